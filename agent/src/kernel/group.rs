//! Listens to one multicast group of netlink, for those whose messages say no more than that something has changed.

use std::io;

use futures::FutureExt as _;
use nix::errno::Errno;
use rtnetlink::{
    proto::sys::{AsyncSocket as _, AsyncSocketExt as _},
    sys::{SocketAddr, TokioSocket},
};

use super::{KernelError, Result};

/// A socket of its own that is a member of one group.
pub(super) struct Group {
    socket: TokioSocket,
}

impl Group {
    /// Joins the `groups` (a bit each) of a netlink protocol in the network namespace of the calling thread. Must be called
    /// inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`KernelError::Connect`] where the kernel grants no socket.
    pub(super) fn join(protocol: isize, groups: u32) -> Result<Self> {
        let mut socket = TokioSocket::new(protocol).map_err(KernelError::Connect)?;
        socket.socket_mut().bind(&SocketAddr::new(0, groups)).map_err(KernelError::Connect)?;
        Ok(Self { socket })
    }

    /// Waits until a datagram that `tells` of a change has come since the last call; several changes are one. May be dropped
    /// while it waits without losing a change.
    ///
    /// # Errors
    ///
    /// Where the socket has failed, and a new one must be made.
    pub(super) async fn changed(&self, tells: impl Fn(&[u8]) -> bool) -> io::Result<()> {
        while !self.receive(&tells).await? {}
        // What has come meanwhile is the same change, for whoever looks at the whole.
        while let Some(more) = self.receive(&tells).now_or_never() {
            more?;
        }
        Ok(())
    }

    /// Whether the next datagram tells of a change; where some were lost, one may have.
    async fn receive(&self, tells: &impl Fn(&[u8]) -> bool) -> io::Result<bool> {
        let mut datagram = Vec::with_capacity(64 * 1024);
        match self.socket.recv(&mut datagram).await {
            Ok(()) => Ok(tells(&datagram)),
            Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => Ok(true),
            Err(error) => Err(error),
        }
    }
}
