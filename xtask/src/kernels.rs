//! `cargo xtask test --kernels`: the core of the programs' and the cluster ring on Debian's kernels, in QEMU.
//!
//! The test binaries that run here run there as well, so both prove the same. A guest is a kernel from Debian's
//! archive and an initramfs with the agent, the tests and the programs that they use; nothing of this machine is
//! reachable from it. Emulated (TCG): slow, but no virtualisation is needed.

mod debian;
mod guest;
mod image;

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use self::{debian::Kernel, guest::Run};
use crate::{
    build,
    progress::{Step, heading},
    setup,
    table::table,
};

/// The kernels: a series, and the suite of Debian's archive that has it.
const SERIES: &[Series] = &[
    Series { name: "5.10", archive: "debian-security", suite: "bullseye-security" },
    Series { name: "6.1", archive: "debian-security", suite: "bookworm-security" },
    Series { name: "6.12", archive: "debian", suite: "bookworm-backports" },
    Series { name: "sid", archive: "debian", suite: "sid" },
];

/// What must pass on each.
const CORE: Tests = Tests {
    programs: TABLES,
    cluster: &[
        "attachment::",
        "fast_path::",
        "local::",
        // Without the segments of a flannel node: before Linux 5.13 a veth has no GRO that would verify their checksums.
        "mixed::a_flannel",
        "mixed::flannel_nodes",
        "mixed::loden_and",
        "nat::",
        "churn::a_stream_goes_on",
        "direct::host_gw_takes",
        "guard::",
        "reachability::every_container",
        "reachability::without_the_programs",
        "leaving::cleanup",
        "wireguard::",
        "ipvs::",
    ],
};

/// What must pass on each with `--quick`.
const QUICK: Tests = Tests {
    programs: TABLES,
    // The last is the one test of WireGuard that every change must pass: the rings leave them to the guests.
    cluster: &["attachment::each_hook", "fast_path::bulk_tcp", "wireguard::containers_reach_each_other"],
};

/// The tables of frames: every program is loaded with every set of constants, and says on each kernel the same.
const TABLES: &[&str] = &[
    "bare_device::",
    "from_pod::",
    "from_wire::",
    "from_other::",
    "from_overlay::",
    "gate::",
    "observe::",
    "guard::",
];

/// Names of tests, or of modules of them, by suite.
#[derive(Clone, Copy, Debug)]
struct Tests<'a> {
    programs: &'a [&'a str],
    cluster: &'a [&'a str],
}

/// A series of kernels.
#[derive(Debug)]
struct Series {
    /// As it is chosen with `--kernels`.
    name: &'static str,
    /// Directory of the archive.
    archive: &'static str,
    /// Its suite.
    suite: &'static str,
}

/// What the guests run, as cargo built it.
#[derive(Debug)]
pub(crate) struct Programs<'a> {
    /// The binary `loden`.
    pub(crate) agent: &'a Path,
    /// The tests of the cluster ring.
    pub(crate) cluster: &'a Path,
    /// The tests of the programs' ring.
    pub(crate) programs: &'a Path,
}

/// How they are run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct How {
    /// Only the quick part of the core.
    pub(crate) quick: bool,
    /// By a clock that goes by instructions.
    pub(crate) instructions: bool,
}

/// The names that `--kernels` knows.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    SERIES.iter().map(|series| series.name)
}

/// Boots the chosen kernels one after another (`all`, or names of series) and prints a table and, last,
/// `N passed, N failed`.
///
/// # Errors
///
/// Where a kernel cannot be had, or a test fails on one.
pub(crate) fn run(chosen: &str, how: How, filter: Option<&str>, programs: &Programs<'_>) -> Result<()> {
    let chosen: Vec<&Series> =
        SERIES.iter().filter(|series| chosen == "all" || series.name == chosen).collect();
    ensure!(!chosen.is_empty(), "no such kernel: there are {}", names().collect::<Vec<_>>().join(", "));
    setup::for_kernels()?;
    let cache = build::root().join("target/kernels");
    let image = image::Image::prepare(&cache, programs)?;
    heading("running the core of the tests on other kernels");
    let filter = filter.map(|filter| [filter]);
    let tests = match &filter {
        Some(filter) => Tests { programs: filter, cluster: filter },
        None if how.quick => QUICK,
        None => CORE,
    };
    let mut runs = Vec::new();
    for series in chosen {
        let step = Step::start(format!("kernel {}", series.name));
        step.note("downloading");
        let kernel = debian::get(series, &cache)?;
        step.note(&format!("tail -f target/kernels/{}.log", kernel.release));
        let run = boot(&image, &kernel, tests, how, &cache)?;
        step.done(format!("{}: {} passed, {} failed", kernel.release, run.passed, run.failed));
        if run.failed > 0 {
            println!("{}", run.output);
        }
        runs.push((kernel, run));
    }
    report(&runs)
}

fn boot(image: &image::Image, kernel: &Kernel, tests: Tests<'_>, how: How, cache: &Path) -> Result<Run> {
    let initramfs: PathBuf = cache.join(format!("{}.cpio", kernel.release));
    image.write(kernel, tests, &initramfs)?;
    let run = guest::run(kernel, &initramfs, how.instructions);
    std::fs::remove_file(&initramfs)?;
    run
}

fn report(runs: &[(Kernel, Run)]) -> Result<()> {
    let mut table = table(["kernel", "programs", "attached by", "passed", "failed", "seconds"], 3);
    for (kernel, run) in runs {
        table.add_row([
            kernel.release.clone(),
            run.said("programs"),
            run.said("attached by"),
            run.passed.to_string(),
            run.failed.to_string(),
            format!("{:.0}", run.time.as_secs_f32()),
        ]);
    }
    println!("{table}");
    for (kernel, run) in runs {
        for (what, value) in run.measured() {
            println!("{}: {what}: {value}", kernel.release);
        }
    }
    let passed: usize = runs.iter().map(|(_, run)| run.passed).sum();
    let failed: usize = runs.iter().map(|(_, run)| run.failed).sum();
    println!("{passed} passed, {failed} failed");
    ensure!(failed == 0, "tests failed");
    Ok(())
}
