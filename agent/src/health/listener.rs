//! A listener whose clients cannot exhaust the agent: few connections at a time, none for long.
//!
//! The endpoints are open to whoever reaches the node. Without limits, connections that never end would take all file
//! descriptors, and with them etcd and netlink.

use std::future::Future as _;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;

/// Connections at a time; more wait in the kernel's backlog.
const CONNECTIONS: usize = 64;

/// How long a connection may last: a probe takes milliseconds.
const LIFETIME: Duration = Duration::from_secs(10);

/// A [`TcpListener`] that hands out [`Guarded`] connections.
#[derive(Debug)]
pub(super) struct GuardedListener {
    listener: TcpListener,
    free: Arc<Semaphore>,
    lifetime: Duration,
}

impl GuardedListener {
    pub(super) fn new(listener: TcpListener) -> Self {
        Self::with_limits(listener, CONNECTIONS, LIFETIME)
    }

    pub(super) fn with_limits(listener: TcpListener, connections: usize, lifetime: Duration) -> Self {
        Self { listener, free: Arc::new(Semaphore::new(connections)), lifetime }
    }
}

impl axum::serve::Listener for GuardedListener {
    type Io = Guarded;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let permit = loop {
            if let Ok(permit) = Arc::clone(&self.free).acquire_owned().await {
                break permit;
            }
        };
        // axum's own accept waits out errors such as "too many open files".
        let (stream, address) = axum::serve::Listener::accept(&mut self.listener).await;
        (Guarded { stream, end: Box::pin(tokio::time::sleep(self.lifetime)), _permit: permit }, address)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// A connection that fails once its time is up.
#[derive(Debug)]
pub(super) struct Guarded {
    stream: TcpStream,
    end: Pin<Box<Sleep>>,
    _permit: OwnedSemaphorePermit,
}

impl Guarded {
    /// The stream, or an error if the time is up; the task is woken when it is.
    fn stream(&mut self, context: &mut Context<'_>) -> io::Result<Pin<&mut TcpStream>> {
        match self.end.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(Pin::new(&mut self.stream)),
        }
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.stream(context)?.poll_read(context, buffer)
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.stream(context)?.poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream(context)?.poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream(context)?.poll_shutdown(context)
    }
}
