//! Traffic between namespaces, by our own sockets: what is sent is known, and what arrives is compared with it.
//!
//! Every socket has a timeout, so that a lost packet ends in an error and not in a test that hangs.

pub mod load;
pub mod socket;
pub mod stream;
pub mod transactions;

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    sync::LazyLock,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::sys::{
    socket::{setsockopt, sockopt::ReceiveTimeout},
    time::{TimeVal, TimeValLike as _},
};

use crate::{
    container::Container,
    netns::Netns,
    process::{slowness, wait_for},
};

/// How long one step of a conversation may take: five seconds, longer where the machine is slow.
pub static PATIENCE: LazyLock<Duration> = LazyLock::new(|| Duration::from_secs(5) * slowness());

/// One end of a conversation: a namespace and its address there.
#[derive(Clone, Copy, Debug)]
pub struct Host<'a> {
    /// Where its sockets are.
    pub netns: &'a Netns,
    /// Where others reach it; of either family.
    pub address: IpAddr,
}

/// Runs both ends at the same time, each on a thread in its namespace, and returns what each returns. The server
/// tells the port that it listens on through its argument before the client starts.
///
/// # Errors
///
/// The client's error, with the server's where there is one too.
///
/// # Panics
///
/// Where an end panics.
pub fn converse<S: Send, C: Send>(
    server: &Netns,
    client: &Netns,
    serve: impl FnOnce(&dyn Fn(u16)) -> Result<S> + Send,
    speak: impl FnOnce(u16) -> Result<C> + Send,
) -> Result<(S, C)> {
    let (tell, told) = std::sync::mpsc::channel();
    thread::scope(|scope| {
        let served = scope.spawn(move || {
            server.enter();
            serve(&move |port| {
                // The client may have given up already; then nobody wants to know.
                let _ = tell.send(port);
            })
        });
        let spoken = scope.spawn(move || {
            client.enter();
            let port = told.recv_timeout(*PATIENCE).context("the server does not listen")?;
            speak(port)
        });
        let spoken = spoken.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let served = served.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        match (served, spoken) {
            (Ok(served), Ok(spoken)) => Ok((served, spoken)),
            (Err(server), Err(client)) => Err(client.context(format!("the server said: {server:#}"))),
            (Err(error), _) => Err(error.context("server")),
            (_, Err(error)) => Err(error.context("client")),
        }
    })
}

/// A way to a server that is not the server's own address: a Service in front of it.
#[derive(Clone, Copy, Debug)]
pub struct Service {
    /// What the client connects to.
    pub front: SocketAddr,
    /// The port at which the server listens.
    pub backend: u16,
}

/// Opens a TCP connection, says hello both ways, and returns the client's address as the server saw it.
///
/// # Errors
///
/// Where nothing arrives within [`PATIENCE`].
pub fn hello(client: Host<'_>, server: Host<'_>, service: Option<Service>) -> Result<IpAddr> {
    let serve = |tell: &dyn Fn(u16)| {
        let listener = listen(server.address, service)?;
        tell(listener.local_addr()?.port());
        let (mut stream, peer) = accept(&listener)?;
        echo_hello(&mut stream, false)?;
        Ok(peer.ip())
    };
    let speak = |port: u16| {
        let mut stream = connect(destination(server, port, service))?;
        echo_hello(&mut stream, true)
    };
    converse(server.netns, client.netns, serve, speak).map(|(seen, ())| seen)
}

fn destination(server: Host<'_>, port: u16, service: Option<Service>) -> SocketAddr {
    service.map_or((server.address, port).into(), |service| service.front)
}

fn echo_hello(stream: &mut TcpStream, first: bool) -> Result<()> {
    let mut heard = [0; 5];
    if first {
        stream.write_all(b"hello")?;
    }
    stream.read_exact(&mut heard).context("no hello")?;
    anyhow::ensure!(&heard == b"hello", "heard {heard:?}");
    if !first {
        stream.write_all(b"hello")?;
    }
    Ok(())
}

/// Sends `count` ICMP echo requests 50 ms apart and wants every reply.
///
/// # Errors
///
/// Where a reply is missing after two seconds.
pub fn ping(client: &Netns, address: impl Into<IpAddr>, count: u32) -> Result<()> {
    let address = address.into();
    client.exec(&format!("ping -n -q -c {count} -i 0.05 -W 2 {address}")).map(drop)
}

/// Waits until a container reaches another in every family that they have: of IPv6 nobody asks for a neighbour before its
/// own link-local address is known to be its own alone, which takes a new bridge or container a second or two.
///
/// # Errors
///
/// Where there is no answer within 20 seconds.
pub fn wait_for_answer(from: &Container, to: &Container) -> Result<()> {
    for address in to.addresses() {
        let echo = format!("ping -n -q -c 1 -W 1 {address}");
        let what = format!("the first answer from {address}");
        wait_for(&what, Duration::from_secs(20), || from.netns().exec(&echo).ok())?;
    }
    Ok(())
}

/// A listener, at the service's backend port or else any, whose `accept` gives up after [`PATIENCE`].
///
/// # Errors
///
/// Where the port is taken or the address is not here.
pub(crate) fn listen(address: IpAddr, service: Option<Service>) -> Result<TcpListener> {
    listen_at(address, service.map_or(0, |service| service.backend))
}

/// A listener at this port (0: any), whose `accept` gives up after [`PATIENCE`].
///
/// # Errors
///
/// As [`listen`].
pub(crate) fn listen_at(address: IpAddr, port: u16) -> Result<TcpListener> {
    // A child that another thread is just starting holds a copy of the last listener until its exec.
    let listener = wait_for(&format!("port {port} to be free"), *PATIENCE, || {
        let listener = TcpListener::bind((address, port));
        (!listener.as_ref().is_err_and(|error| error.kind() == ErrorKind::AddrInUse)).then_some(listener)
    })?;
    let listener = listener.with_context(|| format!("listening at {address}:{port}"))?;
    patient(&listener)?;
    Ok(listener)
}

/// Makes blocking reads and accepts of a socket end after [`PATIENCE`].
fn patient(socket: &impl AsFd) -> Result<()> {
    let limit = TimeVal::seconds(i64::try_from(PATIENCE.as_secs())?);
    Ok(setsockopt(socket, ReceiveTimeout, &limit)?)
}

pub(crate) fn accept(listener: &TcpListener) -> Result<(TcpStream, SocketAddr)> {
    let (stream, peer) = listener.accept().context("nobody connects")?;
    Ok((configured(stream)?, peer))
}

pub(crate) fn connect(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, *PATIENCE).with_context(|| format!("connecting to {to}"))?;
    configured(stream)
}

fn configured(stream: TcpStream) -> Result<TcpStream> {
    stream.set_read_timeout(Some(*PATIENCE))?;
    stream.set_write_timeout(Some(*PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}
