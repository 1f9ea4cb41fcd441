//! The flow gate's two points: what goes into the host stack is noted, what comes out is compared. Only looks.

use loden_ebpf::{
    abi::{Endpoint, FlowKey, UNPROVEN},
    ethernet,
    family::Family,
    flow::{Direction, Left},
    reason::Reason,
    transport,
};

use super::{Verdict, gate, half::Half, skb::Skb, traffic};

const IP: usize = ethernet::LEN;

/// Egress of the VXLAN device, or of an uplink with direct peers: what skipped the host stack was concluded already.
#[inline(always)]
pub(super) fn leaves_host<F: Half>(skb: &mut Skb) -> Verdict {
    if skb.take_fast() {
        return Verdict::Ignore;
    }
    traffic::leaves_host::<F>(skb);
    outbound::<F>(skb)
}

/// From a local pod towards a peer.
#[inline(always)]
fn outbound<F: Half>(skb: &mut Skb) -> Verdict {
    reach::<F>(skb);
    let Some((ip, key, _)) = read::<F>(skb, Direction::Outbound) else { return Verdict::Ignore };
    let Some(endpoint) = F::endpoint(F::source(ip)) else { return Verdict::Ignore };
    if F::peer(F::destination(ip)).is_none() {
        return Verdict::Ignore;
    }
    conclude::<F>(skb, &key, Direction::Outbound, endpoint)
}

/// Egress of the host side of a pod's veth: from a peer's pod towards the local one.
#[inline(always)]
pub(super) fn inbound<F: Half>(skb: &mut Skb) -> Verdict {
    reach::<F>(skb);
    let Some((ip, key, _)) = read::<F>(skb, Direction::Inbound) else { return Verdict::Ignore };
    let (source, destination) = (F::source(ip), F::destination(ip));
    // A bridge floods what it has not learned: only the destination's own port counts.
    let Some(endpoint) = F::endpoint(destination).filter(|endpoint| endpoint.ifindex == skb.ifindex()) else {
        return Verdict::Ignore;
    };
    if F::peer(source).is_some() {
        return conclude::<F>(skb, &key, Direction::Inbound, endpoint);
    }
    if let Some(sender) = F::endpoint(source) {
        // From another local pod: the flow is that one's, and its reverse is this one's.
        return conclude_local::<F>(skb, &key.reversed(), sender, destination);
    }
    Verdict::Ignore
}

/// Point 2 of a flow between two local pods: what was translated gates both.
#[inline(always)]
fn conclude_local<F: Half>(
    skb: &Skb,
    key: &FlowKey<F::Octets>,
    sender: &Endpoint<F::Octets>,
    destination: F::Addr,
) -> Verdict {
    let verdict = conclude::<F>(skb, key, Direction::Outbound, sender);
    if let Verdict::Pass(_) = verdict {
        F::gate_endpoint(destination);
    }
    verdict
}

/// An IP packet for a pod, not encapsulated, on its way into the host stack: may it skip that? If not, it is noted
/// as point 1 of its flow.
#[inline(always)]
pub(super) fn forward<F: Half>(
    skb: &mut Skb,
    endpoint: &'static Endpoint<F::Octets>,
) -> Result<&'static Endpoint<F::Octets>, ()> {
    reach::<F>(skb);
    let (ip, key, tcp_flags) = read::<F>(skb, Direction::Inbound).ok_or(())?;
    let plain = F::is_plain(ip)
        && F::is_undamaged(ip)
        && !skb.has_vlan()
        && !F::is_fragment(ip)
        && F::hops(ip) > 1
        && F::packet_len(ip) + ethernet::LEN as u32 == skb.len();
    if plain && skb.is_for_host() {
        if !gate::is_gated(endpoint) {
            return Ok(endpoint);
        }
        if let gate::Answer::Fast = gate::ask::<F>(&key, Direction::Inbound, tcp_flags) {
            return Ok(endpoint);
        }
    }
    gate::enter::<F>(skb, IP, &key, Direction::Inbound);
    Err(())
}

#[inline(always)]
fn conclude<F: Half>(
    skb: &Skb,
    key: &FlowKey<F::Octets>,
    direction: Direction,
    local: &Endpoint<F::Octets>,
) -> Verdict {
    // A new endpoint may have come between both points; the agent looks up whether it is that or a translation.
    if gate::leave::<F>(skb, IP, key, direction) != Left::Translated || local.gated == UNPROVEN {
        return Verdict::Ignore;
    }
    gate::translated::<F>(key);
    F::gate_endpoint(F::addr(&key.local));
    Verdict::Pass(Reason::NoteTranslated)
}

/// Brings what [`read`] looks at into the linear part.
#[inline(always)]
fn reach<F: Half>(skb: &mut Skb) {
    skb.reach(IP + F::LEN + 8, (IP + F::LEN + 20) as u32);
}

/// A frame's IP header, its flow, and TCP's flags.
type Read<'a, F> = (&'a <F as Family>::Header, FlowKey<<F as Family>::Octets>, u8);

/// Reads the header and the flow of a frame; `None` where the gate has nothing to go by.
#[inline(always)]
fn read<F: Half>(skb: &Skb, direction: Direction) -> Option<Read<'_, F>> {
    let ip = skb.read::<F::Header>(IP)?;
    if F::is_later_fragment(ip) {
        return None;
    }
    let next = IP + F::header_len(ip);
    let protocol = F::protocol(ip);
    let (source_port, destination_port) = F::ports(ip, skb.bytes(next)?)?;
    let tcp_flags = if protocol == transport::TCP { skb.bytes::<1>(next + 13)?[0] } else { 0 };
    let source = (F::source(ip), source_port);
    let destination = (F::destination(ip), destination_port);
    let (local, remote) = match direction {
        Direction::Outbound => (source, destination),
        Direction::Inbound => (destination, source),
    };
    Some((ip, F::flow_key(protocol, local, remote), tcp_flags))
}
