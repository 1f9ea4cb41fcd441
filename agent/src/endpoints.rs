//! Which local pod sits behind which veth: found from the bridge that carries the own subnet, as its kernel would
//! find it, and from what the programs saw; and from what `loden-cni` has noted on the veths of routed pods.
//!
//! The kernel delivers to a pod by its neighbour table (address to MAC) and the bridge's FDB (MAC to port); an
//! endpoint is the two of them joined. Both forget a silent pod after minutes, so what was found once stays until
//! its port is gone or something speaks against it. Pure: [`crate::reconcile`] reads the kernel and fills the map.

use std::collections::{BTreeMap, BTreeSet};

use loden_ebpf::abi::Endpoint;

use crate::{
    cni::{addresses::Addresses, record::Record},
    dataplane::Mapped,
    family::{Family, V4},
    kernel::{Link, LinkKind},
};

/// How many endpoints one port of a bridge may have, of a family, that the neighbour table does not resolve (now): a pod
/// that sends from ever new addresses of the subnet would fill the map, and nobody else's would find room. Those that the
/// table resolves the kernel limits itself (`gc_thresh3`). More than a pod with some containers of its own has.
pub const UNRESOLVED_OF_A_PORT: usize = 64;

/// A bridge with an address in the own subnet, such as docker0 or cni0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bridge<F: Family = V4> {
    /// Its interface index.
    pub index: u32,
    /// Its MAC: the pods' gateway.
    pub mac: [u8; 6],
    /// Its own addresses.
    pub addresses: BTreeSet<F::Addr>,
    /// Interface indices of its ports that are veths.
    pub ports: BTreeSet<u32>,
    /// Addresses that its neighbour table resolves; `None` for one that did not answer.
    pub neighbours: BTreeMap<F::Addr, Option<[u8; 6]>>,
    /// Ports by the MAC learned there.
    pub fdb: BTreeMap<[u8; 6], u32>,
}

/// A pod on a veth of its own, without a bridge, as its veth's alias tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Routed {
    /// Interface index of the host's end.
    pub port: u32,
    /// Its MAC: the pod's gateway.
    pub gateway_mac: [u8; 6],
    /// The pod's addresses.
    pub addresses: Addresses,
    /// MAC of the pod's own interface.
    pub mac: [u8; 6],
}

impl Routed {
    /// Reads it from a link; `None` for every other link.
    #[must_use]
    pub fn of(link: &Link) -> Option<Self> {
        if link.kind != LinkKind::Veth || link.master.is_some() || link.peer_in_other_netns.is_none() {
            return None;
        }
        let Record { addresses, mac, .. } = Record::parse(link.alias.as_deref()?)?;
        Some(Self { port: link.index, gateway_mac: link.mac?, addresses, mac })
    }

    /// Its endpoint of a family, where it has an address of that.
    fn endpoint<F: Mapped>(&self) -> Option<(F::Addr, Endpoint<F::Octets>)> {
        let Self { port, gateway_mac, addresses, mac } = *self;
        let address = addresses.get::<F>()?;
        let octets = F::octets(address);
        Some((address, Endpoint { address: octets, ifindex: port, mac, gateway_mac, ..Endpoint::default() }))
    }
}

/// A packet that a pod's veth sent from an address that is not its endpoint yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen<F: Family = V4> {
    /// The veth.
    pub port: u32,
    /// Source address.
    pub address: F::Addr,
    /// Source MAC.
    pub mac: [u8; 6],
}

/// Endpoints by their address.
pub type Endpoints<F = V4> = BTreeMap<<F as Family>::Addr, Endpoint<<F as Mapped>::Octets>>;

/// Finds the endpoints of the subnet: routed ones, and those behind these bridges. Earlier ones are kept where nothing
/// contradicts them, up to [`UNRESOLVED_OF_A_PORT`]; what is more is left to the kernel.
#[must_use]
pub fn discover<F: Mapped>(
    subnet: F::Net,
    bridges: &[Bridge<F>],
    routed: &[Routed],
    seen: &[Seen<F>],
    earlier: &Endpoints<F>,
) -> Endpoints<F> {
    let mut found = Endpoints::<F>::new();
    for bridge in bridges {
        let is_pod = |address: &F::Addr| F::contains(subnet, *address) && !bridge.addresses.contains(address);
        let mut unresolved: BTreeMap<u32, usize> = BTreeMap::new();
        let mut has_room = |address: &F::Addr, port: u32| {
            let count = unresolved.entry(port).or_default();
            *count += usize::from(!bridge.resolves(address));
            *count <= UNRESOLVED_OF_A_PORT
        };
        for (&address, endpoint) in earlier.iter().filter(|(address, e)| is_pod(address) && bridge.keeps(e)) {
            if has_room(&address, endpoint.ifindex) {
                found.insert(address, Endpoint { gateway_mac: bridge.mac, ..*endpoint });
            }
        }
        // A sighting fills a gap; it never overrides what the kernel itself would do.
        for seen in seen.iter().filter(|seen| is_pod(&seen.address) && bridge.confirms(seen)) {
            if !found.contains_key(&seen.address) && has_room(&seen.address, seen.port) {
                found.insert(seen.address, bridge.endpoint(seen.address, seen.port, seen.mac));
            }
        }
        for (&address, mac) in bridge.neighbours.iter().filter(|(address, _)| is_pod(address)) {
            match mac {
                None => {
                    found.remove(&address);
                }
                Some(mac) => bridge.place(&mut found, address, *mac),
            }
        }
    }
    // Last: the host's route to one address counts before that to the whole subnet.
    let own =
        routed.iter().filter_map(Routed::endpoint::<F>).filter(|(address, _)| F::contains(subnet, *address));
    found.extend(own);
    found
}

impl<F: Mapped> Bridge<F> {
    fn endpoint(&self, address: F::Addr, port: u32, mac: [u8; 6]) -> Endpoint<F::Octets> {
        Endpoint {
            address: F::octets(address),
            ifindex: port,
            mac,
            gateway_mac: self.mac,
            ..Endpoint::default()
        }
    }

    /// Puts a resolved neighbour behind the port where its MAC is; where that is forgotten, what was found before
    /// stands if it has the same MAC.
    fn place(&self, found: &mut Endpoints<F>, address: F::Addr, mac: [u8; 6]) {
        match self.fdb.get(&mac).filter(|port| self.ports.contains(port)) {
            Some(&port) => {
                found.insert(address, self.endpoint(address, port, mac));
            }
            None if found.get(&address).is_some_and(|endpoint| endpoint.mac != mac) => {
                found.remove(&address);
            }
            None => {}
        }
    }

    /// Whether the neighbour table knows now who has an address.
    fn resolves(&self, address: &F::Addr) -> bool {
        matches!(self.neighbours.get(address), Some(Some(_)))
    }

    /// The ports with so many endpoints that others of theirs were perhaps left out.
    pub fn crowded(&self, found: &Endpoints<F>) -> BTreeSet<u32> {
        let mut unresolved: BTreeMap<u32, usize> = BTreeMap::new();
        for (_, endpoint) in found.iter().filter(|(address, _)| !self.resolves(address)) {
            *unresolved.entry(endpoint.ifindex).or_default() += 1;
        }
        unresolved.retain(|port, count| self.ports.contains(port) && *count >= UNRESOLVED_OF_A_PORT);
        unresolved.into_keys().collect()
    }

    /// Whether an endpoint found before can still be true: its port is there and its MAC is nowhere else.
    fn keeps(&self, endpoint: &Endpoint<F::Octets>) -> bool {
        self.ports.contains(&endpoint.ifindex)
            && self.fdb.get(&endpoint.mac).is_none_or(|port| *port == endpoint.ifindex)
    }

    /// Whether the bridge knows the sender at the port where it was seen: it learns before it forwards.
    fn confirms(&self, seen: &Seen<F>) -> bool {
        self.ports.contains(&seen.port) && self.fdb.get(&seen.mac) == Some(&seen.port)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const SUBNET: &str = "10.5.1.0/24";
    const GATEWAY: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const POD: [u8; 6] = [2, 0, 0, 0, 0, 0x10];
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 0x11];

    fn address(host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 5, 1, host)
    }

    fn bridge() -> Bridge {
        Bridge {
            index: 3,
            mac: GATEWAY,
            addresses: [address(1)].into(),
            ports: [7, 8].into(),
            neighbours: [(address(2), Some(POD))].into(),
            fdb: [(POD, 7)].into(),
        }
    }

    fn discover(bridge: Bridge, seen: &[Seen], earlier: &Endpoints) -> Endpoints {
        super::discover::<V4>(SUBNET.parse().unwrap(), &[bridge], &[], seen, earlier)
    }

    fn at(port: u32, mac: [u8; 6]) -> Endpoint {
        Endpoint {
            address: address(2).octets(),
            ifindex: port,
            mac,
            gateway_mac: GATEWAY,
            ..Endpoint::default()
        }
    }

    #[test]
    fn a_neighbour_behind_a_known_port_is_an_endpoint() {
        assert_eq!(discover(bridge(), &[], &Endpoints::<V4>::new()), [(address(2), at(7, POD))].into());
    }

    #[test]
    fn the_bridge_itself_and_foreign_addresses_are_not() {
        let mut bridge = bridge();
        bridge.neighbours = [(address(1), Some(POD)), (Ipv4Addr::new(10, 5, 2, 2), Some(POD))].into();
        assert!(discover(bridge, &[], &Endpoints::<V4>::new()).is_empty());
    }

    #[test]
    fn a_silent_pod_stays_though_both_tables_forgot_it() {
        let earlier = [(address(2), at(7, POD))].into();
        let silent = Bridge { neighbours: BTreeMap::new(), fdb: BTreeMap::new(), ..bridge() };
        assert_eq!(discover(silent, &[], &earlier), earlier);
    }

    #[test]
    fn a_pod_goes_with_its_port() {
        let earlier = [(address(2), at(7, POD))].into();
        let gone = Bridge { ports: [8].into(), fdb: BTreeMap::new(), ..bridge() };
        assert!(discover(gone, &[], &earlier).is_empty());
    }

    #[test]
    fn an_address_that_no_longer_answers_goes() {
        let earlier = [(address(2), at(7, POD))].into();
        let failed = Bridge { neighbours: [(address(2), None)].into(), ..bridge() };
        assert!(discover(failed, &[], &earlier).is_empty());
    }

    #[test]
    fn an_address_moves_with_the_pod_that_has_it_now() {
        let earlier = [(address(2), at(7, POD))].into();
        let mut moved = bridge();
        moved.neighbours = [(address(2), Some(OTHER))].into();
        moved.fdb = [(OTHER, 8), (POD, 7)].into();
        assert_eq!(discover(moved.clone(), &[], &earlier)[&address(2)], at(8, OTHER));
        moved.fdb = [(POD, 7)].into();
        assert!(
            discover(moved, &[], &earlier).is_empty(),
            "the new one's port is not known yet: the kernel's"
        );
    }

    #[test]
    fn a_sighting_fills_a_gap_and_never_takes_an_address_away() {
        let mut quiet = bridge();
        quiet.neighbours.clear();
        let seen = Seen { port: 7, address: address(2), mac: POD };
        assert_eq!(discover(quiet, &[seen], &Endpoints::<V4>::new())[&address(2)], at(7, POD));

        let mut both = bridge();
        both.fdb.insert(OTHER, 8);
        let thief = Seen { port: 8, address: address(2), mac: OTHER };
        assert_eq!(discover(both.clone(), &[thief], &Endpoints::<V4>::new())[&address(2)], at(7, POD));
        both.neighbours.clear();
        let earlier = [(address(2), at(7, POD))].into();
        assert_eq!(discover(both, &[thief], &earlier)[&address(2)], at(7, POD));
    }

    #[test]
    fn a_sighting_that_the_bridge_did_not_learn_is_not_believed() {
        let mut quiet = bridge();
        quiet.neighbours.clear();
        let seen = Seen { port: 8, address: address(2), mac: POD };
        assert!(discover(quiet, &[seen], &Endpoints::<V4>::new()).is_empty());
    }

    #[test]
    fn a_port_that_sends_from_ever_new_addresses_has_no_more_than_its_share() {
        let many = |port, mac, from: u8| {
            (from..from + 100).map(move |host| Seen { port, address: address(host), mac }).collect::<Vec<_>>()
        };
        let quiet = Bridge { neighbours: BTreeMap::new(), fdb: [(POD, 7), (OTHER, 8)].into(), ..bridge() };
        let of = |found: &Endpoints, port| found.values().filter(|endpoint| endpoint.ifindex == port).count();
        let mut earlier = Endpoints::<V4>::new();
        for round in 0..3 {
            let found = discover(quiet.clone(), &many(7, POD, 2 + 50 * round), &earlier);
            assert_eq!(of(&found, 7), UNRESOLVED_OF_A_PORT, "round {round}");
            assert!(round == 0 || found == earlier, "those that are there stay");
            earlier = found;
        }
        assert_eq!(quiet.crowded(&earlier), [7].into());
        // Neither another port nor what the kernel itself resolves has to do with it.
        let late = address(254);
        let seen = [Seen { port: 8, address: late, mac: OTHER }];
        assert_eq!(
            discover(quiet.clone(), &seen, &earlier)[&late],
            Endpoint { address: late.octets(), ..at(8, OTHER) }
        );
        let resolved = Bridge { neighbours: [(late, Some(POD))].into(), ..quiet };
        let found = discover(resolved.clone(), &[], &earlier);
        assert_eq!((of(&found, 7), resolved.crowded(&found)), (UNRESOLVED_OF_A_PORT + 1, [7].into()));
    }

    const ALIAS: &str = "loden-cni 10.5.1.2 02:00:00:00:00:11 n eth0 c";

    fn veth() -> Link {
        Link {
            index: 9,
            name: "pod1".into(),
            mac: Some(GATEWAY),
            mtu: 1450,
            up: true,
            carrier: true,
            running: true,
            master: None,
            peer: Some(2),
            peer_in_other_netns: Some(0),
            kind: LinkKind::Veth,
            loopback: false,
            point_to_point: false,
            no_arp: false,
            alias: Some(ALIAS.into()),
        }
    }

    #[test]
    fn a_routed_pod_is_what_its_veth_tells_and_counts_before_one_on_a_bridge() {
        let routed = Routed::of(&veth()).unwrap();
        let found = super::discover::<V4>(
            SUBNET.parse().unwrap(),
            &[bridge()],
            &[routed],
            &[],
            &Endpoints::<V4>::new(),
        );
        assert_eq!(found, [(address(2), at(9, OTHER))].into());
        let elsewhere = Routed { addresses: "10.5.2.2".parse().unwrap(), ..routed };
        let found =
            super::discover::<V4>(SUBNET.parse().unwrap(), &[], &[elsewhere], &[], &Endpoints::<V4>::new());
        assert!(found.is_empty(), "another subnet's");
    }

    #[test]
    fn no_other_link_is_a_routed_pod() {
        let others = [
            Link { alias: None, ..veth() },
            Link { alias: Some("uplink".into()), ..veth() },
            Link { master: Some(3), ..veth() },
            Link { peer_in_other_netns: None, ..veth() },
            Link { kind: LinkKind::Physical, ..veth() },
            Link { mac: None, ..veth() },
        ];
        for link in others {
            assert_eq!(Routed::of(&link), None, "{link:?}");
        }
    }
}
