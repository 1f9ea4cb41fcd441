//! Keys and values of the maps, and the names under which programs, maps and globals are known.
//!
//! Addresses are byte arrays in network order, numbers are in host order, padding is spelled out. There is
//! one writer per field: the agent, unless a field says otherwise.

use crate::{flow_cache::Ends, reason::COUNT};

/// Version of everything in this file; part of the pin path, so that an agent never adopts maps it would misread.
pub const ABI_VERSION: u32 = 1;

/// Names of the programs, as `bpftool prog` shows them.
pub mod program {
    /// TC ingress of the host side of a pod's veth.
    pub const FROM_POD: &str = "from_pod";
    /// XDP on an uplink.
    pub const GUARD: &str = "guard";
    /// TC egress of the host side of a pod's veth.
    pub const TO_POD: &str = "to_pod";
    /// TC ingress of an uplink.
    pub const FROM_WIRE: &str = "from_wire";
    /// TC ingress of the interfaces that have no other program.
    pub const FROM_OTHER: &str = "from_other";
    /// TC egress of an uplink that leads to direct peers.
    pub const TO_WIRE: &str = "to_wire";
    /// TC ingress of the VXLAN or WireGuard device.
    pub const FROM_OVERLAY: &str = "from_overlay";
    /// TC egress of the VXLAN or WireGuard device.
    pub const TO_OVERLAY: &str = "to_overlay";
}

/// Names of the maps, as `bpftool map` shows them.
pub mod map {
    /// Array of [`Peer`](super::Peer), one slot per subnet of the network: see [`crate::grid`].
    pub const PEERS: &str = "PEERS";
    /// Hash of the VTEP addresses (`[u8; 4]`) that may send to us, to the number of their subnets.
    pub const VTEPS: &str = "VTEPS";
    /// Array of [`Endpoint`](super::Endpoint), one slot per address of the own subnet.
    pub const ENDPOINTS: &str = "ENDPOINTS";
    /// LRU hash of [`FlowKey`](super::FlowKey) to [`Flow`](super::Flow).
    pub const FLOWS: &str = "FLOWS";
    /// Array of one `u32`, the epoch: flow entries of another epoch are not fast.
    pub const EPOCH: &str = "EPOCH";
    /// Per-CPU array of [`Note`](crate::flow_cache::Note), by [`slot`](crate::flow_cache::slot): flows found fast a
    /// moment ago.
    pub const FLOW_CACHE: &str = "FLOW_CACHE";
    /// Array of one `u64`: when a flow last lost its qualification (`CLOCK_MONOTONIC`, ns). Written by the programs.
    pub const WITHDRAWN: &str = "WITHDRAWN";
    /// Per-CPU array of [`Counter`](super::Counter) by [`Reason`](crate::reason::Reason).
    pub const COUNTERS: &str = "COUNTERS";
    /// Per-CPU array of [`Traffic`](super::Traffic), by [`Peer::traffic`](super::Peer::traffic).
    pub const PEER_TRAFFIC: &str = "PEER_TRAFFIC";
    /// Per-CPU array of [`EndpointTraffic`](super::EndpointTraffic), by
    /// [`Endpoint::traffic`](super::Endpoint::traffic).
    pub const ENDPOINT_TRAFFIC: &str = "ENDPOINT_TRAFFIC";
    /// LRU hash of [`SightingKey`](super::SightingKey) to [`Sighting`](super::Sighting): what pods were seen to send from.
    pub const SIGHTINGS: &str = "SIGHTINGS";
    /// Ring buffer that tells the agent of each new sighting of either family: its key.
    pub const NEW_SIGHTINGS: &str = "NEW_SIGHTINGS";
    /// Ring buffer that tells the agent of each tuple that the host gave to two flows, in either family: the
    /// [`FlowKey`](super::FlowKey), sender first.
    pub const TAKEN_TUPLES: &str = "TAKEN_TUPLES";
    /// Array of one `u32`: other than 0 while somebody may be listening to verdicts. Set by listeners, again and again;
    /// the programs set it to 0 when nobody has renewed.
    pub const TRACING: &str = "TRACING";
    /// Array of [`Tracer`](crate::trace::Tracer): who listens, and to what.
    pub const TRACERS: &str = "TRACERS";
    /// Per-CPU array of [`Tally`](crate::trace::Tally), by listener.
    pub const TRACE_TALLY: &str = "TRACE_TALLY";
    /// Ring buffers of [`Traced`](crate::trace::Traced), one a listener.
    pub const VERDICTS: [&str; crate::trace::TRACERS_MAX] =
        ["VERDICTS_0", "VERDICTS_1", "VERDICTS_2", "VERDICTS_3"];

    /// [`PEERS`] of IPv6.
    pub const V6_PEERS: &str = "V6_PEERS";
    /// [`VTEPS`] of IPv6, by [`Address`](super::Address).
    pub const V6_VTEPS: &str = "V6_VTEPS";
    /// [`ENDPOINTS`] of IPv6: a hash by [`Address`](super::Address), as a subnet has more of them than an array can.
    pub const V6_ENDPOINTS: &str = "V6_ENDPOINTS";
    /// [`FLOWS`] of IPv6.
    pub const V6_FLOWS: &str = "V6_FLOWS";
    /// [`FLOW_CACHE`] of IPv6.
    pub const V6_FLOW_CACHE: &str = "V6_FLOW_CACHE";
    /// [`PEER_TRAFFIC`] of IPv6.
    pub const V6_PEER_TRAFFIC: &str = "V6_PEER_TRAFFIC";
    /// [`ENDPOINT_TRAFFIC`] of IPv6.
    pub const V6_ENDPOINT_TRAFFIC: &str = "V6_ENDPOINT_TRAFFIC";
    /// [`SIGHTINGS`] of IPv6, by [`SightingKeyV6`](super::SightingKeyV6).
    pub const V6_SIGHTINGS: &str = "V6_SIGHTINGS";
}

/// Names of the read-only globals that are set when the programs are loaded.
pub mod global {
    /// `u32`: the network's address, host order.
    pub const V4_NETWORK: &str = "V4_NETWORK";
    /// `u32`: the network's mask, host order.
    pub const V4_NETWORK_MASK: &str = "V4_NETWORK_MASK";
    /// `u32`: 32 minus SubnetLen.
    pub const V4_GRID_SHIFT: &str = "V4_GRID_SHIFT";
    /// `u32`: the own subnet's address, host order.
    pub const V4_SUBNET: &str = "V4_SUBNET";
    /// `u32`: the own subnet's mask, host order.
    pub const V4_SUBNET_MASK: &str = "V4_SUBNET_MASK";
    /// `u32`: the address at which this node receives VXLAN, host order.
    pub const V4_VTEP: &str = "V4_VTEP";
    /// `[u8; 6]`: MAC of the VXLAN device.
    pub const V4_VTEP_MAC: &str = "V4_VTEP_MAC";
    /// `u32`: VXLAN network identifier, 24 bits, host order.
    pub const V4_VNI: &str = "V4_VNI";
    /// `u16`: UDP port of VXLAN, host order.
    pub const V4_PORT: &str = "V4_PORT";
    /// `u16`: lowest UDP source port (`net.ipv4.ip_local_port_range`).
    pub const SOURCE_PORT_MIN: &str = "SOURCE_PORT_MIN";
    /// `u16`: highest UDP source port, as that sysctl says it.
    pub const SOURCE_PORT_MAX: &str = "SOURCE_PORT_MAX";
    /// `u8`: TTL of outer packets (`net.ipv4.ip_default_ttl`).
    pub const V4_OUTER_TTL: &str = "V4_OUTER_TTL";
    /// `u8`: 1 where every flow must qualify (`--gate=strict`), 0 where only those of gated endpoints must.
    pub const STRICT: &str = "STRICT";
    /// `u8`: 1 where packets with a forged source are dropped, 0 where the kernel decides.
    pub const DROP_FORGED: &str = "DROP_FORGED";
    /// `u8`: 1 where the kernel has `bpf_ktime_get_coarse_ns` (Linux 5.11).
    pub const COARSE_CLOCK: &str = "COARSE_CLOCK";
    /// `u8`: 1 where the packets of the overlay's devices have no Ethernet header (WireGuard), 0 where they do (VXLAN).
    pub const BARE_DEVICE: &str = "BARE_DEVICE";
    /// `u8`: 1 where the network has an IPv6 half; without it the programs' IPv6 code is never reached. One without an
    /// IPv4 half needs no such word: an empty network has no address.
    pub const HAS_V6: &str = "HAS_V6";
    /// `[u8; 16]`: the first address for which there are slots: see [`crate::grid::GridV6`].
    pub const V6_GRID: &str = "V6_GRID";
    /// `[u8; 16]`: mask of the addresses for which there are slots.
    pub const V6_GRID_MASK: &str = "V6_GRID_MASK";
    /// `u32`: SubnetLen of IPv6.
    pub const V6_SUBNET_LEN: &str = "V6_SUBNET_LEN";
    /// `[u8; 16]`: [`V4_SUBNET`] of IPv6.
    pub const V6_SUBNET: &str = "V6_SUBNET";
    /// `[u8; 16]`: [`V4_SUBNET_MASK`] of IPv6.
    pub const V6_SUBNET_MASK: &str = "V6_SUBNET_MASK";
    /// `[u8; 16]`: [`V4_VTEP`] of IPv6.
    pub const V6_VTEP: &str = "V6_VTEP";
    /// `[u8; 6]`: [`V4_VTEP_MAC`] of IPv6.
    pub const V6_VTEP_MAC: &str = "V6_VTEP_MAC";
    /// `u32`: [`V4_VNI`] of IPv6.
    pub const V6_VNI: &str = "V6_VNI";
    /// `u16`: [`V4_PORT`] of IPv6.
    pub const V6_PORT: &str = "V6_PORT";
    /// `u8`: hop limit of outer packets (`net.ipv6.conf.<uplink>.hop_limit`).
    pub const V6_OUTER_HOPS: &str = "V6_OUTER_HOPS";
    /// `u32`: interface index of the VXLAN device with an IPv6 underlay: aggregates are encapsulated there.
    pub const V6_DEVICE: &str = "V6_DEVICE";
}

/// Entries of the flow table. At 100 000 flows a third of it is still free for LRU's slack.
pub const FLOWS_MAX: usize = 131_072;
/// Entries of the sightings table; a full one forgets the oldest.
pub const SIGHTINGS_MAX: usize = 1024;
/// Most VTEPs that a network can have.
pub const VTEPS_MAX: usize = 65_536;
/// Most subnets that a network may have for the fast path: 2^20 slots of 32 bytes are 32 MiB.
pub const PEERS_MAX: u32 = 1 << 20;
/// Most subnets of an IPv6 network that the fast path knows: those around the own one. 2^16 slots of 80 bytes are 5 MiB.
pub const PEERS_MAX_V6: u32 = 1 << 16;
/// Most addresses that the own subnet may have for the fast path, and most IPv6 endpoints.
pub const ENDPOINTS_MAX: u32 = 1 << 16;
/// Slots of [`map::V6_ENDPOINT_TRAFFIC`]: an IPv6 subnet is no measure of how many pods a node has.
pub const ENDPOINT_SLOTS_V6: u32 = 1 << 10;
/// Most memory that [`map::PEER_TRAFFIC`] takes on all CPUs together, in bytes, and the same of
/// [`map::ENDPOINT_TRAFFIC`]: whoever finds no slot of its own is counted in slot 0 with the others.
pub const TRAFFIC_BYTES_MAX: usize = 32 << 20;
/// Most slots of [`map::PEER_TRAFFIC`] and of [`map::ENDPOINT_TRAFFIC`], the common one included.
pub const TRAFFIC_SLOTS_MAX: u32 = 1 << 16;
/// Reasons for which [`EndpointTraffic`] has room.
pub const SLOW_REASONS_MAX: usize = 56;

/// The bytes of an address in network order, of either family: of neither do the types below have padding.
pub trait Octets: sealed::Octets + Ends + Copy + 'static {}

mod sealed {
    pub trait Octets {}
}

impl sealed::Octets for [u8; 4] {}
impl Octets for [u8; 4] {}
impl sealed::Octets for [u8; 16] {}
impl Octets for [u8; 16] {}

/// How packets go to a peer: [`Peer::way`].
pub mod way {
    /// The programs encapsulate them in VXLAN.
    pub const ENCAPSULATED: u8 = 0;
    /// As they are, to the peer as the next hop (host-gw, DirectRouting).
    pub const DIRECT: u8 = 1;
    /// As they are, into a device that encapsulates them itself (WireGuard): it is the [`uplink`](super::Peer::uplink).
    pub const DEVICE: u8 = 2;
}

/// How packets reach one peer subnet. An empty slot is all zeroes: see [`Peer::is_empty`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer<A = [u8; 4]> {
    /// The peer's VTEP: destination of the outer packet, and the only valid source of what comes from this subnet.
    pub vtep: A,
    /// Source of the outer packet.
    pub source: A,
    /// Neighbour on the underlay that gets the outer packet: the VTEP itself or a router. Not used for a
    /// [`way::DEVICE`].
    pub next_hop: A,
    /// Interface index of the uplink, or of the device that encapsulates; 0 where the fast path must not send to this peer.
    pub uplink: u32,
    /// MAC of the peer's VXLAN device.
    pub vtep_mac: [u8; 6],
    /// Largest outer IP packet towards the peer, in bytes; into a device, the largest that it takes.
    pub mtu: u16,
    /// The subnet, for people who read the map.
    pub subnet: A,
    /// Its prefix length.
    pub prefix_len: u8,
    /// How packets go there: see [`way`].
    pub way: u8,
    /// Slot of `PEER_TRAFFIC` that counts for this peer; 0 is common to all that have none.
    pub traffic: u16,
}

impl FlowKey {
    /// A key from addresses and ports in host order.
    #[inline(always)]
    #[must_use]
    pub fn new(protocol: u8, (local, local_port): (u32, u16), (remote, remote_port): (u32, u16)) -> Self {
        Self::of(protocol, (local.to_be_bytes(), local_port), (remote.to_be_bytes(), remote_port))
    }
}

impl<A> FlowKey<A> {
    /// A key from addresses in network order and ports in host order.
    #[inline(always)]
    #[must_use]
    pub fn of(protocol: u8, (local, local_port): (A, u16), (remote, remote_port): (A, u16)) -> Self {
        Self {
            local,
            remote,
            local_port: local_port.to_be_bytes(),
            remote_port: remote_port.to_be_bytes(),
            protocol: u32::from(protocol),
        }
    }
}

impl<A: for<'a> TryFrom<&'a [u8]>> FlowKey<A> {
    /// A key as it stands in a ring; `None` where the record has another length.
    #[must_use]
    pub fn from_record(record: &[u8]) -> Option<Self> {
        if record.len() != size_of::<Self>() {
            return None;
        }
        let (local, rest) = record.split_at(size_of::<A>());
        let (remote, rest) = rest.split_at(size_of::<A>());
        let (local_port, rest) = rest.split_first_chunk()?;
        let (remote_port, rest) = rest.split_first_chunk()?;
        Some(Self {
            local: local.try_into().ok()?,
            remote: remote.try_into().ok()?,
            local_port: *local_port,
            remote_port: *remote_port,
            protocol: u32::from_ne_bytes(*rest.first_chunk()?),
        })
    }
}

impl<A: Copy> FlowKey<A> {
    /// The same flow, seen from its other end.
    #[inline(always)]
    #[must_use]
    pub fn reversed(&self) -> Self {
        Self {
            local: self.remote,
            remote: self.local,
            local_port: self.remote_port,
            remote_port: self.local_port,
            protocol: self.protocol,
        }
    }
}

/// An address as the key of a hash: a multiple of its size, because the programs build it on their stack, where the
/// verifier allows no misaligned store.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// Network order.
    pub octets: [u8; 16],
}

impl<A> Peer<A> {
    /// Whether no lease covers this slot: no lease covers all addresses.
    #[inline(always)]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.prefix_len == 0
    }
}

/// A local pod address. An empty slot has interface index 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoint<A = [u8; 4]> {
    /// The pod's address, for people who read the map.
    pub address: A,
    /// Interface index of the host side of the pod's veth.
    pub ifindex: u32,
    /// MAC of the pod's own interface.
    pub mac: [u8; 6],
    /// MAC of the pod's gateway: what it sends to, and what it sees as the sender of what we deliver.
    pub gateway_mac: [u8; 6],
    /// 0, [`TRANSLATED`] or [`UNPROVEN`]: other than 0, its flows must qualify. The programs write the first of
    /// these over 0; the agent keeps what it finds when it rewrites the rest.
    pub gated: u16,
    /// Slot of `ENDPOINT_TRAFFIC` that counts for this endpoint; 0 is common to all that have none.
    pub traffic: u16,
    /// The number by which the host's network namespace knows the pod's (`IFLA_LINK_NETNSID`). A wrong one names a
    /// namespace that has not the pod's addresses, nor sockets of them.
    pub netns: i32,
}

/// The host was seen to translate a flow of the endpoint.
pub const TRANSLATED: u16 = 1;
/// The endpoint is new: whether the host translates flows of it already is not known yet.
pub const UNPROVEN: u16 = 2;

/// A flow as this node sees it: local pod first. Of an ICMP echo, the sender's port is the identifier and the
/// receiver's the type, so that requests and replies are flows of their own: filters tell them apart.
///
/// Every field at a multiple of its size, because the programs build it on their stack, where the verifier allows
/// no misaligned store.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey<A = [u8; 4]> {
    /// Address of the local pod.
    pub local: A,
    /// Address of the remote pod.
    pub remote: A,
    /// Port of the local pod.
    pub local_port: [u8; 2],
    /// Port of the remote pod.
    pub remote_port: [u8; 2],
    /// IP protocol number.
    pub protocol: u32,
}

/// What was observed of a flow. Times are `CLOCK_MONOTONIC` in nanoseconds, at tick resolution. Written by the programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// When a packet from the pod was last handed to the host stack.
    pub outbound_seen: u64,
    /// Until when packets from the pod may skip the host stack.
    pub outbound_until: u64,
    /// When a packet for the pod was last handed to the host stack.
    pub inbound_seen: u64,
    /// Until when packets for the pod may skip the host stack.
    pub inbound_until: u64,
    /// What tells the packet of `outbound_seen` from others: see [`crate::flow::mark`].
    pub outbound_mark: u64,
    /// The same of `inbound_seen`.
    pub inbound_mark: u64,
    /// Epoch in which the flow qualified.
    pub epoch: u32,
    /// 1 where the host was seen to translate this flow.
    pub translated: u32,
}

/// Packets and bytes of one reason on one CPU. Bytes count the frame as the program saw it first.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    /// Packets; a GSO packet is one.
    pub packets: u64,
    /// Bytes, Ethernet header included.
    pub bytes: u64,
}

/// What went between a peer and this node, or between an endpoint and other pods, on one CPU. *Fast* skipped the host
/// stack, *slow* went through it: counted where the kernel's own way passes the VXLAN device, for direct peers the
/// uplink, between local pods where it begins.
///
/// Packets are those of the wire: an aggregate counts as its segments. Bytes are those of the pods' IP packets, without
/// Ethernet and outer headers; an aggregate's own headers are counted once. Written by the programs, and set to zero by
/// the agent when it gives the slot to somebody else.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// To the peer, or from the endpoint, on the fast path.
    pub sent_fast: Counter,
    /// The same through the host stack.
    pub sent_slow: Counter,
    /// From the peer, or to the endpoint, on the fast path.
    pub received_fast: Counter,
    /// The same through the host stack.
    pub received_slow: Counter,
}

impl core::ops::AddAssign for Counter {
    fn add_assign(&mut self, other: Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

impl core::ops::AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.sent_fast += other.sent_fast;
        self.sent_slow += other.sent_slow;
        self.received_fast += other.received_fast;
        self.received_slow += other.received_slow;
    }
}

/// [`Traffic`] of an endpoint, and why what was not fast was not, on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndpointTraffic {
    /// Between the endpoint and other pods.
    pub traffic: Traffic,
    /// Packets of the endpoint that were handed to the host stack, by [`Reason`](crate::reason::Reason); more than the
    /// slow ones of `traffic`, since those to the outside are among them.
    pub slow: [u64; SLOW_REASONS_MAX],
}

impl Default for EndpointTraffic {
    fn default() -> Self {
        Self { traffic: Traffic::default(), slow: [0; SLOW_REASONS_MAX] }
    }
}

impl core::ops::AddAssign for EndpointTraffic {
    fn add_assign(&mut self, other: Self) {
        self.traffic += other.traffic;
        for (sum, packets) in self.slow.iter_mut().zip(other.slow) {
            *sum += packets;
        }
    }
}

/// An address of the own subnet that a pod's veth was seen to send from, without being its endpoint.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SightingKey {
    /// Interface index of the host side of the veth.
    pub ifindex: u32,
    /// Source address of the packet.
    pub address: [u8; 4],
}

/// The same of IPv6, in another order: as for [`Address`].
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SightingKeyV6 {
    /// Source address of the packet.
    pub address: [u8; 16],
    /// Interface index of the host side of the veth.
    pub ifindex: u32,
    /// Always 0.
    pub pad: u32,
}

/// The rest of a sighting.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sighting {
    /// Source MAC of the packet.
    pub mac: [u8; 6],
    /// Always 0; keeps the next field aligned on the programs' stack.
    pub pad: [u8; 2],
    /// Destination MAC of the packet.
    pub gateway_mac: [u8; 6],
    /// Always 0.
    pub pad_end: [u8; 2],
}

const _: () = {
    assert!(size_of::<Peer>() == 32);
    assert!(size_of::<Peer<[u8; 16]>>() == 80);
    assert!(size_of::<Endpoint>() == 28);
    assert!(size_of::<Endpoint<[u8; 16]>>() == 40);
    assert!(size_of::<FlowKey>() == 16);
    assert!(size_of::<FlowKey<[u8; 16]>>() == 40);
    assert!(size_of::<Address>() == 16);
    assert!(size_of::<SightingKeyV6>() == 24);
    assert!(size_of::<Flow>() == 56);
    assert!(size_of::<Counter>() == 16);
    assert!(size_of::<Traffic>() == 64);
    assert!(size_of::<EndpointTraffic>() == 512);
    assert!(COUNT <= SLOW_REASONS_MAX);
    assert!(size_of::<SightingKey>() == 8);
    assert!(size_of::<Sighting>() == 16);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_key_holds_its_fields_in_network_order() {
        let key = FlowKey::new(6, (0x0a05_0102, 80), (0x0a05_0203, 40_000));
        let expected = FlowKey {
            local: [10, 5, 1, 2],
            remote: [10, 5, 2, 3],
            local_port: [0, 80],
            remote_port: [0x9c, 0x40],
            protocol: 6,
        };
        assert_eq!(key, expected);
        assert_eq!(key.reversed(), FlowKey::new(6, (0x0a05_0203, 40_000), (0x0a05_0102, 80)));
    }

    #[test]
    fn a_flow_key_is_read_from_a_record_of_its_own_length() {
        let key = FlowKey::new(17, (0x0a05_0102, 80), (0x0a05_0203, 40_000));
        // SAFETY: integers without padding.
        let record: [u8; size_of::<FlowKey>()] = unsafe { core::mem::transmute(key) };
        assert_eq!(FlowKey::<[u8; 4]>::from_record(&record), Some(key));
        assert_eq!(FlowKey::<[u8; 16]>::from_record(&record), None);
        assert_eq!(FlowKey::<[u8; 4]>::from_record(&record[1..]), None);
        assert_eq!(FlowKey::<[u8; 4]>::from_record(&[]), None);
    }
}

#[cfg(feature = "user")]
mod pod {
    use aya::Pod;

    use super::Octets;

    // SAFETY: each is `repr(C)`, made of integers only, valid for every bit pattern and without implicit
    // padding (the sizes are asserted above to be the sum of their fields).
    unsafe impl<A: Octets> Pod for super::Peer<A> {}
    // SAFETY: as for Peer.
    unsafe impl<A: Octets> Pod for super::Endpoint<A> {}
    // SAFETY: as for Peer.
    unsafe impl<A: Octets> Pod for super::FlowKey<A> {}
    // SAFETY: as for Peer.
    unsafe impl Pod for super::Flow {}
    // SAFETY: as for Peer.
    unsafe impl Pod for super::Counter {}
    // SAFETY: as for Peer.
    unsafe impl Pod for super::Traffic {}
    // SAFETY: as for Peer.
    unsafe impl Pod for super::EndpointTraffic {}
    // SAFETY: as for Peer.
    unsafe impl Pod for super::SightingKey {}
    // SAFETY: as for Peer.
    unsafe impl Pod for super::SightingKeyV6 {}
    // SAFETY: as for Peer.
    unsafe impl Pod for super::Address {}
    // SAFETY: as for Peer.
    unsafe impl Pod for super::Sighting {}
}
