//! VXLAN.

use super::{Ipv4, Packet, UDP, checksum};

/// A VXLAN packet (RFC 7348) around a frame, without the outer Ethernet header.
#[derive(Clone, Debug)]
pub struct Vxlan<P: Packet = Ipv4> {
    /// The sender's VTEP.
    pub source: P::Address,
    /// The receiver's VTEP.
    pub destination: P::Address,
    /// UDP ports.
    pub ports: (u16, u16),
    /// The first four bytes of the VXLAN header; `0x0800_0000` says that there is a VNI.
    pub flags: u32,
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// The inner frame.
    pub frame: Vec<u8>,
}

impl<P: Packet> Vxlan<P> {
    /// The outer packet as peers send it: with a UDP checksum where the family needs one.
    #[must_use]
    pub fn packet(&self) -> P {
        if P::NEEDS_CHECKSUM { self.packet_with_checksum() } else { self.packet_without_checksum() }
    }

    /// The outer packet, UDP checksum zero.
    #[must_use]
    pub fn packet_without_checksum(&self) -> P {
        let len = (16 + self.frame.len()) as u16;
        let mut udp: Vec<u8> =
            [self.ports.0, self.ports.1, len, 0].iter().flat_map(|word| word.to_be_bytes()).collect();
        udp.extend(self.flags.to_be_bytes());
        udp.extend((self.vni << 8).to_be_bytes());
        udp.extend(&self.frame);
        P::new(self.source, self.destination, UDP, udp)
    }

    /// The outer packet with a UDP checksum.
    #[must_use]
    pub fn packet_with_checksum(&self) -> P {
        let mut packet = self.packet_without_checksum();
        let pseudo = P::pseudo_header(self.source, self.destination, UDP, packet.payload().len());
        let sum = checksum(&[&pseudo[..], packet.payload()].concat());
        packet.payload_mut()[6..8].copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
        packet
    }
}
