//! One byte there, one byte back, as often as it goes: latency, seen as transactions a second.

use std::{
    io::{Read as _, Write as _},
    net::UdpSocket,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{Host, PATIENCE, accept, connect, converse, listen, socket::uninterrupted};

/// Transactions before the clock starts: neighbours are resolved and flows are known by then.
const WARM_UP: u32 = 50;

/// What a transaction consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One byte each way on one TCP connection.
    TcpRr,
    /// A TCP connection for each byte each way.
    TcpCrr,
    /// One datagram of one byte each way.
    UdpRr,
}

/// What a round of transactions came to.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// Transactions done.
    pub transactions: u64,
    /// In this time.
    pub time: Duration,
}

impl Rate {
    /// Transactions a second.
    #[must_use]
    pub fn per_second(&self) -> f64 {
        // Exact below 2^53.
        self.transactions as f64 / self.time.as_secs_f64()
    }
}

/// Runs transactions of this kind for `duration`.
///
/// # Errors
///
/// Where a reply is missing for five seconds.
pub fn run(kind: Kind, client: Host<'_>, server: Host<'_>, duration: Duration) -> Result<Rate> {
    match kind {
        Kind::TcpRr => tcp_rr(client, server, duration),
        Kind::TcpCrr => tcp_crr(client, server, duration),
        Kind::UdpRr => udp_rr(client, server, duration),
    }
}

/// Repeats a transaction, first to warm up, then by the clock.
fn timed(duration: Duration, mut transaction: impl FnMut() -> Result<()>) -> Result<Rate> {
    for _ in 0..WARM_UP {
        transaction()?;
    }
    let (start, mut transactions) = (Instant::now(), 0);
    while start.elapsed() < duration {
        transaction()?;
        transactions += 1;
    }
    Ok(Rate { transactions, time: start.elapsed() })
}

fn tcp_rr(client: Host<'_>, server: Host<'_>, duration: Duration) -> Result<Rate> {
    let serve = |tell: &dyn Fn(u16)| {
        let listener = listen(server.address, None)?;
        tell(listener.local_addr()?.port());
        let (mut stream, _) = accept(&listener)?;
        let mut byte = [0];
        while uninterrupted(|| stream.read(&mut byte))? == 1 {
            stream.write_all(&byte)?;
        }
        Ok(())
    };
    let speak = |port: u16| {
        let mut stream = connect((server.address, port).into())?;
        timed(duration, || {
            stream.write_all(b"x")?;
            stream.read_exact(&mut [0]).context("no reply")
        })
    };
    converse(server.netns, client.netns, serve, speak).map(|((), rate)| rate)
}

fn tcp_crr(client: Host<'_>, server: Host<'_>, duration: Duration) -> Result<Rate> {
    // An empty request is the client's farewell.
    let serve = |tell: &dyn Fn(u16)| {
        let listener = listen(server.address, None)?;
        tell(listener.local_addr()?.port());
        loop {
            let (mut stream, _) = accept(&listener)?;
            let mut byte = [0];
            if uninterrupted(|| stream.read(&mut byte))? == 0 {
                return Ok(());
            }
            stream.write_all(&byte)?;
        }
    };
    let speak = |port: u16| {
        let address = (server.address, port).into();
        let rate = timed(duration, || {
            let mut stream = connect(address)?;
            stream.write_all(b"x")?;
            stream.read_exact(&mut [0]).context("no reply")
        })?;
        connect(address)?;
        Ok(rate)
    };
    converse(server.netns, client.netns, serve, speak).map(|((), rate)| rate)
}

fn udp_rr(client: Host<'_>, server: Host<'_>, duration: Duration) -> Result<Rate> {
    let bind = |address| -> Result<UdpSocket> {
        let socket = UdpSocket::bind((address, 0))?;
        socket.set_read_timeout(Some(*PATIENCE))?;
        Ok(socket)
    };
    // An empty datagram is the client's farewell.
    let serve = |tell: &dyn Fn(u16)| {
        let socket = bind(server.address)?;
        tell(socket.local_addr()?.port());
        loop {
            let mut byte = [0];
            let (n, peer) = uninterrupted(|| socket.recv_from(&mut byte)).context("no request")?;
            if n == 0 {
                return Ok(());
            }
            socket.send_to(&byte, peer)?;
        }
    };
    let speak = |port: u16| {
        let socket = bind(client.address)?;
        socket.connect((server.address, port))?;
        let rate = timed(duration, || {
            socket.send(b"x")?;
            uninterrupted(|| socket.recv(&mut [0])).context("no reply").map(drop)
        })?;
        socket.send(b"")?;
        Ok(rate)
    };
    converse(server.netns, client.netns, serve, speak).map(|((), rate)| rate)
}
