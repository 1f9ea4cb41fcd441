//! What must be reached, as ratios with both ends on one CPU.

use anyhow::{Result, ensure};

use super::{
    mode::Mode,
    plan::{Family, Variant},
    results::Section,
    statistics::Median,
    work::Work,
};

/// A ratio that a mode must reach in some work.
#[derive(Clone, Copy, Debug)]
pub(super) struct Goal {
    pub(super) family: Family,
    pub(super) work: Work,
    pub(super) mode: Mode,
    pub(super) to: Mode,
    pub(super) least: f64,
}

/// All of them, the ones to the limit first.
pub(super) const GOALS: &[Goal] = &[
    goal(Work::TcpRr, Mode::Open, Mode::Host, 0.85),
    goal(Work::TcpRr, Mode::Open, Mode::Flannel, 1.80),
    goal(Work::TcpRr, Mode::Open, Mode::Direct, 0.95),
    goal(Work::TcpCrr, Mode::Open, Mode::Host, 0.88),
    goal(Work::TcpCrr, Mode::Open, Mode::Flannel, 1.65),
    goal(Work::TcpCrr, Mode::Open, Mode::Direct, 0.95),
    goal(Work::UdpRr, Mode::Open, Mode::Host, 0.82),
    goal(Work::UdpRr, Mode::Open, Mode::Flannel, 1.75),
    goal(Work::UdpRr, Mode::Open, Mode::Direct, 0.95),
    goal(Work::TcpStream, Mode::Open, Mode::Host, 0.98),
    goal(Work::TcpStream, Mode::Open, Mode::Flannel, 1.35),
    goal(Work::TcpStream, Mode::Open, Mode::Direct, 0.95),
    goal(Work::TcpRr, Mode::Strict, Mode::Host, 0.85),
    goal(Work::TcpRr, Mode::Strict, Mode::Flannel, 1.80),
    goal(Work::UdpRr, Mode::Strict, Mode::Host, 0.82),
    goal(Work::UdpRr, Mode::Strict, Mode::Flannel, 1.75),
    goal(Work::TcpStream, Mode::Strict, Mode::Host, 0.98),
    goal(Work::TcpStream, Mode::Strict, Mode::Flannel, 1.35),
    goal(Work::TcpCrr, Mode::Strict, Mode::Flannel, 0.97),
    goal(Work::VipTcpRr, Mode::Open, Mode::Flannel, 0.97),
    goal(Work::VipTcpCrr, Mode::Open, Mode::Flannel, 0.97),
    goal(Work::VipTcpRr, Mode::Strict, Mode::Flannel, 0.97),
    goal(Work::VipTcpCrr, Mode::Strict, Mode::Flannel, 0.97),
    goal(Work::TcpCrr, Mode::Open5000, Mode::Flannel5000, 1.65),
    goal6(Work::TcpRr, Mode::Open, Mode::Flannel, 1.80),
    goal6(Work::TcpStream, Mode::Open, Mode::Flannel, 1.35),
];

const fn goal(work: Work, mode: Mode, to: Mode, least: f64) -> Goal {
    Goal { family: Family::V4, work, mode, to, least }
}

/// What is to be reached by IPv6 is what is to be reached by IPv4.
const fn goal6(work: Work, mode: Mode, to: Mode, least: f64) -> Goal {
    Goal { family: Family::V6, work, mode, to, least }
}

impl Goal {
    /// What was measured of it, where it was.
    pub(super) fn measured(&self, section: &Section) -> Option<Median> {
        let is_meant = (section.family, section.variant) == (self.family, Variant::OneCpu);
        is_meant.then(|| section.ratio(self.work, self.mode, self.to, 0))?
    }

    /// Of a goal beside bare hosts: the same beside hosts with the rules that the mode's own nodes have.
    pub(super) fn beside_rules(&self, section: &Section) -> Option<Median> {
        (self.to == Mode::Host).then(|| Self { to: Mode::HostRules, ..*self }.measured(section))?
    }

    /// The same of programs that only redirect: no program behind a veth gets more.
    pub(super) fn bound(&self, section: &Section) -> Option<Median> {
        Self { mode: Mode::Redirect, ..*self }.measured(section)
    }

    /// What is compared.
    pub(super) fn title(&self) -> String {
        let name = self.work.metrics()[0].name;
        let family = if self.family == Family::V6 { " over IPv6" } else { "" };
        format!("{name}{family}: {} to {}", self.mode.name(), self.to.name())
    }

    pub(super) fn text(&self) -> String {
        format!("{} at least {:.2}", self.title(), self.least)
    }
}

/// Machines are noisy: only what is under half of its goal, beyond all doubt, is a failure.
///
/// # Errors
///
/// All of those, in one message.
pub(super) fn no_collapse(sections: &[Section]) -> Result<()> {
    let mut failures = Vec::new();
    for section in sections {
        for goal in GOALS {
            let Some(median) = goal.measured(section) else { continue };
            if median.high < goal.least / 2.0 {
                failures.push(format!("{} is {:.2}", goal.text(), median.value));
            }
        }
    }
    ensure!(failures.is_empty(), "under half of what must be reached: {}", failures.join("; "));
    Ok(())
}
