//! The flow gate's maps: see `loden_ebpf::flow` for its rules.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns},
};
use loden_ebpf::{
    abi::{Endpoint, Flow, FlowKey},
    flow::{self, Direction},
    ipv4,
};

use super::{globals, maps};

/// What the gate says of a packet.
pub(super) enum Answer {
    Fast,
    /// SYN, FIN or RST of a gated flow.
    Control,
    NotQualified,
}

/// Whether flows of this endpoint must qualify. One that need not has nothing to look up: the open gate's gain.
#[inline(always)]
pub(super) fn is_gated(endpoint: &Endpoint) -> bool {
    globals::STRICT.load() != 0 || endpoint.gated != 0
}

/// Asks whether a packet of a gated endpoint may be fast. `tcp_flags` is 0 for other protocols.
#[inline(always)]
pub(super) fn ask(key: &FlowKey, direction: Direction, tcp_flags: u8) -> Answer {
    if ipv4::is_tcp_control(tcp_flags) {
        return Answer::Control;
    }
    // SAFETY: the entry may be reused for another flow while we read it; a wrong time then lets one packet
    // take the other path, and both deliver it.
    match unsafe { maps::FLOWS.get(key) } {
        Some(entry) if flow::is_fast(entry, direction, now(), maps::epoch()) => Answer::Fast,
        _ => Answer::NotQualified,
    }
}

/// Point 1: the packet goes into the host stack.
#[inline(always)]
pub(super) fn enter(key: &FlowKey, direction: Direction) {
    let now = now();
    if let Some(entry) = maps::FLOWS.get_ptr_mut(key) {
        // SAFETY: the pointer is valid until the program ends; two CPUs that write the same field both write
        // the present time.
        flow::enter(unsafe { &mut *entry }, direction, now);
        return;
    }
    let mut entry = Flow::default();
    flow::enter(&mut entry, direction, now);
    // A full table makes room by itself; if another CPU was first, its entry says the same.
    let _ = maps::FLOWS.insert(key, &entry, u64::from(BPF_NOEXIST));
}

/// Point 2: the packet came out of the host stack. Says whether it is the one that went in.
#[inline(always)]
pub(super) fn leave(key: &FlowKey, direction: Direction) -> bool {
    let Some(entry) = maps::FLOWS.get_ptr_mut(key) else { return false };
    // SAFETY: calls a helper that takes nothing.
    let random = unsafe { bpf_get_prandom_u32() };
    // SAFETY: as in `enter`.
    flow::leave(unsafe { &mut *entry }, direction, now(), maps::epoch(), random)
}

/// Remembers that the host translates this flow.
#[inline(always)]
pub(super) fn translated(key: &FlowKey) {
    let entry = Flow { translated: 1, ..Flow::default() };
    let _ = maps::FLOWS.insert(key, &entry, u64::from(BPF_ANY));
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: calls a helper that takes nothing. (Linux 5.11)
    unsafe { bpf_ktime_get_coarse_ns() }
}
