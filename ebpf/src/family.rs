//! The two address families, so that one source serves both: what is generic takes a [`Family`] and is compiled once for
//! each. An overlay has one family inside and outside.

use crate::{
    abi::{FlowKey, Octets},
    ethernet, grid, ipv4, ipv6,
    transport::{self, Echo, NextHeader},
    vxlan,
};

/// Bytes that may be anything: what a packet holds can be looked at as them.
///
/// # Safety
///
/// Every bit pattern is a value, and the alignment is 1.
pub unsafe trait Bytes: Copy {}

// SAFETY: bytes have neither forbidden patterns nor an alignment.
unsafe impl<const N: usize> Bytes for [u8; N] {}

/// An address family: [`V4`] or [`V6`].
pub trait Family: Copy {
    /// An address in headers and maps, network order.
    type Octets: Octets + Bytes;
    /// An address as the programs look it up.
    type Addr: Copy;
    /// The IP header, without options or extension headers.
    type Header: Bytes;
    /// Where the network lies and how it is cut into slots.
    type Grid: Copy;

    /// EtherType.
    const ETHER_TYPE: u16;
    /// Length of [`Self::Header`], in bytes.
    const LEN: usize;
    /// Where the source address stands in [`Self::Header`].
    const SOURCE_AT: usize;
    /// Length of what encapsulation puts in front of a packet, in bytes.
    const ENCAP_LEN: usize;
    /// The family's echo.
    const ECHO: Echo;
    /// Whether the outer UDP header must have a checksum (RFC 8200, section 8.1).
    const OUTER_CHECKSUM: bool;

    /// Whether two addresses are one.
    fn is_same(a: Self::Addr, b: Self::Addr) -> bool;
    /// The address from its bytes.
    fn addr(octets: &Self::Octets) -> Self::Addr;
    /// Its bytes.
    fn octets(address: Self::Addr) -> Self::Octets;
    /// The slot of an address: see [`grid`].
    fn slot(address: Self::Addr, grid: &Self::Grid) -> Option<u32>;

    /// This family's version, without options or extension headers.
    fn is_plain(header: &Self::Header) -> bool;
    /// Whether the header's checksum is right, where it has one.
    fn is_undamaged(header: &Self::Header) -> bool;
    /// A fragment; of IPv6 one that is told by the fixed header.
    fn is_fragment(header: &Self::Header) -> bool;
    /// A fragment that does not hold the next header.
    fn is_later_fragment(header: &Self::Header) -> bool;
    /// Length of the header with its options, in bytes.
    fn header_len(header: &Self::Header) -> usize;
    /// Length of the packet as its header says it, in bytes.
    fn packet_len(header: &Self::Header) -> u32;
    /// Number of the next header.
    fn protocol(header: &Self::Header) -> u8;
    /// Source address.
    fn source(header: &Self::Header) -> Self::Addr;
    /// Destination address.
    fn destination(header: &Self::Header) -> Self::Addr;
    /// Hops that are left.
    fn hops(header: &Self::Header) -> u8;
    /// DSCP and ECN.
    fn traffic_class(header: &Self::Header) -> u8;
    /// Takes one hop off.
    fn take_hop(header: &mut Self::Header);
    /// Sets the ECN field.
    fn set_ecn(header: &mut Self::Header, ecn: u8);
    /// Sum, in memory order, of the words in which traffic class and hops stand, where no checksum of the header makes up
    /// for what changes in them; else 0.
    fn unprotected(header: &Self::Header) -> u32;
    /// What tells packets apart besides their transport header: see [`crate::flow::mark`]. `further` are the twelve bytes
    /// behind the transport's first twelve.
    fn identity(header: &Self::Header, further: impl FnOnce() -> [u8; 12]) -> u64;

    /// Ports of the next header.
    #[inline(always)]
    fn ports(header: &Self::Header, next: &NextHeader) -> Option<(u16, u16)> {
        transport::ports(Self::protocol(header), Self::ECHO, next)
    }

    /// Whether [`Self::ports`] finds any.
    #[inline(always)]
    fn has_ports(header: &Self::Header, next: &NextHeader) -> bool {
        transport::has_ports(Self::protocol(header), Self::ECHO, next)
    }

    /// The key of a flow: its local end first.
    #[inline(always)]
    fn flow_key(
        protocol: u8,
        (local, local_port): (Self::Addr, u16),
        (remote, remote_port): (Self::Addr, u16),
    ) -> FlowKey<Self::Octets> {
        FlowKey::of(protocol, (Self::octets(local), local_port), (Self::octets(remote), remote_port))
    }
}

/// IPv4.
#[derive(Clone, Copy, Debug)]
pub struct V4;

/// IPv6.
#[derive(Clone, Copy, Debug)]
pub struct V6;

impl Family for V4 {
    type Octets = [u8; 4];
    /// Host order.
    type Addr = u32;
    type Header = ipv4::Header;
    type Grid = grid::Grid;

    const ETHER_TYPE: u16 = ethernet::IPV4;
    const LEN: usize = ipv4::LEN;
    const SOURCE_AT: usize = 12;
    const ENCAP_LEN: usize = vxlan::ENCAP_LEN;
    const ECHO: Echo = transport::ECHO_V4;
    const OUTER_CHECKSUM: bool = false;

    #[inline(always)]
    fn is_same(a: u32, b: u32) -> bool {
        a == b
    }

    #[inline(always)]
    fn addr(octets: &[u8; 4]) -> u32 {
        u32::from_be_bytes(*octets)
    }

    #[inline(always)]
    fn octets(address: u32) -> [u8; 4] {
        address.to_be_bytes()
    }

    #[inline(always)]
    fn slot(address: u32, grid: &grid::Grid) -> Option<u32> {
        grid::slot(address, grid.network, grid.mask, grid.shift)
    }

    #[inline(always)]
    fn is_plain(header: &ipv4::Header) -> bool {
        ipv4::is_plain(header)
    }

    #[inline(always)]
    fn is_undamaged(header: &ipv4::Header) -> bool {
        ipv4::has_right_checksum(header)
    }

    #[inline(always)]
    fn is_fragment(header: &ipv4::Header) -> bool {
        ipv4::is_fragment(header)
    }

    #[inline(always)]
    fn is_later_fragment(header: &ipv4::Header) -> bool {
        ipv4::is_later_fragment(header)
    }

    #[inline(always)]
    fn header_len(header: &ipv4::Header) -> usize {
        ipv4::header_len(header)
    }

    #[inline(always)]
    fn packet_len(header: &ipv4::Header) -> u32 {
        u32::from(ipv4::total_len(header))
    }

    #[inline(always)]
    fn protocol(header: &ipv4::Header) -> u8 {
        ipv4::protocol(header)
    }

    #[inline(always)]
    fn source(header: &ipv4::Header) -> u32 {
        ipv4::source(header)
    }

    #[inline(always)]
    fn destination(header: &ipv4::Header) -> u32 {
        ipv4::destination(header)
    }

    #[inline(always)]
    fn hops(header: &ipv4::Header) -> u8 {
        ipv4::ttl(header)
    }

    #[inline(always)]
    fn traffic_class(header: &ipv4::Header) -> u8 {
        ipv4::tos(header)
    }

    #[inline(always)]
    fn take_hop(header: &mut ipv4::Header) {
        ipv4::decrement_ttl(header);
    }

    #[inline(always)]
    fn set_ecn(header: &mut ipv4::Header, ecn: u8) {
        ipv4::set_ecn(header, ecn);
    }

    #[inline(always)]
    fn unprotected(_: &ipv4::Header) -> u32 {
        0
    }

    /// The IP id.
    #[inline(always)]
    fn identity(header: &ipv4::Header, _: impl FnOnce() -> [u8; 12]) -> u64 {
        u64::from(u16::from_be_bytes([header[4], header[5]]))
    }
}

impl Family for V6 {
    type Octets = [u8; 16];
    type Addr = ipv6::Address;
    type Header = ipv6::Header;
    type Grid = grid::GridV6;

    const ETHER_TYPE: u16 = ethernet::IPV6;
    const LEN: usize = ipv6::LEN;
    const SOURCE_AT: usize = 8;
    const ENCAP_LEN: usize = vxlan::ENCAP_LEN_V6;
    const ECHO: Echo = transport::ECHO_V6;
    const OUTER_CHECKSUM: bool = true;

    #[inline(always)]
    fn is_same(a: ipv6::Address, b: ipv6::Address) -> bool {
        (a[0] ^ b[0]) | (a[1] ^ b[1]) == 0
    }

    #[inline(always)]
    fn addr(octets: &[u8; 16]) -> ipv6::Address {
        ipv6::words(octets)
    }

    #[inline(always)]
    fn octets(address: ipv6::Address) -> [u8; 16] {
        ipv6::octets(address)
    }

    #[inline(always)]
    fn slot(address: ipv6::Address, grid: &grid::GridV6) -> Option<u32> {
        grid.slot(address)
    }

    #[inline(always)]
    fn is_plain(header: &ipv6::Header) -> bool {
        ipv6::is_plain(header)
    }

    #[inline(always)]
    fn is_undamaged(_: &ipv6::Header) -> bool {
        true
    }

    #[inline(always)]
    fn is_fragment(header: &ipv6::Header) -> bool {
        ipv6::next_header(header) == ipv6::FRAGMENT
    }

    /// The fixed header does not tell; its next header is then none that has ports.
    #[inline(always)]
    fn is_later_fragment(_: &ipv6::Header) -> bool {
        false
    }

    #[inline(always)]
    fn header_len(_: &ipv6::Header) -> usize {
        ipv6::LEN
    }

    #[inline(always)]
    fn packet_len(header: &ipv6::Header) -> u32 {
        u32::from(ipv6::payload_len(header)) + ipv6::LEN as u32
    }

    #[inline(always)]
    fn protocol(header: &ipv6::Header) -> u8 {
        ipv6::next_header(header)
    }

    #[inline(always)]
    fn source(header: &ipv6::Header) -> ipv6::Address {
        ipv6::source(header)
    }

    #[inline(always)]
    fn destination(header: &ipv6::Header) -> ipv6::Address {
        ipv6::destination(header)
    }

    #[inline(always)]
    fn hops(header: &ipv6::Header) -> u8 {
        ipv6::hop_limit(header)
    }

    #[inline(always)]
    fn traffic_class(header: &ipv6::Header) -> u8 {
        ipv6::traffic_class(header)
    }

    #[inline(always)]
    fn take_hop(header: &mut ipv6::Header) {
        ipv6::decrement_hop_limit(header);
    }

    #[inline(always)]
    fn set_ecn(header: &mut ipv6::Header, ecn: u8) {
        ipv6::set_ecn(header, ecn);
    }

    #[inline(always)]
    fn unprotected(header: &ipv6::Header) -> u32 {
        u32::from(u16::from_ne_bytes([header[0], header[1]]))
            + u32::from(u16::from_ne_bytes([header[6], header[7]]))
    }

    /// There is no id but in fragments: the flow label and more of the payload stand in for it.
    #[inline(always)]
    fn identity(header: &ipv6::Header, further: impl FnOnce() -> [u8; 12]) -> u64 {
        let further = further();
        let word = |at: usize| {
            u64::from(u32::from_ne_bytes([further[at], further[at + 1], further[at + 2], further[at + 3]]))
        };
        u64::from(ipv6::flow_label(header)) ^ word(0) ^ word(4).rotate_left(20) ^ word(8).rotate_left(40)
    }
}
