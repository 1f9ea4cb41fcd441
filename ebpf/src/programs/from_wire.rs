//! What arrives from the underlay: VXLAN for this node is checked, decapsulated and delivered into the pod.

use loden_ebpf::{
    abi::{Endpoint, FlowKey, Peer},
    ethernet,
    flow::Direction,
    ipv4::{self, Ecn},
    reason::Reason,
    vxlan,
};

use super::{
    Verdict, gate, globals, lookup, observe,
    skb::Skb,
    traffic::{self, Load, Way},
};

const ETH: usize = ethernet::LEN;
/// Where the headers stand, counted from the start of the frame.
const OUTER_IP: usize = ETH;
const UDP: usize = OUTER_IP + ipv4::LEN;
const INNER_ETH: usize = UDP + 16;
const INNER_IP: usize = INNER_ETH + ETH;
const INNER_NEXT: usize = INNER_IP + ipv4::LEN;
/// Most bytes of options that the outer IP header can have.
const OPTIONS_MAX: usize = 40;

/// An endpoint, and what to do to the packet on the way to it.
struct Delivery {
    endpoint: &'static Endpoint,
    /// Where the sender's packets are counted.
    peer: u16,
    /// What the inner ECN field becomes, if anything else.
    ecn: Option<u8>,
}

/// What came, and may be fast.
enum Arrival {
    Encapsulated(Delivery),
    Direct(Delivery),
}

#[inline(always)]
pub(super) fn run(skb: &mut Skb) -> Verdict {
    match decide(skb) {
        Ok(Arrival::Encapsulated(delivery)) => decapsulate(skb, &delivery),
        Ok(Arrival::Direct(delivery)) => {
            let load = Load::of(skb, OUTER_IP);
            traffic::received(Some(delivery.peer), Some(delivery.endpoint), Way::Fast, load);
            deliver(skb, delivery.endpoint, None, Reason::FastDirectIn)
        }
        Err(verdict) => verdict,
    }
}

/// Everything that can be decided, and nothing written.
#[inline(always)]
fn decide(skb: &mut Skb) -> Result<Arrival, Verdict> {
    if skb.ether_type() != ethernet::IPV4 || skb.has_vlan() || !skb.is_for_host() {
        return Err(Verdict::Ignore);
    }
    if skb.bytes::<{ OUTER_IP + ipv4::LEN }>(0).is_none() {
        skb.make_linear((OUTER_IP + ipv4::LEN) as u32);
    }
    let Some(outer) = skb.bytes::<{ ipv4::LEN }>(OUTER_IP) else { return Err(Verdict::Ignore) };
    if ipv4::protocol(outer) != ipv4::UDP || ipv4::destination(outer) != globals::VTEP.load() {
        return direct(skb).map(Arrival::Direct);
    }
    if !ipv4::is_plain(outer) || ipv4::is_fragment(outer) {
        if skb.bytes::<{ INNER_NEXT + OPTIONS_MAX }>(0).is_none() {
            let len = skb.len().min((INNER_NEXT + OPTIONS_MAX) as u32);
            skb.make_linear(len);
        }
        let Some(outer) = skb.bytes::<{ ipv4::LEN }>(OUTER_IP) else { return Err(Verdict::Ignore) };
        return Err(unusual_outer(skb, outer));
    }
    if skb.bytes::<{ INNER_NEXT + 8 }>(0).is_none() {
        skb.make_linear((INNER_NEXT + 20) as u32);
    }
    // `outer` may have moved: from here on every header is fetched again.
    let Some(udp) = skb.bytes::<8>(UDP) else { return Err(Verdict::Ignore) };
    if vxlan::port(udp) != globals::PORT.load() {
        return Err(Verdict::Ignore);
    }
    let Some(outer) = skb.bytes::<{ ipv4::LEN }>(OUTER_IP) else { return Err(Verdict::Ignore) };
    let sender = ipv4::source(outer).to_be_bytes();
    match inner(skb, outer, sender) {
        Ok(delivery) => Ok(Arrival::Encapsulated(delivery)),
        // Another overlay on the same port has VTEPs of its own.
        Err(verdict @ Verdict::Pass(Reason::PassWireVni)) => Err(verdict),
        // The kernel accepts VXLAN from anybody. Whatever is passed on to it is from a peer.
        Err(_) if !lookup::is_vtep(sender) => Err(Verdict::Drop(Reason::DropUnknownVtep)),
        Err(verdict) => Err(verdict),
    }
}

/// Not VXLAN for us. What a direct peer's pod sends to a pod here is routed to it, the gate permitting.
#[inline(always)]
fn direct(skb: &mut Skb) -> Result<Delivery, Verdict> {
    let Some(ip) = skb.bytes::<{ ipv4::LEN }>(OUTER_IP) else { return Err(Verdict::Ignore) };
    let peer = lookup::peer(ipv4::source(ip)).filter(|peer| peer.direct == 1);
    let (Some(peer), Some(endpoint)) = (peer, lookup::endpoint(ipv4::destination(ip))) else {
        return Err(Verdict::Ignore);
    };
    let load = Load::of(skb, OUTER_IP);
    match observe::forward(skb, endpoint) {
        Ok(endpoint) => Ok(Delivery { endpoint, peer: peer.traffic, ecn: None }),
        Err(()) => {
            traffic::received(Some(peer.traffic), Some(endpoint), Way::Slow, load);
            traffic::because(endpoint, Reason::PassDirect, load);
            Err(Reason::PassDirect.into())
        }
    }
}

#[inline(always)]
fn inner(skb: &Skb, outer: &ipv4::Header, sender: [u8; 4]) -> Result<Delivery, Verdict> {
    let cut = Verdict::Pass(Reason::PassWireOuter);
    let Some(headers) = skb.bytes::<16>(UDP) else { return Err(cut) };
    if vxlan::vni_field(headers) != globals::VNI.load() {
        return Err(Reason::PassWireVni.into());
    }
    if vxlan::vni(headers).is_none() {
        return Err(Reason::PassWireFlags.into());
    }
    let Some(checked) = check_sender(skb, INNER_ETH, sender) else { return Err(cut) };
    let peer = checked?;
    // The kernel trims to the outer lengths; where they say the same as the frame, nothing has to be trimmed. A
    // header that was damaged on the way it drops.
    if u32::from(ipv4::total_len(outer)) + OUTER_IP as u32 != skb.len()
        || u32::from(vxlan::udp_len(headers)) + UDP as u32 != skb.len()
        || !ipv4::has_right_checksum(outer)
    {
        return Err(cut);
    }
    let Some(frame) = skb.bytes::<ETH>(INNER_ETH) else { return Err(cut) };
    if ethernet::ether_type(frame) != ethernet::IPV4 || ethernet::destination(frame) != globals::vtep_mac() {
        return Err(Reason::PassWireInnerFrame.into());
    }
    let Some(ip) = skb.bytes::<{ ipv4::LEN }>(INNER_IP) else { return Err(cut) };
    if !ipv4::is_plain(ip)
        || !ipv4::has_right_checksum(ip)
        || ipv4::is_fragment(ip)
        || u32::from(ipv4::total_len(ip)) + INNER_IP as u32 != skb.len()
    {
        return Err(Reason::PassWireInnerPacket.into());
    }
    let Some(endpoint) = lookup::endpoint(ipv4::destination(ip)) else {
        return Err(Reason::PassWireNoEndpoint.into());
    };
    match may_be_fast(skb, outer, ip, headers, endpoint) {
        Ok(ecn) => Ok(Delivery { endpoint, peer, ecn }),
        Err(reason) => {
            traffic::because(endpoint, reason, Load::of(skb, INNER_IP));
            Err(reason.into())
        }
    }
}

/// Whether a packet for an endpoint may be delivered past the host, and what its ECN field then becomes.
#[inline(always)]
fn may_be_fast(
    skb: &Skb,
    outer: &ipv4::Header,
    ip: &ipv4::Header,
    headers: &vxlan::Headers,
    endpoint: &Endpoint,
) -> Result<Option<u8>, Reason> {
    if ipv4::ttl(ip) <= 1 {
        return Err(Reason::PassWireTtl);
    }
    let ecn = match ipv4::decapsulate_ecn(ipv4::tos(outer), ipv4::tos(ip)) {
        Ecn::Keep => None,
        Ecn::Set(ecn) => Some(ecn),
        Ecn::Drop => return Err(Reason::PassWireEcn),
    };
    check_next_header(skb, ip, headers)?;
    if !gate::is_gated(endpoint) {
        return Ok(ecn);
    }
    let Some((key, tcp_flags)) = flow_key(skb, ip) else { return Err(Reason::PassWireProtocol) };
    match gate::ask(&key, Direction::Inbound, tcp_flags) {
        gate::Answer::Fast => Ok(ecn),
        gate::Answer::Control => Err(Reason::PassWireTcpControl),
        gate::Answer::NotQualified => Err(Reason::PassWireGate),
    }
}

/// Whether the sender may send the inner frame that starts at this offset, whoever decapsulates it, and where its
/// packets are counted; `None` where the frame is cut off before that is clear.
#[inline(always)]
fn check_sender(skb: &Skb, frame: usize, sender: [u8; 4]) -> Option<Result<u16, Verdict>> {
    Some(match ethernet::ether_type(skb.bytes(frame)?) {
        // The source stands at byte 12 of the inner IP header.
        ethernet::IPV4 => check_source(u32::from_be_bytes(*skb.bytes(frame + ETH + 12)?), sender),
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
pub(super) fn check_source(source: u32, sender: [u8; 4]) -> Result<u16, Verdict> {
    match lookup::peer(source) {
        Some(Peer { vtep, traffic, .. }) if *vtep == sender => Ok(*traffic),
        // A node's own processes speak to pods from the node's address, which may lie in the network.
        _ if source.to_be_bytes() == sender => Err(Reason::PassWireForeignSource.into()),
        // Another peer's, or this node's: a forged pod address. Nobody's: a client that the peer forwards for, which
        // the host decides on. It may be inside the network, where that overlaps the hosts' own; and who sends from
        // there gains nothing that the peer's own subnet would not give it.
        other if globals::DROP_FORGED.load() == 1 && (other.is_some() || lookup::is_own(source)) => {
            Err(Verdict::Drop(Reason::DropForgedPeerSource))
        }
        _ => Err(Reason::PassWireForeignSource.into()),
    }
}

/// Only what the gate could follow is fast, gated or not, so that both decide alike. An outer checksum, which Loden's
/// own packets have not, is the kernel's to verify unless that has been done: it drops what is damaged.
#[inline(always)]
fn check_next_header(skb: &Skb, ip: &ipv4::Header, headers: &vxlan::Headers) -> Result<(), Reason> {
    let Some(next) = skb.bytes::<8>(INNER_NEXT) else { return Err(Reason::PassWireProtocol) };
    let protocol = ipv4::protocol(ip);
    if !ipv4::has_ports(protocol, next) || protocol == ipv4::TCP && skb.bytes::<1>(INNER_NEXT + 13).is_none()
    {
        return Err(Reason::PassWireProtocol);
    }
    if vxlan::udp_checksum(headers) != 0 && !skb.is_checksum_verified() {
        return Err(Reason::PassWireChecksum);
    }
    Ok(())
}

#[inline(always)]
fn flow_key(skb: &Skb, ip: &ipv4::Header) -> Option<(FlowKey, u8)> {
    let protocol = ipv4::protocol(ip);
    let (remote_port, local_port) = ipv4::ports(protocol, skb.bytes(INNER_NEXT)?)?;
    let tcp_flags = if protocol == ipv4::TCP { skb.bytes::<1>(INNER_NEXT + 13)?[0] } else { 0 };
    let key = FlowKey::new(protocol, (ipv4::destination(ip), local_port), (ipv4::source(ip), remote_port));
    Some((key, tcp_flags))
}

/// Outer options or a fragment: the kernel's, if a peer sent it or it is another overlay's; a fragment without
/// ports goes on, since nothing comes of it when its first one is dropped here.
#[inline(always)]
fn unusual_outer(skb: &Skb, outer: &ipv4::Header) -> Verdict {
    if ipv4::is_later_fragment(outer) {
        return Verdict::Ignore;
    }
    let udp = OUTER_IP + ipv4::header_len(outer);
    if skb.bytes::<8>(udp).is_some_and(|udp| vxlan::port(udp) != globals::PORT.load()) {
        return Verdict::Ignore;
    }
    if skb.bytes::<16>(udp).is_some_and(|headers| vxlan::vni_field(headers) != globals::VNI.load()) {
        return Reason::PassWireVni.into();
    }
    let sender = ipv4::source(outer).to_be_bytes();
    if !lookup::is_vtep(sender) {
        return Verdict::Drop(Reason::DropUnknownVtep);
    }
    match check_sender(skb, udp + 16, sender) {
        Some(Err(verdict)) => verdict,
        // No link's MTU is so small that the first fragment ends before the inner source (RFC 791: 68 bytes).
        None if globals::DROP_FORGED.load() == 1 => Verdict::Drop(Reason::DropForgedPeerSource),
        Some(Ok(_)) | None => Reason::PassWireOuter.into(),
    }
}

/// Takes the headers off and delivers. Only shrinking the packet can fail without harm, so it comes first.
#[inline(always)]
fn decapsulate(skb: &mut Skb, delivery: &Delivery) -> Verdict {
    let load = Load::of(skb, INNER_IP);
    if !skb.shrink() {
        traffic::because(delivery.endpoint, Reason::PassWireNoRoom, load);
        return Reason::PassWireNoRoom.into();
    }
    traffic::received(Some(delivery.peer), Some(delivery.endpoint), Way::Fast, load);
    deliver(skb, delivery.endpoint, delivery.ecn, Reason::FastDecap)
}

/// Routes a decapsulated packet into the pod: one hop off, the pod's MACs, the pod's namespace.
#[inline(always)]
pub(super) fn deliver(skb: &mut Skb, endpoint: &Endpoint, ecn: Option<u8>, reason: Reason) -> Verdict {
    let lost = Verdict::Drop(Reason::DropRedirect);
    let Some(frame) = skb.bytes_mut::<ETH>(0) else { return lost };
    ethernet::set_macs(frame, endpoint.mac, endpoint.gateway_mac);
    let Some(ip) = skb.bytes_mut::<{ ipv4::LEN }>(ETH) else { return lost };
    ipv4::decrement_ttl(ip);
    if let Some(ecn) = ecn {
        ipv4::set_ecn(ip, ecn);
    }
    Verdict::Redirect(reason, skb.redirect_peer(endpoint.ifindex))
}
