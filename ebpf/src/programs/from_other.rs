//! VXLAN that comes by another way than the uplink's: the kernel's socket takes it at every interface and for every
//! address of the host, so every interface has this check. It only drops: the host decides on the rest.
//!
//! What is looked at stands where the network header does, so an interface without Ethernet is no exception.

use loden_ebpf::{ethernet, ipv4, reason::Reason, vxlan};

use super::{Verdict, from_wire, globals, lookup, skb::Skb};

/// Priority tags (VLAN 0) that are looked behind. The kernel takes off any number of them; honest frames have one.
const TAGS: usize = 4;
/// The inner frame as far as the source of an IPv4 packet.
const INNER: usize = ethernet::LEN + 16;

/// Behind more tags than we look behind.
struct Hidden;

/// VXLAN of this overlay.
struct Arrival {
    sender: [u8; 4],
    /// Host order.
    destination: u32,
    /// Where the VXLAN header ends, counted from the network header.
    end: usize,
}

/// At an interface that is neither a pod's nor the VXLAN device, and at an uplink for what `from_wire` ignores.
#[inline(always)]
pub(super) fn run(skb: &Skb) -> Verdict {
    if skb.is_for_another_host() {
        return Verdict::Ignore;
    }
    match arrival(skb) {
        Err(Hidden) => Verdict::Drop(Reason::DropUnknownVtep),
        Ok(Some(arrival)) => refused(skb, &arrival).map_or(Verdict::Ignore, Verdict::Drop),
        Ok(None) => Verdict::Ignore,
    }
}

/// At a pod's veth, for what it sends to nobody's subnet: nodes have addresses there.
#[inline(always)]
pub(super) fn of_pod(skb: &Skb, reason: Reason) -> Verdict {
    match arrival(skb) {
        Err(Hidden) => Verdict::Drop(Reason::DropPodVxlan),
        Ok(Some(arrival)) if is_for_a_vtep(skb, &arrival) => Verdict::Drop(Reason::DropPodVxlan),
        Ok(_) => reason.into(),
    }
}

/// Why the packet may not reach the kernel's socket, here or at a peer, if there is a reason.
#[inline(always)]
fn refused(skb: &Skb, arrival: &Arrival) -> Option<Reason> {
    let is_known = lookup::is_vtep(arrival.sender);
    let reason = if is_known { forged(skb, arrival)? } else { Reason::DropUnknownVtep };
    is_for_a_vtep(skb, arrival).then_some(reason)
}

/// Reads the headers as far as the VNI. `None` where they are not of this overlay, or cut.
#[inline(always)]
fn arrival(skb: &Skb) -> Result<Option<Arrival>, Hidden> {
    Ok(ip_header(skb)?.and_then(|at| vxlan_of_ours(skb, at)))
}

/// The same from the IP header on.
#[inline(always)]
fn vxlan_of_ours(skb: &Skb, at: usize) -> Option<Arrival> {
    let ip: ipv4::Header = skb.load(at)?;
    if ipv4::protocol(&ip) != ipv4::UDP || ipv4::is_later_fragment(&ip) {
        return None;
    }
    let udp = at + ipv4::header_len(&ip);
    if vxlan::port(&skb.load(udp)?) != globals::PORT.load() {
        return None;
    }
    let sender = ipv4::source(&ip).to_be_bytes();
    let arrival = Arrival { sender, destination: ipv4::destination(&ip), end: udp + 16 };
    match skb.load(udp) {
        Some(headers) => (vxlan::vni_field(&headers) == globals::VNI.load()).then_some(arrival),
        // A fragment that ends before the VNI hides it.
        None => ipv4::is_fragment(&ip).then_some(arrival),
    }
}

/// Where the IPv4 header stands, counted from the network header, behind the tags that the kernel would take off.
#[inline(always)]
fn ip_header(skb: &Skb) -> Result<Option<usize>, Hidden> {
    let mut ether_type = skb.ether_type();
    // A VLAN's own device has the check, too.
    if skb.vlan_id() != 0 {
        return Ok(None);
    }
    for tag in 0..=TAGS {
        match ether_type {
            ethernet::IPV4 => return Ok(Some(tag * 4)),
            ethernet::VLAN | ethernet::SERVICE_VLAN => {}
            _ => return Ok(None),
        }
        let Some([high, low, next @ ..]) = skb.load::<4>(tag * 4) else { return Ok(None) };
        if u16::from_be_bytes([high & 0xf, low]) != 0 {
            return Ok(None);
        }
        ether_type = u16::from_be_bytes(next);
    }
    Err(Hidden)
}

/// As at the uplink: a peer sends only from its own subnet, and shows it.
#[inline(always)]
fn forged(skb: &Skb, arrival: &Arrival) -> Option<Reason> {
    let hidden = (globals::DROP_FORGED.load() == 1).then_some(Reason::DropForgedPeerSource);
    let Some(inner) = skb.load::<INNER>(arrival.end) else { return hidden };
    match u16::from_be_bytes([inner[12], inner[13]]) {
        ethernet::IPV4 => {
            let source = u32::from_be_bytes([inner[26], inner[27], inner[28], inner[29]]);
            match from_wire::check_source(source, arrival.sender) {
                Err(Verdict::Drop(reason)) => Some(reason),
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
fn is_for_a_vtep(skb: &Skb, arrival: &Arrival) -> bool {
    let destination = arrival.destination;
    destination == globals::VTEP.load()
        || ipv4::is_for_many(destination)
        || lookup::is_vtep(destination.to_be_bytes())
        || skb.is_for_this_host(arrival.sender, destination.to_be_bytes())
}
