//! What arrives from the underlay: VXLAN for this node is checked, decapsulated and delivered into the pod.

use core::marker::PhantomData;

use loden_ebpf::{
    abi::{Endpoint, FlowKey, Peer, way},
    ecn::{self, Ecn},
    ethernet,
    family::Family as _,
    flow::Direction,
    reason::Reason,
    transport, vxlan,
};

use super::{
    Verdict, gate, globals,
    half::Half,
    observe,
    outer::CheckOuter,
    skb::Skb,
    traffic::{self, Load, Way},
};

const ETH: usize = ethernet::LEN;
/// Where the outer IP header stands, counted from the start of the frame.
const OUTER_IP: usize = ETH;

/// Where the other headers stand.
struct At<F>(PhantomData<F>);

impl<F: Half> At<F> {
    const UDP: usize = OUTER_IP + F::LEN;
    const INNER_ETH: usize = Self::UDP + 16;
    const INNER_IP: usize = Self::INNER_ETH + ETH;
    const INNER_NEXT: usize = Self::INNER_IP + F::LEN;
}

/// An endpoint, and what to do to the packet on the way to it.
struct Delivery<A: 'static> {
    endpoint: &'static Endpoint<A>,
    /// Where the sender's packets are counted.
    peer: u16,
    /// What the inner ECN field becomes, if anything else.
    ecn: Option<u8>,
}

/// What came, and may be fast.
enum Arrival<A: 'static> {
    Encapsulated(Delivery<A>),
    Direct(Delivery<A>),
}

#[inline(always)]
pub(super) fn run<F: CheckOuter>(skb: &mut Skb) -> Verdict {
    match decide::<F>(skb) {
        Ok(Arrival::Encapsulated(delivery)) => decapsulate::<F>(skb, &delivery),
        Ok(Arrival::Direct(delivery)) => {
            let load = Load::of::<F>(skb, OUTER_IP);
            traffic::received::<F>(Some(delivery.peer), Some(delivery.endpoint), Way::Fast, load);
            deliver::<F>(skb, delivery.endpoint, None, Reason::FastDirectIn)
        }
        Err(verdict) => verdict,
    }
}

/// Everything that can be decided, and nothing written.
#[inline(always)]
fn decide<F: CheckOuter>(skb: &mut Skb) -> Result<Arrival<F::Octets>, Verdict> {
    if skb.has_vlan() || !skb.is_for_host() {
        return Err(Verdict::Ignore);
    }
    skb.reach(OUTER_IP + F::LEN, (OUTER_IP + F::LEN) as u32);
    let Some(outer) = skb.read::<F::Header>(OUTER_IP) else { return Err(Verdict::Ignore) };
    if !F::may_be_vxlan(outer) {
        return direct::<F>(skb).map(Arrival::Direct);
    }
    if !F::is_plain(outer) || F::is_fragment(outer) {
        return Err(unusual_outer::<F>(skb));
    }
    skb.reach(At::<F>::INNER_NEXT + 8, (At::<F>::INNER_NEXT + 20) as u32);
    // `outer` may have moved: from here on every header is fetched again.
    let Some(udp) = skb.bytes::<8>(At::<F>::UDP) else { return Err(Verdict::Ignore) };
    if vxlan::port(udp) != F::port() {
        return Err(Verdict::Ignore);
    }
    let Some(outer) = skb.read::<F::Header>(OUTER_IP) else { return Err(Verdict::Ignore) };
    let sender = F::source(outer);
    match inner::<F>(skb, outer, sender) {
        Ok(delivery) => Ok(Arrival::Encapsulated(delivery)),
        // Another overlay on the same port has VTEPs of its own.
        Err(verdict @ Verdict::Pass(Reason::PassWireVni)) => Err(verdict),
        // The kernel accepts VXLAN from anybody. Whatever is passed on to it is from a peer.
        Err(_) if !F::is_vtep(sender) => Err(Verdict::Drop(Reason::DropUnknownVtep)),
        Err(verdict) => Err(verdict),
    }
}

/// Not VXLAN for us. What a direct peer's pod sends to a pod here is routed to it, the gate permitting.
#[inline(always)]
fn direct<F: CheckOuter>(skb: &mut Skb) -> Result<Delivery<F::Octets>, Verdict> {
    let Some(ip) = skb.read::<F::Header>(OUTER_IP) else { return Err(Verdict::Ignore) };
    let peer = F::peer(F::source(ip)).filter(|peer| peer.way == way::DIRECT);
    let (Some(peer), Some(endpoint)) = (peer, F::endpoint(F::destination(ip))) else {
        return Err(Verdict::Ignore);
    };
    let load = Load::of::<F>(skb, OUTER_IP);
    match observe::forward::<F, ETH>(skb, endpoint) {
        Ok(endpoint) => Ok(Delivery { endpoint, peer: peer.traffic, ecn: None }),
        Err(()) => {
            traffic::received::<F>(Some(peer.traffic), Some(endpoint), Way::Slow, load);
            traffic::because::<F>(endpoint, Reason::PassDirect, load);
            Err(Reason::PassDirect.into())
        }
    }
}

#[inline(always)]
fn inner<F: CheckOuter>(
    skb: &Skb,
    outer: &F::Header,
    sender: F::Addr,
) -> Result<Delivery<F::Octets>, Verdict> {
    let cut = Verdict::Pass(Reason::PassWireOuter);
    let Some(headers) = skb.bytes::<16>(At::<F>::UDP) else { return Err(cut) };
    if vxlan::vni_field(headers) != F::vni() {
        return Err(Reason::PassWireVni.into());
    }
    if vxlan::vni(headers).is_none() {
        return Err(Reason::PassWireFlags.into());
    }
    let Some(checked) = check_sender::<F>(skb, At::<F>::INNER_ETH, sender) else { return Err(cut) };
    let peer = checked?;
    // The kernel trims to the outer lengths; where they say the same as the frame, nothing has to be trimmed. A
    // header that was damaged on the way it drops.
    if F::packet_len(outer) + OUTER_IP as u32 != skb.len()
        || u32::from(vxlan::udp_len(headers)) + At::<F>::UDP as u32 != skb.len()
        || !F::is_undamaged(outer)
    {
        return Err(cut);
    }
    let Some(frame) = skb.bytes::<ETH>(At::<F>::INNER_ETH) else { return Err(cut) };
    if ethernet::ether_type(frame) != F::ETHER_TYPE || !ethernet::is_for(frame, &F::vtep_mac()) {
        return Err(Reason::PassWireInnerFrame.into());
    }
    let Some(ip) = skb.read::<F::Header>(At::<F>::INNER_IP) else { return Err(cut) };
    if !F::is_plain(ip)
        || !F::is_undamaged(ip)
        || F::is_fragment(ip)
        || F::packet_len(ip) + At::<F>::INNER_IP as u32 != skb.len()
    {
        return Err(Reason::PassWireInnerPacket.into());
    }
    let Some(endpoint) = F::endpoint(F::destination(ip)) else {
        return Err(Reason::PassWireNoEndpoint.into());
    };
    match may_be_fast::<F>(skb, outer, ip, headers, endpoint) {
        Ok(ecn) => Ok(Delivery { endpoint, peer, ecn }),
        Err(reason) => {
            traffic::because::<F>(endpoint, reason, Load::of::<F>(skb, At::<F>::INNER_IP));
            Err(reason.into())
        }
    }
}

/// Whether a packet for an endpoint may be delivered past the host, and what its ECN field then becomes.
#[inline(always)]
fn may_be_fast<F: CheckOuter>(
    skb: &Skb,
    outer: &F::Header,
    ip: &F::Header,
    headers: &vxlan::Headers,
    endpoint: &Endpoint<F::Octets>,
) -> Result<Option<u8>, Reason> {
    if F::hops(ip) <= 1 {
        return Err(Reason::PassWireTtl);
    }
    let ecn = match ecn::decapsulate(F::traffic_class(outer), F::traffic_class(ip)) {
        Ecn::Keep => None,
        Ecn::Set(ecn) => Some(ecn),
        Ecn::Drop => return Err(Reason::PassWireEcn),
    };
    // What `shrink` leaves of the tunnel (`SKB_GSO_UDP_TUNNEL`, `skb->encapsulation`) TCP never looks at. UDP has the kernel
    // segment an aggregate for a socket without UDP_GRO, by the offsets of headers that are gone: it would lose them all.
    if skb.gso_size() != 0 && F::protocol(ip) == transport::UDP {
        return Err(Reason::PassWireAggregate);
    }
    check_next_header::<F>(skb, ip, headers)?;
    if !gate::is_gated(endpoint) {
        return Ok(ecn);
    }
    let Some((key, tcp_flags)) = flow_key::<F>(skb, ip) else { return Err(Reason::PassWireProtocol) };
    match gate::ask::<F>(&key, Direction::Inbound, tcp_flags) {
        gate::Answer::Fast => Ok(ecn),
        gate::Answer::Control => Err(Reason::PassWireTcpControl),
        gate::Answer::NotQualified => Err(Reason::PassWireGate),
    }
}

/// Whether the sender may send the inner frame that starts at this offset, whoever decapsulates it, and where its
/// packets are counted; `None` where the frame is cut off before that is clear.
#[inline(always)]
pub(super) fn check_sender<F: Half>(
    skb: &Skb,
    frame: usize,
    sender: F::Addr,
) -> Option<Result<u16, Verdict>> {
    Some(match ethernet::ether_type(skb.bytes(frame)?) {
        family if family == F::ETHER_TYPE => {
            check_source::<F>(F::addr(skb.read(frame + ETH + F::SOURCE_AT)?), sender)
        }
        family if family == F::Other::ETHER_TYPE => {
            let source = skb.read(frame + ETH + F::Other::SOURCE_AT)?;
            check_other_source::<F::Other>(F::Other::addr(source)).map_or(Ok(0), Err)
        }
        // The kernel takes priority tags off, any number of them: what stands behind them is not looked for.
        ethernet::VLAN | ethernet::SERVICE_VLAN if globals::DROP_FORGED.load() == 1 => {
            Err(Verdict::Drop(Reason::DropForgedPeerSource))
        }
        _ => Ok(0),
    })
}

/// The inner source must be in a subnet of the very peer that sent it. One look-up answers that and whether
/// the sender is a peer at all.
#[inline(always)]
pub(super) fn check_source<F: Half>(source: F::Addr, sender: F::Addr) -> Result<u16, Verdict> {
    match F::peer(source) {
        Some(Peer { vtep, traffic, .. }) if F::is_same(F::addr(vtep), sender) => Ok(*traffic),
        // A node's own processes speak to pods from the node's address, which may lie in the network.
        _ if F::is_same(source, sender) => Err(Reason::PassWireForeignSource.into()),
        // Another peer's, or this node's: a forged pod address. Nobody's: a client that the peer forwards for, which
        // the host decides on. It may be inside the network, where that overlaps the hosts' own; and who sends from
        // there gains nothing that the peer's own subnet would not give it.
        other if globals::DROP_FORGED.load() == 1 && (other.is_some() || F::is_own(source)) => {
            Err(Verdict::Drop(Reason::DropForgedPeerSource))
        }
        _ => Err(Reason::PassWireForeignSource.into()),
    }
}

/// Each family has a tunnel of its own: what comes through the other's and has a pod's source is no pod's, whoever sent it.
#[inline(always)]
pub(super) fn check_other_source<F: Half>(source: F::Addr) -> Option<Verdict> {
    let is_pods = F::is_there() && (F::is_own(source) || F::peer(source).is_some());
    (is_pods && globals::DROP_FORGED.load() == 1).then_some(Verdict::Drop(Reason::DropForgedPeerSource))
}

/// Only what the gate could follow is fast, gated or not, so that both decide alike. An outer checksum that is not right is
/// the kernel's to look at: it drops what is damaged.
#[inline(always)]
fn check_next_header<F: CheckOuter>(
    skb: &Skb,
    ip: &F::Header,
    headers: &vxlan::Headers,
) -> Result<(), Reason> {
    let Some(next) = skb.bytes::<8>(At::<F>::INNER_NEXT) else { return Err(Reason::PassWireProtocol) };
    if !F::has_ports(ip, next) || skb.is_cut(F::protocol(ip), At::<F>::INNER_NEXT) {
        return Err(Reason::PassWireProtocol);
    }
    if !F::is_checksum_right(skb, ip, next, headers) {
        return Err(Reason::PassWireChecksum);
    }
    Ok(())
}

#[inline(always)]
fn flow_key<F: Half>(skb: &Skb, ip: &F::Header) -> Option<(FlowKey<F::Octets>, u8)> {
    let protocol = F::protocol(ip);
    let (remote_port, local_port) = F::ports(ip, skb.bytes(At::<F>::INNER_NEXT)?)?;
    let tcp_flags = if protocol == transport::TCP { skb.bytes::<1>(At::<F>::INNER_NEXT + 13)?[0] } else { 0 };
    let key = F::flow_key(protocol, (F::destination(ip), local_port), (F::source(ip), remote_port));
    Some((key, tcp_flags))
}

/// Outer options, extension headers or a fragment: the kernel's, if a peer sent it or it is another overlay's; a fragment
/// without ports goes on, since nothing comes of it when its first one is dropped here.
#[inline(always)]
fn unusual_outer<F: CheckOuter>(skb: &mut Skb) -> Verdict {
    let udp = match F::find_udp(skb, OUTER_IP) {
        Ok(udp) => udp,
        Err(verdict) => return verdict,
    };
    let Some(outer) = skb.read::<F::Header>(OUTER_IP) else { return Verdict::Ignore };
    if skb.bytes::<8>(udp).is_some_and(|udp| vxlan::port(udp) != F::port()) {
        return Verdict::Ignore;
    }
    if skb.bytes::<16>(udp).is_some_and(|headers| vxlan::vni_field(headers) != F::vni()) {
        return Reason::PassWireVni.into();
    }
    let sender = F::source(outer);
    if !F::is_vtep(sender) {
        return Verdict::Drop(Reason::DropUnknownVtep);
    }
    match check_sender::<F>(skb, udp + 16, sender) {
        Some(Err(verdict)) => verdict,
        // No link's MTU is so small that the first fragment ends before the inner source (RFC 791: 68 bytes; RFC 8200:
        // 1280).
        None if globals::DROP_FORGED.load() == 1 => Verdict::Drop(Reason::DropForgedPeerSource),
        Some(Ok(_)) | None => Reason::PassWireOuter.into(),
    }
}

/// Takes the headers off and delivers. Only shrinking the packet can fail without harm, so it comes first.
#[inline(always)]
fn decapsulate<F: Half>(skb: &mut Skb, delivery: &Delivery<F::Octets>) -> Verdict {
    let load = Load::of::<F>(skb, At::<F>::INNER_IP);
    if !skb.shrink::<F>() {
        traffic::because::<F>(delivery.endpoint, Reason::PassWireNoRoom, load);
        return Reason::PassWireNoRoom.into();
    }
    traffic::received::<F>(Some(delivery.peer), Some(delivery.endpoint), Way::Fast, load);
    deliver::<F>(skb, delivery.endpoint, delivery.ecn, Reason::FastDecap)
}

/// Routes a decapsulated packet into the pod: one hop off, the pod's MACs, the pod's namespace.
#[inline(always)]
pub(super) fn deliver<F: Half>(
    skb: &mut Skb,
    endpoint: &Endpoint<F::Octets>,
    ecn: Option<u8>,
    reason: Reason,
) -> Verdict {
    let lost = Verdict::Drop(Reason::DropRedirect);
    let Some(frame) = skb.bytes_mut::<ETH>(0) else { return lost };
    ethernet::set_macs(frame, endpoint.mac, endpoint.gateway_mac);
    let Some(ip) = skb.write::<F::Header>(ETH) else { return lost };
    let before = F::unprotected(ip);
    F::take_hop(ip);
    if let Some(ecn) = ecn {
        F::set_ecn(ip, ecn);
    }
    let after = F::unprotected(ip);
    if after != before {
        skb.resummed(before, after);
    }
    Verdict::Redirect(reason, skb.redirect_peer(endpoint.ifindex))
}
