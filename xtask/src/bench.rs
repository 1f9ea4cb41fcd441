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
mod plan;
mod plot;
mod programs;
mod report;
mod results;
mod rounds;
mod stage;
mod statistics;
mod work;

use std::{fs, path::PathBuf, thread};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};
use nix::unistd::geteuid;

use self::{
    mode::Mode,
    plan::{Block, Family, Part, Variant},
    results::{Origin, Section, Stored},
    rounds::Extent,
    stage::Stage,
    work::Work,
};
use crate::{build, interrupt, progress::heading, setup};

/// The CPU on which everything runs when both ends share one; the first is the agents' and etcd's.
const MEASURED_CPU: usize = 1;
const OTHER_CPU: usize = 0;
/// The rates' file below the directory of results.
const RATES: &str = "rates.json";

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// A short run, which fails where a figure is under half of its goal
    #[arg(long)]
    quick: bool,
    /// Only these pieces of what the documents show
    #[arg(long, value_enum, value_delimiter = ',', conflicts_with_all = ["quick", "mode", "work", "variant", "family"])]
    part: Vec<Part>,
    /// Only these modes
    #[arg(long, value_enum, value_delimiter = ',')]
    mode: Vec<Mode>,
    /// Only this work
    #[arg(long, value_enum, value_delimiter = ',')]
    work: Vec<Work>,
    /// Only these variants
    #[arg(long, value_enum, value_delimiter = ',')]
    variant: Vec<Variant>,
    /// Only these families
    #[arg(long, value_enum, value_delimiter = ',')]
    family: Vec<Family>,
    /// Instead: how long each program runs, by the kernel's statistics
    #[arg(long)]
    programs: bool,
    /// Instead: what it costs as these become many; all of them where none is named
    #[arg(long, value_enum, value_delimiter = ',', num_args = 0.., value_name = "WHAT", conflicts_with = "programs")]
    growth: Option<Vec<growth::Kind>>,
    /// Instead: put the figures of earlier runs into the documents
    #[arg(long, conflicts_with_all = ["programs", "growth", "quick"])]
    publish: bool,
    /// How many times everything is measured
    #[arg(long)]
    rounds: Option<u32>,
    /// Milliseconds of each measurement
    #[arg(long)]
    millis: Option<u64>,
    /// Where results, report and plot go
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    out: PathBuf,
    /// Add to the results that are there, instead of replacing those of the same kind
    #[arg(long)]
    add: bool,
    /// Print the result as JSON on standard output
    #[arg(long)]
    json: bool,
}

impl Options {
    /// What is to be measured.
    fn blocks(&self) -> Vec<Block> {
        let is_free = self.mode.is_empty() && self.work.is_empty() && self.variant.is_empty();
        if is_free && self.family.is_empty() {
            return match (self.quick, self.programs) {
                (_, true) => plan::programs(),
                (true, _) => plan::quick(),
                _ => chosen(&self.part, Part::value_variants()).into_iter().map(Part::block).collect(),
            };
        }
        let (modes, works) =
            (chosen(&self.mode, Mode::value_variants()), chosen(&self.work, Work::value_variants()));
        let variants = chosen(&self.variant, &[Variant::OneCpu]);
        let block = |family| {
            let (modes, works) = (&modes, &works);
            variants.iter().map(move |&variant| Block::new(family, variant, modes, works))
        };
        chosen(&self.family, &[Family::V4]).into_iter().flat_map(block).collect()
    }

    fn extent(&self) -> Extent {
        let (rounds, millis, attempts) = if self.quick { (4, 250, 2) } else { (9, 200, 3) };
        Extent { rounds: self.rounds.unwrap_or(rounds), millis: self.millis.unwrap_or(millis), attempts }
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
    if let Some(kinds) = &options.growth {
        return growth::run(&chosen(kinds, growth::Kind::value_variants()), options);
    }
    heading("building the agent and its programs");
    let agent = build::Agent::build()?;
    let origin = Origin::here(&agent.binary)?;
    let file = options.out.join(RATES);
    if options.add && !options.programs {
        Stored::<Vec<Section>>::ensure_from(&file, &origin)?;
    }
    // Everything that is started from here on stays off the CPU of the traffic, but for the traffic.
    generator::pin(OTHER_CPU)?;
    let (mut sections, mut run_times) = (Vec::new(), Vec::new());
    for family in [Family::V4, Family::V6] {
        let mut blocks: Vec<Block> =
            options.blocks().into_iter().filter(|block| block.family == family).collect();
        if blocks.is_empty() {
            continue;
        }
        // The wire does not become whole again.
        blocks.sort_by_key(|block| block.variant);
        heading(&format!("nodes for {}", family.title()));
        let modes: Vec<Mode> = blocks.iter().flat_map(|block| &block.modes).copied().collect();
        let stage = Stage::create(&chosen(&modes, &[]), family, &agent)?;
        heading("measuring");
        for block in &blocks {
            if options.programs {
                run_times.extend(programs::measure(&stage, block, options.extent().millis)?);
                continue;
            }
            let section = rounds::measure(&stage, block, options.extent())?;
            results::merge(&mut sections, vec![section]);
        }
    }
    if options.programs {
        return Stored { origin, results: run_times }.save(&options.out.join(programs::FILE));
    }
    reported(options, origin, sections)
}

/// Keeps what was measured, with what was there before if it is to be added, and tells it.
fn reported(options: &Options, origin: Origin, sections: Vec<Section>) -> Result<()> {
    let file = options.out.join(RATES);
    let earlier = if options.add { Stored::<Vec<Section>>::load(&file)? } else { None };
    let mut all = earlier.map_or_else(Vec::new, |stored| stored.results);
    results::merge(&mut all, sections.clone());
    let stored = Stored { origin, results: all };
    stored.save(&file)?;
    fs::write(options.out.join("report.txt"), report::text(&stored.results)).context("report.txt")?;
    let json = format!("{:#}\n", report::json(&stored.results));
    fs::write(options.out.join("report.json"), &json).context("report.json")?;
    plot::draw(&stored.results, &options.out.join("plot.svg"))?;
    print!("{}", if options.json { json } else { report::text(&sections) });
    if options.quick { goal::no_collapse(&sections) } else { Ok(()) }
}
