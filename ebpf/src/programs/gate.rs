//! The flow gate's maps: see `loden_ebpf::flow` for its rules.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns},
};
use loden_ebpf::{
    abi::{Endpoint, Flow, FlowKey},
    flow::{self, Direction, Left},
    flow_cache::{self, Note},
    transport,
};

use super::{globals, half::Half, maps, skb::Skb};

/// What the gate says of a packet.
pub(super) enum Answer {
    Fast,
    /// SYN, FIN or RST of a gated flow.
    Control,
    NotQualified,
}

/// Whether flows of this endpoint must qualify. One that need not has nothing to look up: the open gate's gain.
#[inline(always)]
pub(super) fn is_gated<A>(endpoint: &Endpoint<A>) -> bool {
    globals::STRICT.load() != 0 || endpoint.gated != 0
}

/// Asks whether a packet of a gated endpoint may be fast. `tcp_flags` is 0 for other protocols.
#[inline(always)]
pub(super) fn ask<F: Half>(key: &FlowKey<F::Octets>, direction: Direction, tcp_flags: u8) -> Answer {
    if transport::is_tcp_control(tcp_flags) {
        return Answer::Control;
    }
    let state = maps::state();
    let Some(note) = F::note(flow_cache::slot(key, direction)) else {
        return Answer::NotQualified;
    };
    // SAFETY: the slot is this CPU's own, and TC programs of one CPU do not interrupt one another.
    let note = unsafe { &mut *note };
    if note.holds(key, state) {
        return Answer::Fast;
    }
    match F::flow(key) {
        Some(entry) if flow::is_fast(entry, direction, now(), state.epoch) => {
            *note = Note::new(key, state);
            Answer::Fast
        }
        _ => Answer::NotQualified,
    }
}

/// Point 1: the packet, whose IP header is at `at`, goes into the host stack. `tcp_flags` as in [`ask`].
#[inline(always)]
pub(super) fn enter<F: Half>(
    skb: &Skb,
    at: usize,
    key: &FlowKey<F::Octets>,
    direction: Direction,
    tcp_flags: u8,
) {
    let (mark, now, epoch) = (mark::<F>(skb, at), now(), maps::epoch());
    let opens = transport::opens_tcp(tcp_flags);
    if let Some(entry) = F::flow_mut(key) {
        // SAFETY: the pointer is valid until the program ends; two CPUs that write the same field both write
        // the present time, or nothing.
        if flow::enter(unsafe { &mut *entry }, direction, mark, now, epoch, opens) {
            maps::withdraw();
        }
        return;
    }
    let mut entry = Flow::default();
    let _ = flow::enter(&mut entry, direction, mark, now, epoch, opens);
    F::insert_flow(key, &entry, BPF_NOEXIST);
}

/// Point 2: the packet, whose IP header is at `at`, came out of the host stack. `tcp_flags` as in [`ask`].
#[inline(always)]
pub(super) fn leave<F: Half>(
    skb: &Skb,
    at: usize,
    key: &FlowKey<F::Octets>,
    direction: Direction,
    tcp_flags: u8,
) -> Left {
    let Some(entry) = F::flow_mut(key) else { return Left::Translated };
    let mark = mark::<F>(skb, at);
    // SAFETY: calls a helper that takes nothing.
    let random = unsafe { bpf_get_prandom_u32() };
    let opens = transport::opens_tcp(tcp_flags);
    // SAFETY: as in `enter`.
    flow::leave(unsafe { &mut *entry }, direction, mark, now(), maps::epoch(), random, opens)
}

/// 0 for a packet that cannot be read: the same at both points.
#[inline(always)]
fn mark<F: Half>(skb: &Skb, at: usize) -> u64 {
    let Some(ip) = skb.read::<F::Header>(at) else { return 0 };
    let next = at + F::header_len(ip);
    let further = || skb.bytes(next + 12).copied().unwrap_or_default();
    match skb.bytes(next) {
        Some(header) => {
            flow::mark::<F>(ip, header, skb.bytes(next + 8).copied().unwrap_or_default(), further)
        }
        None => 0,
    }
}

/// Whether the host was seen to translate this flow.
#[inline(always)]
pub(super) fn is_translated<F: Half>(key: &FlowKey<F::Octets>) -> bool {
    F::flow(key).is_some_and(|flow| flow.translated != 0)
}

/// Keeps the pod's own connection of this tuple off the host, of whose flow the host has given it to another.
#[inline(always)]
pub(super) fn hold<F: Half>(key: &FlowKey<F::Octets>) {
    F::insert_flow(key, &flow::held(now(), maps::epoch()), BPF_ANY);
}

/// Remembers that the host translates this flow.
#[inline(always)]
pub(super) fn translated<F: Half>(key: &FlowKey<F::Octets>) {
    if let Some(entry) = F::flow_mut(key) {
        // SAFETY: as in `enter`. Most packets of a service's flow find it noted already.
        if flow::translate(unsafe { &mut *entry }) {
            maps::withdraw();
        }
        return;
    }
    let entry = Flow { translated: 1, ..Flow::default() };
    F::insert_flow(key, &entry, BPF_ANY);
}

/// Both clocks are CLOCK_MONOTONIC; the coarse one, true to a timer tick, is the cheaper one to read. (Linux 5.11)
#[inline(always)]
fn now() -> u64 {
    // SAFETY: both call a helper that takes nothing. The verifier does not look at the branch that the constant
    // rules out, so a kernel without that helper loads the program.
    unsafe { if globals::COARSE_CLOCK.load() == 1 { bpf_ktime_get_coarse_ns() } else { bpf_ktime_get_ns() } }
}
