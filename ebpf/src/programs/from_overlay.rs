//! What the kernel decapsulated or decrypted: delivered past the host stack where the gate allows, noted as point 1 of its
//! flow where it does not.
//!
//! The source is a peer's. Of VXLAN, the uplink's program has compared it with the sender; WireGuard itself drops what a
//! peer sends from an address that is not among those allowed to it, which are its lease's subnets.

use loden_ebpf::{ethernet, reason::Reason};

use super::{
    Verdict, from_wire, globals,
    half::Half,
    observe,
    skb::Skb,
    traffic::{self, Load, Way},
};

#[inline(always)]
pub(super) fn run<F: Half>(skb: &mut Skb) -> Verdict {
    if globals::BARE_DEVICE.load() == 1 {
        of_device::<F, 0>(skb)
    } else {
        of_device::<F, { ethernet::LEN }>(skb)
    }
}

/// A packet whose IP header stands at `AT`: behind an Ethernet header, or behind nothing.
#[inline(always)]
fn of_device<F: Half, const AT: usize>(skb: &mut Skb) -> Verdict {
    let pass = Verdict::Pass(Reason::PassOverlay);
    skb.reach(AT + F::LEN, (AT + F::LEN) as u32);
    let Some(ip) = skb.read::<F::Header>(AT) else { return pass };
    let Some(peer) = F::peer(F::source(ip)) else { return pass };
    let endpoint = F::endpoint(F::destination(ip));
    let load = Load::of::<F>(skb, AT);
    let fast = endpoint.and_then(|endpoint| observe::forward::<F, AT>(skb, endpoint).ok());
    let way = if fast.is_some() { Way::Fast } else { Way::Slow };
    traffic::received::<F>(Some(peer.traffic), endpoint, way, load);
    let Some(endpoint) = fast else { return pass };
    if AT == 0 {
        let Some(frame) = skb.bytes_mut(0) else { return Verdict::Drop(Reason::DropRedirect) };
        ethernet::set_ether_type(frame, F::ETHER_TYPE);
    }
    // Before 6.15 the pod would see what the VXLAN device made of the inner MAC.
    skb.set_for_host();
    from_wire::deliver::<F>(skb, endpoint, None, Reason::FastOverlay)
}
