//! One family's half of the programs: its maps, its constants, and what the kernel's helpers want to know of it.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::{
    BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, BPF_NOEXIST, bpf_fib_lookup, bpf_redir_neigh,
    bpf_redir_neigh__bindgen_ty_1, bpf_sock,
};
use loden_ebpf::{
    abi::{
        Address, Endpoint, EndpointTraffic, Flow, FlowKey, Peer, Sighting, SightingKey, SightingKeyV6,
        TRANSLATED, Traffic,
    },
    family::{Family, V4, V6},
    flow_cache::{Ends, Note},
    grid, ipv6,
};

use super::{globals, maps};

/// `AF_INET` and `AF_INET6` of linux/socket.h.
const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

/// A family as the programs have it.
pub(super) trait Half: Family {
    /// The other one.
    type Other: Half;

    /// What `bpf_skb_adjust_room` is told of the outer header.
    const ENCAP_L3: u64;

    /// Whether the network has the family: of one that it has not, no address is anybody's.
    fn is_there() -> bool;
    /// The network's grid.
    fn grid() -> Self::Grid;
    /// The peer in a slot, empty or not.
    fn slot_of_peer(slot: u32) -> Option<&'static Peer<Self::Octets>>;
    /// Whether the address is in the own subnet.
    fn is_own(address: Self::Addr) -> bool;
    /// The local pod that has the address.
    fn endpoint(address: Self::Addr) -> Option<&'static Endpoint<Self::Octets>>;
    /// From now on every flow of the endpoint at this address must qualify.
    fn gate_endpoint(address: Self::Addr);
    /// Whether the address may send VXLAN to us.
    fn is_vtep(address: Self::Addr) -> bool;

    /// The gate's entry of a flow, to read.
    fn flow(key: &FlowKey<Self::Octets>) -> Option<&'static Flow>;
    /// The same, to write.
    fn flow_mut(key: &FlowKey<Self::Octets>) -> Option<*mut Flow>;
    /// Makes an entry, `flags` being those of `bpf_map_update_elem`.
    fn insert_flow(key: &FlowKey<Self::Octets>, flow: &Flow, flags: u32);

    /// This CPU's note in a slot of the flow cache.
    fn note(slot: u32) -> Option<*mut Note<<Self::Octets as Ends>::Words>>;

    /// This CPU's counters in a slot of the peers.
    fn peer_traffic(slot: u16) -> Option<*mut Traffic>;
    /// This CPU's counters in a slot of the endpoints.
    fn endpoint_traffic(slot: u16) -> Option<*mut EndpointTraffic>;
    /// Tells the agent of an address that a veth was seen to send from.
    fn sight(ifindex: u32, address: Self::Addr, sighting: &Sighting);

    /// The address at which this node receives VXLAN.
    fn vtep() -> Self::Addr;
    /// The MAC of the VXLAN device.
    fn vtep_mac() -> [u8; 6];
    /// VXLAN network identifier.
    fn vni() -> u32;
    /// UDP port of VXLAN.
    fn port() -> u16;
    /// Writes a neighbour as `bpf_redirect_neigh` wants it.
    fn set_neighbour(params: &mut MaybeUninit<bpf_redir_neigh>, address: &Self::Octets);

    /// Writes what the routing table is asked: about a packet of these addresses.
    fn set_addresses(asked: &mut bpf_fib_lookup, source: Self::Addr, destination: Self::Addr);

    /// Whether a socket has a remote end.
    ///
    /// # Safety
    ///
    /// The socket must be one that a helper found, and not given back yet.
    unsafe fn is_connected(socket: *const bpf_sock) -> bool;

    /// The peer whose subnet holds the address.
    #[inline(always)]
    fn peer(address: Self::Addr) -> Option<&'static Peer<Self::Octets>> {
        let peer = Self::slot_of_peer(Self::slot(address, &Self::grid())?)?;
        if peer.is_empty() { None } else { Some(peer) }
    }
}

impl Half for V4 {
    type Other = V6;

    const ENCAP_L3: u64 = BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 as u64;

    /// Its constants are such that nothing is in a network that there is not.
    #[inline(always)]
    fn is_there() -> bool {
        true
    }

    #[inline(always)]
    fn grid() -> grid::Grid {
        grid::Grid {
            network: globals::V4_NETWORK.load(),
            mask: globals::V4_NETWORK_MASK.load(),
            shift: globals::V4_GRID_SHIFT.load(),
        }
    }

    #[inline(always)]
    fn slot_of_peer(slot: u32) -> Option<&'static Peer> {
        maps::PEERS.get(slot)
    }

    #[inline(always)]
    fn is_own(address: u32) -> bool {
        own_offset(address).is_some()
    }

    #[inline(always)]
    fn endpoint(address: u32) -> Option<&'static Endpoint> {
        let endpoint = maps::ENDPOINTS.get(own_offset(address)?)?;
        if endpoint.ifindex == 0 { None } else { Some(endpoint) }
    }

    #[inline(always)]
    fn gate_endpoint(address: u32) {
        if let Some(endpoint) = own_offset(address).and_then(|offset| maps::ENDPOINTS.get_ptr_mut(offset)) {
            // SAFETY: the pointer is valid as long as the map is.
            unsafe { gate(endpoint) };
        }
    }

    #[inline(always)]
    fn is_vtep(address: u32) -> bool {
        maps::VTEPS.get_ptr(address.to_be_bytes()).is_some()
    }

    #[inline(always)]
    fn flow(key: &FlowKey) -> Option<&'static Flow> {
        // SAFETY: the entry may be reused for another flow while we read it; a wrong time then lets packets of
        // a few ticks take the other path, and both deliver them.
        unsafe { maps::FLOWS.get(key) }
    }

    #[inline(always)]
    fn flow_mut(key: &FlowKey) -> Option<*mut Flow> {
        maps::FLOWS.get_ptr_mut(key)
    }

    #[inline(always)]
    fn insert_flow(key: &FlowKey, flow: &Flow, flags: u32) {
        // A full table makes room by itself; if another CPU was first, its entry says the same.
        let _ = maps::FLOWS.insert(key, flow, u64::from(flags));
    }

    #[inline(always)]
    fn note(slot: u32) -> Option<*mut Note<[u64; 2]>> {
        maps::FLOW_CACHE.get_ptr_mut(slot)
    }

    #[inline(always)]
    fn peer_traffic(slot: u16) -> Option<*mut Traffic> {
        maps::PEER_TRAFFIC.get_ptr_mut(u32::from(slot))
    }

    #[inline(always)]
    fn endpoint_traffic(slot: u16) -> Option<*mut EndpointTraffic> {
        maps::ENDPOINT_TRAFFIC.get_ptr_mut(u32::from(slot))
    }

    #[inline(always)]
    fn sight(ifindex: u32, address: u32, sighting: &Sighting) {
        let key = SightingKey { ifindex, address: address.to_be_bytes() };
        // Told once: the agent forgets a sighting that it wants to hear of again.
        if maps::SIGHTINGS.insert(key, sighting, u64::from(BPF_NOEXIST)).is_ok() {
            // A full ring is no harm: the agent lists the sightings on its tick too.
            let _ = maps::NEW_SIGHTINGS.output_untyped::<SightingKey>(key, 0);
        }
    }

    #[inline(always)]
    fn vtep() -> u32 {
        globals::V4_VTEP.load()
    }

    #[inline(always)]
    fn vtep_mac() -> [u8; 6] {
        mac(globals::V4_VTEP_MAC.load())
    }

    #[inline(always)]
    fn vni() -> u32 {
        globals::V4_VNI.load()
    }

    #[inline(always)]
    fn port() -> u16 {
        globals::V4_PORT.load()
    }

    #[inline(always)]
    fn set_neighbour(params: &mut MaybeUninit<bpf_redir_neigh>, address: &[u8; 4]) {
        // The union is written whole: the verifier wants every byte of the parameters to have a value.
        let next_hop = bpf_redir_neigh__bindgen_ty_1 { ipv6_nh: [u32::from_ne_bytes(*address), 0, 0, 0] };
        params.write(bpf_redir_neigh { nh_family: AF_INET, __bindgen_anon_1: next_hop });
    }

    #[inline(always)]
    fn set_addresses(asked: &mut bpf_fib_lookup, source: u32, destination: u32) {
        asked.family = AF_INET as u8;
        asked.__bindgen_anon_3.ipv4_src = source.to_be();
        asked.__bindgen_anon_4.ipv4_dst = destination.to_be();
    }

    #[inline(always)]
    unsafe fn is_connected(socket: *const bpf_sock) -> bool {
        // SAFETY: the caller's promise.
        unsafe { (&raw const (*socket).dst_ip4).read_volatile() != 0 }
    }
}

impl Half for V6 {
    type Other = V4;

    const ENCAP_L3: u64 = BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 as u64;

    #[inline(always)]
    fn is_there() -> bool {
        globals::HAS_V6.load() == 1
    }

    #[inline(always)]
    fn grid() -> grid::GridV6 {
        grid::GridV6 {
            base: globals::V6_GRID.load(),
            mask: globals::V6_GRID_MASK.load(),
            subnet_len: globals::V6_SUBNET_LEN.load(),
        }
    }

    #[inline(always)]
    fn slot_of_peer(slot: u32) -> Option<&'static Peer<[u8; 16]>> {
        maps::V6_PEERS.get(slot)
    }

    #[inline(always)]
    fn is_own(address: ipv6::Address) -> bool {
        let (subnet, mask) = (globals::V6_SUBNET.load(), globals::V6_SUBNET_MASK.load());
        ((address[0] ^ subnet[0]) & mask[0]) | ((address[1] ^ subnet[1]) & mask[1]) == 0
    }

    #[inline(always)]
    fn endpoint(address: ipv6::Address) -> Option<&'static Endpoint<[u8; 16]>> {
        if !Self::is_own(address) {
            return None;
        }
        // SAFETY: the entry is freed after the program has ended; what the agent changes meanwhile is as in the array.
        unsafe { maps::V6_ENDPOINTS.get(key(address)) }
    }

    #[inline(always)]
    fn gate_endpoint(address: ipv6::Address) {
        if let Some(endpoint) = maps::V6_ENDPOINTS.get_ptr_mut(key(address)) {
            // SAFETY: as for IPv4.
            unsafe { gate(endpoint) };
        }
    }

    #[inline(always)]
    fn is_vtep(address: ipv6::Address) -> bool {
        maps::V6_VTEPS.get_ptr(key(address)).is_some()
    }

    #[inline(always)]
    fn flow(key: &FlowKey<[u8; 16]>) -> Option<&'static Flow> {
        // SAFETY: as for IPv4.
        unsafe { maps::V6_FLOWS.get(key) }
    }

    #[inline(always)]
    fn flow_mut(key: &FlowKey<[u8; 16]>) -> Option<*mut Flow> {
        maps::V6_FLOWS.get_ptr_mut(key)
    }

    #[inline(always)]
    fn insert_flow(key: &FlowKey<[u8; 16]>, flow: &Flow, flags: u32) {
        let _ = maps::V6_FLOWS.insert(key, flow, u64::from(flags));
    }

    #[inline(always)]
    fn note(slot: u32) -> Option<*mut Note<[u64; 5]>> {
        maps::V6_FLOW_CACHE.get_ptr_mut(slot)
    }

    #[inline(always)]
    fn peer_traffic(slot: u16) -> Option<*mut Traffic> {
        maps::V6_PEER_TRAFFIC.get_ptr_mut(u32::from(slot))
    }

    #[inline(always)]
    fn endpoint_traffic(slot: u16) -> Option<*mut EndpointTraffic> {
        maps::V6_ENDPOINT_TRAFFIC.get_ptr_mut(u32::from(slot))
    }

    #[inline(always)]
    fn sight(ifindex: u32, address: ipv6::Address, sighting: &Sighting) {
        let key = SightingKeyV6 { address: Self::octets(address), ifindex, pad: 0 };
        if maps::V6_SIGHTINGS.insert(key, sighting, u64::from(BPF_NOEXIST)).is_ok() {
            let _ = maps::NEW_SIGHTINGS.output_untyped::<SightingKeyV6>(key, 0);
        }
    }

    #[inline(always)]
    fn vtep() -> ipv6::Address {
        globals::V6_VTEP.load()
    }

    #[inline(always)]
    fn vtep_mac() -> [u8; 6] {
        mac(globals::V6_VTEP_MAC.load())
    }

    #[inline(always)]
    fn vni() -> u32 {
        globals::V6_VNI.load()
    }

    #[inline(always)]
    fn port() -> u16 {
        globals::V6_PORT.load()
    }

    #[inline(always)]
    fn set_neighbour(params: &mut MaybeUninit<bpf_redir_neigh>, address: &[u8; 16]) {
        let word =
            |at: usize| u32::from_ne_bytes([address[at], address[at + 1], address[at + 2], address[at + 3]]);
        let words = params.as_mut_ptr().cast::<u32>();
        // Word by word, and each for itself: of two the compiler would make one store, which the verifier refuses as the
        // address begins in the middle of eight bytes.
        // SAFETY: the parameters are the family and the four words of the address.
        unsafe {
            words.write_volatile(AF_INET6);
            words.add(1).write_volatile(word(0));
            words.add(2).write_volatile(word(4));
            words.add(3).write_volatile(word(8));
            words.add(4).write_volatile(word(12));
        }
    }

    #[inline(always)]
    fn set_addresses(asked: &mut bpf_fib_lookup, source: ipv6::Address, destination: ipv6::Address) {
        asked.family = AF_INET6 as u8;
        asked.__bindgen_anon_3.ipv6_src = ipv6::quarters(source);
        asked.__bindgen_anon_4.ipv6_dst = ipv6::quarters(destination);
    }

    #[inline(always)]
    unsafe fn is_connected(socket: *const bpf_sock) -> bool {
        // Word by word: the kernel allows no wider access.
        // SAFETY: the caller's promise.
        let word = |n: usize| unsafe { (&raw const (*socket).dst_ip6[n]).read_volatile() };
        word(0) | word(1) | word(2) | word(3) != 0
    }
}

/// # Safety
///
/// The pointer must be a map's.
#[inline(always)]
unsafe fn gate<A>(endpoint: *mut Endpoint<A>) {
    // SAFETY: the field is written whole, and not for every packet: other CPUs read the same cache line.
    unsafe {
        if (*endpoint).gated != TRANSLATED {
            (*endpoint).gated = TRANSLATED;
        }
    }
}

/// The offset of an IPv4 address in the own subnet.
#[inline(always)]
fn own_offset(address: u32) -> Option<u32> {
    grid::offset(address, globals::V4_SUBNET.load(), globals::V4_SUBNET_MASK.load())
}

#[inline(always)]
fn key(address: ipv6::Address) -> Address {
    Address { octets: ipv6::octets(address) }
}

/// A MAC is read in words, since a volatile read of bytes is a load for each of them.
#[inline(always)]
fn mac(words: [u16; 3]) -> [u8; 6] {
    let [a, b, c] = words.map(u16::to_ne_bytes);
    [a[0], a[1], b[0], b[1], c[0], c[1]]
}
