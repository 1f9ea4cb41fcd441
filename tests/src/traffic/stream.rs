//! Bulk TCP in one direction, every byte compared.

use std::{
    io::{Read as _, Write as _},
    net::IpAddr,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::{
    Host, PATIENCE, Service, accept, connect, converse, destination, listen, load::Stopper,
    socket::uninterrupted,
};

/// The pattern repeats after this many bytes: a prime, so that a lost, doubled or moved segment cannot line up.
const PERIOD: usize = 65_521;
/// Bytes given to the kernel at once.
const CHUNK: usize = 64 * 1024;
/// What a transfer beside some work sends before that begins, and again after it has ended, bytes.
const MARGIN: u64 = 4_000_000;

/// What a transfer came to.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    /// Bytes that arrived, all as sent.
    pub bytes: u64,
    /// From the first byte's arrival to the end.
    pub time: Duration,
    /// The sender's address as the receiver saw it.
    pub source: IpAddr,
}

impl Stream {
    /// Megabytes (10^6) a second.
    #[must_use]
    pub fn megabytes_per_second(&self) -> f64 {
        // Exact below 2^53 bytes.
        self.bytes as f64 / 1e6 / self.time.as_secs_f64()
    }
}

/// When a transfer ends.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// After so many bytes.
    Bytes(u64),
    /// After so much time.
    Time(Duration),
}

/// Sends a known pattern from one host to another and compares every byte that arrives.
///
/// # Errors
///
/// Where a byte differs or is missing, or nothing arrives for five seconds.
pub fn run(from: Host<'_>, to: Host<'_>, service: Option<Service>, until: Until) -> Result<Stream> {
    let mut start = None;
    transfer(from, to, service, move |bytes| match until {
        Until::Bytes(all) => usize::try_from(all - bytes).map_or(CHUNK, |rest| rest.min(CHUNK)),
        Until::Time(limit) if start.get_or_insert_with(Instant::now).elapsed() >= limit => 0,
        Until::Time(_) => CHUNK,
    })
}

/// The same while `work` runs: megabytes have arrived when it begins, and as many more are sent after it has ended.
///
/// # Errors
///
/// As [`run`].
///
/// # Panics
///
/// Where `work` or an end panics.
pub fn during<T>(from: Host<'_>, to: Host<'_>, work: impl FnOnce() -> T) -> Result<(T, Stream)> {
    let done = AtomicBool::new(false);
    let (begin, begun) = mpsc::channel();
    thread::scope(|scope| {
        let done = &done;
        let running = scope.spawn(move || {
            let mut end = None;
            transfer(from, to, None, move |bytes| {
                // What is sent has arrived but for what sockets and links hold, far less than the margin.
                if bytes > MARGIN {
                    // Whom it tells has long heard it.
                    let _ = begin.send(());
                }
                if end.is_none() && done.load(Ordering::Acquire) {
                    end = Some(bytes + MARGIN);
                }
                if end.is_some_and(|end| bytes >= end) { 0 } else { CHUNK }
            })
        });
        let stopper = Stopper(done);
        // Where it does not begin, it has ended, and says why.
        let result = begun.recv_timeout(*PATIENCE * 2).is_ok().then(work);
        drop(stopper);
        let stream = running.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok((result.context("the stream did not begin in time")?, stream))
    })
}

/// Sends as many bytes as `next` says, which is told how many went before, until it says none.
fn transfer(
    from: Host<'_>,
    to: Host<'_>,
    service: Option<Service>,
    mut next: impl FnMut(u64) -> usize + Send,
) -> Result<Stream> {
    let pattern = pattern();
    let receive = |tell: &dyn Fn(u16)| {
        let listener = listen(to.address, service)?;
        tell(listener.local_addr()?.port());
        let (mut stream, peer) = accept(&listener)?;
        let (mut bytes, mut start) = (0_u64, None);
        let mut buffer = vec![0; CHUNK];
        loop {
            let n = uninterrupted(|| stream.read(&mut buffer))?;
            if n == 0 {
                break;
            }
            start.get_or_insert_with(Instant::now);
            let at = offset(bytes);
            ensure!(buffer[..n] == pattern[at..at + n], "bytes {bytes} to {} differ", bytes + n as u64);
            bytes += n as u64;
        }
        let time = start.map_or(Duration::ZERO, |start| start.elapsed());
        Ok(Stream { bytes, time, source: peer.ip() })
    };
    let send = |port: u16| {
        let mut stream = connect(destination(to, port, service))?;
        let mut bytes = 0_u64;
        loop {
            let n = next(bytes).min(CHUNK);
            if n == 0 {
                return Ok(bytes);
            }
            let at = offset(bytes);
            stream.write_all(&pattern[at..at + n])?;
            bytes += n as u64;
        }
    };
    let (received, sent) = converse(to.netns, from.netns, receive, send)?;
    ensure!(received.bytes == sent, "{sent} bytes were sent and {} arrived", received.bytes);
    Ok(received)
}

/// Where in the pattern the byte at this position of the stream is.
fn offset(position: u64) -> usize {
    (position % PERIOD as u64) as usize
}

/// Long enough that a chunk fits behind every offset.
fn pattern() -> Vec<u8> {
    // Knuth's multiplicative hash: cheap, and no byte can be guessed from its neighbours.
    let byte = |i: usize| ((i as u32).wrapping_mul(2_654_435_761) >> 24) as u8;
    (0..PERIOD + CHUNK).map(|i| byte(i % PERIOD)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pattern_goes_on_where_a_chunk_ends() {
        let pattern = pattern();
        let wrap = PERIOD - 3;
        assert_eq!(pattern[wrap + 3..wrap + 10], pattern[..7]);
        assert_ne!(pattern[..100], pattern[1..101]);
        assert_eq!(offset(PERIOD as u64 * 7 + 5), 5);
    }
}
