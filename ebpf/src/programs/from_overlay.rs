//! What the kernel decapsulated because the uplink's program did not: delivered past the host stack where the
//! gate allows, noted as point 1 of its flow where it does not.

use loden_ebpf::{ethernet, flow::Direction, ipv4, reason::Reason};

use super::{Verdict, from_wire, gate, lookup, observe, skb::Skb};

#[inline(always)]
pub(super) fn run(skb: &mut Skb) -> Verdict {
    let pass = Verdict::Pass(Reason::PassOverlay);
    let Some((ip, key, tcp_flags)) = observe::read(skb, Direction::Inbound) else { return pass };
    if lookup::peer(ipv4::source(&ip)).is_none() {
        return pass;
    }
    let Some(endpoint) = lookup::endpoint(ipv4::destination(&ip)) else { return pass };
    let plain = ipv4::is_plain(&ip)
        && !ipv4::is_fragment(&ip)
        && ipv4::ttl(&ip) > 1
        && u32::from(ipv4::total_len(&ip)) + ethernet::LEN as u32 == skb.len();
    if plain
        && skb.is_for_host()
        && (!gate::is_gated(endpoint)
            || matches!(gate::ask(&key, Direction::Inbound, tcp_flags), gate::Answer::Fast))
    {
        skb.set_for_host();
        return from_wire::deliver(skb, endpoint, false, Reason::FastOverlay);
    }
    gate::enter(&key, Direction::Inbound);
    pass
}
