//! A packet socket on one interface: frames as they are on the wire, in and out, past the host's stack.

use std::{
    ffi::CString,
    os::fd::{AsRawFd as _, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    libc::{self, AF_PACKET, bind, c_int, if_nametoindex, sa_family_t, sockaddr, sockaddr_ll, socklen_t},
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
        sockopt::{RcvBufForce, ReceiveTimeout},
    },
    sys::time::{TimeVal, TimeValLike as _},
};

use crate::netns::Netns;

/// Larger than any frame, GSO packets included.
const LARGEST: usize = 70_000;
/// What the kernel may hold until it is read, in bytes.
const BUFFER: usize = 64 << 20;

/// A packet socket (packet(7)) that receives what the interface receives. A frame with a VLAN tag comes without it.
#[derive(Debug)]
pub struct Capture {
    socket: OwnedFd,
}

impl Capture {
    /// Opens it on an interface of the namespace; what arrives from now on is kept.
    ///
    /// # Errors
    ///
    /// Without root, or where there is no such interface.
    pub fn open(netns: &Netns, interface: &str) -> Result<Self> {
        netns.run(|| {
            // Without a protocol it hears nothing until it is tied to the interface.
            let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
            setsockopt(&socket, RcvBufForce, &BUFFER)?;
            setsockopt(&socket, ReceiveTimeout, &TimeVal::milliseconds(10))?;
            attach(&socket, interface)?;
            Ok(Self { socket })
        })
    }

    /// Sends a frame out of the interface.
    ///
    /// # Errors
    ///
    /// Where the interface is down, or the frame longer than its MTU allows.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        let sent = loop {
            match send(self.socket.as_raw_fd(), frame, MsgFlags::empty()) {
                Err(Errno::ENOBUFS) => thread::yield_now(),
                other => break other,
            }
        };
        sent.with_context(|| format!("sending a frame of {} bytes", frame.len()))?;
        Ok(())
    }

    /// The next frame that the interface has received; `None` where none comes within 10 ms.
    ///
    /// # Errors
    ///
    /// Where the interface is gone.
    pub fn next(&self) -> Result<Option<Vec<u8>>> {
        let mut frame = vec![0; LARGEST];
        match recv(self.socket.as_raw_fd(), &mut frame, MsgFlags::empty()) {
            Ok(len) => {
                frame.truncate(len);
                Ok(Some(frame))
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(error) => Err(error).context("a packet socket"),
        }
    }

    /// What has been received so far and not read yet.
    ///
    /// # Errors
    ///
    /// As [`Self::next`].
    pub fn drain(&self) -> Result<Vec<Vec<u8>>> {
        self.drain_heads(LARGEST)
    }

    /// As [`Self::drain`], of each frame the first `len` bytes.
    ///
    /// # Errors
    ///
    /// As [`Self::next`].
    pub fn drain_heads(&self, len: usize) -> Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        let mut frame = vec![0; len];
        loop {
            match recv(self.socket.as_raw_fd(), &mut frame, MsgFlags::MSG_DONTWAIT) {
                Ok(len) => frames.push(frame[..len].to_vec()),
                Err(Errno::EAGAIN) => return Ok(frames),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error).context("a packet socket"),
            }
        }
    }

    /// Receives until a frame is as wanted, and returns it with those before it.
    ///
    /// # Errors
    ///
    /// Where none is within `limit`.
    pub fn until(&self, what: &str, limit: Duration, wanted: impl Fn(&[u8]) -> bool) -> Result<Vec<Vec<u8>>> {
        let (start, mut frames) = (Instant::now(), Vec::new());
        loop {
            if let Some(frame) = self.next()? {
                frames.push(frame);
                if frames.last().is_some_and(|frame| wanted(frame)) {
                    return Ok(frames);
                }
            }
            anyhow::ensure!(
                start.elapsed() < limit,
                "waited {limit:?} for {what}; {} frames came",
                frames.len()
            );
        }
    }
}

/// Ties the socket to one interface, and leaves out what the interface sends.
fn attach(socket: &OwnedFd, interface: &str) -> Result<()> {
    let name = CString::new(interface)?;
    // SAFETY: a NUL-terminated string that lives through the call.
    let index = unsafe { if_nametoindex(name.as_ptr()) };
    anyhow::ensure!(index != 0, "no interface {interface}: {}", Errno::last());
    let address = sockaddr_ll {
        sll_family: AF_PACKET as sa_family_t,
        sll_protocol: (SockProtocol::EthAll as c_int) as u16,
        sll_ifindex: index as c_int,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the address is of the type that AF_PACKET takes, of the length said, and lives through the call.
    let bound = unsafe {
        bind(
            socket.as_raw_fd(),
            (&raw const address).cast::<sockaddr>(),
            size_of::<sockaddr_ll>() as socklen_t,
        )
    };
    Errno::result(bound)?;
    let on: c_int = 1;
    // SAFETY: the option (Linux 4.20) takes an int, which lives through the call.
    let ignored = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_IGNORE_OUTGOING,
            (&raw const on).cast(),
            size_of::<c_int>() as socklen_t,
        )
    };
    Errno::result(ignored)?;
    Ok(())
}
