//! Ethernet II headers.

/// Length of a header without tags, in bytes.
pub const LEN: usize = 14;
/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800;
/// EtherType of IPv6.
pub const IPV6: u16 = 0x86dd;
/// EtherTypes of VLAN tags (IEEE 802.1Q and 802.1ad).
pub const VLAN: u16 = 0x8100;
/// See [`VLAN`].
pub const SERVICE_VLAN: u16 = 0x88a8;

/// A header as it stands in the packet.
pub type Header = [u8; LEN];

/// Destination MAC.
#[inline(always)]
#[must_use]
pub fn destination(header: &Header) -> [u8; 6] {
    [header[0], header[1], header[2], header[3], header[4], header[5]]
}

/// A MAC as two numbers, as it stands in memory: each is one load or store, where its bytes would be as many.
#[inline(always)]
#[must_use]
pub const fn parts(mac: &[u8; 6]) -> (u32, u16) {
    let [a, b, c, d, e, f] = *mac;
    (u32::from_ne_bytes([a, b, c, d]), u16::from_ne_bytes([e, f]))
}

/// Whether the frame is for this MAC.
#[inline(always)]
#[must_use]
pub fn is_for(header: &Header, mac: &[u8; 6]) -> bool {
    parts(&destination(header)) == parts(mac)
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

/// Writes the EtherType (host order).
#[inline(always)]
pub fn set_ether_type(header: &mut Header, ether_type: u16) {
    [header[12], header[13]] = ether_type.to_be_bytes();
}

/// Overwrites both MACs.
///
/// Byte by byte, which the compiler merges into two stores each; as a slice copy it would be a call.
#[inline(always)]
pub fn set_macs(header: &mut Header, destination: [u8; 6], source: [u8; 6]) {
    let [d0, d1, d2, d3, d4, d5] = destination;
    let [s0, s1, s2, s3, s4, s5] = source;
    [header[0], header[1], header[2], header[3], header[4], header[5]] = [d0, d1, d2, d3, d4, d5];
    [header[6], header[7], header[8], header[9], header[10], header[11]] = [s0, s1, s2, s3, s4, s5];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_for_a_mac_of_which_every_byte_is_its_destinations() {
        let mut header = [0xff; LEN];
        let mac = [2, 0, 0, 0, 0, 0x12];
        set_macs(&mut header, mac, [2, 0, 0, 0, 0, 0x11]);
        assert!(is_for(&header, &mac));
        for byte in 0..mac.len() {
            for bit in 0..8 {
                let mut other = mac;
                other[byte] ^= 1 << bit;
                assert!(!is_for(&header, &other), "{other:x?}");
            }
        }
    }
}
