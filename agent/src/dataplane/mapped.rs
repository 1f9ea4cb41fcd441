//! One family's maps: their names, keys and shapes.

use std::{
    fmt::Debug,
    net::{Ipv4Addr, Ipv6Addr},
};

use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData, MapError, MapType},
};
use loden_ebpf::abi::{
    self, Address, ENDPOINT_SLOTS_V6, ENDPOINTS_MAX, Endpoint, PEERS_MAX, PEERS_MAX_V6, Peer, SightingKey,
    SightingKeyV6, map,
};

use super::{
    Dataplane, DataplaneError, FamilySettings, PinnedDataplane, Settings, load::slots, tables::Tables,
};
use crate::family::{Family, V4, V6};

/// Names of a family's maps.
#[derive(Clone, Copy, Debug)]
pub(super) struct Names {
    pub(super) peers: &'static str,
    pub(super) vteps: &'static str,
    pub(super) endpoints: &'static str,
    pub(super) flows: &'static str,
    pub(super) peer_traffic: &'static str,
    pub(super) endpoint_traffic: &'static str,
    pub(super) sightings: &'static str,
}

/// A family that has maps.
#[expect(private_interfaces, reason = "what tables there are is this module's own matter")]
pub trait Mapped: Family {
    /// An address in the maps, network order.
    type Octets: abi::Octets + Pod + Debug + Default + Eq + Ord + Send + Sync;
    /// An address as the key of a hash.
    type AddressKey: Pod + Ord + Debug;
    /// The key of a sighting.
    type SightingKey: Pod;
    /// The endpoints.
    type Endpoints: Send;
    /// Their key there.
    type EndpointKey: Pod;

    /// What the maps are called.
    const NAMES: Names;

    /// What the map of endpoints is called.
    #[must_use]
    fn endpoints_name() -> &'static str {
        Self::NAMES.endpoints
    }

    /// The bytes of an address.
    fn octets(address: Self::Addr) -> Self::Octets;
    /// The address from its bytes.
    fn of_octets(octets: Self::Octets) -> Self::Addr;
    /// The address as the key of a hash.
    fn key(address: Self::Addr) -> Self::AddressKey;
    /// Interface and address of a sighting.
    fn sighted(key: &Self::SightingKey) -> (u32, Self::Addr);

    /// This family's part of the settings.
    fn of(settings: &Settings) -> Option<&FamilySettings<Self>>;
    /// This family's maps.
    fn tables(dataplane: &Dataplane) -> &Tables<Self>;
    /// The same, to write.
    fn tables_mut(dataplane: &mut Dataplane) -> &mut Tables<Self>;
    /// This family's endpoints among what is pinned.
    fn pinned(dataplane: &PinnedDataplane) -> Option<&Self::Endpoints>;
    /// The same, to write.
    fn pinned_mut(dataplane: &mut PinnedDataplane) -> Option<&mut Self::Endpoints>;

    /// The part of the network that has slots among the peers.
    ///
    /// # Errors
    ///
    /// Where the fast path can only have all of it, and it is too large.
    fn grid(settings: &FamilySettings<Self>) -> Result<Self::Net, DataplaneError>;
    /// Entries of the endpoint map, and how many of them may have counters of their own.
    ///
    /// # Errors
    ///
    /// Where the fast path cannot have as many.
    fn endpoint_slots(settings: &FamilySettings<Self>) -> Result<(u32, u32), DataplaneError>;
    /// Kind of the endpoint map and size of its keys.
    const ENDPOINTS: (MapType, u32);

    /// Opens the endpoint map.
    ///
    /// # Errors
    ///
    /// Where it is no such map.
    fn open_endpoints(map: Map) -> Result<Self::Endpoints, MapError>;
    /// The endpoint at an address of the subnet.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    fn endpoint(
        map: &Self::Endpoints,
        subnet: Self::Net,
        address: Self::Addr,
    ) -> Result<Option<Endpoint<Self::Octets>>, MapError>;
    /// Writes the endpoint of an address of the subnet; `None` takes it away.
    ///
    /// # Errors
    ///
    /// Where the map cannot be written.
    fn set_endpoint(
        map: &mut Self::Endpoints,
        subnet: Self::Net,
        address: Self::Addr,
        endpoint: Option<Endpoint<Self::Octets>>,
    ) -> Result<(), MapError>;
}

#[expect(private_interfaces, reason = "as above")]
impl Mapped for V4 {
    type Octets = [u8; 4];
    type AddressKey = [u8; 4];
    type SightingKey = SightingKey;
    type Endpoints = Array<MapData, Endpoint>;
    type EndpointKey = u32;

    const NAMES: Names = Names {
        peers: map::PEERS,
        vteps: map::VTEPS,
        endpoints: map::ENDPOINTS,
        flows: map::FLOWS,
        peer_traffic: map::PEER_TRAFFIC,
        endpoint_traffic: map::ENDPOINT_TRAFFIC,
        sightings: map::SIGHTINGS,
    };
    const ENDPOINTS: (MapType, u32) = (MapType::Array, 4);

    fn octets(address: Ipv4Addr) -> [u8; 4] {
        address.octets()
    }

    fn of_octets(octets: [u8; 4]) -> Ipv4Addr {
        octets.into()
    }

    fn key(address: Ipv4Addr) -> [u8; 4] {
        address.octets()
    }

    fn sighted(key: &SightingKey) -> (u32, Ipv4Addr) {
        (key.ifindex, key.address.into())
    }

    fn of(settings: &Settings) -> Option<&FamilySettings<Self>> {
        settings.v4.as_ref()
    }

    fn tables(dataplane: &Dataplane) -> &Tables<Self> {
        &dataplane.v4
    }

    fn tables_mut(dataplane: &mut Dataplane) -> &mut Tables<Self> {
        &mut dataplane.v4
    }

    fn pinned(dataplane: &PinnedDataplane) -> Option<&Self::Endpoints> {
        dataplane.v4.as_ref()
    }

    fn pinned_mut(dataplane: &mut PinnedDataplane) -> Option<&mut Self::Endpoints> {
        dataplane.v4.as_mut()
    }

    fn grid(settings: &FamilySettings<Self>) -> Result<Self::Net, DataplaneError> {
        let bits = settings.subnet_len.saturating_sub(settings.network.prefix_len());
        slots("the network", bits, PEERS_MAX).map(|_| settings.network)
    }

    fn endpoint_slots(settings: &FamilySettings<Self>) -> Result<(u32, u32), DataplaneError> {
        let slots = slots("the own subnet", 32 - settings.subnet.prefix_len(), ENDPOINTS_MAX)?;
        Ok((slots, slots))
    }

    fn open_endpoints(map: Map) -> Result<Self::Endpoints, MapError> {
        Array::try_from(map)
    }

    fn endpoint(
        map: &Self::Endpoints,
        subnet: Self::Net,
        address: Ipv4Addr,
    ) -> Result<Option<Endpoint>, MapError> {
        let endpoint = map.get(&offset(subnet, address), 0)?;
        Ok((endpoint.ifindex != 0).then_some(endpoint))
    }

    fn set_endpoint(
        map: &mut Self::Endpoints,
        subnet: Self::Net,
        address: Ipv4Addr,
        endpoint: Option<Endpoint>,
    ) -> Result<(), MapError> {
        map.set(offset(subnet, address), endpoint.unwrap_or_default(), 0)
    }
}

fn offset(subnet: ipnet::Ipv4Net, address: Ipv4Addr) -> u32 {
    u32::from(address) & u32::from(subnet.hostmask())
}

#[expect(private_interfaces, reason = "as above")]
impl Mapped for V6 {
    type Octets = [u8; 16];
    type AddressKey = Address;
    type SightingKey = SightingKeyV6;
    type Endpoints = HashMap<MapData, Address, Endpoint<[u8; 16]>>;
    type EndpointKey = Address;

    const NAMES: Names = Names {
        peers: map::V6_PEERS,
        vteps: map::V6_VTEPS,
        endpoints: map::V6_ENDPOINTS,
        flows: map::V6_FLOWS,
        peer_traffic: map::V6_PEER_TRAFFIC,
        endpoint_traffic: map::V6_ENDPOINT_TRAFFIC,
        sightings: map::V6_SIGHTINGS,
    };
    const ENDPOINTS: (MapType, u32) = (MapType::Hash, size_of::<Address>() as u32);

    fn octets(address: Ipv6Addr) -> [u8; 16] {
        address.octets()
    }

    fn of_octets(octets: [u8; 16]) -> Ipv6Addr {
        octets.into()
    }

    fn key(address: Ipv6Addr) -> Address {
        Address { octets: address.octets() }
    }

    fn sighted(key: &SightingKeyV6) -> (u32, Ipv6Addr) {
        (key.ifindex, key.address.into())
    }

    fn of(settings: &Settings) -> Option<&FamilySettings<Self>> {
        settings.v6.as_ref()
    }

    fn tables(dataplane: &Dataplane) -> &Tables<Self> {
        &dataplane.v6
    }

    fn tables_mut(dataplane: &mut Dataplane) -> &mut Tables<Self> {
        &mut dataplane.v6
    }

    fn pinned(dataplane: &PinnedDataplane) -> Option<&Self::Endpoints> {
        dataplane.v6.as_ref()
    }

    fn pinned_mut(dataplane: &mut PinnedDataplane) -> Option<&mut Self::Endpoints> {
        dataplane.v6.as_mut()
    }

    /// The part around the own subnet: whoever picks subnets does so side by side, and a network may have 2^64 of them.
    fn grid(settings: &FamilySettings<Self>) -> Result<Self::Net, DataplaneError> {
        let bits = PEERS_MAX_V6.ilog2() as u8;
        let prefix_len = settings.network.prefix_len().max(settings.subnet_len.saturating_sub(bits));
        let part = Self::net(Self::base(settings.subnet), prefix_len).map(Self::trunc);
        Ok(part.unwrap_or(settings.network))
    }

    fn endpoint_slots(settings: &FamilySettings<Self>) -> Result<(u32, u32), DataplaneError> {
        let addresses = 1u32 << (128 - settings.subnet.prefix_len()).min(16);
        Ok((addresses.min(ENDPOINTS_MAX), addresses.min(ENDPOINT_SLOTS_V6)))
    }

    fn open_endpoints(map: Map) -> Result<Self::Endpoints, MapError> {
        HashMap::try_from(map)
    }

    fn endpoint(
        map: &Self::Endpoints,
        _: Self::Net,
        address: Ipv6Addr,
    ) -> Result<Option<Endpoint<[u8; 16]>>, MapError> {
        match map.get(&Self::key(address), 0) {
            Err(MapError::KeyNotFound) => Ok(None),
            found => found.map(Some),
        }
    }

    fn set_endpoint(
        map: &mut Self::Endpoints,
        _: Self::Net,
        address: Ipv6Addr,
        endpoint: Option<Endpoint<[u8; 16]>>,
    ) -> Result<(), MapError> {
        let key = Self::key(address);
        match endpoint {
            Some(endpoint) => map.insert(key, endpoint, 0),
            None => super::tables::gone_is_fine(map.remove(&key)),
        }
    }
}

/// The subnet of a peer's entry. The agent wrote the length; what somebody else made of it is not worth a failure here.
pub(super) fn subnet<F: Mapped>(peer: &Peer<F::Octets>) -> F::Net {
    F::net(F::of_octets(peer.subnet), peer.prefix_len.min(F::BITS)).unwrap_or_default()
}
