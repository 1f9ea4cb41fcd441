//! One byte there, one byte back.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, TcpListener, TcpStream, UdpSocket},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{
    FLOWS_MAX, Port, Tally, anywhere,
    clock::{Done, Phase, Signal, Watch},
};

/// How long a datagram's answer may take before it counts as lost.
const LOST: Duration = Duration::from_millis(200);

/// The first of the ports from which [`udp_in_turn`] sends.
const FIRST_PORT: u16 = 20_000;

/// A byte for a byte, a thread for each connection.
pub(super) fn echo(listener: &TcpListener) -> Result<()> {
    loop {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        thread::spawn(move || {
            let mut byte = [0];
            // The client's end, however it comes, is this thread's.
            while stream.read(&mut byte).is_ok_and(|n| n == 1) && stream.write_all(&byte).is_ok() {}
        });
    }
}

/// A byte for a byte, then the end. The server ends the connection, so that it and not the client remembers the
/// ports for a while: the client would run out of them.
pub(super) fn echo_once(listener: &TcpListener) -> Result<()> {
    loop {
        let (mut stream, _) = listener.accept()?;
        let mut byte = [0];
        if stream.read(&mut byte).is_ok_and(|n| n == 1) {
            // A client that has gone is the next one's business.
            let _ = stream.write_all(&byte);
        }
    }
}

/// A byte for a datagram.
pub(super) fn echo_datagrams(socket: &UdpSocket) -> Result<()> {
    let mut byte = [0];
    loop {
        let (_, peer) = socket.recv_from(&mut byte)?;
        // An unreachable client has given up.
        let _ = socket.send_to(&byte, peer);
    }
}

/// Each flow has a socket of its own, as each TCP connection has.
pub(super) fn datagram_sockets(address: IpAddr) -> Result<Vec<UdpSocket>> {
    let socket = |flow| UdpSocket::bind((address, datagram_port(flow))).context("a port for datagrams");
    (0..FLOWS_MAX).map(socket).collect()
}

/// The ports of the flows stand apart from those of other servers.
fn datagram_port(flow: u16) -> u16 {
    Port::Datagrams as u16 + flow * 100
}

/// TCP_RR over so many connections.
pub(super) fn tcp(to: IpAddr, flows: u16, watch: Watch) -> Result<Tally> {
    let worker = |_| {
        let mut stream = TcpStream::connect(Port::Echo.at(to))?;
        stream.set_nodelay(true)?;
        Ok(move |signal: &Signal| {
            repeat(signal, || {
                stream.write_all(b"x")?;
                stream.read_exact(&mut [0]).context("no reply").map(|()| true)
            })
        })
    };
    watch.run((0..flows).map(worker).collect::<Result<_>>()?)
}

/// TCP_CRR: a connection for each transaction.
pub(super) fn connections(to: IpAddr, watch: Watch) -> Result<Tally> {
    let worker = move |signal: &Signal| {
        repeat(signal, || {
            let mut stream = TcpStream::connect(Port::EchoOnce.at(to)).context("connecting")?;
            stream.write_all(b"x")?;
            let mut bytes = [0; 2];
            stream.read_exact(&mut bytes[..1]).context("no reply")?;
            anyhow::ensure!(stream.read(&mut bytes)? == 0, "more than the reply");
            Ok(true)
        })
    };
    watch.run(vec![worker])
}

/// UDP_RR over so many pairs of sockets.
pub(super) fn udp(to: IpAddr, flows: u16, watch: Watch) -> Result<Tally> {
    let worker = |flow| {
        let socket = UdpSocket::bind((anywhere(to), 0))?;
        socket.connect((to, datagram_port(flow)))?;
        socket.set_read_timeout(Some(LOST))?;
        Ok(move |signal: &Signal| {
            repeat(signal, || {
                socket.send(b"x")?;
                match socket.recv(&mut [0]) {
                    Ok(_) => Ok(true),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
                    Err(error) => Err(error.into()),
                }
            })
        })
    };
    watch.run((0..flows).map(worker).collect::<Result<_>>()?)
}

/// UDP_RR over so many flows, a transaction of each in turn: as many sockets as it takes, each to every server's port.
/// Every flow has had its turn before the clock starts; the sockets' ports are the same in every run.
pub(super) fn udp_in_turn(to: IpAddr, flows: u32, watch: Watch) -> Result<Tally> {
    let ports = u32::from(FLOWS_MAX);
    let socket = |n: u32| {
        let port = FIRST_PORT.checked_add(u16::try_from(n)?).context("too many flows")?;
        let socket = UdpSocket::bind((anywhere(to), port))?;
        socket.set_read_timeout(Some(LOST))?;
        Ok(socket)
    };
    let sockets = (0..flows.div_ceil(ports)).map(socket).collect::<Result<Vec<_>>>()?;
    let mut turn = 0;
    let mut transaction = move || {
        let socket = &sockets[(turn / ports) as usize];
        socket.send_to(b"x", (to, datagram_port((turn % ports) as u16)))?;
        turn = (turn + 1) % flows;
        match socket.recv(&mut [0]) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error.into()),
        }
    };
    for _ in 0..flows {
        transaction()?;
    }
    watch.run(vec![move |signal: &Signal| repeat(signal, transaction)])
}

/// TCP_RR over one connection, each transaction timed.
pub(super) fn timed(to: IpAddr, watch: Watch) -> Result<Tally> {
    let times = Arc::new(Mutex::new(Vec::<u32>::with_capacity(1 << 20)));
    let mut stream = TcpStream::connect(Port::Echo.at(to))?;
    stream.set_nodelay(true)?;
    let worker = {
        let times = Arc::clone(&times);
        move |signal: &Signal| {
            let mut times = times.lock().unwrap_or_else(PoisonError::into_inner);
            repeat(signal, || {
                let start = Instant::now();
                stream.write_all(b"x")?;
                stream.read_exact(&mut [0]).context("no reply")?;
                if signal.phase() == Phase::Measure {
                    times.push(u32::try_from(start.elapsed().as_nanos()).unwrap_or(u32::MAX));
                }
                Ok(true)
            })
        }
    };
    let tally = watch.run(vec![worker])?;
    let mut times = times.lock().unwrap_or_else(PoisonError::into_inner);
    times.sort_unstable();
    let at = |share: f64| {
        // Exact below 2^53 transactions.
        let rank = (times.len() as f64 * share) as usize;
        times.get(rank).map(|&nanos| f64::from(nanos) / 1000.0)
    };
    let latency = [at(0.5), at(0.99), at(0.999)].map(|quantile| quantile.unwrap_or(f64::NAN));
    Ok(Tally { latency: Some(latency), ..tally })
}

/// Repeats a transaction until time is over; it says whether it was answered.
fn repeat(signal: &Signal, mut transaction: impl FnMut() -> Result<bool>) -> Result<Done> {
    let mut done = Done::default();
    loop {
        let answered = transaction()?;
        match (signal.phase(), answered) {
            (Phase::WarmUp, _) => {}
            (Phase::Measure, true) => done.units += 1,
            (Phase::Measure, false) => done.lost += 1,
            (Phase::Over, _) => return Ok(done),
        }
    }
}
