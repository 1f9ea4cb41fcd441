//! What the programs tell of packets, put into the agent's own log (`--bpf-log`).

use std::io;

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya_log::EbpfLogger;
use loden_ebpf::reason::Reason;
use tokio::{io::unix::AsyncFd, task::AbortHandle};

/// The task that reads the programs' records; dropping it ends it.
#[derive(Debug)]
pub(super) struct PacketLog(AbortHandle);

impl PacketLog {
    /// Begins to read. Must be called inside a tokio runtime.
    pub(super) fn open(ebpf: &mut Ebpf) -> Result<Self> {
        let logger = EbpfLogger::init_with_logger(ebpf, Records).context("the programs' log")?;
        // SAFETY: the logger owns its descriptor and never closes or exchanges it while it lives, and AsyncFd owns
        // the logger.
        let mut logger = unsafe { AsyncFd::register(logger) }.map_err(io::Error::from)?;
        let task = tokio::spawn(async move {
            while let Ok(mut guard) = logger.readable_mut().await {
                guard.get_inner_mut().flush();
                guard.clear_ready();
            }
        });
        Ok(Self(task.abort_handle()))
    }
}

impl Drop for PacketLog {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Turns a record into a line of ours.
struct Records;

impl log::Log for Records {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let line = record.args().to_string();
        tracing::info!(target: "loden::packets", "{}", named(&line));
    }

    fn flush(&self) {}
}

/// The line with the reason's name in the place of its number, which comes first.
fn named(line: &str) -> String {
    let (number, rest) = line.split_once(' ').unwrap_or((line, ""));
    let reason = number.parse().ok().and_then(|number: usize| Reason::ALL.get(number));
    reason.map_or_else(|| line.to_owned(), |reason| format!("{} {rest}", reason.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_becomes_the_name() {
        let line = format!("{} if 7 10.5.1.2 > 10.5.2.3 proto 6 98 bytes", Reason::FastDecap as u32);
        assert_eq!(named(&line), "fast_decap if 7 10.5.1.2 > 10.5.2.3 proto 6 98 bytes");
        assert_eq!(named("99999 if 7"), "99999 if 7", "a newer program's");
        assert_eq!(named(""), "");
    }
}
