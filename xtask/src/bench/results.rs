//! What was measured, round by round, and what follows from it.

use std::{
    fs,
    hash::{DefaultHasher, Hasher as _},
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    measure::Sample,
    mode::Mode,
    plan::{Family, Variant},
    rounds::DRIFT,
    statistics::Median,
    work::Work,
};

/// Where figures are from: what can be compared, and shown as one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Origin {
    /// Kernel and CPUs.
    pub(super) machine: String,
    /// Tells builds of the agent, and so of its programs, apart.
    agent: String,
}

impl Origin {
    /// This machine, with this agent.
    ///
    /// # Errors
    ///
    /// Where the kernel does not tell, or there is no such binary.
    pub(super) fn here(agent: &Path) -> Result<Self> {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let version = release.trim().split('.').take(2).collect::<Vec<_>>().join(".");
        let cpus = fs::read_to_string("/proc/cpuinfo")?;
        let models: Vec<_> = cpus.lines().filter_map(|line| line.strip_prefix("model name")).collect();
        let model = models.first().and_then(|line| line.split(':').nth(1)).unwrap_or("unknown kind").trim();
        let mut hasher = DefaultHasher::new();
        hasher.write(&fs::read(agent).with_context(|| agent.display().to_string())?);
        let machine = format!("Linux {version}, {} CPUs: {model}", models.len());
        Ok(Self { machine, agent: format!("{:016x}", hasher.finish()) })
    }
}

/// A file with results of one origin, to which later runs may add.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Stored<T> {
    #[serde(flatten)]
    pub(super) origin: Origin,
    pub(super) results: T,
}

impl<T: Serialize + DeserializeOwned> Stored<T> {
    /// What the file holds.
    ///
    /// # Errors
    ///
    /// Where it is there and cannot be read.
    pub(super) fn load(file: &Path) -> Result<Option<Self>> {
        if !file.exists() {
            return Ok(None);
        }
        let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
        let what = || format!("{} is of another version: remove it", file.display());
        serde_json::from_str(&text).map(Some).with_context(what)
    }

    /// Writes the file.
    ///
    /// # Errors
    ///
    /// Where that is not possible.
    pub(super) fn save(&self, file: &Path) -> Result<()> {
        if let Some(directory) = file.parent() {
            fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        }
        let text = serde_json::to_string(self)? + "\n";
        fs::write(file, text).with_context(|| file.display().to_string())
    }

    /// Looks whether results of this origin can be added to the file.
    ///
    /// # Errors
    ///
    /// Where it holds others.
    pub(super) fn ensure_from(file: &Path, origin: &Origin) -> Result<()> {
        let Some(stored) = Self::load(file)? else { return Ok(()) };
        ensure!(
            stored.origin == *origin,
            "{} holds results of another machine or build: {:?}; these are {origin:?}",
            file.display(),
            stored.origin
        );
        Ok(())
    }
}

/// The results of one family and variant.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Section {
    pub(super) family: Family,
    pub(super) variant: Variant,
    pub(super) rounds: Vec<Round>,
}

/// A kind of work, once in each of some modes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Round {
    pub(super) work: Work,
    /// Of each measurement.
    pub(super) millis: u64,
    pub(super) samples: Vec<(Mode, Sample)>,
    /// How far the baseline had moved at its end, as a part of what it was.
    pub(super) drift: f64,
    /// How many rounds in its place did not count.
    pub(super) discarded: u32,
}

impl Round {
    fn sample(&self, mode: Mode) -> Option<&Sample> {
        self.samples.iter().find(|(other, _)| *other == mode).map(|(_, sample)| sample)
    }
}

/// Puts results beside others of the same family and variant.
pub(super) fn merge(into: &mut Vec<Section>, more: Vec<Section>) {
    for section in more {
        let same = |other: &&mut Section| (other.family, other.variant) == (section.family, section.variant);
        match into.iter_mut().find(same) {
            Some(known) => known.rounds.extend(section.rounds),
            None => into.push(section),
        }
    }
    into.sort_by_key(|section| (section.family, section.variant));
}

impl Section {
    /// What was done, each once, in order.
    pub(super) fn works(&self) -> Vec<Work> {
        let mut works: Vec<Work> = self.rounds.iter().map(|round| round.work).collect();
        works.sort_unstable();
        works.dedup();
        works
    }

    /// The modes in which it was done, in order.
    pub(super) fn modes(&self, work: Work) -> Vec<Mode> {
        let samples = self.rounds.iter().filter(|round| round.work == work).flat_map(|round| &round.samples);
        let mut modes: Vec<Mode> = samples.map(|(mode, _)| *mode).collect();
        modes.sort_unstable();
        modes.dedup();
        modes
    }

    pub(super) fn samples(&self, work: Work, mode: Mode) -> Vec<&Sample> {
        self.rounds.iter().filter(|round| round.work == work).filter_map(|round| round.sample(mode)).collect()
    }

    /// The median of a metric over the rounds.
    pub(super) fn value(&self, work: Work, mode: Mode, metric: usize) -> Median {
        Median::of(self.samples(work, mode).iter().map(|sample| sample.values[metric]).collect())
    }

    /// The median of a unit's CPU time, microseconds.
    pub(super) fn cpu_micros(&self, work: Work, mode: Mode) -> f64 {
        Median::of(self.samples(work, mode).iter().map(|sample| sample.cpu_micros).collect()).value
    }

    /// TCP segments sent again in all rounds.
    pub(super) fn resent(&self, work: Work, mode: Mode) -> u64 {
        self.samples(work, mode).iter().map(|sample| sample.retransmitted).sum()
    }

    /// The median of the rounds' own ratios of a metric; `None` where no round has both.
    pub(super) fn ratio(&self, work: Work, mode: Mode, to: Mode, metric: usize) -> Option<Median> {
        if mode == to {
            return None;
        }
        let rounds = self.rounds.iter().filter(|round| round.work == work);
        let ratio =
            |round: &Round| Some(round.sample(mode)?.values[metric] / round.sample(to)?.values[metric]);
        let ratios: Vec<f64> = rounds.filter_map(ratio).collect();
        (!ratios.is_empty()).then(|| Median::of(ratios))
    }

    /// Rounds that did not count.
    pub(super) fn discarded(&self) -> u32 {
        self.rounds.iter().map(|round| round.discarded).sum()
    }

    /// How much was measured, and how steady the machine was.
    pub(super) fn extent(&self) -> String {
        let span = |mut values: Vec<u64>| {
            values.sort_unstable();
            match (values.first(), values.last()) {
                (Some(first), Some(last)) if first != last => format!("{first} to {last}"),
                (first, _) => first.copied().unwrap_or_default().to_string(),
            }
        };
        let of = |work| self.rounds.iter().filter(|round| round.work == work).count() as u64;
        let rounds = span(self.works().into_iter().map(of).collect());
        let millis = span(self.rounds.iter().map(|round| round.millis).collect());
        let mut text = format!("{rounds} rounds of {millis} ms");
        let percent = DRIFT * 100.0;
        let moved = self.rounds.iter().filter(|round| round.drift > DRIFT).count();
        if self.discarded() > 0 {
            text += &format!(
                "; {} of {} were discarded because the baseline moved by more than {percent:.0} % in them",
                self.discarded(),
                self.rounds.len() as u64 + u64::from(self.discarded()),
            );
        }
        if moved > 0 {
            text += &format!("; in {moved} that count it did so at every attempt");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(rates: &[(Mode, f64)]) -> Round {
        let sample =
            |rate| Sample { values: vec![rate], cpu_micros: 1.0, retransmitted: 0, lost: 0, share: None };
        let samples = rates.iter().map(|(mode, rate)| (*mode, sample(*rate))).collect();
        Round { work: Work::TcpRr, millis: 1, samples, drift: 0.0, discarded: 1 }
    }

    fn section(variant: Variant, rounds: Vec<Round>) -> Section {
        Section { family: Family::V4, variant, rounds }
    }

    #[test]
    fn what_is_added_later_is_compared_within_its_own_rounds() {
        let mut all = vec![section(Variant::OneCpu, vec![round(&[(Mode::Open, 4.0), (Mode::Flannel, 2.0)])])];
        let more = vec![
            section(Variant::TwoCpus, vec![round(&[(Mode::Open, 1.0)])]),
            section(Variant::OneCpu, vec![round(&[(Mode::Open, 9.0), (Mode::Strict, 3.0)])]),
        ];
        merge(&mut all, more);
        assert_eq!(all.len(), 2);
        let ratio = |mode, to| all[0].ratio(Work::TcpRr, mode, to, 0).map(|median| median.value);
        assert_eq!(ratio(Mode::Open, Mode::Flannel), Some(2.0));
        assert_eq!(ratio(Mode::Open, Mode::Strict), Some(3.0));
        assert_eq!(ratio(Mode::Strict, Mode::Flannel), None, "never in one round");
        assert_eq!(all[0].modes(Work::TcpRr), [Mode::Open, Mode::Strict, Mode::Flannel]);
        assert_eq!(all[0].discarded(), 2);
    }

    #[test]
    fn results_of_another_build_are_not_added_to() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("rates.json");
        let origin = |agent: &str| Origin { machine: "m".to_owned(), agent: agent.to_owned() };
        let stored =
            Stored { origin: origin("a"), results: vec![section(Variant::OneCpu, vec![round(&[])])] };
        Stored::<Vec<Section>>::ensure_from(&file, &origin("a")).expect("nothing there");
        stored.save(&file).expect("saved");
        Stored::<Vec<Section>>::ensure_from(&file, &origin("a")).expect("the same");
        let refused = Stored::<Vec<Section>>::ensure_from(&file, &origin("b")).expect_err("another build");
        assert!(refused.to_string().contains("another machine or build"), "{refused}");
    }
}
