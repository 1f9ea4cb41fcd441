//! What the programs and maps say of themselves, for people.

use std::collections::BTreeSet;

use aya::programs::{ProgramInfo, SchedClassifier, Xdp};
use ipnet::Ipv4Net;
use loden_ebpf::abi::{FLOWS_MAX, VTEPS_MAX, map};

use super::{Dataplane, Direction, Program, traffic};

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

    /// The subnets of direct peers.
    #[must_use]
    pub fn direct_peers(&self) -> BTreeSet<Ipv4Net> {
        self.peers_held.values().filter(|peer| peer.direct == 1).map(traffic::subnet).collect()
    }

    /// Entries in use and at most, by map. Flows are counted one by one: a hundred thousand take tens of milliseconds.
    #[must_use]
    pub fn fill(&self) -> Vec<(&'static str, u64, u64)> {
        let vteps: BTreeSet<[u8; 4]> = self.peers_held.values().map(|peer| peer.vtep).collect();
        let (peers, endpoints) = (self.peers_held.len(), self.endpoints_held.len());
        let counted = |slots: &mut dyn Iterator<Item = u16>| slots.collect::<BTreeSet<_>>().len();
        let own = |slot: &u16| *slot != 0;
        vec![
            (map::PEERS, peers as u64, u64::from(self.peers.len())),
            (map::VTEPS, vteps.len() as u64, VTEPS_MAX as u64),
            (map::ENDPOINTS, endpoints as u64, u64::from(self.endpoints.len())),
            (map::FLOWS, self.flows.keys().filter(Result::is_ok).count() as u64, FLOWS_MAX as u64),
            (
                map::PEER_TRAFFIC,
                counted(&mut self.peers_held.values().map(|peer| peer.traffic).filter(own)) as u64,
                u64::from(self.peer_traffic.len()),
            ),
            (
                map::ENDPOINT_TRAFFIC,
                counted(&mut self.endpoints_held.values().map(|endpoint| endpoint.traffic).filter(own))
                    as u64,
                u64::from(self.endpoint_traffic.len()),
            ),
        ]
    }
}
