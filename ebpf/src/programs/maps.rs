//! The maps. Sizes that depend on the network config are set by the agent when it loads the programs.

use aya_ebpf::{
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
    helpers::{bpf_jiffies64, bpf_ktime_get_ns},
    macros::btf_map,
};
use loden_ebpf::{
    abi::{
        Address, Counter, ENDPOINT_SLOTS_V6, ENDPOINTS_MAX, Endpoint, EndpointTraffic, FLOWS_MAX, Flow,
        FlowKey, Octets, PEERS_MAX, PEERS_MAX_V6, Peer, SIGHTINGS_MAX, Sighting, SightingKey, SightingKeyV6,
        TRAFFIC_SLOTS_MAX, Traffic, VTEPS_MAX,
    },
    flow_cache::{Note, SLOTS, State},
    reason::COUNT,
    trace::{RING_BYTES, TRACERS_MAX, Tally, Traced, Tracer},
};

/// `BPF_F_NO_PREALLOC`: memory for entries that exist, not for all that could.
const NO_PREALLOC: usize = 1;

#[btf_map]
pub(super) static PEERS: Array<Peer, { PEERS_MAX as usize }> = Array::new();

#[btf_map]
pub(super) static VTEPS: HashMap<[u8; 4], u32, VTEPS_MAX, NO_PREALLOC> = HashMap::new();

#[btf_map]
pub(super) static ENDPOINTS: Array<Endpoint, { ENDPOINTS_MAX as usize }> = Array::new();

#[btf_map]
pub(super) static FLOWS: LruHashMap<FlowKey, Flow, FLOWS_MAX> = LruHashMap::new();

#[btf_map]
pub(super) static EPOCH: Array<u32, 1> = Array::new();

#[btf_map]
pub(super) static FLOW_CACHE: PerCpuArray<Note, { SLOTS as usize }> = PerCpuArray::new();

#[btf_map]
pub(super) static WITHDRAWN: Array<u64, 1> = Array::new();

#[btf_map]
pub(super) static COUNTERS: PerCpuArray<Counter, COUNT> = PerCpuArray::new();

#[btf_map]
pub(super) static PEER_TRAFFIC: PerCpuArray<Traffic, { TRAFFIC_SLOTS_MAX as usize }> = PerCpuArray::new();

#[btf_map]
pub(super) static ENDPOINT_TRAFFIC: PerCpuArray<EndpointTraffic, { TRAFFIC_SLOTS_MAX as usize }> =
    PerCpuArray::new();

#[btf_map]
pub(super) static SIGHTINGS: LruHashMap<SightingKey, Sighting, SIGHTINGS_MAX> = LruHashMap::new();

#[btf_map]
pub(super) static NEW_SIGHTINGS: RingBuf<(), 65_536> = RingBuf::new();

#[btf_map]
pub(super) static TAKEN_TUPLES: RingBuf<(), 65_536> = RingBuf::new();

#[btf_map]
pub(super) static V6_PEERS: Array<Peer<[u8; 16]>, { PEERS_MAX_V6 as usize }> = Array::new();

#[btf_map]
pub(super) static V6_VTEPS: HashMap<Address, u32, VTEPS_MAX, NO_PREALLOC> = HashMap::new();

#[btf_map]
pub(super) static V6_ENDPOINTS: HashMap<
    Address,
    Endpoint<[u8; 16]>,
    { ENDPOINTS_MAX as usize },
    NO_PREALLOC,
> = HashMap::new();

#[btf_map]
pub(super) static V6_FLOWS: LruHashMap<FlowKey<[u8; 16]>, Flow, FLOWS_MAX> = LruHashMap::new();

#[btf_map]
pub(super) static V6_FLOW_CACHE: PerCpuArray<Note<[u64; 5]>, { SLOTS as usize }> = PerCpuArray::new();

#[btf_map]
pub(super) static V6_PEER_TRAFFIC: PerCpuArray<Traffic, { TRAFFIC_SLOTS_MAX as usize }> = PerCpuArray::new();

#[btf_map]
pub(super) static V6_ENDPOINT_TRAFFIC: PerCpuArray<EndpointTraffic, { ENDPOINT_SLOTS_V6 as usize }> =
    PerCpuArray::new();

#[btf_map]
pub(super) static V6_SIGHTINGS: LruHashMap<SightingKeyV6, Sighting, SIGHTINGS_MAX> = LruHashMap::new();

#[btf_map]
pub(super) static TRACING: Array<u32, 1> = Array::new();

#[btf_map]
pub(super) static TRACERS: Array<Tracer, TRACERS_MAX> = Array::new();

#[btf_map]
pub(super) static TRACE_TALLY: PerCpuArray<Tally, TRACERS_MAX> = PerCpuArray::new();

#[btf_map]
pub(super) static VERDICTS_0: RingBuf<(), RING_BYTES> = RingBuf::new();

#[btf_map]
pub(super) static VERDICTS_1: RingBuf<(), RING_BYTES> = RingBuf::new();

#[btf_map]
pub(super) static VERDICTS_2: RingBuf<(), RING_BYTES> = RingBuf::new();

#[btf_map]
pub(super) static VERDICTS_3: RingBuf<(), RING_BYTES> = RingBuf::new();

/// Counts one packet of `len` bytes for the reason of this number.
#[inline(always)]
pub(super) fn count(reason: u32, len: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(reason) {
        // SAFETY: the slot is this CPU's own, and TC programs of one CPU do not interrupt one another.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += u64::from(len);
        }
    }
}

/// What notes in the flow cache are compared with.
#[inline(always)]
pub(super) fn state() -> State {
    State {
        // SAFETY: calls a helper that takes nothing; the verifier makes it a single load.
        tick: unsafe { bpf_jiffies64() },
        epoch: epoch(),
        withdrawn: WITHDRAWN.get(0).copied().unwrap_or(0) as u32,
    }
}

/// Ends what every CPU remembers of flows. The time, because no two CPUs write the same one; a count would take an
/// atomic instruction.
#[inline(always)]
pub(super) fn withdraw() {
    if let Some(withdrawn) = WITHDRAWN.get_ptr_mut(0) {
        // SAFETY: the helper takes nothing; the pointer is valid as long as the map is, and the field is written whole.
        unsafe { *withdrawn = bpf_ktime_get_ns() };
    }
}

/// The epoch of flow entries.
#[inline(always)]
pub(super) fn epoch() -> u32 {
    EPOCH.get(0).copied().unwrap_or(0)
}

/// Tells the agent of a tuple that two flows have. A full ring is no harm: the sender tries again.
#[inline(always)]
pub(super) fn tell_taken<A: Octets>(tuple: &FlowKey<A>) {
    let _ = TAKEN_TUPLES.output_untyped::<FlowKey<A>>(tuple, 0);
}

/// Whether somebody may be listening to verdicts.
#[inline(always)]
pub(super) fn is_traced() -> bool {
    TRACING.get(0).is_some_and(|tracing| *tracing != 0)
}

/// Nobody is.
#[inline(always)]
pub(super) fn set_untraced() {
    if let Some(tracing) = TRACING.get_ptr_mut(0) {
        // SAFETY: the pointer is valid as long as the map is; the word is written whole.
        unsafe { *tracing = 0 };
    }
}

/// Puts a verdict into a listener's ring; `false` where that is full.
#[inline(always)]
pub(super) fn put_verdict(slot: u32, verdict: &Traced) -> bool {
    let done = match slot {
        0 => VERDICTS_0.output_untyped::<Traced>(verdict, 0),
        1 => VERDICTS_1.output_untyped::<Traced>(verdict, 0),
        2 => VERDICTS_2.output_untyped::<Traced>(verdict, 0),
        _ => VERDICTS_3.output_untyped::<Traced>(verdict, 0),
    };
    done.is_ok()
}
