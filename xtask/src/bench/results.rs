//! What was measured, round by round, and what follows from it.

use std::collections::BTreeMap;

use super::{Variant, measure::Sample, mode::Mode, statistics::Median, work::Work};

/// A run's results.
#[derive(Debug)]
pub(super) struct Results {
    pub(super) sections: Vec<Section>,
    pub(super) millis: u64,
    pub(super) rounds: u32,
}

/// The results of one variant.
#[derive(Debug)]
pub(super) struct Section {
    pub(super) variant: Variant,
    /// A sample a round, in the order of the rounds.
    samples: BTreeMap<(Work, Mode), Vec<Sample>>,
}

impl Section {
    pub(super) fn new(variant: Variant) -> Self {
        Self { variant, samples: BTreeMap::new() }
    }

    pub(super) fn add(&mut self, work: Work, mode: Mode, sample: Sample) {
        self.samples.entry((work, mode)).or_default().push(sample);
    }

    /// What was done, each once, in order.
    pub(super) fn works(&self) -> Vec<Work> {
        let mut works: Vec<Work> = self.samples.keys().map(|(work, _)| *work).collect();
        works.dedup();
        works
    }

    /// The modes in which it was done, in order.
    pub(super) fn modes(&self, work: Work) -> Vec<Mode> {
        self.samples.keys().filter(|(other, _)| *other == work).map(|(_, mode)| *mode).collect()
    }

    pub(super) fn samples(&self, work: Work, mode: Mode) -> &[Sample] {
        self.samples.get(&(work, mode)).map_or(&[], Vec::as_slice)
    }

    /// The median of a metric over the rounds.
    pub(super) fn value(&self, work: Work, mode: Mode, metric: usize) -> Median {
        Median::of(self.samples(work, mode).iter().map(|sample| sample.values[metric]).collect())
    }

    /// The median of the rounds' own ratios of a metric; `None` where one of both was not measured.
    pub(super) fn ratio(&self, work: Work, mode: Mode, to: Mode, metric: usize) -> Option<Median> {
        let (these, those) = (self.samples(work, mode), self.samples(work, to));
        if these.is_empty() || those.is_empty() || mode == to {
            return None;
        }
        let ratios = these.iter().zip(those).map(|(this, that)| this.values[metric] / that.values[metric]);
        Some(Median::of(ratios.collect()))
    }
}
