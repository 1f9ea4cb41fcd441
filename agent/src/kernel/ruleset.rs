//! Changes of the host's netfilter rules, as nf_tables tells of them (iptables-nft included; the legacy iptables
//! tells nobody).

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::unix::AsyncFd;

/// Multicast group `NFNLGRP_NFTABLES` (linux/netfilter/nfnetlink.h), as the bit that `bind` takes.
const NFTABLES: u32 = 1 << (7 - 1);

/// A socket that hears of every change, in the network namespace of the thread that made it.
#[derive(Debug)]
pub struct Ruleset {
    socket: AsyncFd<OwnedFd>,
}

impl Ruleset {
    /// Begins to listen. Must be called inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// Where the kernel has no nf_tables or grants no socket.
    pub fn listen() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let netfilter = SockProtocol::NetlinkNetFilter;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, netfilter)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, NFTABLES))?;
        // SAFETY: the socket is owned by the AsyncFd from here on, and nothing closes or exchanges it.
        let socket = unsafe { AsyncFd::register(fd) }?;
        Ok(Self { socket })
    }

    /// Completes when the rules have changed since the last call, however often.
    ///
    /// # Errors
    ///
    /// Where the socket fails.
    pub async fn changed(&self) -> io::Result<()> {
        loop {
            let mut guard = self.socket.readable().await?;
            let mut heard = false;
            let mut message = [0; 8192];
            loop {
                match recv(self.socket.get_ref().as_raw_fd(), &mut message, MsgFlags::empty()) {
                    Ok(_) => heard = true,
                    // Messages were lost because there were too many: a change all the same.
                    Err(nix::Error::ENOBUFS) => heard = true,
                    Err(nix::Error::EAGAIN) => break,
                    Err(nix::Error::EINTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
            guard.clear_ready();
            if heard {
                return Ok(());
            }
        }
    }
}
