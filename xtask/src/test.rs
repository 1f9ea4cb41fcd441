//! `cargo xtask test`: builds everything once, then runs ring after ring and adds up.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
    thread::available_parallelism,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, ValueEnum, builder::PossibleValuesParser};
use nix::unistd::geteuid;
use serde_json::Value;

use crate::{
    build, kernels,
    progress::{Step, heading},
    table::table,
};

/// Where libtest reads how many tests to run at once.
const THREADS: &str = "RUST_TEST_THREADS";

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Only these rings; all where none is named
    #[arg(long, value_enum)]
    ring: Vec<Ring>,
    /// Instead of the rings here: the core of the cluster ring on other kernels, in QEMU; all of them, or one
    #[arg(long, value_name = "KERNEL", num_args = 0..=1, default_missing_value = "all", conflicts_with = "ring",
        value_parser = PossibleValuesParser::new(["all"].into_iter().chain(kernels::names())))]
    kernels: Option<String>,
    /// Of the core only what shows that each kernel takes the programs and that both gates let bulk TCP through them
    #[arg(long, requires = "kernels")]
    quick: bool,
    /// The guests' clock goes by instructions, one a nanosecond: times in there are what the work costs
    #[arg(long, requires = "kernels")]
    instructions: bool,
    /// Only tests whose name contains this
    filter: Option<String>,
}

/// The rings, from the inside out: each proves what the one before cannot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Ring {
    /// Pure code: every crate's unit tests
    Host,
    /// The programs under `BPF_PROG_TEST_RUN`
    Programs,
    /// Devices, routes, rules and attachments in fresh network namespaces
    Kernel,
    /// Leases against a real etcd
    Leases,
    /// Nodes, agents and containers
    Cluster,
    /// Parts that others make: dockerd, CNI plugins, containerd, a browser, an API server's protocol
    Real,
}

impl Ring {
    fn of(suite: &str) -> Self {
        match suite {
            "programs" => Self::Programs,
            "kernel" => Self::Kernel,
            "leases" => Self::Leases,
            "cluster" | "forwarding" | "gate" | "outages" | "doctor" => Self::Cluster,
            "docker" | "cni" | "kube" | "web" => Self::Real,
            _ => Self::Host,
        }
    }

    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// One test binary, as cargo built it.
#[derive(Debug)]
struct Suite {
    ring: Ring,
    name: String,
    executable: PathBuf,
    /// The directory of its package: cargo runs tests there.
    directory: PathBuf,
}

/// What became of one suite.
#[derive(Debug)]
struct Outcome {
    suite: Suite,
    passed: u64,
    failed: u64,
    time: Duration,
}

/// Runs the chosen rings and prints a table and, last, `N passed, N failed`.
///
/// # Errors
///
/// Where a test fails, a chosen ring has no test, or root is missing for one that needs it.
pub(crate) fn run(options: &Options) -> Result<()> {
    if let Some(chosen) = &options.kernels {
        return on_kernels(chosen, options);
    }
    let chosen = |ring: Ring| options.ring.is_empty() || options.ring.contains(&ring);
    let needs_root = Ring::value_variants().iter().any(|&ring| ring != Ring::Host && chosen(ring));
    ensure!(
        !needs_root || geteuid().is_root(),
        "all rings but host make network namespaces and load programs: run this as \
         root, or only `cargo xtask test --ring host`"
    );
    heading("building the agent, the programs and the tests");
    // Everything at once: package by package, cargo would build shared dependencies once for each set of features.
    let messages = build::messages(&["build", "--workspace", "--all-targets"])?;
    let agent = build::Agent::among(&messages)?;
    let mut suites = suites(&messages);
    suites.retain(|suite| chosen(suite.ring));
    suites.sort_by_key(|suite| (suite.ring as u8, suite.name.clone()));
    if let Some(ring) = options.ring.iter().find(|&&ring| suites.iter().all(|suite| suite.ring != ring)) {
        bail!("the ring {} has no test binary", ring.name());
    }
    heading("running the tests");
    let at_once = tests_at_once();
    let mut outcomes = Vec::new();
    for suite in suites {
        let mut command = Command::new(&suite.executable);
        command
            .current_dir(&suite.directory)
            .args(&options.filter)
            .env("CARGO_MANIFEST_DIR", &suite.directory)
            .env(THREADS, &at_once)
            .env("LODEN_BINARY", &agent.binary)
            .env("LODEN_PROGRAMS", &agent.programs);
        outcomes.push(run_suite(suite, &mut command)?);
    }
    report(&outcomes)
}

/// How many tests libtest runs at once: three for two CPUs, since all but the host ring's wait more than they
/// compute; what the environment asks for goes first.
fn tests_at_once() -> String {
    let asked = std::env::var(THREADS);
    asked.unwrap_or_else(|_| (3 * available_parallelism().map_or(1, usize::from)).div_ceil(2).to_string())
}

fn on_kernels(chosen: &str, options: &Options) -> Result<()> {
    heading("building the agent, the programs and the tests");
    // Of the targets only what the guests run.
    let mut args = vec!["build", "--workspace", "--bin", "loden", "--test", "cluster", "--test", "programs"];
    if !options.quick {
        // Optimised, unlike for the rings: the guests' emulated CPUs are slow. For few tests it is not worth the build.
        args.push("--release");
    }
    let messages = build::messages(&args)?;
    let agent = build::Agent::among(&messages)?;
    let suites = suites(&messages);
    let suite = |name: &str| {
        let found = suites.iter().find(|suite| suite.ring != Ring::Host && suite.name == name);
        found.map(|suite| &*suite.executable).with_context(|| format!("the suite {name} is not built"))
    };
    let programs =
        kernels::Programs { agent: &agent.binary, cluster: suite("cluster")?, programs: suite("programs")? };
    let how = kernels::How { quick: options.quick, instructions: options.instructions };
    kernels::run(chosen, how, options.filter.as_deref(), &programs)
}

/// The test binaries among what cargo built.
fn suites(messages: &[Value]) -> Vec<Suite> {
    let suite = |message: &Value| -> Option<Suite> {
        let executable = message["executable"].as_str()?;
        if message["profile"]["test"] != true {
            return None;
        }
        let directory = PathBuf::from(message["manifest_path"].as_str()?).parent()?.to_owned();
        let name = message["target"]["name"].as_str()?.to_owned();
        let integration = message["target"]["kind"][0] == "test";
        let ring = if integration { Ring::of(&name) } else { Ring::Host };
        Some(Suite { ring, name, executable: executable.into(), directory })
    };
    messages.iter().filter_map(suite).collect()
}

fn run_suite(suite: Suite, command: &mut Command) -> Result<Outcome> {
    let step = Step::start(format!("{} / {}", suite.ring.name(), suite.name));
    let start = Instant::now();
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("{command:?} cannot be started"))?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    let (passed, mut failed) = tally(&stdout);
    if !output.status.success() {
        // A suite that dies before its summary has failed too.
        failed = failed.max(1);
    }
    step.done(format!("{passed} passed, {failed} failed"));
    if failed > 0 {
        println!("{stdout}{}", String::from_utf8_lossy(&output.stderr));
        println!("{} / {} ended with {}", suite.ring.name(), suite.name, output.status);
    }
    Ok(Outcome { suite, passed, failed, time: start.elapsed() })
}

/// Reads libtest's summary, `test result: ok. 3 passed; 1 failed; ...`.
pub(crate) fn tally(stdout: &str) -> (u64, u64) {
    let count = |line: &str, what: &str| -> u64 {
        let words: Vec<&str> = line.split([' ', ';']).collect();
        words.windows(2).find(|pair| pair[1] == what).and_then(|pair| pair[0].parse().ok()).unwrap_or(0)
    };
    let summaries = stdout.lines().filter(|line| line.starts_with("test result: "));
    summaries.fold((0, 0), |sum, line| (sum.0 + count(line, "passed"), sum.1 + count(line, "failed")))
}

fn report(outcomes: &[Outcome]) -> Result<()> {
    let mut table = table(["ring", "suite", "passed", "failed", "seconds"], 2);
    for Outcome { suite, passed, failed, time } in outcomes {
        table.add_row([
            suite.ring.name(),
            suite.name.clone(),
            passed.to_string(),
            failed.to_string(),
            format!("{:.1}", time.as_secs_f32()),
        ]);
    }
    println!("{table}");
    let passed: u64 = outcomes.iter().map(|outcome| outcome.passed).sum();
    let failed: u64 = outcomes.iter().map(|outcome| outcome.failed).sum();
    println!("{passed} passed, {failed} failed");
    ensure!(failed == 0, "tests failed");
    ensure!(passed > 0, "no test ran");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::tally;

    #[test]
    fn the_tally_adds_up_summaries_and_nothing_else() {
        let output = "running 3 tests\ntest a ... ok\n\
            test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s\n\
            test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s\n";
        assert_eq!(tally(output), (6, 1));
        assert_eq!(tally("7 passed"), (0, 0));
    }
}
