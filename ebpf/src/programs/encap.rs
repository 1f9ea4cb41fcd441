//! Into VXLAN: by hand, or, where only the kernel can write the checksums, by its device.

use aya_ebpf::helpers::bpf_get_prandom_u32;
use loden_ebpf::{
    abi::{Endpoint, Peer},
    ecn, ethernet,
    family::{Family, V4, V6},
    ipv6,
    reason::Reason,
    vxlan::{self, Outer},
};

use super::{
    Verdict, globals,
    half::Half,
    skb::Skb,
    traffic::{self, Load, Way},
};

/// Where the IP header starts, before encapsulation and after it.
const IP: usize = ethernet::LEN;

/// A family that is encapsulated.
pub(super) trait Encapsulate: Half {
    /// Encapsulates a packet from an endpoint and sends it to the peer; the packet is counted.
    fn encapsulate(
        skb: &mut Skb,
        peer: &Peer<Self::Octets>,
        from: &Endpoint<Self::Octets>,
        load: Load,
    ) -> Verdict;
}

impl Encapsulate for V4 {
    #[inline(always)]
    fn encapsulate(skb: &mut Skb, peer: &Peer, from: &Endpoint, load: Load) -> Verdict {
        by_hand::<Self>(skb, peer, from, load)
    }
}

impl Encapsulate for V6 {
    /// The outer checksum of each segment of an aggregate is the kernel's to compute, and nothing but its own device can
    /// ask it to.
    #[inline(always)]
    fn encapsulate(skb: &mut Skb, peer: &Peer<[u8; 16]>, from: &Endpoint<[u8; 16]>, load: Load) -> Verdict {
        if skb.gso_size() != 0 {
            by_device(skb, peer, from, load)
        } else {
            by_hand::<Self>(skb, peer, from, load)
        }
    }
}

/// What the outer header says besides addresses and ports.
trait WriteOuter: Half {
    /// An address in the outer header.
    type OuterAddr: Copy;

    /// The address from its bytes.
    fn outer_addr(octets: &Self::Octets) -> Self::OuterAddr;
    /// Writes the headers in front of the inner packet.
    fn write(skb: &mut Skb, outer: &Outer<Self::OuterAddr>) -> Option<()>;
    /// Hops that the outer packet may take.
    fn outer_hops() -> u8;
    /// IP identification.
    fn outer_id() -> u16;
}

impl WriteOuter for V4 {
    type OuterAddr = [u8; 4];

    #[inline(always)]
    fn outer_addr(octets: &[u8; 4]) -> [u8; 4] {
        *octets
    }

    #[inline(always)]
    fn write(skb: &mut Skb, outer: &Outer<[u8; 4]>) -> Option<()> {
        outer.write(skb.bytes_mut(IP)?);
        Some(())
    }

    #[inline(always)]
    fn outer_hops() -> u8 {
        globals::V4_OUTER_TTL.load()
    }

    #[inline(always)]
    fn outer_id() -> u16 {
        // SAFETY: calls a helper that takes nothing.
        unsafe { bpf_get_prandom_u32() as u16 }
    }
}

impl WriteOuter for V6 {
    type OuterAddr = ipv6::Address;

    #[inline(always)]
    fn outer_addr(octets: &[u8; 16]) -> ipv6::Address {
        Self::addr(octets)
    }

    #[inline(always)]
    fn write(skb: &mut Skb, outer: &Outer<ipv6::Address>) -> Option<()> {
        let (headers, inner) = skb.split(IP)?;
        outer.write(headers, inner);
        Some(())
    }

    #[inline(always)]
    fn outer_hops() -> u8 {
        globals::V6_OUTER_HOPS.load()
    }

    #[inline(always)]
    fn outer_id() -> u16 {
        0
    }
}

#[inline(always)]
fn by_hand<F: WriteOuter>(
    skb: &mut Skb,
    peer: &Peer<F::Octets>,
    from: &Endpoint<F::Octets>,
    load: Load,
) -> Verdict {
    let hash = skb.hash();
    // Only growing the packet can fail without harm, so it comes first.
    if !skb.grow::<F>() {
        traffic::because::<F>(from, Reason::PassPodNoRoom, load);
        return Reason::PassPodNoRoom.into();
    }
    traffic::sent::<F>(Some(peer), Some(from), Way::Fast, load);
    match write_headers::<F>(skb, peer, hash, load) {
        Some(()) => {
            Verdict::Redirect(Reason::FastEncap, skb.redirect_neighbour::<F>(peer.uplink, &peer.next_hop))
        }
        None => Verdict::Drop(Reason::DropRedirect),
    }
}

/// Writes the headers into the room that was made.
#[inline(always)]
fn write_headers<F: WriteOuter>(skb: &mut Skb, peer: &Peer<F::Octets>, hash: u32, inner: Load) -> Option<()> {
    let ip = skb.write::<F::Header>(IP + F::ENCAP_LEN)?;
    F::take_hop(ip);
    let tos = ecn::encapsulate(F::traffic_class(ip));
    let outer = Outer {
        source: F::outer_addr(&peer.source),
        destination: F::outer_addr(&peer.vtep),
        tos,
        ttl: F::outer_hops(),
        id: F::outer_id(),
        source_port: vxlan::source_port(
            hash,
            globals::SOURCE_PORT_MIN.load(),
            globals::SOURCE_PORT_MAX.load(),
        ),
        port: F::port(),
        vni: F::vni(),
        peer_mac: peer.vtep_mac,
        own_mac: F::vtep_mac(),
        inner_len: inner.bytes as u16,
    };
    F::write(skb, &outer)
}

/// A router's part, and into the VXLAN device as the host's own routing would: past bridge, routing and netfilter. Its FDB
/// knows the VTEP by the MAC.
#[inline(always)]
fn by_device(skb: &mut Skb, peer: &Peer<[u8; 16]>, from: &Endpoint<[u8; 16]>, load: Load) -> Verdict {
    let Some(frame) = skb.bytes_mut::<{ ethernet::LEN }>(0) else { return Reason::PassPodMalformed.into() };
    ethernet::set_macs(frame, peer.vtep_mac, V6::vtep_mac());
    let Some(ip) = skb.write(IP) else { return Verdict::Drop(Reason::DropRedirect) };
    V6::take_hop(ip);
    traffic::sent::<V6>(Some(peer), Some(from), Way::Fast, load);
    // The device's egress has a program, which would take it for a packet that the host translated.
    skb.note_fast();
    Verdict::Redirect(Reason::FastOverlayOut, skb.redirect(globals::V6_DEVICE.load()))
}
