//! The flow gate's two points: what goes into the host stack is noted, what comes out is compared. Only looks.

use loden_ebpf::{
    abi::{Endpoint, FlowKey, UNPROVEN},
    ethernet,
    flow::{Direction, Left},
    ipv4,
    reason::Reason,
};

use super::{Verdict, gate, lookup, skb::Skb};

const IP: usize = ethernet::LEN;

/// Egress of the VXLAN device: from a local pod towards a peer.
#[inline(always)]
pub(super) fn outbound(skb: &mut Skb) -> Verdict {
    let Some((ip, key, _)) = read(skb, Direction::Outbound) else { return Verdict::Ignore };
    let Some(endpoint) = lookup::endpoint(ipv4::source(&ip)) else { return Verdict::Ignore };
    if lookup::peer(ipv4::destination(&ip)).is_none() {
        return Verdict::Ignore;
    }
    conclude(skb, &key, Direction::Outbound, endpoint)
}

/// Egress of the host side of a pod's veth: from a peer's pod towards the local one.
#[inline(always)]
pub(super) fn inbound(skb: &mut Skb) -> Verdict {
    let Some((ip, key, _)) = read(skb, Direction::Inbound) else { return Verdict::Ignore };
    let (source, destination) = (ipv4::source(&ip), ipv4::destination(&ip));
    // A bridge floods what it has not learned: only the destination's own port counts.
    let Some(endpoint) = lookup::endpoint(destination).filter(|endpoint| endpoint.ifindex == skb.ifindex())
    else {
        return Verdict::Ignore;
    };
    if lookup::peer(source).is_some() {
        return conclude(skb, &key, Direction::Inbound, endpoint);
    }
    if let Some(sender) = lookup::endpoint(source) {
        // From another local pod: the flow is that one's, and its reverse is this one's.
        return conclude_local(skb, &key.reversed(), sender, destination);
    }
    Verdict::Ignore
}

/// Point 2 of a flow between two local pods: what was translated gates both.
#[inline(always)]
fn conclude_local(skb: &Skb, key: &FlowKey, sender: &Endpoint, destination: u32) -> Verdict {
    let verdict = conclude(skb, key, Direction::Outbound, sender);
    if let Verdict::Pass(_) = verdict {
        lookup::gate_endpoint(destination);
    }
    verdict
}

/// An IP packet for a pod, not encapsulated, on its way into the host stack: may it skip that? If not, it is noted
/// as point 1 of its flow.
#[inline(always)]
pub(super) fn forward(skb: &mut Skb, endpoint: &'static Endpoint) -> Result<&'static Endpoint, ()> {
    let (ip, key, tcp_flags) = read(skb, Direction::Inbound).ok_or(())?;
    let plain = ipv4::is_plain(&ip)
        && !ipv4::is_fragment(&ip)
        && ipv4::ttl(&ip) > 1
        && u32::from(ipv4::total_len(&ip)) + ethernet::LEN as u32 == skb.len();
    if plain && skb.is_for_host() {
        if !gate::is_gated(endpoint) {
            return Ok(endpoint);
        }
        if let gate::Answer::Fast = gate::ask(&key, Direction::Inbound, tcp_flags) {
            return Ok(endpoint);
        }
    }
    gate::enter(skb, IP, &key, Direction::Inbound);
    Err(())
}

#[inline(always)]
fn conclude(skb: &Skb, key: &FlowKey, direction: Direction, local: &Endpoint) -> Verdict {
    // A new endpoint may have come between both points; the agent looks up whether it is that or a translation.
    if gate::leave(skb, IP, key, direction) != Left::Translated || local.gated == UNPROVEN {
        return Verdict::Ignore;
    }
    gate::translated(key);
    lookup::gate_endpoint(u32::from_be_bytes(key.local));
    Verdict::Pass(Reason::NoteTranslated)
}

/// Reads the header and the flow of a frame; `None` where the gate has nothing to go by.
#[inline(always)]
pub(super) fn read(skb: &mut Skb, direction: Direction) -> Option<(ipv4::Header, FlowKey, u8)> {
    if skb.ether_type() != ethernet::IPV4 {
        return None;
    }
    if skb.bytes::<{ IP + ipv4::LEN + 8 }>(0).is_none() {
        skb.make_linear((IP + ipv4::LEN + 20) as u32);
    }
    let ip = *skb.bytes::<{ ipv4::LEN }>(IP)?;
    if ipv4::is_later_fragment(&ip) {
        return None;
    }
    let next = IP + ipv4::header_len(&ip);
    let protocol = ipv4::protocol(&ip);
    let (source_port, destination_port) = ipv4::ports(protocol, skb.bytes(next)?)?;
    let tcp_flags = if protocol == ipv4::TCP { skb.bytes::<1>(next + 13)?[0] } else { 0 };
    let source = (ipv4::source(&ip), source_port);
    let destination = (ipv4::destination(&ip), destination_port);
    let (local, remote) = match direction {
        Direction::Outbound => (source, destination),
        Direction::Inbound => (destination, source),
    };
    Some((ip, FlowKey::new(protocol, local, remote), tcp_flags))
}
