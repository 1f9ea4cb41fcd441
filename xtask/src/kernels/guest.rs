//! One boot: QEMU, its serial line, and what it says there.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::Kernel;
use crate::test::tally;

/// The last line of a guest whose tests have passed. One that panics or hangs does not say it.
const PASSED: &str = "guest: tests ended with 0";

/// What became of one boot.
#[derive(Debug)]
pub(super) struct Run {
    /// Tests that passed.
    pub(super) passed: usize,
    /// Tests that failed; 1 where the guest did not say.
    pub(super) failed: usize,
    /// From the start of QEMU to its end.
    pub(super) time: Duration,
    /// The serial line.
    pub(super) output: String,
    said: BTreeMap<String, String>,
}

impl Run {
    /// What a test has said of the kernel, in a line that ends with `guest: WHAT = VALUE`.
    pub(super) fn said(&self, what: &str) -> String {
        self.said.get(what).cloned().unwrap_or_else(|| "-".to_owned())
    }

    /// What tests have measured, in lines that end with `guest: measured WHAT = VALUE`.
    pub(super) fn measured(&self) -> impl Iterator<Item = (&str, &str)> {
        self.said.iter().filter_map(|(what, value)| Some((what.strip_prefix("measured ")?, value.as_str())))
    }
}

/// Boots the kernel and waits until it is off again; a time limit ends it at the latest. What it says goes to a log
/// beside the initramfs, to be watched. With `instructions` its clock goes on by a nanosecond with each instruction, and at
/// once to what it waits for when it has nothing to do.
///
/// # Errors
///
/// Where QEMU cannot be started.
pub(super) fn run(kernel: &Kernel, initramfs: &Path, instructions: bool) -> Result<Run> {
    let start = Instant::now();
    // One CPU and no cmpxchg16b: Linux 6.12 has crashed in its allocator under the emulation of QEMU 7.2.
    let mut command = Command::new("timeout");
    command
        .args(["--kill-after=5", "3600", "qemu-system-x86_64"])
        .args(["-accel", "tcg", "-cpu", "max,-cx16", "-m", "1536"])
        .args(["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initramfs)
        .stdin(Stdio::null());
    let mut arguments = "console=ttyS0 panic=-1 quiet random.trust_cpu=on mitigations=off".to_owned();
    if instructions {
        command.args(["-icount", "shift=0,sleep=off"]);
        arguments += " loden.instructions";
    }
    command.args(["-append", &arguments]);
    let log = initramfs.with_extension("log");
    let output = command
        .stdout(File::create(&log).with_context(|| log.display().to_string())?)
        .stderr(Stdio::piped())
        .output()
        .context("qemu-system-x86_64 cannot be started")?;
    let text = String::from_utf8_lossy(&fs::read(&log)?).replace('\r', "");
    let (passed, mut failed) = tally(&text);
    if passed == 0 || !text.lines().any(|line| line.trim() == PASSED) {
        failed = failed.max(1);
    }
    let said = text.lines().filter_map(|line| {
        let (what, value) = line.split_once("guest: ")?.1.trim().split_once(" = ")?;
        Some((what.to_owned(), value.to_owned()))
    });
    let said = said.collect();
    let output = format!("{text}{}QEMU: {}", String::from_utf8_lossy(&output.stderr), output.status);
    Ok(Run { passed, failed, time: start.elapsed(), output, said })
}
