//! VXLAN that comes by another way than the uplink's: the kernel's socket takes it at every interface and for every
//! address of the host, so every interface has this check. It only drops: the host decides on the rest.
//!
//! What is looked at stands where the network header does, so an interface without Ethernet is no exception. Each check is
//! a function of its own, called when the body of a family has returned its part of the stack.

use aya_ebpf::bindings::__sk_buff;
use loden_ebpf::{
    ethernet,
    family::{Family, V4, V6},
    ipv4, ipv6,
    reason::Reason,
    transport, vxlan,
};

use super::{Verdict, from_wire, globals, half::Half, outer::EXTENSIONS_MAX, skb::Skb};

/// Priority tags (VLAN 0) that are looked behind. The kernel takes off any number of them; honest frames have one.
const TAGS: usize = 4;

/// Behind more tags or extension headers than we look behind.
struct Hidden;

/// Where the UDP header stands, counted from the network header, and whether the packet is a fragment.
struct Udp {
    at: usize,
    is_fragment: bool,
}

/// A family that is looked for.
trait Search: Half {
    /// The UDP header behind this IP header, which stands at `at`. `None` where there is none, or none to be read: of a
    /// fragment the first one has it.
    fn udp(skb: &Skb, ip: &Self::Header, at: usize) -> Result<Option<Udp>, Hidden>;
    /// Whether hosts take packets to this address without having it.
    fn is_for_many(address: Self::Addr) -> bool;
}

impl Search for V4 {
    #[inline(always)]
    fn udp(_: &Skb, ip: &ipv4::Header, at: usize) -> Result<Option<Udp>, Hidden> {
        if ipv4::protocol(ip) != transport::UDP || ipv4::is_later_fragment(ip) {
            return Ok(None);
        }
        Ok(Some(Udp { at: at + ipv4::header_len(ip), is_fragment: ipv4::is_fragment(ip) }))
    }

    #[inline(always)]
    fn is_for_many(address: u32) -> bool {
        ipv4::is_for_many(address)
    }
}

impl Search for V6 {
    #[inline(always)]
    fn udp(skb: &Skb, ip: &ipv6::Header, at: usize) -> Result<Option<Udp>, Hidden> {
        let (mut number, mut at, mut is_fragment) = (ipv6::next_header(ip), at + ipv6::LEN, false);
        for _ in 0..EXTENSIONS_MAX {
            if number == transport::UDP {
                return Ok(Some(Udp { at, is_fragment }));
            }
            if !ipv6::is_extension(number) {
                return Ok(None);
            }
            let extension = skb.load::<[u8; 8]>(at).and_then(|header| ipv6::extension(number, &header));
            let Some(extension) = extension else {
                // A fragment that ends before UDP hides it (RFC 7112: nobody may send that).
                return if is_fragment { Err(Hidden) } else { Ok(None) };
            };
            if extension.is_later_fragment {
                return Ok(None);
            }
            is_fragment |= number == ipv6::FRAGMENT;
            number = extension.next;
            at += extension.len;
        }
        Err(Hidden)
    }

    #[inline(always)]
    fn is_for_many(address: ipv6::Address) -> bool {
        ipv6::is_for_many(address)
    }
}

/// VXLAN of this overlay.
struct Arrival<F: Half> {
    sender: F::Addr,
    destination: F::Addr,
    /// Where the VXLAN header ends, counted from the network header.
    end: usize,
}

/// At an interface that is neither a pod's nor the VXLAN device, and at an uplink for what `from_wire` ignores.
#[inline(always)]
pub(super) fn of_wire(skb: &Skb, verdict: u64) -> u64 {
    #[inline(never)]
    fn check(raw: *mut __sk_buff) -> u64 {
        wire(&Skb::of(raw)).into()
    }
    if verdict == 0 && !skb.is_for_another_host() { check(skb.raw()) } else { verdict }
}

/// At a pod's veth, for what it sends to nobody's subnet: nodes have addresses there.
#[inline(always)]
pub(super) fn of_pod(skb: &Skb, verdict: u64) -> u64 {
    #[inline(never)]
    fn check(raw: *mut __sk_buff, verdict: u64) -> u64 {
        if is_to_a_vtep(&Skb::of(raw)) { Verdict::Drop(Reason::DropPodVxlan).into() } else { verdict }
    }
    let to_nobody = [Reason::PassPodNoPeer, Reason::PassPodNotIp, Reason::PassPodMalformed];
    let is = |reason: &Reason| verdict == u64::from(Verdict::Pass(*reason));
    if to_nobody.iter().any(is) { check(skb.raw(), verdict) } else { verdict }
}

#[inline(always)]
fn wire(skb: &Skb) -> Verdict {
    match ip_header(skb) {
        Ok(Some((ethernet::IPV6, at))) if globals::HAS_V6.load() == 1 => wire_of::<V6>(skb, at),
        Ok(Some((ethernet::IPV4, at))) => wire_of::<V4>(skb, at),
        Ok(_) => Verdict::Ignore,
        Err(Hidden) => Verdict::Drop(Reason::DropUnknownVtep),
    }
}

#[inline(always)]
fn wire_of<F: Search>(skb: &Skb, at: usize) -> Verdict {
    match arrival::<F>(skb, at) {
        Err(Hidden) => Verdict::Drop(Reason::DropUnknownVtep),
        Ok(Some(arrival)) => refused(skb, &arrival).map_or(Verdict::Ignore, Verdict::Drop),
        Ok(None) => Verdict::Ignore,
    }
}

#[inline(always)]
fn is_to_a_vtep(skb: &Skb) -> bool {
    #[inline(always)]
    fn of<F: Search>(skb: &Skb, at: usize) -> bool {
        match arrival::<F>(skb, at) {
            Err(Hidden) => true,
            Ok(Some(arrival)) => is_for_a_vtep(skb, &arrival),
            Ok(None) => false,
        }
    }
    match ip_header(skb) {
        Ok(Some((ethernet::IPV6, at))) if globals::HAS_V6.load() == 1 => of::<V6>(skb, at),
        Ok(Some((ethernet::IPV4, at))) => of::<V4>(skb, at),
        Ok(_) => false,
        Err(Hidden) => true,
    }
}

/// Why the packet may not reach the kernel's socket, here or at a peer, if there is a reason.
#[inline(always)]
fn refused<F: Search>(skb: &Skb, arrival: &Arrival<F>) -> Option<Reason> {
    let is_known = F::is_vtep(arrival.sender);
    let reason = if is_known { forged(skb, arrival)? } else { Reason::DropUnknownVtep };
    is_for_a_vtep(skb, arrival).then_some(reason)
}

/// Reads the headers from the IP header on, as far as the VNI. `None` where they are not of this overlay, or cut.
#[inline(always)]
fn arrival<F: Search>(skb: &Skb, at: usize) -> Result<Option<Arrival<F>>, Hidden> {
    if F::port() == 0 {
        // The family has no VXLAN here.
        return Ok(None);
    }
    let Some(ip) = skb.load::<F::Header>(at) else { return Ok(None) };
    let Some(udp) = F::udp(skb, &ip, at)? else { return Ok(None) };
    if skb.load(udp.at).is_none_or(|header| vxlan::port(&header) != F::port()) {
        return Ok(None);
    }
    let arrival = Arrival { sender: F::source(&ip), destination: F::destination(&ip), end: udp.at + 16 };
    Ok(match skb.load(udp.at) {
        Some(headers) => (vxlan::vni_field(&headers) == F::vni()).then_some(arrival),
        // A fragment that ends before the VNI hides it.
        None => udp.is_fragment.then_some(arrival),
    })
}

/// The EtherType of what stands behind the tags that the kernel would take off, and where, counted from the network header.
#[inline(always)]
fn ip_header(skb: &Skb) -> Result<Option<(u16, usize)>, Hidden> {
    let mut ether_type = skb.ether_type();
    // A VLAN's own device has the check, too.
    if skb.vlan_id() != 0 {
        return Ok(None);
    }
    for tag in 0..=TAGS {
        if !matches!(ether_type, ethernet::VLAN | ethernet::SERVICE_VLAN) {
            return Ok(Some((ether_type, tag * 4)));
        }
        let Some([high, low, next @ ..]) = skb.load::<[u8; 4]>(tag * 4) else { return Ok(None) };
        if u16::from_be_bytes([high & 0xf, low]) != 0 {
            return Ok(None);
        }
        ether_type = u16::from_be_bytes(next);
    }
    Err(Hidden)
}

/// As at the uplink: a peer sends only from its own subnet, and shows it.
#[inline(always)]
fn forged<F: Half>(skb: &Skb, arrival: &Arrival<F>) -> Option<Reason> {
    let hidden = (globals::DROP_FORGED.load() == 1).then_some(Reason::DropForgedPeerSource);
    let Some(frame) = skb.load::<ethernet::Header>(arrival.end) else { return hidden };
    match ethernet::ether_type(&frame) {
        family if family == F::ETHER_TYPE => {
            let Some(source) = skb.load::<F::Octets>(arrival.end + ethernet::LEN + F::SOURCE_AT) else {
                return hidden;
            };
            match from_wire::check_source::<F>(F::addr(&source), arrival.sender) {
                Err(Verdict::Drop(reason)) => Some(reason),
                _ => None,
            }
        }
        family if family == F::Other::ETHER_TYPE => {
            let at = arrival.end + ethernet::LEN + F::Other::SOURCE_AT;
            let Some(source) = skb.load::<<F::Other as Family>::Octets>(at) else { return hidden };
            match from_wire::check_other_source::<F::Other>(F::Other::addr(&source)) {
                Some(Verdict::Drop(reason)) => Some(reason),
                _ => None,
            }
        }
        ethernet::VLAN | ethernet::SERVICE_VLAN => hidden,
        _ => None,
    }
}

/// Whether the destination is this host, in whatever way, or another node. What the host only passes on to others is
/// none of our business.
#[inline(always)]
fn is_for_a_vtep<F: Search>(skb: &Skb, arrival: &Arrival<F>) -> bool {
    let destination = arrival.destination;
    F::is_same(destination, F::vtep())
        || F::is_for_many(destination)
        || F::is_vtep(destination)
        || skb.is_for_this_host::<F>(arrival.sender, destination)
}
