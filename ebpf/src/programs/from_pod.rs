//! What a pod sends: checked, encapsulated, sent to the underlay.

use loden_ebpf::{
    abi::{Endpoint, FlowKey, Peer, Sighting, way},
    ethernet,
    flow::Direction,
    reason::Reason,
    transport,
};

use super::{
    Verdict,
    encap::Encapsulate,
    from_wire, gate, globals,
    skb::Skb,
    traffic::{self, Load},
};

/// Length of the Ethernet header.
const ETH: usize = ethernet::LEN;
/// Where the IP header starts.
const IP: usize = ethernet::LEN;

/// Where a packet may go past the host.
enum Way<A: 'static> {
    Peer(&'static Peer<A>),
    /// In the same segment.
    Local(&'static Endpoint<A>),
    /// Behind another gateway: this host is the router between them.
    Routed(&'static Endpoint<A>),
}

/// A packet that may be fast: where to, and whose it is.
struct Departure<A: 'static> {
    way: Way<A>,
    from: &'static Endpoint<A>,
}

/// Why a packet is not fast.
enum Refused {
    /// It goes into the host stack, where point 2 is to know it again.
    Entering(Reason),
    /// It goes on unknown to the gate, or ends.
    Unnoted(Verdict),
}

impl From<Verdict> for Refused {
    #[inline(always)]
    fn from(verdict: Verdict) -> Self {
        Self::Unnoted(verdict)
    }
}

#[inline(always)]
pub(super) fn run<F: Encapsulate>(skb: &mut Skb) -> Verdict {
    let verdict = match decide::<F>(skb) {
        Ok(departure) => depart::<F>(skb, &departure),
        Err(Refused::Entering(reason)) => reason.into(),
        Err(Refused::Unnoted(verdict)) => return verdict,
    };
    // Also where there was no room for the headers: unnoted, it would look translated at point 2.
    if let Verdict::Pass(_) = verdict
        && let Some(ip) = skb.read::<F::Header>(IP)
        && let Some((key, tcp_flags)) = flow_key::<F>(skb, ip)
    {
        gate::enter::<F>(skb, IP, &key, Direction::Outbound, tcp_flags);
    }
    verdict
}

/// Sends it past the host. What the kernel has no room for passes, unchanged.
#[inline(always)]
fn depart<F: Encapsulate>(skb: &mut Skb, departure: &Departure<F::Octets>) -> Verdict {
    let Departure { way, from } = departure;
    let load = Load::of::<F>(skb, IP);
    match way {
        Way::Local(to) | Way::Routed(to) => {
            traffic::sent::<F>(None, Some(from), traffic::Way::Fast, load);
            traffic::received::<F>(None, Some(to), traffic::Way::Fast, load);
            if matches!(way, Way::Routed(_)) {
                return from_wire::deliver::<F>(skb, to, None, Reason::FastLocal);
            }
            // The frame is for the other pod's MAC, so to this veth somebody else's; kernels before 6.15 (and without
            // the backport) leave that as it is, and the other pod would drop it.
            skb.set_for_host();
            Verdict::Redirect(Reason::FastLocal, skb.redirect_peer(to.ifindex))
        }
        Way::Peer(peer) if peer.way != way::ENCAPSULATED => {
            traffic::sent::<F>(Some(peer), Some(from), traffic::Way::Fast, load);
            route::<F>(skb, peer)
        }
        Way::Peer(peer) => F::encapsulate(skb, peer, from, load),
    }
}

/// Everything that can be decided, and nothing written.
#[inline(always)]
fn decide<F: Encapsulate>(skb: &mut Skb) -> Result<Departure<F::Octets>, Refused> {
    skb.reach(IP + F::LEN + 8, (IP + F::LEN + 20) as u32);
    let malformed = Verdict::Pass(Reason::PassPodMalformed);
    let Some(frame) = skb.bytes::<ETH>(0) else { return Err(malformed.into()) };
    let Some(ip) = skb.read::<F::Header>(IP) else { return Err(malformed.into()) };

    let destination = F::destination(ip);
    let source = F::source(ip);
    let Some(peer) = F::peer(destination) else {
        return match (F::endpoint(destination), F::endpoint(source)) {
            (Some(to), from) => local::<F>(skb, frame, ip, from, to),
            // Two pods that only ever talk to each other are in no table of the host: this is how it hears of them.
            (None, None) if F::is_own(destination) => {
                Err(foreign_source::<F>(skb, frame, source, false).into())
            }
            (None, from) => {
                if let Some(from) = from.filter(|from| from.ifindex == skb.ifindex()) {
                    traffic::because::<F>(from, Reason::PassPodNoPeer, Load::of::<F>(skb, IP));
                }
                Err(Verdict::Pass(Reason::PassPodNoPeer).into())
            }
        };
    };
    let from = match F::endpoint(source) {
        Some(endpoint) if endpoint.ifindex == skb.ifindex() => endpoint,
        other => return Err(foreign_source::<F>(skb, frame, source, other.is_some()).into()),
    };
    // Not for the gateway as the agent knows it: a bridge changes its MAC as containers come and go.
    let is_routed = ethernet::is_for(frame, &from.gateway_mac);
    let answer =
        if is_routed { may_be_fast::<F>(skb, ip, peer, from) } else { Err(Reason::PassPodNotForGateway) };
    match answer {
        Ok(()) => Ok(Departure { way: Way::Peer(peer), from }),
        Err(reason) => {
            traffic::because::<F>(from, reason, Load::of::<F>(skb, IP));
            Err(Refused::Entering(reason))
        }
    }
}

/// To another pod of this node. On a bridge both are in one segment: the frame goes over as it is, if it is meant
/// for that pod's MAC. Where each has a gateway of its own, the packet goes over as a router passes it on. From one
/// pod to another of the same bridge through the gateway is the host's matter.
#[inline(always)]
fn local<F: Encapsulate>(
    skb: &Skb,
    frame: &ethernet::Header,
    ip: &F::Header,
    from: Option<&'static Endpoint<F::Octets>>,
    to: &'static Endpoint<F::Octets>,
) -> Result<Departure<F::Octets>, Refused> {
    let from = match from {
        Some(endpoint) if endpoint.ifindex == skb.ifindex() => endpoint,
        other => return Err(foreign_source::<F>(skb, frame, F::source(ip), other.is_some()).into()),
    };
    let Some((key, tcp_flags)) = flow_key::<F>(skb, ip) else { return Err(local_slow::<F>(skb, from, to)) };
    let one_segment = to.gateway_mac == from.gateway_mac;
    let may_cross = if one_segment {
        ethernet::is_for(frame, &to.mac)
    } else {
        ethernet::is_for(frame, &from.gateway_mac) && F::hops(ip) > 1 && F::is_undamaged(ip)
    };
    let may_cross = may_cross
        && to.ifindex != from.ifindex
        && !skb.has_vlan()
        && F::is_plain(ip)
        && !F::is_fragment(ip)
        && F::packet_len(ip) + ETH as u32 == skb.len()
        && !skb.is_cut(F::protocol(ip), IP + F::LEN);
    let gated = gate::is_gated(from) || gate::is_gated(to);
    if may_cross
        && (!gated || matches!(gate::ask::<F>(&key, Direction::Outbound, tcp_flags), gate::Answer::Fast))
    {
        let way = if one_segment { Way::Local(to) } else { Way::Routed(to) };
        return Ok(Departure { way, from });
    }
    Err(local_slow::<F>(skb, from, to))
}

/// Counts where the host stack's way begins: it passes no other place at which both are known.
#[inline(always)]
fn local_slow<F: Encapsulate>(skb: &Skb, from: &Endpoint<F::Octets>, to: &Endpoint<F::Octets>) -> Refused {
    let load = Load::of::<F>(skb, IP);
    traffic::sent::<F>(None, Some(from), traffic::Way::Slow, load);
    traffic::received::<F>(None, Some(to), traffic::Way::Slow, load);
    traffic::because::<F>(from, Reason::PassPodLocal, load);
    Refused::Entering(Reason::PassPodLocal)
}

#[inline(always)]
fn may_be_fast<F: Encapsulate>(
    skb: &Skb,
    ip: &F::Header,
    peer: &Peer<F::Octets>,
    endpoint: &Endpoint<F::Octets>,
) -> Result<(), Reason> {
    // The kernel routes what has only a priority tag: it is noted like everything else that goes there.
    if skb.has_vlan() {
        return Err(Reason::PassPodNotIp);
    }
    if !F::is_plain(ip) {
        return Err(Reason::PassPodOptions);
    }
    if F::is_fragment(ip) {
        return Err(Reason::PassPodFragment);
    }
    if F::hops(ip) <= 1 {
        return Err(Reason::PassPodTtl);
    }
    if !F::is_undamaged(ip) || F::packet_len(ip) + ETH as u32 != skb.len() {
        return Err(Reason::PassPodMalformed);
    }
    if peer.uplink == 0 {
        return Err(Reason::PassPodNoUplink);
    }
    let added = if peer.way == way::ENCAPSULATED { F::ENCAP_LEN as u32 } else { 0 };
    if largest_segment::<F>(skb, ip) + added > u32::from(peer.mtu) || skb.len() + added > 0xffff {
        return Err(Reason::PassPodTooBig);
    }
    let Some(next) = skb.bytes::<8>(IP + F::LEN) else { return Err(Reason::PassPodMalformed) };
    // An outer checksum follows from TCP's own, too.
    if !F::has_ports(ip, next) || skb.is_cut(F::protocol(ip), IP + F::LEN) {
        return Err(Reason::PassPodProtocol);
    }
    if F::OUTER_CHECKSUM && F::protocol(ip) == transport::UDP && transport::udp_checksum(next) == 0 {
        return Err(Reason::PassPodChecksum);
    }
    if !gate::is_gated(endpoint) {
        return Ok(());
    }
    let Some((key, tcp_flags)) = flow_key::<F>(skb, ip) else { return Err(Reason::PassPodProtocol) };
    match gate::ask::<F>(&key, Direction::Outbound, tcp_flags) {
        gate::Answer::Fast => Ok(()),
        gate::Answer::Control => Err(Reason::PassPodTcpControl),
        gate::Answer::NotQualified => Err(Reason::PassPodGate),
    }
}

/// Length of the largest IP packet that will be on the wire, before encapsulation, in bytes.
#[inline(always)]
fn largest_segment<F: Encapsulate>(skb: &Skb, ip: &F::Header) -> u32 {
    let gso_size = skb.gso_size();
    if gso_size == 0 {
        return skb.len() - ETH as u32;
    }
    let next_header = if F::protocol(ip) == transport::TCP {
        // Byte 12 of a TCP header holds its length in its upper half, in words.
        skb.bytes::<1>(IP + F::LEN + 12).map_or(60, |b| u32::from(b[0] >> 4) * 4)
    } else {
        8
    };
    F::LEN as u32 + next_header + gso_size
}

/// The flow of a packet from a pod, and its TCP flags.
#[inline(always)]
fn flow_key<F: Encapsulate>(skb: &Skb, ip: &F::Header) -> Option<(FlowKey<F::Octets>, u8)> {
    if F::is_later_fragment(ip) {
        return None;
    }
    let next = if F::is_plain(ip) { IP + F::LEN } else { IP + F::header_len(ip) };
    let protocol = F::protocol(ip);
    let (local_port, remote_port) = F::ports(ip, skb.bytes(next)?)?;
    let tcp_flags = if protocol == transport::TCP { skb.bytes::<1>(next + 13)?[0] } else { 0 };
    let key = F::flow_key(protocol, (F::source(ip), local_port), (F::destination(ip), remote_port));
    Some((key, tcp_flags))
}

/// The source is not this veth's endpoint: another pod's address, or one that the agent does not know yet.
#[inline(always)]
fn foreign_source<F: Encapsulate>(
    skb: &Skb,
    frame: &ethernet::Header,
    source: F::Addr,
    is_anothers: bool,
) -> Verdict {
    if !F::is_own(source) {
        return Reason::PassPodForeignSource.into();
    }
    let sighting = Sighting {
        mac: ethernet::source(frame),
        gateway_mac: ethernet::destination(frame),
        ..Sighting::default()
    };
    F::sight(skb.ifindex(), source, &sighting);
    if is_anothers && globals::DROP_FORGED.load() == 1 {
        return Verdict::Drop(Reason::DropForgedPodSource);
    }
    Reason::PassPodForeignSource.into()
}

/// Sends to a peer that is a hop away, or into the device that encrypts for it: a router's part, without encapsulation.
#[inline(always)]
fn route<F: Encapsulate>(skb: &mut Skb, peer: &Peer<F::Octets>) -> Verdict {
    let Some(ip) = skb.write::<F::Header>(IP) else { return Reason::PassPodMalformed.into() };
    F::take_hop(ip);
    // The redirect passes an egress where point 2 would take it for a packet that the host translated.
    skb.note_fast();
    if peer.way == way::DEVICE {
        return Verdict::Redirect(Reason::FastOverlayOut, skb.redirect(peer.uplink));
    }
    Verdict::Redirect(Reason::FastDirectOut, skb.redirect_neighbour::<F>(peer.uplink, &peer.next_hop))
}
