//! A steady load while something else happens: many TCP flows, every byte compared, and datagrams at a fixed rate,
//! every one numbered.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread::{self, ScopedJoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};

use super::{Host, socket};

/// What each TCP flow sends at a time, bytes.
const CHUNK: usize = 8192;
/// Time between two chunks of a flow.
const PAUSE: Duration = Duration::from_millis(20);
/// Bytes of a datagram; the first eight are its number.
const DATAGRAM: usize = 256;
/// Time between two datagrams.
const BEAT: Duration = Duration::from_millis(1);
/// What the receiver's kernel may hold while its thread has no CPU, bytes.
const BACKLOG: usize = 16 << 20;
/// How long the last datagrams may be on their way.
const REST: Duration = Duration::from_millis(500);

/// What the load came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Bytes of TCP that arrived, all as sent.
    pub bytes: u64,
    /// Datagrams sent.
    pub datagrams: u64,
    /// Those of them that never arrived.
    pub lost: u64,
    /// Datagrams that arrived more than once.
    pub repeated: u64,
}

/// Opens `flows` TCP connections, and sends over all of them, and a thousand datagrams a second, while `work` runs.
///
/// # Errors
///
/// Those of `work`, and where a connection breaks, stands still for five seconds, or a byte differs.
///
/// # Panics
///
/// Where an end panics.
pub fn during<T>(
    from: Host<'_>,
    to: Host<'_>,
    flows: usize,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Report)> {
    let (near, far): (Vec<_>, Vec<_>) = connections(from, to, flows)?.into_iter().unzip();
    let (sender, receiver) = (socket::udp(from, 0)?, socket::udp(to, 0)?);
    setsockopt(&receiver, RcvBufForce, &BACKLOG)?;
    sender.connect(receiver.local_addr()?)?;
    let (stop, silent) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        let writes = scope.spawn(|| write(&near, &stop));
        let reads = scope.spawn(|| read(&far));
        let beats = scope.spawn(|| {
            let sent = beat(&sender, &stop);
            silent.store(true, Ordering::Release);
            sent
        });
        let hears = scope.spawn(|| hear(&receiver, &silent));
        let stopper = Stopper(&stop);
        let done = work();
        drop(stopper);
        let (written, bytes) = (ended(writes), ended(reads));
        let (datagrams, heard) = (ended(beats), ended(hears));
        let (done, written, bytes) = (done?, written.context("sender")?, bytes.context("receiver")?);
        ensure!(written == bytes, "{written} bytes were sent and {bytes} arrived");
        let (datagrams, mut numbers) = (datagrams?, heard?);
        numbers.resize(usize::try_from(datagrams)?, 0);
        let different = numbers.iter().filter(|&&times| times > 0).count() as u64;
        let repeated = numbers.iter().filter(|&&times| times > 1).count() as u64;
        let lost = datagrams - different;
        if lost > 0 {
            eprintln!("of {datagrams} datagrams, one a ms, these are lost: {}", gaps(&numbers));
        }
        Ok((done, Report { bytes, datagrams, lost, repeated }))
    })
}

/// As [`during`] for several pairs of hosts at once, and returns what each came to.
///
/// # Errors
///
/// As [`during`].
///
/// # Panics
///
/// As [`during`].
pub fn during_all<'a, T>(
    pairs: &[(Host<'a>, Host<'a>)],
    flows: usize,
    work: Box<dyn FnOnce() -> Result<T> + 'a>,
) -> Result<(T, Vec<Report>)> {
    let Some((&(from, to), rest)) = pairs.split_first() else { return Ok((work()?, Vec::new())) };
    let ((done, mut reports), report) = during(from, to, flows, || during_all(rest, flows, work))?;
    reports.insert(0, report);
    Ok((done, reports))
}

/// Ends the load when `work` does, in whichever way.
pub(super) struct Stopper<'a>(pub(super) &'a AtomicBool);

impl Drop for Stopper<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

fn ended<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn connections(from: Host<'_>, to: Host<'_>, flows: usize) -> Result<Vec<(TcpStream, TcpStream)>> {
    let listener = socket::listen(to, 0)?;
    let at = SocketAddr::new(to.address, listener.local_addr()?.port());
    (0..flows).map(|_| socket::open(from.netns, None, at, &listener)).collect()
}

/// The chunk of a flow in a round: no two of them are alike.
fn chunk(flow: usize, round: u64) -> [u8; CHUNK] {
    let mut state = (flow as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ round;
    let mut chunk = [0; CHUNK];
    for word in chunk.chunks_exact_mut(8) {
        // Marsaglia's xorshift64: every byte depends on the flow and the round.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    chunk
}

fn write(flows: &[TcpStream], stop: &AtomicBool) -> Result<u64> {
    let mut round = 0;
    while !stop.load(Ordering::Acquire) {
        for (flow, mut stream) in flows.iter().enumerate() {
            stream.write_all(&chunk(flow, round)).with_context(|| format!("flow {flow}, round {round}"))?;
        }
        round += 1;
        thread::sleep(PAUSE);
    }
    for stream in flows {
        stream.shutdown(Shutdown::Write)?;
    }
    Ok(round * (flows.len() * CHUNK) as u64)
}

fn read(flows: &[TcpStream]) -> Result<u64> {
    let (mut round, mut bytes) = (0, 0);
    let mut buffer = [0; CHUNK];
    loop {
        for (flow, mut stream) in flows.iter().enumerate() {
            let mut filled = 0;
            while filled < CHUNK {
                let n = stream.read(&mut buffer[filled..]);
                let n = n.with_context(|| format!("flow {flow} stands still in round {round}"))?;
                if n == 0 {
                    ensure!(filled == 0, "flow {flow} ended within a chunk, in round {round}");
                    break;
                }
                filled += n;
            }
            if filled == 0 {
                // The sender closes the flows together, after a round.
                ensure!(flow == 0 || bytes % (flows.len() * CHUNK) as u64 == 0, "flow {flow} ended early");
                if flow + 1 == flows.len() {
                    return Ok(bytes);
                }
                continue;
            }
            ensure!(buffer == chunk(flow, round), "flow {flow} differs in round {round}");
            bytes += CHUNK as u64;
        }
        round += 1;
    }
}

fn beat(socket: &UdpSocket, stop: &AtomicBool) -> Result<u64> {
    let (mut next, mut number) = (Instant::now(), 0_u64);
    let mut datagram = [0x5a; DATAGRAM];
    while !stop.load(Ordering::Acquire) {
        datagram[..8].copy_from_slice(&number.to_le_bytes());
        socket.send(&datagram)?;
        number += 1;
        next += BEAT;
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(number)
}

/// Which numbers never arrived: many in a row tell of an interruption, single ones of a race or a full queue.
fn gaps(numbers: &[u32]) -> String {
    let mut next = 0;
    let runs = numbers.chunk_by(|one, other| (*one == 0) == (*other == 0)).filter_map(|run| {
        let first = next;
        next += run.len();
        (run[0] == 0).then(|| format!("{first} to {}", next - 1))
    });
    runs.collect::<Vec<_>>().join(", ")
}

/// How often each number arrived.
fn hear(socket: &UdpSocket, silent: &AtomicBool) -> Result<Vec<u32>> {
    socket.set_read_timeout(Some(REST))?;
    let mut times: Vec<u32> = Vec::new();
    let mut datagram = [0; DATAGRAM];
    loop {
        match socket::uninterrupted(|| socket.recv(&mut datagram)) {
            Ok(n) => {
                ensure!(n == DATAGRAM, "a datagram of {n} bytes");
                let number: [u8; 8] = datagram[..8].try_into()?;
                let number = usize::try_from(u64::from_le_bytes(number))?;
                times.resize(times.len().max(number + 1), 0);
                times[number] += 1;
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if silent.load(Ordering::Acquire) {
                    return Ok(times);
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::gaps;

    #[test]
    fn gaps_are_told_from_their_first_to_their_last() {
        assert_eq!(gaps(&[0, 0, 1, 2, 0, 1, 0]), "0 to 1, 4 to 4, 6 to 6");
        assert_eq!(gaps(&[1, 1]), "");
    }
}
