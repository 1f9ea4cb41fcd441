//! What may be redirected and what may be dropped, judged a second time: from RFC 791, 768, 792, 6040 and 7348 and
//! the rules of the data path, without any code of the programs.
//!
//! The checksum of a header that goes on is not judged: a forwarder that only adjusts it (RFC 1624) hands a wrong one
//! on as wrong as it came, and the receiver discards the packet. That is what [`Allowed::agrees`] insists on. That of
//! the outer header, which ends here, is.

use std::net::Ipv4Addr;

use loden_agent::dataplane::Program::{self, *};

use crate::{
    case::with_free_fields,
    packet::{ICMP, Mac, Packet, TCP, UDP, internet_checksum},
    rig::*,
    samples::{ECHO, LOCAL_PORT, REMOTE_PORT},
};

/// A redirect that is right.
pub(crate) struct Allowed {
    frame: Sent,
    /// Where the IP header stands that loses a hop, in the frame that came and in the one that goes.
    ip: (usize, usize),
}

enum Sent {
    As(Vec<u8>),
    Encapsulated(Packet),
}

impl Allowed {
    /// Whether this is the frame that goes, for one that came with this flow hash.
    pub(crate) fn agrees(&self, came: &[u8], went: &[u8], hash: impl FnOnce() -> u32) -> bool {
        let mut expected = match &self.frame {
            Sent::As(frame) => frame.clone(),
            Sent::Encapsulated(packet) => with_free_fields(packet, hash(), went),
        };
        if expected.len() != went.len() {
            return false;
        }
        let checksum = self.ip.1 + 10..self.ip.1 + 12;
        expected[checksum.clone()].copy_from_slice(&went[checksum]);
        // One's complement has two zeroes; modulo 0xffff they are one.
        let sum = |header: &[u8]| {
            header.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum::<u32>()
                % 0xffff
        };
        expected == went && sum(&came[self.ip.0..][..20]) == sum(&went[self.ip.1..][..20])
    }
}

/// An IPv4 header without options, of a packet that is neither a fragment nor padded nor cut.
struct Ip {
    tos: u8,
    ttl: u8,
    protocol: u8,
    source: Ipv4Addr,
    destination: Ipv4Addr,
}

fn word(frame: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?))
}

fn address(frame: &[u8], at: usize) -> Option<Ipv4Addr> {
    let octets: [u8; 4] = frame.get(at..at + 4)?.try_into().ok()?;
    Some(octets.into())
}

fn is_ethernet_to(frame: &[u8], at: usize, mac: Mac) -> bool {
    frame.get(at..at + 6) == Some(&mac[..]) && word(frame, at + 12) == Some(0x0800)
}

fn plain_ip(frame: &[u8], at: usize) -> Option<Ip> {
    let header = frame.get(at..at + 20)?;
    let fragment = word(header, 6)? & 0x3fff;
    let whole = usize::from(word(header, 2)?) == frame.len() - at;
    if header[0] != 0x45 || fragment != 0 || !whole {
        return None;
    }
    Some(Ip {
        tos: header[1],
        ttl: header[8],
        protocol: header[9],
        source: address(header, 12)?,
        destination: address(header, 16)?,
    })
}

/// The VTEP of the peer that has a pod's address, and whether it needs no encapsulation.
fn peer_of(pod: Ipv4Addr) -> Option<(Ipv4Addr, bool)> {
    match pod.octets() {
        [10, 5, 2, _] => Some((PEER_VTEP, false)),
        [10, 5, 3, _] => Some((KERNEL_PEER_VTEP, false)),
        [10, 5, 4, _] => Some((DIRECT_PEER_VTEP, true)),
        [10, 5, 8..=11, _] => Some((WIDE_PEER_VTEP, false)),
        _ => None,
    }
}

fn is_own(address: Ipv4Addr) -> bool {
    matches!(address.octets(), [10, 5, 1, _])
}

fn pod_macs(pod: Ipv4Addr) -> Option<(Mac, Mac)> {
    match pod {
        POD => Some((POD_MAC, GATEWAY_MAC)),
        OTHER_POD => Some((OTHER_POD_MAC, GATEWAY_MAC)),
        ROUTED_POD => Some((ROUTED_POD_MAC, OTHER_GATEWAY_MAC)),
        _ => None,
    }
}

/// Whether the gate can follow the packet and lets it go: the strict one only the samples' flows, which the run has
/// qualified, and of TCP nothing that opens or ends a connection.
fn gate(frame: &[u8], at: usize, ip: &Ip, outbound: bool, strict: bool) -> Option<()> {
    let next = frame.get(at + 20..).filter(|next| next.len() >= 8)?;
    let ports = match ip.protocol {
        // To be followed, TCP must show its header, whether the gate asks for it or not.
        TCP if next.len() < 20 => return None,
        TCP | UDP => (word(next, 0)?, word(next, 2)?),
        // Of an echo, either way, the run has qualified the identifier.
        ICMP if next[0] == 0 || next[0] == 8 => {
            let (pod, remote) =
                if outbound { (ip.source, ip.destination) } else { (ip.destination, ip.source) };
            let is_qualified = (pod, remote, word(next, 4)) == (POD, REMOTE, Some(ECHO));
            return (!strict || is_qualified).then_some(());
        }
        _ => return None,
    };
    if !strict {
        return Some(());
    }
    let (local, remote) = if outbound { (ip.source, ip.destination) } else { (ip.destination, ip.source) };
    let ports = if outbound { ports } else { (ports.1, ports.0) };
    let control = ip.protocol == TCP && next.get(13)? & 7 != 0;
    ((local, remote, ports) == (POD, REMOTE, (LOCAL_PORT, REMOTE_PORT)) && !control).then_some(())
}

/// The redirect of this frame that is right, if there is one.
pub(crate) fn allowed(program: Program, frame: &[u8], strict: bool) -> Option<Allowed> {
    match program {
        FromPod => from_pod(frame, strict),
        FromWire => from_wire(frame, strict),
        FromOverlay => delivered(frame, 0, VTEP_MAC, strict, |_| true),
        FromOther | ToPod | ToOverlay | ToWire | Guard => None,
    }
}

fn from_pod(frame: &[u8], strict: bool) -> Option<Allowed> {
    let ip = plain_ip(frame, 14).filter(|ip| ip.source == POD)?;
    if ip.destination == OTHER_POD {
        gate(frame, 14, &ip, true, strict)?;
        // In one segment: nobody is a router here.
        let over = is_ethernet_to(frame, 0, OTHER_POD_MAC).then(|| frame.to_vec())?;
        return Some(Allowed { frame: Sent::As(over), ip: (14, 14) });
    }
    if ip.ttl < 2 || !is_intact(frame, 14) {
        return None;
    }
    if ip.destination == ROUTED_POD {
        gate(frame, 14, &ip, true, strict)?;
        let mut over = is_ethernet_to(frame, 0, GATEWAY_MAC).then(|| frame.to_vec())?;
        over[0..6].copy_from_slice(&ROUTED_POD_MAC);
        over[6..12].copy_from_slice(&OTHER_GATEWAY_MAC);
        over[22] -= 1;
        return Some(Allowed { frame: Sent::As(over), ip: (14, 14) });
    }
    let (vtep, direct) = peer_of(ip.destination).filter(|(vtep, _)| *vtep != KERNEL_PEER_VTEP)?;
    let fits = frame.len() - 14 + if direct { 0 } else { 50 } <= usize::from(PEER_MTU);
    if !is_ethernet_to(frame, 0, GATEWAY_MAC) || !fits {
        return None;
    }
    gate(frame, 14, &ip, true, strict)?;
    let mut inner = frame.to_vec();
    inner[14 + 8] -= 1;
    if direct {
        return Some(Allowed { frame: Sent::As(inner), ip: (14, 14) });
    }
    let mac = if vtep == PEER_VTEP { PEER_VTEP_MAC } else { WIDE_PEER_VTEP_MAC };
    inner[0..6].copy_from_slice(&mac);
    inner[6..12].copy_from_slice(&VTEP_MAC);
    let ecn = if ip.tos & 3 == 3 { 2 } else { ip.tos & 3 };
    let packet = Packet::ethernet(GATEWAY_MAC, frame[6..12].try_into().ok()?)
        .ipv4(VTEP, vtep)
        .fragment(0)
        .ttl(OUTER_TTL)
        .tos(ecn)
        .udp(0, PORT)
        .udp_checksum(0)
        .vxlan(VNI)
        .bytes(&inner);
    Some(Allowed { frame: Sent::Encapsulated(packet), ip: (14, 64) })
}

fn from_wire(frame: &[u8], strict: bool) -> Option<Allowed> {
    let outer = plain_ip(frame, 14);
    if outer.as_ref().is_none_or(|outer| outer.protocol != UDP || outer.destination != VTEP) {
        return delivered(frame, 0, WIRE_MAC, strict, |source| {
            peer_of(source).is_some_and(|(_, direct)| direct)
        });
    }
    let outer = outer?;
    let udp = frame.get(34..50)?;
    let vni = [&[8, 0, 0, 0][..], &(VNI << 8).to_be_bytes()].concat();
    let is_vxlan = word(udp, 2) == Some(PORT)
        && word(udp, 4).map(usize::from) == Some(frame.len() - 34)
        && udp[8..16] == vni[..]
        && is_ethernet_to(frame, 0, WIRE_MAC)
        && ones_complement_sum(&frame[14..34]) == 0xffff;
    let inner_tos = *frame.get(65)?;
    let (ce, not_ect) = (outer.tos & 3 == 3, inner_tos & 3 == 0);
    let is_wrong = word(udp, 6) != Some(0) && !may_be_right(frame).unwrap_or(false);
    if !is_vxlan || ce && not_ect || is_wrong {
        return None;
    }
    let from_its_peer = |source| peer_of(source).is_some_and(|(vtep, _)| vtep == outer.source);
    let mut allowed = delivered(frame, 50, VTEP_MAC, strict, from_its_peer)?;
    if let Sent::As(frame) = &mut allowed.frame {
        match (outer.tos & 3, frame[15] & 3) {
            (3, _) => frame[15] |= 3,
            (1, 2) => frame[15] ^= 3,
            _ => {}
        }
    }
    Some(allowed)
}

/// Whether the outer UDP checksum is right, provided that the checksum of the inner transport header is.
fn may_be_right(frame: &[u8]) -> Option<bool> {
    let (outer, inner) = (frame.get(14..34)?, frame.get(64..84)?);
    let has_none = inner[9] == UDP && frame.get(90..92)? == [0, 0];
    // What a segment with a right checksum sums to: nothing with its pseudo header, which ICMP has not.
    let len = (frame.len() as u16).wrapping_sub(84).to_be_bytes();
    let segment =
        if inner[9] == ICMP { 0 } else { internet_checksum(&[&inner[12..20], &[0, inner[9]], &len]) };
    let len = (frame.len() as u16).wrapping_sub(34).to_be_bytes();
    let parts = [&outer[12..20], &[0, UDP], &len, &frame[34..84], &segment.to_be_bytes()];
    Some(!has_none && internet_checksum(&parts) == 0)
}

/// The sum that RFC 791 wants to be all ones over a whole header.
fn ones_complement_sum(header: &[u8]) -> u32 {
    let sum: u32 = header.chunks(2).map(|word| u32::from(word[0]) * 256 + u32::from(word[1])).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    (folded & 0xffff) + (folded >> 16)
}

/// Whether the checksum of the IP header at `at`, without options, is right.
fn is_intact(frame: &[u8], at: usize) -> bool {
    frame.get(at..at + 20).is_some_and(|header| ones_complement_sum(header) == 0xffff)
}

/// The inner frame at `at`, routed into the pod that it is for.
fn delivered(
    frame: &[u8],
    at: usize,
    mac: Mac,
    strict: bool,
    is_right_source: impl Fn(Ipv4Addr) -> bool,
) -> Option<Allowed> {
    let ip = plain_ip(frame, at + 14).filter(|ip| ip.ttl >= 2)?;
    peer_of(ip.source)?;
    let (pod_mac, gateway_mac) = pod_macs(ip.destination).filter(|_| is_intact(frame, at + 14))?;
    if !is_ethernet_to(frame, at, mac) || !is_right_source(ip.source) {
        return None;
    }
    gate(frame, at + 14, &ip, false, strict)?;
    let mut out = frame[at..].to_vec();
    out[0..6].copy_from_slice(&pod_mac);
    out[6..12].copy_from_slice(&gateway_mac);
    out[22] -= 1;
    Some(Allowed { frame: Sent::As(out), ip: (at + 14, 14) })
}

/// Whether there is a reason to drop the frame: a forged source, VXLAN from somebody who is no peer, or from a pod.
pub(crate) fn may_drop(program: Program, frame: &[u8]) -> bool {
    match program {
        FromPod => {
            let forged = address(frame, 26).is_some_and(|source| [OTHER_POD, ROUTED_POD].contains(&source));
            forged || untagged(frame).is_none_or(|ip| is_to_our_port(frame, ip))
        }
        FromWire | FromOther => {
            let Some(ip) = untagged(frame) else { return true };
            let sender = address(frame, ip + 12);
            let vteps = [PEER_VTEP, KERNEL_PEER_VTEP, WIDE_PEER_VTEP, DIRECT_PEER_VTEP];
            let is_strange = sender.is_none_or(|sender| !vteps.contains(&sender));
            // Behind options the inner frame starts later; where it ends before its source, or has a tag, that is hidden.
            let inner = udp_of(frame, ip) + 16;
            let is_forged = address(frame, inner + 14 + 12).is_none_or(|source| {
                is_own(source) || peer_of(source).is_some_and(|(vtep, _)| Some(vtep) != sender)
            });
            let is_tagged = matches!(word(frame, inner + 12), Some(0x8100 | 0x88a8));
            is_to_our_port(frame, ip) && (is_strange || is_forged || is_tagged)
        }
        FromOverlay | ToPod | ToOverlay | ToWire | Guard => false,
    }
}

/// Where the IP header stands behind priority tags; `None` where there are more than four.
fn untagged(frame: &[u8]) -> Option<usize> {
    let is_tag = |at: &usize| {
        matches!(word(frame, at - 2), Some(0x8100 | 0x88a8))
            && word(frame, *at).is_some_and(|tci| tci & 0xfff == 0)
    };
    let ip = (14..).step_by(4).find(|at| !is_tag(at))?;
    (ip <= 14 + 4 * 4).then_some(ip)
}

/// Where the UDP header of the IP header at `ip` stands.
fn udp_of(frame: &[u8], ip: usize) -> usize {
    ip + usize::from(frame.get(ip).map_or(5, |first| first & 0xf)) * 4
}

/// A UDP header that is cut off hides its port.
fn is_to_our_port(frame: &[u8], ip: usize) -> bool {
    let udp = udp_of(frame, ip);
    frame.get(ip + 9) == Some(&UDP) && (frame.len() < udp + 8 || word(frame, udp + 2) == Some(PORT))
}
