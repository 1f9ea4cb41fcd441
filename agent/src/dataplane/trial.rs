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

use super::{DataplaneError, Mapped, Program, Settings, load};

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
    pub fn set_peer<F: Mapped>(&mut self, slot: u32, peer: Peer<F::Octets>) -> Result<()> {
        let names = F::NAMES;
        let map = self.ebpf.map_mut(names.vteps).context(names.vteps)?;
        let vtep = F::key(F::of_octets(peer.vtep));
        HashMap::<_, F::AddressKey, u32>::try_from(map)?.insert(vtep, 1, 0)?;
        let map = self.ebpf.map_mut(names.peers).context(names.peers)?;
        Ok(Array::<_, Peer<F::Octets>>::try_from(map)?.set(slot, peer, 0)?)
    }

    /// Puts endpoints of the own subnet at their addresses; once.
    ///
    /// # Errors
    ///
    /// Where the map cannot be written.
    pub fn set_endpoints<F: Mapped>(
        &mut self,
        subnet: F::Net,
        endpoints: impl IntoIterator<Item = Endpoint<F::Octets>>,
    ) -> Result<()> {
        let name = F::NAMES.endpoints;
        let mut map = F::open_endpoints(self.ebpf.take_map(name).context(name)?)?;
        for endpoint in endpoints {
            F::set_endpoint(&mut map, subnet, F::of_octets(endpoint.address), Some(endpoint))?;
        }
        Ok(())
    }

    /// Sets the epoch, and what is known of a flow.
    ///
    /// # Errors
    ///
    /// Where a map cannot be written.
    pub fn set_flow<F: Mapped>(
        &mut self,
        epoch: u32,
        flow: Option<(FlowKey<F::Octets>, Flow)>,
    ) -> Result<()> {
        let map = self.ebpf.map_mut(map::EPOCH).context(map::EPOCH)?;
        Array::<_, u32>::try_from(map)?.set(0, epoch, 0)?;
        let Some((key, flow)) = flow else { return Ok(()) };
        let map = self.ebpf.map_mut(F::NAMES.flows).context(F::NAMES.flows)?;
        Ok(HashMap::<_, FlowKey<F::Octets>, Flow>::try_from(map)?.insert(&key, &flow, 0)?)
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
/// (`convert___skb_to_skb` in net/bpf/test_run.c). So must `ingress_ifindex`, which no program reads, on Linux 5.10.
fn context(ifindex: u32) -> [u8; 192] {
    const IFINDEX: usize = 40;
    let mut bytes = [0; 192];
    bytes[IFINDEX..IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
    bytes
}
