//! `cargo xtask bench`: how fast Loden is, beside what it replaces and beside the limit, in one run on one machine.
//!
//! Every mode has two nodes of its own, all up at once. In each round each kind of work is done in every mode, one
//! straight after the other, in an order that turns from round to round; what is compared is compared within a round.

mod figures;
pub(crate) mod generator;
mod goal;
mod growth;
mod measure;
mod mode;
mod plot;
mod programs;
mod report;
mod results;
mod stage;
mod statistics;
mod work;

use std::{fs, path::PathBuf, thread};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};
use nix::unistd::geteuid;

use self::{
    measure::Servers,
    mode::Mode,
    results::{Results, Section},
    stage::Stage,
    work::Work,
};
use crate::{
    build, interrupt,
    progress::{Step, heading},
    setup,
};

/// The CPU on which everything runs when both ends share one; the first is the agents' and etcd's.
const MEASURED_CPU: usize = 1;
const OTHER_CPU: usize = 0;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// A short run, which fails where a figure is under half of its goal
    #[arg(long)]
    quick: bool,
    /// Only these modes
    #[arg(long, value_enum, value_delimiter = ',')]
    mode: Vec<Mode>,
    /// Only this work
    #[arg(long, value_enum, value_delimiter = ',')]
    work: Vec<Work>,
    /// Only these variants
    #[arg(long, value_enum, value_delimiter = ',')]
    variant: Vec<Variant>,
    /// Instead: how long each program runs, by the kernel's statistics
    #[arg(long)]
    programs: bool,
    /// Instead: what it costs as peers, endpoints and flows become many
    #[arg(long, conflicts_with = "programs")]
    growth: bool,
    /// Instead: put the figures of earlier runs into the documents
    #[arg(long, conflicts_with_all = ["programs", "growth", "quick"])]
    publish: bool,
    /// How many times everything is measured
    #[arg(long)]
    rounds: Option<u32>,
    /// Milliseconds of each measurement
    #[arg(long)]
    millis: Option<u64>,
    /// Where report.txt, report.json, plot.svg and the figures for the documents go
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    out: PathBuf,
    /// Print the result as JSON on standard output
    #[arg(long)]
    json: bool,
}

/// Where the ends of the traffic run, and what the wire is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Variant {
    /// Both ends on one CPU: the cost of the way and nothing else
    OneCpu,
    /// Each end on a CPU of its own
    TwoCpus,
    /// Both ends on one CPU, a wire of MTU-sized packets (no TSO, no tunnel GSO) with GRO behind it
    Segmented,
}

impl Variant {
    fn client_cpu(self) -> usize {
        if self == Self::TwoCpus { OTHER_CPU } else { MEASURED_CPU }
    }

    fn server_cpu(self) -> usize {
        MEASURED_CPU
    }

    /// The CPUs whose time counts, as the client's command line takes them.
    fn cpus(self) -> String {
        if self == Self::TwoCpus { format!("{OTHER_CPU},{MEASURED_CPU}") } else { MEASURED_CPU.to_string() }
    }

    fn title(self) -> &'static str {
        match self {
            Self::OneCpu => "both ends on one CPU",
            Self::TwoCpus => "each end on a CPU of its own",
            Self::Segmented => "both ends on one CPU, MTU-sized packets on the wire, GRO behind it",
        }
    }
}

/// What is to be measured.
#[derive(Debug)]
struct Program {
    modes: Vec<Mode>,
    works: Vec<Work>,
    variants: Vec<Variant>,
    rounds: u32,
    millis: u64,
}

impl Options {
    fn program(&self) -> Program {
        let quick_modes = [Mode::Host, Mode::Direct, Mode::Open, Mode::Strict, Mode::Flannel];
        let quick_works = [Work::TcpRr, Work::TcpCrr, Work::UdpRr, Work::TcpStream, Work::VipTcpCrr];
        Program {
            modes: chosen(&self.mode, if self.quick { &quick_modes } else { Mode::value_variants() }),
            works: chosen(&self.work, if self.quick { &quick_works } else { Work::value_variants() }),
            variants: chosen(
                &self.variant,
                if self.quick { &[Variant::OneCpu] } else { Variant::value_variants() },
            ),
            rounds: self.rounds.unwrap_or(if self.quick { 4 } else { 12 }),
            millis: self.millis.unwrap_or(if self.quick { 250 } else { 500 }),
        }
    }
}

/// Those that were asked for, else all of these; in their own order, each once.
fn chosen<T: Copy + Ord>(asked: &[T], all: &[T]) -> Vec<T> {
    let mut chosen = if asked.is_empty() { all.to_vec() } else { asked.to_vec() };
    chosen.sort_unstable();
    chosen.dedup();
    chosen
}

/// Measures and reports.
///
/// # Errors
///
/// Where something cannot be set up, packets of Loden did not take the fast path, or, in a quick run, a figure is
/// under half of its goal.
pub(crate) fn run(options: &Options) -> Result<()> {
    if options.publish {
        return figures::publish(&options.out);
    }
    ensure!(geteuid().is_root(), "the bench makes network namespaces and loads programs: run it as root");
    interrupt::clear_away()?;
    let outcome = setup::run().and_then(|()| measured(options));
    interrupt::wait_if_interrupted();
    outcome
}

fn measured(options: &Options) -> Result<()> {
    let cpus = thread::available_parallelism()?.get();
    ensure!(cpus > MEASURED_CPU, "the traffic needs a CPU besides the agents': this machine has {cpus}");
    heading("building the agent and its programs");
    let agent = build::Agent::build()?;
    // Everything that is started from here on stays off the CPU of the traffic, but for the traffic.
    generator::pin(OTHER_CPU)?;
    let program = options.program();
    if options.growth {
        return growth::run(&agent, program.rounds, program.millis, &options.out);
    }
    heading("nodes");
    let stage = Stage::create(&program.modes, &agent)?;
    heading("measuring");
    if options.programs {
        return programs::run_times(&stage, &program, &options.out);
    }
    let mut results = Results { sections: Vec::new(), millis: program.millis, rounds: program.rounds };
    for &variant in &program.variants {
        results.sections.push(section(&stage, &program, variant)?);
    }
    drop(stage);
    let text = report::text(&results);
    let json = format!("{:#}\n", report::json(&results));
    fs::create_dir_all(&options.out).with_context(|| options.out.display().to_string())?;
    fs::write(options.out.join("report.txt"), &text)?;
    fs::write(options.out.join("report.json"), &json)?;
    figures::write(&results, &options.out)?;
    plot::draw(&results, &options.out.join("plot.svg"))?;
    print!("{}", if options.json { &json } else { &text });
    if options.quick { goal::no_collapse(&results) } else { Ok(()) }
}

/// All rounds of one variant.
fn section(stage: &Stage, program: &Program, variant: Variant) -> Result<Section> {
    if variant == Variant::Segmented {
        stage.pairs.iter().try_for_each(stage::Pair::segment_wire)?;
    }
    let _servers =
        stage.pairs.iter().map(|pair| Servers::start(pair, variant)).collect::<Result<Vec<_>>>()?;
    let step = Step::start(variant.title());
    let mut section = Section::new(variant);
    for round in 0..program.rounds as usize {
        for &work in &program.works {
            let mut pairs: Vec<_> =
                stage.pairs.iter().filter(|pair| !work.is_through_service() || pair.has_services()).collect();
            // Another mode is first each time, and in odd rounds the order is the other way round: nobody always
            // comes after the same neighbour.
            let turn = (round / 2 * 5 + work as usize) % pairs.len().max(1);
            pairs.rotate_left(turn);
            if round % 2 == 1 {
                pairs.reverse();
            }
            for pair in pairs {
                let what = || {
                    format!("{} in mode {}, round {}", work.metrics()[0].name, pair.mode.name(), round + 1)
                };
                step.note(&what());
                let sample = measure::run(pair, work, variant, program.millis).with_context(what)?;
                section.add(work, pair.mode, sample);
            }
        }
    }
    step.done(format!("{} rounds", program.rounds));
    Ok(section)
}
