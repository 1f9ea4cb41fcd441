//! What the kernel decapsulated because the uplink's program did not: delivered past the host stack where the
//! gate allows, noted as point 1 of its flow where it does not.

use loden_ebpf::{ethernet, reason::Reason};

use super::{
    Verdict, from_wire,
    half::Half,
    observe,
    skb::Skb,
    traffic::{self, Load, Way},
};

#[inline(always)]
pub(super) fn run<F: Half>(skb: &mut Skb) -> Verdict {
    let pass = Verdict::Pass(Reason::PassOverlay);
    skb.reach(ethernet::LEN + F::LEN, (ethernet::LEN + F::LEN) as u32);
    let Some(ip) = skb.read::<F::Header>(ethernet::LEN) else { return pass };
    let Some(peer) = F::peer(F::source(ip)) else { return pass };
    let endpoint = F::endpoint(F::destination(ip));
    let load = Load::of::<F>(skb, ethernet::LEN);
    let fast = endpoint.and_then(|endpoint| observe::forward::<F>(skb, endpoint).ok());
    let way = if fast.is_some() { Way::Fast } else { Way::Slow };
    traffic::received::<F>(Some(peer.traffic), endpoint, way, load);
    let Some(endpoint) = fast else { return pass };
    // Before 6.15 the pod would see what the VXLAN device made of the inner MAC.
    skb.set_for_host();
    from_wire::deliver::<F>(skb, endpoint, None, Reason::FastOverlay)
}
