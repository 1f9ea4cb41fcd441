//! What the kernel decapsulated because the uplink's program did not: delivered past the host stack where the
//! gate allows, noted as point 1 of its flow where it does not.

use loden_ebpf::{ethernet, ipv4, reason::Reason};

use super::{
    Verdict, from_wire, lookup, observe,
    skb::Skb,
    traffic::{self, Load, Way},
};

#[inline(always)]
pub(super) fn run(skb: &mut Skb) -> Verdict {
    let pass = Verdict::Pass(Reason::PassOverlay);
    if skb.ether_type() != ethernet::IPV4 {
        return pass;
    }
    if skb.bytes::<{ ethernet::LEN + ipv4::LEN }>(0).is_none() {
        skb.make_linear((ethernet::LEN + ipv4::LEN) as u32);
    }
    let Some(ip) = skb.bytes::<{ ipv4::LEN }>(ethernet::LEN) else { return pass };
    let Some(peer) = lookup::peer(ipv4::source(ip)) else { return pass };
    let endpoint = lookup::endpoint(ipv4::destination(ip));
    let load = Load::of(skb, ethernet::LEN);
    let fast = endpoint.and_then(|endpoint| observe::forward(skb, endpoint).ok());
    let way = if fast.is_some() { Way::Fast } else { Way::Slow };
    traffic::received(Some(peer.traffic), endpoint, way, load);
    let Some(endpoint) = fast else { return pass };
    // Before 6.15 the pod would see what the VXLAN device made of the inner MAC.
    skb.set_for_host();
    from_wire::deliver(skb, endpoint, None, Reason::FastOverlay)
}
