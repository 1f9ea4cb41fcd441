//! What the kernel decapsulated because the uplink's program did not: delivered past the host stack where the
//! gate allows, noted as point 1 of its flow where it does not.

use loden_ebpf::{ethernet, ipv4, reason::Reason};

use super::{Verdict, from_wire, lookup, observe, skb::Skb};

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
    let (source, destination) = (ipv4::source(ip), ipv4::destination(ip));
    let Some(endpoint) = lookup::endpoint(destination) else { return pass };
    if lookup::peer(source).is_none() {
        return pass;
    }
    match observe::forward(skb, endpoint) {
        Ok(endpoint) => {
            // Before 6.15 the pod would see what the VXLAN device made of the inner MAC.
            skb.set_for_host();
            from_wire::deliver(skb, endpoint, false, Reason::FastOverlay)
        }
        Err(()) => pass,
    }
}
