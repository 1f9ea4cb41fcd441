//! What every Prometheus client tells of its process, from `/proc/self` (proc(5)).

use std::{fmt, fs, io};

use prometheus_client::registry::Unit;

use super::{Families, value};

/// `USER_HZ`: what the kernel counts CPU time in for user space, on every architecture that we build for.
const TICKS_PER_SECOND: f64 = 100.0;

/// The agent as the kernel sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Process {
    cpu_seconds: f64,
    start: f64,
    virtual_bytes: f64,
    resident_bytes: f64,
    open_files: f64,
}

impl Process {
    pub(super) fn read() -> io::Result<Self> {
        let stat = fs::read_to_string("/proc/self/stat")?;
        let system = fs::read_to_string("/proc/stat")?;
        let open_files = fs::read_dir("/proc/self/fd")?.count() as f64;
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?.unwrap_or(4096) as f64;
        Self::parse(&stat, &system, open_files, page)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/self/stat is not as in proc(5)"))
    }

    fn parse(stat: &str, system: &str, open_files: f64, page: f64) -> Option<Self> {
        // The name, in brackets, may hold anything.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        // proc(5) counts from 1 and the first two are cut off.
        let number = |field: usize| fields.get(field - 3)?.parse::<f64>().ok();
        let boot: f64 = system.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
        Some(Self {
            cpu_seconds: (number(14)? + number(15)?) / TICKS_PER_SECOND,
            start: boot + number(22)? / TICKS_PER_SECOND,
            virtual_bytes: number(23)?,
            resident_bytes: number(24)? * page,
            open_files,
        })
    }

    pub(super) fn encode(&self, out: &mut Families<'_>) -> fmt::Result {
        let (bytes, seconds) = (|| Some(Unit::Bytes), || Some(Unit::Seconds));
        out.counter("process_cpu", "CPU time that the agent used", seconds(), value(self.cpu_seconds))?;
        out.gauge("process_start_time", "When the agent started, UNIX time", seconds(), value(self.start))?;
        out.gauge(
            "process_virtual_memory",
            "Address space of the agent",
            bytes(),
            value(self.virtual_bytes),
        )?;
        out.gauge("process_resident_memory", "Memory of the agent", bytes(), value(self.resident_bytes))?;
        out.gauge("process_open_fds", "File descriptors of the agent", None, value(self.open_files))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_those_of_proc_5_whatever_the_name() {
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194560 500 0 0 0 250 50 0 0 20 0 1 0 12345 1000000 300 18446744073709551615";
        let process = Process::parse(stat, "cpu 1 2\nbtime 1000\n", 9.0, 4096.0).unwrap();
        let expected = Process {
            cpu_seconds: 3.0,
            start: 1123.45,
            virtual_bytes: 1_000_000.0,
            resident_bytes: 300.0 * 4096.0,
            open_files: 9.0,
        };
        assert_eq!(process, expected);
        assert_eq!(Process::parse("7 (a", "", 0.0, 1.0), None);
        assert!(Process::read().unwrap().open_files >= 3.0);
    }
}
