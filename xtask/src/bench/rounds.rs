//! The order of the measurements, and which rounds count.
//!
//! In each round a kind of work is done in every mode, one straight after the other, between two looks at the baseline:
//! TCP_RR in the block's first mode, the host's own sockets where they are among them. Where both differ by more than
//! [`DRIFT`], the machine was not the same at the end as at the start: the round is done again.

use anyhow::{Context as _, Result};

use super::{
    measure::{self, Sample, Servers},
    mode::Mode,
    plan::{Block, Variant},
    results::{Round, Section},
    stage::{Pair, Stage},
    work::Work,
};
use crate::progress::Step;

/// How much the baseline may move in a round.
pub(super) const DRIFT: f64 = 0.1;
/// How much is to be measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    pub(super) rounds: u32,
    /// Of each measurement.
    pub(super) millis: u64,
    /// How often a round is tried at most; then the one in which the baseline has moved least counts.
    pub(super) attempts: u32,
}

/// Measures everything of a block.
///
/// # Errors
///
/// Where work fails in a mode, or does not take the way that the mode is for.
pub(super) fn measure(stage: &Stage, block: &Block, extent: Extent) -> Result<Section> {
    let pairs: Vec<&Pair> = stage.pairs.iter().filter(|pair| block.modes.contains(&pair.mode)).collect();
    if block.variant == Variant::Segmented {
        pairs.iter().try_for_each(|pair| pair.segment_wire())?;
    }
    let start = |pair: &&Pair| Servers::start(pair, block.family, block.variant);
    let _servers = pairs.iter().map(start).collect::<Result<Vec<_>>>()?;
    let title = format!("{}, {}", block.family.title(), block.variant.title());
    let step = Step::start(&title);
    let mut bench = Bench { block, pairs, extent, level: 0.0 };
    bench.level = bench.baseline()?;
    let mut section = Section { family: block.family, variant: block.variant, rounds: Vec::new() };
    for n in 0..extent.rounds {
        for &work in &block.works {
            section.rounds.push(bench.round(work, n, &step)?);
        }
    }
    step.done(section.extent());
    Ok(section)
}

struct Bench<'a> {
    block: &'a Block,
    pairs: Vec<&'a Pair>,
    extent: Extent,
    /// The baseline when it was last looked at, transactions a second.
    level: f64,
}

impl Bench<'_> {
    /// One round of one kind of work, again while the baseline moves.
    fn round(&mut self, work: Work, n: u32, step: &Step) -> Result<Round> {
        let mut steadiest: Option<Round> = None;
        for discarded in 0..self.extent.attempts {
            let samples = self.samples(work, n as usize, step)?;
            let level = self.baseline()?;
            let drift = (level / self.level - 1.0).abs();
            self.level = level;
            let known = steadiest.as_ref().map_or(f64::INFINITY, |round| round.drift);
            if drift < known {
                steadiest = Some(Round { work, millis: self.extent.millis, samples, drift, discarded: 0 });
            }
            if let Some(round) = steadiest.as_mut() {
                round.discarded = discarded;
                if round.drift <= DRIFT {
                    break;
                }
            }
        }
        steadiest.context("a baseline that is no number")
    }

    /// A kind of work in every mode that can do it.
    fn samples(&self, work: Work, n: usize, step: &Step) -> Result<Vec<(Mode, Sample)>> {
        let can = |pair: &&&Pair| !work.is_through_service() || pair.has_services();
        let mut pairs: Vec<&Pair> = self.pairs.iter().filter(can).copied().collect();
        // Another mode is first each time, and in odd rounds the order is the other way round: nobody always comes
        // after the same neighbour.
        let turn = (n / 2 * 5 + work as usize) % pairs.len().max(1);
        pairs.rotate_left(turn);
        if n % 2 == 1 {
            pairs.reverse();
        }
        let sample = |pair: &Pair| {
            let what = || format!("{} in mode {}, round {}", work.metrics()[0].name, pair.mode.name(), n + 1);
            step.note(&what());
            let sample = measure::run(pair, work, self.block.family, self.block.variant, self.extent.millis);
            Ok((pair.mode, sample.with_context(what)?))
        };
        pairs.into_iter().map(sample).collect()
    }

    fn baseline(&self) -> Result<f64> {
        let pair = self.pairs.first().context("no mode to measure")?;
        let sample =
            measure::run(pair, Work::TcpRr, self.block.family, self.block.variant, self.extent.millis);
        Ok(sample.context("the baseline")?.values[0])
    }
}
