//! Datagrams in one direction.

use std::{
    io::ErrorKind,
    net::{IpAddr, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;

use super::{
    Port, Tally, anywhere,
    clock::{Done, Phase, Signal, Watch},
};

/// Datagrams for one acknowledgement.
pub(super) const BATCH: u64 = 32;
/// Datagrams under way at most. Those of 1 400 bytes must fit into a socket's default buffer (212 992 bytes of
/// truesize, some 2 300 each): without a bound the sender would starve a receiver on its own CPU.
const WINDOW: u64 = 64;
/// How long an acknowledgement may take before its datagrams count as lost.
const LOST: Duration = Duration::from_millis(100);
/// Datagrams a second of the fixed rate: less than half of what any mode carries on one CPU of 2020.
const RATE: u64 = 50_000;
/// They go in bursts of this interval.
const INTERVAL: Duration = Duration::from_millis(1);

/// A byte for every [`BATCH`] datagrams.
pub(super) fn acknowledge(socket: &UdpSocket) -> Result<()> {
    let (mut buffer, mut left) = ([0; 2048], BATCH);
    loop {
        let (_, peer) = socket.recv_from(&mut buffer)?;
        // The first byte of a client's first datagram says that counting starts anew.
        if buffer[0] == 1 {
            left = BATCH;
        }
        left -= 1;
        if left == 0 {
            // An unreachable client has given up.
            let _ = socket.send_to(b"x", peer);
            left = BATCH;
        }
    }
}

/// Reads and is silent.
pub(super) fn swallow(socket: &UdpSocket) -> Result<()> {
    let mut buffer = [0; 2048];
    loop {
        socket.recv(&mut buffer)?;
    }
}

/// As many datagrams as go through with [`WINDOW`] of them under way.
pub(super) fn windowed(to: IpAddr, bytes: usize, watch: Watch) -> Result<Tally> {
    let socket = UdpSocket::bind((anywhere(to), 0))?;
    socket.connect(Port::Counted.at(to))?;
    socket.set_read_timeout(Some(LOST))?;
    let worker = move |signal: &Signal| {
        let (fresh, more) = (vec![1; bytes], vec![0; bytes]);
        let (mut done, mut under_way, mut anew) = (Done::default(), 0, true);
        loop {
            while under_way < WINDOW {
                socket.send(if anew { &fresh } else { &more })?;
                anew = false;
                under_way += 1;
            }
            let arrived = match socket.recv(&mut [0]) {
                Ok(_) => true,
                Err(error) if error.kind() == ErrorKind::WouldBlock => false,
                Err(error) => return Err(error.into()),
            };
            let counted = if arrived { BATCH } else { under_way };
            match (signal.phase(), arrived) {
                (Phase::WarmUp, _) => {}
                (Phase::Measure, true) => done.units += counted,
                (Phase::Measure, false) => done.lost += counted,
                (Phase::Over, _) => return Ok(done),
            }
            under_way -= counted;
            anew = !arrived;
        }
    };
    watch.run(vec![worker])
}

/// Small datagrams at a fixed rate: what counts is the CPU time that they take.
pub(super) fn paced(to: IpAddr, watch: Watch) -> Result<Tally> {
    let socket = UdpSocket::bind((anywhere(to), 0))?;
    socket.connect(Port::Silent.at(to))?;
    let burst = RATE / (1000 / INTERVAL.as_millis() as u64);
    let worker = move |signal: &Signal| {
        let mut done = Done::default();
        let mut next = Instant::now();
        loop {
            for _ in 0..burst {
                socket.send(&[0; 64])?;
            }
            match signal.phase() {
                Phase::WarmUp => {}
                Phase::Measure => done.units += burst,
                Phase::Over => return Ok(done),
            }
            next += INTERVAL;
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    };
    watch.run(vec![worker])
}
