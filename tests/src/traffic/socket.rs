//! Sockets that are made inside a namespace and used outside of it: both ends in one test, step by step.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    thread,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket,
        sockopt::ReuseAddr,
    },
};

use super::{Host, PATIENCE, listen_at};
use crate::netns::Netns;

/// Listens for TCP in a namespace.
///
/// # Errors
///
/// Where the address is taken.
pub fn listen(host: Host<'_>, port: u16) -> Result<TcpListener> {
    host.netns.run(|| listen_at(host.address, port))
}

/// Opens a TCP connection, from a chosen port or from any, that this listener accepts.
///
/// # Errors
///
/// Where it is not accepted within [`PATIENCE`].
pub fn open(
    client: &Netns,
    from: Option<SocketAddr>,
    to: impl Into<SocketAddr>,
    listener: &TcpListener,
) -> Result<(TcpStream, TcpStream)> {
    let to = to.into();
    let near = dial(client, from, to)?;
    let (far, _) = listener.accept().with_context(|| format!("{to} reaches nobody"))?;
    configure(&far)?;
    Ok((near, far))
}

/// Opens a TCP connection, from a chosen port or from any; the port may be in use for another destination.
///
/// # Errors
///
/// Where nobody answers within [`PATIENCE`].
pub fn dial(client: &Netns, from: Option<SocketAddr>, to: impl Into<SocketAddr>) -> Result<TcpStream> {
    let to = to.into();
    let stream = client.run(|| -> Result<TcpStream> {
        let Some(from) = from else { return Ok(TcpStream::connect_timeout(&to, *PATIENCE)?) };
        let fd = socket(family(to), SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&fd, ReuseAddr, &true)?;
        // Linux bounds connect by the send timeout.
        let stream = TcpStream::from(fd);
        stream.set_write_timeout(Some(*PATIENCE))?;
        bind(stream.as_raw_fd(), &SockaddrStorage::from(from))?;
        // With a timeout, a process that was stopped and goes on is told EINTR; asked again, Linux waits on.
        while let Err(errno) = connect(stream.as_raw_fd(), &SockaddrStorage::from(to)) {
            if errno != Errno::EINTR {
                return Err(errno.into());
            }
        }
        Ok(stream)
    });
    let stream = stream.with_context(|| format!("connecting to {to} from {from:?}"))?;
    configure(&stream)?;
    Ok(stream)
}

/// Does it again as long as it is told EINTR, as sockets with a timeout tell a process that was stopped and goes on.
///
/// # Errors
///
/// Whatever else it is told.
pub fn uninterrupted<T>(mut act: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match act() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

fn family(address: SocketAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn configure(stream: &TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(*PATIENCE))?;
    stream.set_write_timeout(Some(*PATIENCE))?;
    Ok(stream.set_nodelay(true)?)
}

/// Sends a message over one end and wants it at the other.
///
/// # Errors
///
/// Where something else arrives, or nothing within [`PATIENCE`].
pub fn say(mut from: &TcpStream, mut to: &TcpStream, message: &str) -> Result<()> {
    from.write_all(message.as_bytes())?;
    let mut heard = vec![0; message.len()];
    to.read_exact(&mut heard).with_context(|| format!("{message:?} did not arrive"))?;
    ensure!(heard == message.as_bytes(), "{message:?} arrived as {:?}", String::from_utf8_lossy(&heard));
    Ok(())
}

/// Sends so many bytes over one end while the other reads and counts them.
///
/// # Errors
///
/// Where nothing moves for [`PATIENCE`].
pub fn pour(from: &TcpStream, to: &TcpStream, bytes: u64) -> Result<()> {
    let chunk = vec![0x5a; 64 * 1024];
    thread::scope(|scope| {
        let sending = scope.spawn(|| -> Result<()> {
            let (mut from, mut left) = (from, bytes);
            while left > 0 {
                let n = chunk.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                from.write_all(&chunk[..n]).context("sending")?;
                left -= n as u64;
            }
            Ok(())
        });
        let (mut to, mut left) = (to, bytes);
        let mut buffer = vec![0; 256 * 1024];
        while left > 0 {
            let room = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let n = uninterrupted(|| to.read(&mut buffer[..room]))
                .with_context(|| format!("{left} of {bytes} bytes missing"))?;
            ensure!(n > 0, "the end came {left} of {bytes} bytes early");
            left -= n as u64;
        }
        sending.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Reads up to the end of a stream whose sender has closed it.
///
/// # Errors
///
/// Where something else than the end arrives, or nothing within [`PATIENCE`].
pub fn wants_end(mut stream: &TcpStream) -> Result<()> {
    let n = uninterrupted(|| stream.read(&mut [0; 16])).context("no FIN")?;
    ensure!(n == 0, "{n} bytes instead of the end");
    Ok(())
}

/// A UDP socket in a namespace, at this port (0: any).
///
/// # Errors
///
/// Where the port is taken.
pub fn udp(host: Host<'_>, port: u16) -> Result<UdpSocket> {
    let at = SocketAddr::new(host.address, port);
    let fd = host.netns.run(|| -> Result<UdpSocket> {
        let fd = socket(family(at), SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&fd, ReuseAddr, &true)?;
        let socket = UdpSocket::from(fd);
        bind(socket.as_raw_fd(), &SockaddrStorage::from(at))?;
        Ok(socket)
    })?;
    fd.set_read_timeout(Some(*PATIENCE))?;
    Ok(fd)
}

/// Sends a datagram over a connected socket, answers it at the other end, and wants the answer, which a connected
/// socket takes only from whom it is connected to. Returns the client's address as the server saw it.
///
/// # Errors
///
/// Where something else arrives, or nothing within [`PATIENCE`].
pub fn ask(client: &UdpSocket, server: &UdpSocket, message: &str) -> Result<SocketAddr> {
    client.send(message.as_bytes())?;
    let mut heard = [0; 256];
    let (n, peer) = uninterrupted(|| server.recv_from(&mut heard))
        .with_context(|| format!("{message:?} did not arrive"))?;
    ensure!(&heard[..n] == message.as_bytes(), "{message:?} arrived as {:?}", &heard[..n]);
    server.send_to(&heard[..n], peer)?;
    let n = uninterrupted(|| client.recv(&mut heard)).with_context(|| format!("no answer to {message:?}"))?;
    ensure!(&heard[..n] == message.as_bytes(), "the answer to {message:?} is {:?}", &heard[..n]);
    Ok(peer)
}
