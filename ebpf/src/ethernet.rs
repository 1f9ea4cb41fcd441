//! Ethernet II headers.

/// Length of a header without tags, in bytes.
pub const LEN: usize = 14;
/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800;

/// A header as it stands in the packet.
pub type Header = [u8; LEN];

/// Destination MAC.
#[inline(always)]
#[must_use]
pub fn destination(header: &Header) -> [u8; 6] {
    [header[0], header[1], header[2], header[3], header[4], header[5]]
}

/// Source MAC.
#[inline(always)]
#[must_use]
pub fn source(header: &Header) -> [u8; 6] {
    [header[6], header[7], header[8], header[9], header[10], header[11]]
}

/// EtherType, host order.
#[inline(always)]
#[must_use]
pub fn ether_type(header: &Header) -> u16 {
    u16::from_be_bytes([header[12], header[13]])
}

/// Overwrites both MACs.
#[inline(always)]
pub fn set_macs(header: &mut Header, destination: [u8; 6], source: [u8; 6]) {
    header[..6].copy_from_slice(&destination);
    header[6..12].copy_from_slice(&source);
}
