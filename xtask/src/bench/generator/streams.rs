//! Bytes in one direction, as many as go through.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, TcpListener, TcpStream},
    thread,
};

use anyhow::{Context as _, Result};

use super::{
    Port, Tally,
    clock::{Done, Phase, Signal, Watch},
};

/// Bytes asked of the kernel at once.
const READ: usize = 256 * 1024;

/// Reads and is silent, a thread for each connection.
pub(super) fn sink(listener: &TcpListener) -> Result<()> {
    loop {
        let (mut stream, _) = listener.accept()?;
        thread::spawn(move || {
            let mut buffer = vec![0; READ];
            // The client's end, however it comes, is this thread's.
            while stream.read(&mut buffer).is_ok_and(|n| n > 0) {}
        });
    }
}

/// Writes of so many bytes, each at once on the wire (no Nagle), over so many connections. What is counted is what
/// the kernel has taken: over the time of a measurement, a socket's buffer does not matter.
pub(super) fn pour(to: IpAddr, flows: u16, bytes: usize, watch: Watch) -> Result<Tally> {
    let worker = |_| {
        let mut stream = TcpStream::connect(Port::Sink.at(to))?;
        stream.set_nodelay(true)?;
        Ok(move |signal: &Signal| {
            let buffer = vec![0x5a; bytes];
            let mut done = Done::default();
            loop {
                stream.write_all(&buffer).context("the stream has ended")?;
                match signal.phase() {
                    Phase::WarmUp => {}
                    Phase::Measure => done.units += bytes as u64,
                    Phase::Over => return Ok(done),
                }
            }
        })
    };
    watch.run((0..flows).map(worker).collect::<Result<_>>()?)
}
