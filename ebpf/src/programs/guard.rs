//! The guard: VXLAN from strangers ends at the driver, before an skb is made for it.
//!
//! It drops only what it is sure of; everything else is for the TC program behind it, which checks all of it again.

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS},
    programs::XdpContext,
};
use loden_ebpf::{ethernet, ipv4, reason::Reason, vxlan};

use super::{globals, lookup, maps, trace};

const IP: usize = ethernet::LEN;
const UDP: usize = IP + ipv4::LEN;

#[inline(always)]
pub(super) fn run(ctx: &XdpContext) -> u32 {
    if is_strangers_vxlan(ctx).unwrap_or(false) {
        let len = (ctx.data_end() - ctx.data()) as u32;
        maps::count(Reason::DropGuard, len);
        trace::tell_guard(ctx, Reason::DropGuard, len);
        return XDP_DROP;
    }
    XDP_PASS
}

/// `None` where the frame ends before it is clear.
#[inline(always)]
fn is_strangers_vxlan(ctx: &XdpContext) -> Option<bool> {
    let frame = bytes::<{ ethernet::LEN }>(ctx, 0)?;
    if ethernet::ether_type(frame) != ethernet::IPV4 {
        return Some(false);
    }
    let ip = bytes::<{ ipv4::LEN }>(ctx, IP)?;
    if !ipv4::is_plain(ip)
        || ipv4::is_later_fragment(ip)
        || ipv4::protocol(ip) != ipv4::UDP
        || ipv4::destination(ip) != globals::VTEP.load()
    {
        return Some(false);
    }
    let udp = bytes::<8>(ctx, UDP)?;
    if vxlan::port(udp) != globals::PORT.load() {
        return Some(false);
    }
    // Another overlay on the same port has VTEPs of its own.
    let is_ours = vxlan::vni_field(bytes::<16>(ctx, UDP)?) == globals::VNI.load();
    Some(is_ours && !lookup::is_vtep(ipv4::source(ip).to_be_bytes()))
}

#[inline(always)]
pub(super) fn bytes<const N: usize>(ctx: &XdpContext, offset: usize) -> Option<&[u8; N]> {
    let start = ctx.data() + offset;
    if start + N > ctx.data_end() {
        return None;
    }
    // SAFETY: the comparison above keeps the range inside the frame (the verifier insists on it), and the guard
    // never moves or changes it.
    Some(unsafe { &*(start as *const [u8; N]) })
}
