//! `cargo xtask test`: builds everything once, then runs ring after ring and adds up.

mod suite;

use std::{
    iter,
    process::Command,
    sync::{Mutex, PoisonError},
    thread::{self, available_parallelism},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use clap::{Args, ValueEnum, builder::PossibleValuesParser};
use nix::unistd::geteuid;

pub(crate) use self::suite::tally;
use self::suite::{Outcome, Suite, suites};
use crate::{build, kernels, progress::heading, table::table};

/// More tests than these that pass only alone are not the machine's doing.
const MOST_ALONE: usize = 4;

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
    /// Of the core only what shows that each kernel takes the programs, that both gates let bulk TCP through them, and that
    /// WireGuard encrypts
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

/// Runs the chosen rings and prints a table and, last, `N passed, N failed`. A test that fails beside others gets a
/// second try alone, is named where it passes then, and four such tests are the most that a run bears.
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
    // Beside the agent, in the place of what was built there just now: the tests run what is shipped.
    build::cni(&[])?;
    let mut suites = suites(&messages);
    suites.retain(|suite| chosen(suite.ring));
    suites.sort_by_key(|suite| (suite.ring as u8, suite.name.clone()));
    if let Some(ring) = options.ring.iter().find(|&&ring| suites.iter().all(|suite| suite.ring != ring)) {
        bail!("the ring {} has no test binary", ring.name());
    }
    heading("running the tests");
    let (lanes, at_once) = lanes(tests_at_once()?);
    let command = |suite: &Suite, at_once: usize| {
        let mut command = Command::new(&suite.executable);
        command
            .current_dir(&suite.directory)
            .env("CARGO_MANIFEST_DIR", &suite.directory)
            .env(THREADS, at_once.to_string())
            .env("LODEN_BINARY", &agent.binary)
            .env("LODEN_PROGRAMS", &agent.programs);
        command
    };
    let run = |suite: Suite| {
        let mut command = command(&suite, at_once);
        suite.run(command.args(&options.filter))
    };
    let mut outcomes = side_by_side(suites, lanes, run)?;
    second_tries(&mut outcomes, |suite| command(suite, 1))?;
    report(&outcomes)
}

/// Runs suites in so many lanes, the first ones first; the outcomes are in the suites' order. While the last long test
/// of one suite runs, the next one's begin.
fn side_by_side(
    suites: Vec<Suite>,
    lanes: usize,
    run: impl Fn(Suite) -> Result<Outcome> + Sync,
) -> Result<Vec<Outcome>> {
    let waiting = Mutex::new(suites.into_iter().enumerate());
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
    let lane = || -> Result<Vec<(usize, Outcome)>> {
        iter::from_fn(next).map(|(n, suite)| Ok((n, run(suite)?))).collect()
    };
    let mut outcomes = Vec::new();
    thread::scope(|scope| {
        let lanes: Vec<_> = (0..lanes).map(|_| scope.spawn(lane)).collect();
        for lane in lanes {
            outcomes.extend(lane.join().map_err(|_| anyhow!("a lane of tests panicked"))??);
        }
        anyhow::Ok(())
    })?;
    outcomes.sort_by_key(|(n, _)| *n);
    Ok(outcomes.into_iter().map(|(_, outcome)| outcome).collect())
}

/// Tries again, one by one, what failed beside others. Of the host ring's tests none depends on the machine: what
/// fails there once is wrong.
fn second_tries(outcomes: &mut [Outcome], alone: impl Fn(&Suite) -> Command) -> Result<()> {
    let has_failures = |outcome: &Outcome| outcome.suite.ring != Ring::Host && !outcome.failed.is_empty();
    if outcomes.iter().any(has_failures) {
        heading("once more, one by one, what failed beside others");
    }
    outcomes
        .iter_mut()
        .filter(|outcome| has_failures(outcome))
        .try_for_each(|outcome| outcome.try_alone(&alone))
}

/// How many tests run at once: two for each CPU, since all but the host ring's wait more than they compute; what the
/// environment asks for goes first.
fn tests_at_once() -> Result<usize> {
    let Ok(asked) = std::env::var(THREADS) else { return Ok(2 * cpus()) };
    asked
        .parse()
        .ok()
        .filter(|asked| *asked > 0)
        .with_context(|| format!("{THREADS} must be a number above 0, not {asked:?}"))
}

/// How many suites share that many tests, and how many of them each has at once.
fn lanes(tests: usize) -> (usize, usize) {
    let lanes = cpus().min(tests);
    (lanes, tests / lanes)
}

fn cpus() -> usize {
    available_parallelism().map_or(1, usize::from)
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

/// The table, and each test that has passed only alone: a race, of the test or of what it tests, that wants mending.
fn report(outcomes: &[Outcome]) -> Result<()> {
    let mut table = table(["ring", "suite", "passed", "only alone", "failed", "seconds"], 2);
    for outcome in outcomes {
        table.add_row([
            outcome.suite.ring.name(),
            outcome.suite.name.clone(),
            outcome.passed.to_string(),
            outcome.alone.len().to_string(),
            outcome.failures().to_string(),
            format!("{:.1}", outcome.time.as_secs_f32()),
        ]);
    }
    println!("{table}");
    for outcome in outcomes {
        for test in &outcome.alone {
            println!("{} / {test} has failed beside others and passed alone", outcome.suite.name);
        }
    }
    let sum = |count: fn(&Outcome) -> usize| -> usize { outcomes.iter().map(count).sum() };
    let alone = sum(|outcome| outcome.alone.len());
    let (passed, failed) = (sum(|outcome| outcome.passed) + alone, sum(Outcome::failures));
    println!("{passed} passed, {failed} failed");
    ensure!(failed == 0, "tests failed");
    ensure!(alone <= MOST_ALONE, "{alone} tests pass only alone, more than {MOST_ALONE}");
    ensure!(passed > 0, "no test ran");
    Ok(())
}
