//! Traffic by peer and by endpoint: whose packets are counted in which slot, and what the slots hold.

use std::{collections::BTreeMap, ops::AddAssign};

use aya::{
    Pod,
    maps::{MapData, MapError, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};
use loden_ebpf::{
    abi::{Endpoint, EndpointTraffic, TRAFFIC_BYTES_MAX, TRAFFIC_SLOTS_MAX, Traffic},
    reason::Reason,
};

use super::{DataplaneError, Mapped, batch::Batches, mapped::subnet, tables::Tables};

/// Where no more than one slot of so many is asked for, each is read by itself.
const SPARSE: usize = 16;

/// What the programs counted, summed over the CPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted<K, T> {
    /// By peer or by endpoint.
    pub each: BTreeMap<K, T>,
    /// Of all together that have no slot of their own.
    pub others: T,
}

impl<K, T: Default> Default for Counted<K, T> {
    fn default() -> Self {
        Self { each: BTreeMap::new(), others: T::default() }
    }
}

/// Why packets of an endpoint were handed to the host stack: the most frequent reason first, those without packets
/// left out.
#[must_use]
pub fn slow_reasons(traffic: &EndpointTraffic) -> Vec<(Reason, u64)> {
    let packets = |reason: &Reason| (*reason, traffic.slow[*reason as usize]);
    let mut reasons: Vec<_> = Reason::ALL.iter().map(packets).filter(|(_, packets)| *packets > 0).collect();
    reasons.sort_by_key(|(_, packets)| std::cmp::Reverse(*packets));
    reasons
}

/// Slots of a traffic map: one for each that may come, and the common one, as far as the memory goes.
pub(super) fn slots(wanted: u32, value_size: usize, cpus: usize) -> u32 {
    let affordable = TRAFFIC_BYTES_MAX / (value_size * cpus.max(1));
    wanted.saturating_add(1).min(TRAFFIC_SLOTS_MAX).min(u32::try_from(affordable).unwrap_or(u32::MAX)).max(1)
}

/// CPUs that may come to be, each of which has counters of its own.
///
/// # Errors
///
/// Where the kernel does not tell.
pub(super) fn cpus() -> Result<usize, DataplaneError> {
    nr_cpus().map_err(|(path, error)| DataplaneError::Load(anyhow::anyhow!("{path}: {error}")))
}

/// The slots that are free; 0 is common and never given out.
pub(super) struct Free(std::vec::IntoIter<u16>);

impl Free {
    pub(super) fn new(slots: u32, taken: impl Iterator<Item = u16>) -> Self {
        let last = u16::try_from(slots.saturating_sub(1)).unwrap_or(u16::MAX);
        let mut free = vec![true; usize::from(u16::MAX) + 1];
        taken.for_each(|slot| free[usize::from(slot)] = false);
        Self((1..=last).filter(|slot| free[usize::from(*slot)]).collect::<Vec<_>>().into_iter())
    }
}

impl<F: Mapped> Tables<F> {
    /// The slot for a peer that has none yet, set to zero; 0 where all are taken.
    pub(super) fn new_peer_slot(&mut self, free: &mut Free) -> Result<u16, DataplaneError> {
        give(&mut self.peer_traffic, free, F::NAMES.peer_traffic)
    }

    /// The same for an endpoint.
    pub(super) fn new_endpoint_slot(&mut self, free: &mut Free) -> Result<u16, DataplaneError> {
        give(&mut self.endpoint_traffic, free, F::NAMES.endpoint_traffic)
    }

    pub(super) fn free_peer_slots(&self) -> Free {
        Free::new(self.peer_traffic.len(), self.peers_held.values().map(|peer| peer.traffic))
    }

    pub(super) fn free_endpoint_slots(&self) -> Free {
        Free::new(self.endpoint_traffic.len(), self.endpoints_held.values().map(|endpoint| endpoint.traffic))
    }

    /// Traffic by the peers' subnets, since each came.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn peer_traffic(&self) -> Result<Counted<F::Net, Traffic>, DataplaneError> {
        // A subnet of several grid slots has one slot here.
        let peers: BTreeMap<F::Net, u16> =
            self.peers_held.values().map(|peer| (subnet::<F>(peer), peer.traffic)).collect();
        read(&self.peer_traffic, &self.peer_traffic_at_once, peers.into_iter(), F::NAMES.peer_traffic)
    }

    /// Traffic by endpoint, since each came.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn endpoint_traffic(&self) -> Result<Counted<F::Addr, EndpointTraffic>, DataplaneError> {
        let slot = |(address, endpoint): (&F::Addr, &Endpoint<F::Octets>)| (*address, endpoint.traffic);
        let slots = self.endpoints_held.iter().map(slot);
        read(&self.endpoint_traffic, &self.endpoint_traffic_at_once, slots, F::NAMES.endpoint_traffic)
    }
}

fn give<T: Pod + Default>(
    traffic: &mut PerCpuArray<MapData, T>,
    free: &mut Free,
    name: &'static str,
) -> Result<u16, DataplaneError> {
    let Some(slot) = free.0.next() else { return Ok(0) };
    let at = |source| DataplaneError::Map { map: name, source };
    let zero = PerCpuValues::try_from(vec![T::default(); cpus()?]).map_err(|error| at(error.into()))?;
    traffic.set(u32::from(slot), zero, 0).map_err(at)?;
    Ok(slot)
}

fn read<K: Ord, T: Pod + Default + AddAssign>(
    traffic: &PerCpuArray<MapData, T>,
    at_once: &Batches<u32, T>,
    slots: impl Iterator<Item = (K, u16)>,
    name: &'static str,
) -> Result<Counted<K, T>, DataplaneError> {
    let slots: Vec<(K, u16)> = slots.filter(|(_, slot)| *slot != 0).collect();
    let len = traffic.len() as usize;
    // Before Linux 5.13 a refusal.
    let sums = (slots.len() > len / SPARSE).then(|| sums(at_once, len)).and_then(Result::ok);
    let sum = |slot: u16| -> Result<T, DataplaneError> {
        if let Some(sum) = sums.as_ref().and_then(|sums| sums.get(usize::from(slot))) {
            return Ok(*sum);
        }
        let each = traffic.get(&u32::from(slot), 0);
        let each = each.map_err(|source| DataplaneError::Map { map: name, source })?;
        let mut sum = T::default();
        each.iter().for_each(|value| sum += *value);
        Ok(sum)
    };
    let each = slots.into_iter().map(|(key, slot)| Ok((key, sum(slot)?)));
    Ok(Counted { each: each.collect::<Result<_, DataplaneError>>()?, others: sum(0)? })
}

/// All slots, over all CPUs.
fn sums<T: Pod + Default + AddAssign>(at_once: &Batches<u32, T>, slots: usize) -> Result<Vec<T>, MapError> {
    let mut sums = vec![T::default(); slots];
    at_once.for_each(|slot, value| {
        if let Some(sum) = sums.get_mut(slot as usize) {
            *sum += value;
        }
    })?;
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_slot_for_each_and_the_common_one_while_the_memory_lasts() {
        let (peer, endpoint) = (size_of::<Traffic>(), size_of::<EndpointTraffic>());
        assert_eq!(slots(256, peer, 2), 257);
        assert_eq!(slots(65_536, peer, 2), 65_536, "more have no number");
        assert_eq!(slots(1 << 20, peer, 64), 8192);
        assert_eq!(slots(65_536, endpoint, 64), 1024);
        assert_eq!(slots(256, endpoint, 1 << 20), 1, "all in common");
    }

    #[test]
    fn slots_are_given_out_once_and_the_common_one_never() {
        let mut free = Free::new(4, [0, 2].into_iter());
        assert_eq!(free.0.by_ref().collect::<Vec<_>>(), [1, 3]);
        assert_eq!(Free::new(1, [].into_iter()).0.next(), None);
        assert_eq!(Free::new(65_536, [].into_iter()).0.last(), Some(65_535));
    }

    #[test]
    fn the_reason_of_most_packets_comes_first() {
        let mut traffic = EndpointTraffic::default();
        traffic.slow[Reason::PassPodGate as usize] = 3;
        traffic.slow[Reason::PassPodNoPeer as usize] = 9;
        assert_eq!(slow_reasons(&traffic), [(Reason::PassPodNoPeer, 9), (Reason::PassPodGate, 3)]);
    }
}
