//! What the families' outer headers differ in on arrival.

use loden_ebpf::{
    family::{Family, V4, V6},
    ipv4, ipv6,
    reason::Reason,
    transport::{self, NextHeader},
    vxlan,
};

use super::{Verdict, globals, half::Half, skb::Skb};

/// Most bytes of options that an IPv4 header can have.
const OPTIONS_MAX: usize = 40;
/// Most extension headers that are walked, and how far: nobody sends more before VXLAN.
pub(super) const EXTENSIONS_MAX: usize = 6;
const EXTENSION_BYTES_MAX: usize = 256;
/// UDP, VXLAN, Ethernet and the inner header up to its source behind an outer IP header.
const BEHIND: usize = 16 + 14 + 40;

/// A family whose outer headers are checked.
pub(super) trait CheckOuter: Half {
    /// Whether this is UDP for our VTEP address, or may turn out to be.
    fn may_be_vxlan(outer: &Self::Header) -> bool;
    /// Where the UDP header stands behind an outer header, at `ip`, that is not plain.
    fn find_udp(skb: &mut Skb, ip: usize) -> Result<usize, Verdict>;
    /// Whether the outer UDP checksum is right. The kernel verifies what we cannot, and drops what is damaged.
    fn is_checksum_right(
        skb: &Skb,
        inner: &Self::Header,
        next: &NextHeader,
        headers: &vxlan::Headers,
    ) -> bool;
}

impl CheckOuter for V4 {
    #[inline(always)]
    fn may_be_vxlan(outer: &ipv4::Header) -> bool {
        ipv4::protocol(outer) == transport::UDP && ipv4::destination(outer) == globals::V4_VTEP.load()
    }

    #[inline(always)]
    fn find_udp(skb: &mut Skb, ip: usize) -> Result<usize, Verdict> {
        let far = ip + ipv4::LEN + OPTIONS_MAX + BEHIND;
        let len = skb.len().min(far as u32);
        skb.reach(far, len);
        let Some(outer) = skb.read::<ipv4::Header>(ip) else { return Err(Verdict::Ignore) };
        if ipv4::is_later_fragment(outer) {
            return Err(Verdict::Ignore);
        }
        Ok(ip + ipv4::header_len(outer))
    }

    /// Loden's own packets have none. One that the kernel's device wrote must be what follows from the headers, where nobody
    /// has verified it; the payload is the pod's to verify, if it can.
    #[inline(always)]
    fn is_checksum_right(
        skb: &Skb,
        inner: &ipv4::Header,
        next: &NextHeader,
        headers: &vxlan::Headers,
    ) -> bool {
        if vxlan::udp_checksum(headers) == 0 || skb.is_checksum_verified() {
            return true;
        }
        if ipv4::protocol(inner) == transport::UDP && transport::udp_checksum(next) == 0 {
            return false;
        }
        let outer = skb.bytes::<{ vxlan::ENCAP_LEN }>(loden_ebpf::ethernet::LEN);
        outer.is_some_and(|outer| vxlan::has_right_checksum(outer, inner))
    }
}

impl CheckOuter for V6 {
    /// An extension header may hide UDP.
    #[inline(always)]
    fn may_be_vxlan(outer: &ipv6::Header) -> bool {
        let next = ipv6::next_header(outer);
        (next == transport::UDP || ipv6::is_extension(next))
            && Self::is_same(ipv6::destination(outer), globals::V6_VTEP.load())
    }

    #[inline(always)]
    fn find_udp(skb: &mut Skb, ip: usize) -> Result<usize, Verdict> {
        let far = ip + ipv6::LEN + EXTENSION_BYTES_MAX + BEHIND;
        let len = skb.len().min(far as u32);
        skb.reach(far, len);
        let Some(outer) = skb.read::<ipv6::Header>(ip) else { return Err(Verdict::Ignore) };
        let (mut number, mut at) = (ipv6::next_header(outer), 0);
        for _ in 0..EXTENSIONS_MAX {
            if number == transport::UDP {
                return Ok(ip + ipv6::LEN + at);
            }
            let Some(header) = skb.bytes::<8>(ip + ipv6::LEN + at) else { break };
            // TCP, ICMPv6, ESP, nothing: not VXLAN.
            let Some(extension) = ipv6::extension(number, header) else { return Err(Verdict::Ignore) };
            if extension.is_later_fragment {
                return Err(Verdict::Ignore);
            }
            number = extension.next;
            at += extension.len;
            if at > EXTENSION_BYTES_MAX {
                break;
            }
        }
        // The kernel would look further. From a peer it may; a stranger could hide VXLAN there.
        if Self::is_vtep(ipv6::source(outer)) {
            return Err(Reason::PassWireOuter.into());
        }
        Err(Verdict::Drop(Reason::DropUnknownVtep))
    }

    /// Where nobody has verified it, it must be what follows from the headers; the payload is the pod's to verify. From a
    /// UDP header without a checksum nothing follows.
    #[inline(always)]
    fn is_checksum_right(
        skb: &Skb,
        inner: &ipv6::Header,
        next: &NextHeader,
        headers: &vxlan::Headers,
    ) -> bool {
        if vxlan::udp_checksum(headers) == 0 {
            return false;
        }
        if skb.is_checksum_verified() {
            return true;
        }
        if ipv6::next_header(inner) == transport::UDP && transport::udp_checksum(next) == 0 {
            return false;
        }
        let outer = skb.bytes::<{ vxlan::ENCAP_LEN_V6 }>(loden_ebpf::ethernet::LEN);
        outer.is_some_and(|outer| vxlan::checksum_v6(outer, inner) == 0)
    }
}
