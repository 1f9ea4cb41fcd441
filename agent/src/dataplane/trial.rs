//! A private copy of the programs, for a trial run on one packet (`BPF_PROG_TEST_RUN`): the programs themselves answer
//! what they would do, and nothing of the node sees it.

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{Array, HashMap, PerCpuArray},
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use loden_ebpf::{
    abi::{Counter, Endpoint, Flow, FlowKey, Peer, map},
    reason::Reason,
};

use super::{DataplaneError, Program, Settings, load};

/// Loaded programs with maps of their own, empty at first and attached nowhere.
pub struct Trial {
    ebpf: Ebpf,
}

impl Trial {
    /// Loads them.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn load(settings: &Settings) -> Result<Self, DataplaneError> {
        Ok(Self { ebpf: load::load(settings, None)? })
    }

    /// Puts a peer into its slot.
    ///
    /// # Errors
    ///
    /// Where the map cannot be written.
    pub fn set_peer(&mut self, slot: u32, peer: Peer) -> Result<()> {
        let map = self.ebpf.map_mut(map::VTEPS).context(map::VTEPS)?;
        HashMap::<_, [u8; 4], u32>::try_from(map)?.insert(&peer.vtep, &1, 0)?;
        let map = self.ebpf.map_mut(map::PEERS).context(map::PEERS)?;
        Ok(Array::<_, Peer>::try_from(map)?.set(slot, peer, 0)?)
    }

    /// Puts an endpoint at its offset in the own subnet.
    ///
    /// # Errors
    ///
    /// Where the map cannot be written.
    pub fn set_endpoint(&mut self, offset: u32, endpoint: Endpoint) -> Result<()> {
        let map = self.ebpf.map_mut(map::ENDPOINTS).context(map::ENDPOINTS)?;
        Ok(Array::<_, Endpoint>::try_from(map)?.set(offset, endpoint, 0)?)
    }

    /// Sets the epoch, and what is known of a flow.
    ///
    /// # Errors
    ///
    /// Where a map cannot be written.
    pub fn set_flow(&mut self, epoch: u32, flow: Option<(FlowKey, Flow)>) -> Result<()> {
        let map = self.ebpf.map_mut(map::EPOCH).context(map::EPOCH)?;
        Array::<_, u32>::try_from(map)?.set(0, epoch, 0)?;
        let Some((key, flow)) = flow else { return Ok(()) };
        let map = self.ebpf.map_mut(map::FLOWS).context(map::FLOWS)?;
        Ok(HashMap::<_, FlowKey, Flow>::try_from(map)?.insert(&key, &flow, 0)?)
    }

    /// Runs a program on a frame that it might have got at this interface: the reason of its verdict, `None` where the
    /// frame is none of its business.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses the run.
    pub fn run(&mut self, program: Program, frame: &[u8], ifindex: u32) -> Result<Option<Reason>> {
        let before = self.counted()?;
        let name = program.name();
        let classifier: &mut SchedClassifier =
            self.ebpf.program_mut(name).with_context(|| format!("no program {name}"))?.try_into()?;
        let context = context(ifindex);
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.ctx_in = Some(&context);
        classifier
            .test_run(options)
            .with_context(|| format!("the kernel refuses a trial run of {name} on {} bytes", frame.len()))?;
        let after = self.counted()?;
        let counted = Reason::ALL.iter().zip(before.iter().zip(&after));
        Ok(counted.filter(|(_, (before, after))| before != after).map(|(reason, _)| *reason).next())
    }

    pub(super) fn ebpf(&self) -> &Ebpf {
        &self.ebpf
    }

    fn counted(&self) -> Result<Vec<u64>> {
        let map = self.ebpf.map(map::COUNTERS).context(map::COUNTERS)?;
        let counters = PerCpuArray::<_, Counter>::try_from(map)?;
        let sum = |reason: &Reason| -> Result<u64> {
            Ok(counters.get(&(*reason as u32), 0)?.iter().map(|counter| counter.packets).sum())
        };
        Reason::ALL.iter().map(sum).collect()
    }
}

/// `struct __sk_buff` (linux/bpf.h) of a frame that this interface has received; all else must be zero
/// (`convert___skb_to_skb` in net/bpf/test_run.c).
fn context(ifindex: u32) -> [u8; 192] {
    const INGRESS_IFINDEX: usize = 36;
    const IFINDEX: usize = 40;
    let mut bytes = [0; 192];
    for at in [INGRESS_IFINDEX, IFINDEX] {
        bytes[at..at + 4].copy_from_slice(&ifindex.to_ne_bytes());
    }
    bytes
}
