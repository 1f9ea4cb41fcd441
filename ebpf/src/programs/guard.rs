//! The guard: VXLAN from strangers ends at the driver, before an skb is made for it.
//!
//! It drops only what it is sure of; everything else is for the TC program behind it, which checks all of it again.

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS},
    programs::XdpContext,
};
use loden_ebpf::{
    ethernet,
    family::{Bytes, Family as _, V4, V6},
    reason::Reason,
    transport, vxlan,
};

use super::{globals, half::Half, maps, trace};

const IP: usize = ethernet::LEN;

#[inline(always)]
pub(super) fn run(ctx: &XdpContext) -> u32 {
    if is_strangers_vxlan(ctx).unwrap_or(false) {
        let len = (ctx.data_end() - ctx.data()) as u32;
        maps::count(Reason::DropGuard as u32, len);
        trace::tell_guard(ctx, Reason::DropGuard, len);
        return XDP_DROP;
    }
    XDP_PASS
}

/// `None` where the frame ends before it is clear.
#[inline(always)]
fn is_strangers_vxlan(ctx: &XdpContext) -> Option<bool> {
    match ethernet::ether_type(read(ctx, 0)?) {
        V4::ETHER_TYPE => is_of::<V4>(ctx),
        V6::ETHER_TYPE if globals::HAS_V6.load() == 1 => is_of::<V6>(ctx),
        _ => Some(false),
    }
}

#[inline(always)]
fn is_of<F: Half>(ctx: &XdpContext) -> Option<bool> {
    let ip = read::<F::Header>(ctx, IP)?;
    if !F::is_plain(ip)
        || F::is_later_fragment(ip)
        || F::protocol(ip) != transport::UDP
        || !F::is_same(F::destination(ip), F::vtep())
    {
        return Some(false);
    }
    let udp = read::<[u8; 8]>(ctx, IP + F::LEN)?;
    if vxlan::port(udp) != F::port() {
        return Some(false);
    }
    // Another overlay on the same port has VTEPs of its own.
    let is_ours = vxlan::vni_field(read(ctx, IP + F::LEN)?) == F::vni();
    Some(is_ours && !F::is_vtep(F::source(ip)))
}

#[inline(always)]
pub(super) fn read<T: Bytes>(ctx: &XdpContext, offset: usize) -> Option<&T> {
    let start = ctx.data() + offset;
    if start + size_of::<T>() > ctx.data_end() {
        return None;
    }
    // SAFETY: the comparison above keeps the range inside the frame (the verifier insists on it), `T` may be any bytes,
    // and the guard never moves or changes them.
    Some(unsafe { &*(start as *const T) })
}
