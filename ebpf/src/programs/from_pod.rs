//! What a pod sends: checked, encapsulated, sent to the underlay.

use aya_ebpf::{bindings::BPF_NOEXIST, helpers::bpf_get_prandom_u32};
use loden_ebpf::{
    abi::{Endpoint, FlowKey, Peer, Sighting, SightingKey},
    ethernet,
    flow::Direction,
    ipv4,
    reason::Reason,
    vxlan::{self, Outer},
};

use super::{
    Verdict, from_wire, gate, globals, lookup, maps,
    skb::Skb,
    traffic::{self, Load},
};

/// Length of the Ethernet header.
const ETH: usize = ethernet::LEN;
/// Where the IP header starts.
const IP: usize = ethernet::LEN;
/// Where the next header starts when there are no IP options.
const NEXT: usize = IP + ipv4::LEN;
/// Where the IP header stands after encapsulation.
const INNER_IP: usize = IP + vxlan::ENCAP_LEN;

/// Where a packet may go past the host.
enum Way {
    Peer(&'static Peer),
    /// In the same segment.
    Local(&'static Endpoint),
    /// Behind another gateway: this host is the router between them.
    Routed(&'static Endpoint),
}

/// A packet that may be fast: where to, and whose it is.
struct Departure {
    way: Way,
    from: &'static Endpoint,
}

#[inline(always)]
pub(super) fn run(skb: &mut Skb) -> Verdict {
    let Departure { way, from } = match decide(skb) {
        Ok(departure) => departure,
        Err(verdict) => return verdict,
    };
    let load = Load::of(skb, IP);
    match way {
        Way::Local(to) | Way::Routed(to) => {
            traffic::sent(None, Some(from), traffic::Way::Fast, load);
            traffic::received(None, Some(to), traffic::Way::Fast, load);
            if matches!(way, Way::Routed(_)) {
                return from_wire::deliver(skb, to, None, Reason::FastLocal);
            }
            // The frame is for the other pod's MAC, so to this veth somebody else's; kernels before 6.15 (and without
            // the backport) leave that as it is, and the other pod would drop it.
            skb.set_for_host();
            Verdict::Redirect(Reason::FastLocal, skb.redirect_peer(to.ifindex))
        }
        Way::Peer(peer) if peer.direct == 1 => {
            traffic::sent(Some(peer), Some(from), traffic::Way::Fast, load);
            route(skb, peer)
        }
        Way::Peer(peer) => {
            let hash = skb.hash();
            // Only growing the packet can fail without harm, so it comes first.
            if !skb.grow() {
                traffic::because(from, Reason::PassPodNoRoom, load);
                return Reason::PassPodNoRoom.into();
            }
            traffic::sent(Some(peer), Some(from), traffic::Way::Fast, load);
            encapsulate(skb, peer, hash, load)
        }
    }
}

/// Everything that can be decided, and nothing written.
#[inline(always)]
fn decide(skb: &mut Skb) -> Result<Departure, Verdict> {
    if skb.ether_type() != ethernet::IPV4 {
        return Err(Reason::PassPodNotIpv4.into());
    }
    if skb.bytes::<{ NEXT + 8 }>(0).is_none() {
        skb.make_linear((NEXT + 20) as u32);
    }
    let malformed = Verdict::Pass(Reason::PassPodMalformed);
    let Some(frame) = skb.bytes::<ETH>(0) else { return Err(malformed) };
    let Some(ip) = skb.bytes::<{ ipv4::LEN }>(IP) else { return Err(malformed) };

    let destination = ipv4::destination(ip);
    let source = ipv4::source(ip);
    let Some(peer) = lookup::peer(destination) else {
        return match (lookup::endpoint(destination), lookup::endpoint(source)) {
            (Some(to), from) => local(skb, frame, ip, from, to),
            // Two pods that only ever talk to each other are in no table of the host: this is how it hears of them.
            (None, None) if lookup::is_own(destination) => Err(foreign_source(skb, frame, source, false)),
            (None, from) => {
                if let Some(from) = from.filter(|from| from.ifindex == skb.ifindex()) {
                    traffic::because(from, Reason::PassPodNoPeer, Load::of(skb, IP));
                }
                Err(Reason::PassPodNoPeer.into())
            }
        };
    };
    let from = match lookup::endpoint(source) {
        Some(endpoint) if endpoint.ifindex == skb.ifindex() => endpoint,
        other => return Err(foreign_source(skb, frame, source, other.is_some())),
    };
    // Not for the gateway as the agent knows it: a bridge changes its MAC as containers come and go.
    let is_routed = ethernet::destination(frame) == from.gateway_mac;
    let answer = if is_routed { may_be_fast(skb, ip, peer, from) } else { Err(Reason::PassPodNotForGateway) };
    match answer {
        Ok(()) => Ok(Departure { way: Way::Peer(peer), from }),
        Err(reason) => {
            traffic::because(from, reason, Load::of(skb, IP));
            // It goes into the host stack: noted, so that point 2 knows it.
            if let Some((key, _)) = flow_key(skb, ip) {
                gate::enter(skb, IP, &key, Direction::Outbound);
            }
            Err(reason.into())
        }
    }
}

/// To another pod of this node. On a bridge both are in one segment: the frame goes over as it is, if it is meant
/// for that pod's MAC. Where each has a gateway of its own, the packet goes over as a router passes it on. From one
/// pod to another of the same bridge through the gateway is the host's matter.
#[inline(always)]
fn local(
    skb: &Skb,
    frame: &ethernet::Header,
    ip: &ipv4::Header,
    from: Option<&'static Endpoint>,
    to: &'static Endpoint,
) -> Result<Departure, Verdict> {
    let from = match from {
        Some(endpoint) if endpoint.ifindex == skb.ifindex() => endpoint,
        other => return Err(foreign_source(skb, frame, ipv4::source(ip), other.is_some())),
    };
    let Some((key, tcp_flags)) = flow_key(skb, ip) else { return Err(local_slow(skb, from, to)) };
    let next_hop = ethernet::destination(frame);
    let one_segment = to.gateway_mac == from.gateway_mac;
    let may_cross = if one_segment {
        next_hop == to.mac
    } else {
        next_hop == from.gateway_mac && ipv4::ttl(ip) > 1 && ipv4::has_right_checksum(ip)
    };
    let may_cross = may_cross
        && to.ifindex != from.ifindex
        && !skb.has_vlan()
        && ipv4::is_plain(ip)
        && !ipv4::is_fragment(ip)
        && u32::from(ipv4::total_len(ip)) + ETH as u32 == skb.len();
    let gated = gate::is_gated(from) || gate::is_gated(to);
    if may_cross && (!gated || matches!(gate::ask(&key, Direction::Outbound, tcp_flags), gate::Answer::Fast))
    {
        let way = if one_segment { Way::Local(to) } else { Way::Routed(to) };
        return Ok(Departure { way, from });
    }
    gate::enter(skb, IP, &key, Direction::Outbound);
    Err(local_slow(skb, from, to))
}

/// Counts where the host stack's way begins: it passes no other place at which both are known.
#[inline(always)]
fn local_slow(skb: &Skb, from: &Endpoint, to: &Endpoint) -> Verdict {
    let load = Load::of(skb, IP);
    traffic::sent(None, Some(from), traffic::Way::Slow, load);
    traffic::received(None, Some(to), traffic::Way::Slow, load);
    traffic::because(from, Reason::PassPodLocal, load);
    Reason::PassPodLocal.into()
}

#[inline(always)]
fn may_be_fast(skb: &Skb, ip: &ipv4::Header, peer: &Peer, endpoint: &Endpoint) -> Result<(), Reason> {
    // The kernel routes what has only a priority tag: it is noted like everything else that goes there.
    if skb.has_vlan() {
        return Err(Reason::PassPodNotIpv4);
    }
    if !ipv4::is_plain(ip) {
        return Err(Reason::PassPodOptions);
    }
    if ipv4::is_fragment(ip) {
        return Err(Reason::PassPodFragment);
    }
    if ipv4::ttl(ip) <= 1 {
        return Err(Reason::PassPodTtl);
    }
    if !ipv4::has_right_checksum(ip) || u32::from(ipv4::total_len(ip)) + ETH as u32 != skb.len() {
        return Err(Reason::PassPodMalformed);
    }
    if peer.uplink == 0 {
        return Err(Reason::PassPodNoUplink);
    }
    let added = if peer.direct == 1 { 0 } else { vxlan::ENCAP_LEN as u32 };
    if largest_segment(skb, ip) + added > u32::from(peer.mtu) || skb.len() + added > 0xffff {
        return Err(Reason::PassPodTooBig);
    }
    let Some(next) = skb.bytes::<8>(NEXT) else { return Err(Reason::PassPodMalformed) };
    let protocol = ipv4::protocol(ip);
    // TCP whose flags are cut off is not fast through either gate.
    if !ipv4::has_ports(protocol, next) || protocol == ipv4::TCP && skb.bytes::<1>(NEXT + 13).is_none() {
        return Err(Reason::PassPodProtocol);
    }
    if !gate::is_gated(endpoint) {
        return Ok(());
    }
    let Some((key, tcp_flags)) = flow_key(skb, ip) else { return Err(Reason::PassPodProtocol) };
    match gate::ask(&key, Direction::Outbound, tcp_flags) {
        gate::Answer::Fast => Ok(()),
        gate::Answer::Control => Err(Reason::PassPodTcpControl),
        gate::Answer::NotQualified => Err(Reason::PassPodGate),
    }
}

/// Length of the largest IP packet that will be on the wire, before encapsulation, in bytes.
#[inline(always)]
fn largest_segment(skb: &Skb, ip: &ipv4::Header) -> u32 {
    let gso_size = skb.gso_size();
    if gso_size == 0 {
        return skb.len() - ETH as u32;
    }
    let next_header = if ipv4::protocol(ip) == ipv4::TCP {
        // Byte 12 of a TCP header holds its length in its upper half, in words.
        skb.bytes::<1>(NEXT + 12).map_or(60, |b| u32::from(b[0] >> 4) * 4)
    } else {
        8
    };
    ipv4::LEN as u32 + next_header + gso_size
}

/// The flow of a packet from a pod, and its TCP flags.
#[inline(always)]
fn flow_key(skb: &Skb, ip: &ipv4::Header) -> Option<(FlowKey, u8)> {
    if ipv4::is_later_fragment(ip) {
        return None;
    }
    let next = if ipv4::is_plain(ip) { NEXT } else { IP + ipv4::header_len(ip) };
    let protocol = ipv4::protocol(ip);
    let (local_port, remote_port) = ipv4::ports(protocol, skb.bytes(next)?)?;
    let tcp_flags = if protocol == ipv4::TCP { skb.bytes::<1>(next + 13)?[0] } else { 0 };
    let key = FlowKey::new(protocol, (ipv4::source(ip), local_port), (ipv4::destination(ip), remote_port));
    Some((key, tcp_flags))
}

/// The source is not this veth's endpoint: another pod's address, or one that the agent does not know yet.
#[inline(always)]
fn foreign_source(skb: &Skb, frame: &ethernet::Header, source: u32, is_anothers: bool) -> Verdict {
    if !lookup::is_own(source) {
        return Reason::PassPodForeignSource.into();
    }
    let key = SightingKey { ifindex: skb.ifindex(), address: source.to_be_bytes() };
    let sighting = Sighting {
        mac: ethernet::source(frame),
        gateway_mac: ethernet::destination(frame),
        ..Sighting::default()
    };
    // Told once: the agent forgets a sighting that it wants to hear of again.
    if maps::SIGHTINGS.insert(key, &sighting, u64::from(BPF_NOEXIST)).is_ok() {
        // A full ring is no harm: the agent lists the sightings on its tick too.
        let _ = maps::NEW_SIGHTINGS.output_untyped::<SightingKey>(key, 0);
    }
    if is_anothers && globals::DROP_FORGED.load() == 1 {
        return Verdict::Drop(Reason::DropForgedPodSource);
    }
    Reason::PassPodForeignSource.into()
}

/// Sends to a peer that is a hop away: a router's part, without encapsulation.
#[inline(always)]
fn route(skb: &mut Skb, peer: &Peer) -> Verdict {
    let Some(ip) = skb.bytes_mut::<{ ipv4::LEN }>(IP) else { return Reason::PassPodMalformed.into() };
    ipv4::decrement_ttl(ip);
    // The redirect passes the uplink's egress, where point 2 would take it for a packet that the host translated.
    skb.note_fast();
    Verdict::Redirect(Reason::FastDirectOut, skb.redirect_neighbour(peer.uplink, peer.next_hop))
}

/// Writes the headers into the room that was made, and sends.
#[inline(always)]
fn encapsulate(skb: &mut Skb, peer: &Peer, hash: u32, inner: Load) -> Verdict {
    let lost = Verdict::Drop(Reason::DropRedirect);
    let Some(ip) = skb.bytes_mut::<{ ipv4::LEN }>(INNER_IP) else { return lost };
    ipv4::decrement_ttl(ip);
    let tos = ipv4::encapsulate_ecn(ipv4::tos(ip));
    let Some(headers) = skb.bytes_mut::<{ vxlan::ENCAP_LEN }>(IP) else { return lost };
    let outer = Outer {
        source: peer.source,
        destination: peer.vtep,
        tos,
        ttl: globals::OUTER_TTL.load(),
        // SAFETY: calls a helper that takes nothing.
        id: unsafe { bpf_get_prandom_u32() } as u16,
        source_port: vxlan::source_port(
            hash,
            globals::SOURCE_PORT_MIN.load(),
            globals::SOURCE_PORT_MAX.load(),
        ),
        port: globals::PORT.load(),
        vni: globals::VNI.load(),
        peer_mac: peer.vtep_mac,
        own_mac: globals::vtep_mac(),
        inner_len: inner.bytes as u16,
    };
    outer.write(headers);
    Verdict::Redirect(Reason::FastEncap, skb.redirect_neighbour(peer.uplink, peer.next_hop))
}
