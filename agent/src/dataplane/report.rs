//! What the programs and maps say of themselves, for people.

use std::collections::BTreeSet;

use aya::programs::{ProgramInfo, SchedClassifier, Xdp};
use loden_ebpf::abi::{FLOWS_MAX, VTEPS_MAX, way};

use super::{Dataplane, Direction, Mapped, Program, mapped::subnet, tables::Tables};

/// A program that the kernel has loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Which.
    pub program: Program,
    /// The kernel's id of it.
    pub id: u32,
    /// The kernel's hash of its instructions.
    pub tag: u64,
    /// At how many interfaces it runs.
    pub interfaces: usize,
}

impl Dataplane {
    /// The programs, as far as the kernel tells of them.
    #[must_use]
    pub fn loaded(&self) -> Vec<Loaded> {
        let info = |program: Program| -> Option<ProgramInfo> {
            let found = self.ebpf.program(program.name())?;
            if program.direction() == Direction::Driver {
                <&Xdp>::try_from(found).ok()?.info().ok()
            } else {
                <&SchedClassifier>::try_from(found).ok()?.info().ok()
            }
        };
        let loaded = |program: &Program| {
            let info = info(*program)?;
            let interfaces = self.hooks.keys().filter(|hook| hook.program == *program).count();
            Some(Loaded { program: *program, id: info.id(), tag: info.tag(), interfaces })
        };
        Program::ALL.iter().filter_map(loaded).collect()
    }

    /// Entries in use and at most, by map; without those of a family that the network has not.
    #[must_use]
    pub fn fill(&self) -> Vec<(&'static str, u64, u64)> {
        let mut fill = self.v4.fill();
        fill.extend(self.v6.fill());
        fill
    }
}

impl<F: Mapped> Tables<F> {
    /// The subnets of direct peers.
    #[must_use]
    pub fn direct_peers(&self) -> BTreeSet<F::Net> {
        self.peers_held.values().filter(|peer| peer.way == way::DIRECT).map(subnet::<F>).collect()
    }

    fn fill(&self) -> Vec<(&'static str, u64, u64)> {
        let Some(settings) = &self.settings else { return Vec::new() };
        let vteps: BTreeSet<F::Octets> = self.peers_held.values().map(|peer| peer.vtep).collect();
        let (peers, endpoints) = (self.peers_held.len(), self.endpoints_held.len());
        let endpoints_max = F::endpoint_slots(settings).map_or(0, |(slots, _)| slots);
        let counted = |slots: &mut dyn Iterator<Item = u16>| slots.collect::<BTreeSet<_>>().len();
        let own = |slot: &u16| *slot != 0;
        let names = F::NAMES;
        vec![
            (names.peers, peers as u64, u64::from(self.peers.len())),
            (names.vteps, vteps.len() as u64, VTEPS_MAX as u64),
            (names.endpoints, endpoints as u64, u64::from(endpoints_max)),
            (names.flows, self.flows_at_once.count().unwrap_or_default(), FLOWS_MAX as u64),
            (
                names.peer_traffic,
                counted(&mut self.peers_held.values().map(|peer| peer.traffic).filter(own)) as u64,
                u64::from(self.peer_traffic.len()),
            ),
            (
                names.endpoint_traffic,
                counted(&mut self.endpoints_held.values().map(|endpoint| endpoint.traffic).filter(own))
                    as u64,
                u64::from(self.endpoint_traffic.len()),
            ),
        ]
    }
}
