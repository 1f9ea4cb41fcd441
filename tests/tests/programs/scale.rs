//! The maps at the size of a large cluster.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
    path::Path,
    time::Instant,
};

use aya::maps::{HashMap, Map, MapData};
use ipnet::{Ipv4Net, Ipv6Net};
use loden_agent::dataplane::{
    Changes, Dataplane, FamilySettings, PeerPath, PinnedMaps, Pins, Settings, Underlay, VxlanSettings, Way,
};
use loden_agent::family::{V4, V6};
use loden_ebpf::abi::{ENDPOINTS_MAX, Endpoint, FlowKey, map};

use crate::rig::Lab;

fn load(network: &str, subnet: &str, pins: &Path) -> Dataplane {
    Dataplane::load(&settings(network, subnet), pins).unwrap()
}

fn settings(network: &str, subnet: &str) -> Settings {
    let subnet: Ipv4Net = subnet.parse().unwrap();
    Settings {
        v4: Some(FamilySettings {
            network: network.parse().unwrap(),
            subnet_len: subnet.prefix_len(),
            subnet,
            vtep: Ipv4Addr::new(192, 0, 2, 1),
            vxlan: Some(VxlanSettings { ifindex: 2, mac: [2, 0, 0, 0, 0, 1], vni: 1, port: 8472 }),
            outer_ttl: 64,
        }),
        v6: None,
        source_ports: (32768, 60999),
        strict: true,
        drop_forged: true,
        bare_device: false,
        log_packets: false,
    }
}

fn added(added: usize) -> Changes {
    Changes { added, ..Changes::default() }
}

#[test]
fn sixty_five_thousand_peers_fit_and_the_next_agent_finds_them() {
    Lab::run(|lab| {
        let pins = lab.bpffs.path().join("peers");
        let mut dataplane = load("10.0.0.0/8", "10.0.0.0/24", &pins);
        let peers: Vec<PeerPath> = (1..65_536u32)
            .map(|slot| PeerPath {
                subnet: Ipv4Net::new(Ipv4Addr::from(0x0a00_0000 + (slot << 8)), 24).unwrap(),
                vtep: Ipv4Addr::from(0xc612_0000 + slot),
                vtep_mac: [2, 0, 0, 0, (slot >> 8) as u8, slot as u8],
                way: Way::Encapsulated,
                underlay: Some(Underlay {
                    uplink: 1,
                    next_hop: Ipv4Addr::new(192, 0, 2, 254),
                    source: Ipv4Addr::new(192, 0, 2, 1),
                    mtu: 1500,
                }),
            })
            .collect();
        let start = Instant::now();
        assert_eq!(dataplane.half_mut::<V4>().set_peers(&peers).unwrap(), added(65_535));
        println!("65 535 peers written in {:?}", start.elapsed());
        drop(dataplane);
        let start = Instant::now();
        let mut next = load("10.0.0.0/8", "10.0.0.0/24", &pins);
        println!("read back by the next agent in {:?}", start.elapsed());
        assert_eq!(next.half_mut::<V4>().set_peers(&peers).unwrap(), Changes::default());
        let changes = next.half_mut::<V4>().set_peers(&peers[..10]).unwrap();
        assert_eq!(changes, Changes { removed: 65_525, ..Changes::default() });
    });
}

/// A peer with the `slot`-th subnet at the `vtep`-th address.
fn peer(slot: u32, vtep: u32, mac: u8) -> PeerPath {
    let underlay = Underlay {
        uplink: 1,
        next_hop: Ipv4Addr::new(192, 0, 2, 254),
        source: Ipv4Addr::new(192, 0, 2, 1),
        mtu: 1500,
    };
    PeerPath {
        subnet: Ipv4Net::new(Ipv4Addr::from(0x0a05_0000 + (slot << 8)), 24).unwrap(),
        vtep: Ipv4Addr::from(0xc612_0000 + vtep),
        vtep_mac: [2, 0, 0, 0, mac, vtep as u8],
        way: Way::Encapsulated,
        underlay: Some(underlay),
    }
}

#[test]
fn a_few_peers_that_change_leave_what_setting_all_of_them_does() {
    Lab::run(|lab| {
        let pins = lab.bpffs.path().join("few");
        let mut dataplane = load("10.5.0.0/16", "10.5.0.0/24", &pins);
        // The second VTEP has two subnets.
        let first = [peer(1, 1, 0), peer(2, 2, 0), peer(3, 2, 0), peer(4, 4, 0)];
        dataplane.half_mut::<V4>().set_peers(&first).unwrap();
        let vteps = MapData::from_pin(Pins::below(&pins).map(map::VTEPS)).unwrap();
        let vteps = HashMap::<_, [u8; 4], u32>::try_from(Map::HashMap(vteps)).unwrap();
        let vteps = || -> BTreeMap<u8, u32> {
            vteps.iter().map(Result::unwrap).map(|(vtep, subnets)| (vtep[3], subnets)).collect()
        };
        assert_eq!(vteps(), [(1, 1), (2, 2), (4, 1)].into());
        let mut step = |gone: &[PeerPath], now: &[PeerPath], left: &[PeerPath], all: &[PeerPath]| {
            let half = dataplane.half_mut::<V4>();
            let removed = half.remove_peers(gone.iter().map(|path| path.subnet)).unwrap();
            let left: Vec<Ipv4Addr> = left.iter().map(|path| path.vtep).collect();
            let changes = half.change_peers(now, &left).unwrap();
            let few = vteps();
            assert_eq!(half.set_peers(all).unwrap(), Changes::default());
            assert_eq!(few, vteps());
            (removed, changes.added, changes.changed, few.len())
        };
        let (one, two, three, four) = (first[0], first[1], first[2], first[3]);
        let other_mac = peer(1, 1, 9);
        assert_eq!(step(&[], &[other_mac], &[one], &[other_mac, two, three, four]), (0, 0, 1, 3));
        assert_eq!(
            step(&[two], &[], &[two], &[other_mac, three, four]),
            (1, 0, 0, 3),
            "it has the other still"
        );
        assert_eq!(step(&[three], &[], &[three], &[other_mac, four]), (1, 0, 0, 2));
        let moved = peer(5, 4, 0);
        assert_eq!(step(&[four], &[moved], &[four], &[other_mac, moved]), (1, 1, 0, 2), "to another subnet");
        let at_another = peer(5, 6, 0);
        assert_eq!(step(&[], &[at_another], &[moved], &[other_mac, at_another]), (0, 0, 1, 2));
    });
}

#[test]
fn endpoints_for_which_the_map_has_no_room_are_left_out_and_harm_no_other() {
    Lab::run(|lab| {
        let subnet: Ipv6Net = "fc00:0:0:1::/64".parse().unwrap();
        let of_v6 = FamilySettings {
            network: "fc00::/48".parse().unwrap(),
            subnet_len: 64,
            subnet,
            vtep: "fd77::1".parse().unwrap(),
            vxlan: Some(VxlanSettings { ifindex: 2, mac: [2, 0, 0, 0, 0, 1], vni: 1, port: 8472 }),
            outer_ttl: 64,
        };
        let settings = Settings { v4: None, v6: Some(of_v6), ..settings("10.5.0.0/16", "10.5.1.0/24") };
        let mut dataplane = Dataplane::load(&settings, &lab.bpffs.path().join("full")).unwrap();
        let half = dataplane.half_mut::<V6>();
        let first = u128::from(subnet.network()) + 2;
        let mut endpoints: BTreeMap<Ipv6Addr, Endpoint<[u8; 16]>> = (0..ENDPOINTS_MAX + 10)
            .map(|number| {
                let address = Ipv6Addr::from(first + u128::from(number));
                (address, Endpoint { address: address.octets(), ifindex: 9, ..Endpoint::default() })
            })
            .collect();
        assert_eq!(half.set_endpoints(&endpoints).unwrap(), added(ENDPOINTS_MAX as usize));
        assert_eq!(half.set_endpoints(&endpoints).unwrap(), Changes::default());
        endpoints.pop_first();
        assert_eq!(half.set_endpoints(&endpoints).unwrap(), Changes { removed: 1, ..added(1) });
        assert_eq!(half.endpoints_held().len(), ENDPOINTS_MAX as usize);
    });
}

#[test]
fn a_thousand_endpoints_fit_and_the_next_agent_finds_them() {
    Lab::run(|lab| {
        let pins = lab.bpffs.path().join("endpoints");
        let mut dataplane = load("10.0.0.0/12", "10.0.4.0/22", &pins);
        let endpoints: BTreeMap<Ipv4Addr, Endpoint> = (2..1002u32)
            .map(|host| {
                let address = Ipv4Addr::from(0x0a00_0400 + host);
                let mac = [2, 1, 0, 0, (host >> 8) as u8, host as u8];
                let endpoint =
                    Endpoint { address: address.octets(), ifindex: host, mac, ..Endpoint::default() };
                (address, endpoint)
            })
            .collect();
        assert_eq!(dataplane.half_mut::<V4>().set_endpoints(&endpoints).unwrap(), added(1000));
        drop(dataplane);
        let mut next = load("10.0.0.0/12", "10.0.4.0/22", &pins);
        assert_eq!(next.half_mut::<V4>().set_endpoints(&endpoints).unwrap(), Changes::default());
        assert_eq!(next.half::<V4>().endpoints().unwrap().len(), 1000);
    });
}

#[test]
fn of_many_flows_each_is_read_once() {
    const FLOWS: u32 = 20_000;
    Lab::run(|lab| {
        let pins = lab.bpffs.path().join("flows");
        let mut dataplane = load("10.5.0.0/16", "10.5.1.0/24", &pins);
        let flow = |n: u32| FlowKey {
            local: [10, 5, 1, 2],
            remote: (0x0a05_0200 + n % 100).to_be_bytes(),
            local_port: ((1000 + n / 100) as u16).to_be_bytes(),
            ..FlowKey::default()
        };
        (0..FLOWS).for_each(|n| dataplane.half_mut::<V4>().note_translated(&flow(n)).unwrap());
        let filled = dataplane.fill().into_iter().find(|(map, ..)| *map == map::FLOWS);
        assert_eq!(filled.map(|(_, used, _)| used), Some(FLOWS.into()));
        let pinned = PinnedMaps::<V4>::open(&pins).unwrap();
        let found: Vec<_> = pinned.flows(|_| true).unwrap().into_iter().map(|(key, _)| key).collect();
        assert_eq!(found.len(), FLOWS as usize);
        let of_one_port = pinned.flows(|key| key.local_port == 1000u16.to_be_bytes()).unwrap();
        assert_eq!(of_one_port.len(), 100);
        assert!(of_one_port.iter().all(|(_, flow)| flow.translated == 1), "values belong to their keys");
    });
}
