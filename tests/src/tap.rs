//! A virtual machine behind a container: two tap devices, and a hypervisor's part between them that looks at every
//! frame.

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Read as _, Write as _},
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    libc::{
        IFF_NO_PI, IFF_TAP, IFF_TUN, IFF_VNET_HDR, O_NONBLOCK, TUNSETIFF, TUNSETOFFLOAD, c_int, c_ulong,
        ifreq, ioctl,
    },
};

use crate::netns::Netns;

/// `TUN_F_CSUM | TUN_F_TSO4` of linux/if_tun.h: what hypervisors ask for.
const OFFLOADS: c_ulong = 0x01 | 0x02;
/// Length of a virtio-net header.
const VNET_LEN: usize = 10;
/// Larger than any frame, in bytes.
const LARGEST: usize = 70_000;

/// A tap device, held open.
#[derive(Debug)]
pub struct Tap {
    file: File,
    vnet: bool,
}

impl Tap {
    /// Makes a tap device in the namespace. With `vnet` each frame has a virtio-net header, and may be large and without
    /// its checksum, as QEMU and vhost have it; else frames are as on a wire.
    ///
    /// # Errors
    ///
    /// Without root, or where the name is taken.
    pub fn create(netns: &Netns, name: &str, vnet: bool) -> Result<Self> {
        Self::open(netns, name, IFF_TAP, vnet)
    }

    /// Makes a tun device, whose packets have no Ethernet header, and brings it up.
    ///
    /// # Errors
    ///
    /// As [`Self::create`].
    pub fn tun(netns: &Netns, name: &str) -> Result<Self> {
        let tun = Self::open(netns, name, IFF_TUN, false)?;
        netns.ip(&format!("link set {name} up"))?;
        Ok(tun)
    }

    fn open(netns: &Netns, name: &str, kind: c_int, vnet: bool) -> Result<Self> {
        netns.run(|| {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(O_NONBLOCK)
                .open("/dev/net/tun")
                .context("/dev/net/tun")?;
            // SAFETY: all zeroes is a valid ifreq.
            let mut request: ifreq = unsafe { std::mem::zeroed() };
            for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
                *to = from.cast_signed();
            }
            let flags = kind | IFF_NO_PI | if vnet { IFF_VNET_HDR } else { 0 };
            request.ifr_ifru.ifru_flags = flags as i16;
            // SAFETY: TUNSETIFF takes an ifreq, which lives through the call.
            Errno::result(unsafe { ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) })
                .context(name.to_owned())?;
            let offloads = if vnet { OFFLOADS } else { 0 };
            // SAFETY: TUNSETOFFLOAD takes an integer.
            Errno::result(unsafe { ioctl(file.as_raw_fd(), TUNSETOFFLOAD, offloads) })?;
            Ok(Self { file, vnet })
        })
    }

    /// Has the device receive a frame, of a tun device a packet.
    ///
    /// # Errors
    ///
    /// Where the device is down.
    pub fn deliver(&self, frame: &[u8]) -> Result<()> {
        (&self.file).write_all(frame).context("the device refuses a frame")
    }

    /// The next frame that the device sends, of a tun device a packet; `None` where there is none now.
    ///
    /// # Errors
    ///
    /// Where the device is gone.
    pub fn next(&self) -> Result<Option<Vec<u8>>> {
        let mut buffer = vec![0; LARGEST];
        let Some(len) = self.read(&mut buffer)? else { return Ok(None) };
        buffer.truncate(len);
        Ok(Some(buffer))
    }

    /// The next frame with its header; `None` where there is none now.
    fn read(&self, buffer: &mut [u8]) -> Result<Option<usize>> {
        match (&self.file).read(buffer) {
            Ok(len) => Ok(Some(len)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            // The device is down.
            Err(error) if error.raw_os_error() == Some(Errno::EIO as i32) => Ok(None),
            Err(error) => Err(error).context("a tap"),
        }
    }

    /// Where the Ethernet header starts in what is read.
    fn header_len(&self) -> usize {
        if self.vnet { VNET_LEN } else { 0 }
    }
}

/// What went through.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Frames in both directions.
    pub frames: AtomicU64,
    /// Length of the largest frame, Ethernet header included.
    pub largest: AtomicU64,
}

/// Carries frames between two taps until told to stop.
///
/// # Errors
///
/// Where a device is gone, or does not take a frame.
pub fn carry(a: &Tap, b: &Tap, traffic: &Traffic, stop: &AtomicBool) -> Result<()> {
    let mut buffer = vec![0; LARGEST];
    while !stop.load(Ordering::Relaxed) {
        let mut idle = true;
        for (from, to) in [(a, b), (b, a)] {
            while let Some(len) = from.read(&mut buffer)? {
                idle = false;
                traffic.frames.fetch_add(1, Ordering::Relaxed);
                traffic.largest.fetch_max((len - from.header_len()) as u64, Ordering::Relaxed);
                (&to.file).write_all(&buffer[..len]).context("the tap refuses a frame")?;
            }
        }
        if idle {
            thread::sleep(Duration::from_micros(50));
        }
    }
    Ok(())
}
