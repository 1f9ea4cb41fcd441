//! A healthy node, and one thing wrong with it at a time.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    time::Duration,
};

use super::{examine, host, peers};
use crate::{
    dataplane::{Attached, FamilySettings, Hook, Program, Settings, VxlanSettings},
    doctor::{
        finding::Outcome,
        snapshot::{Etcd, Half, Health, Offload, Overlay, Probe, Programs, Reach, Snapshot},
    },
    facts::{self, Facts, Source},
    kernel::{Address, AddressScope, Link, LinkKind, Route, RouteKind, RouteTo, TABLE_MAIN, VxlanAttrs},
    lease::{Lease, LeaseAttrs, LeaseKey, VtepData},
    overlay::{Actual, Desired, Op, OverlayPeer, plan},
    uplink::Uplink,
};

const OWN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 11);
const PEER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 12);
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 11];
const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 12];
const UPLINK: u32 = 2;
const DEVICE: u32 = 3;
const BRIDGE: u32 = 4;
const POD: u32 = 5;

fn link(index: u32, name: &str, kind: LinkKind) -> Link {
    Link {
        index,
        name: name.to_owned(),
        mac: Some([2, 0, 0, 0, 9, index as u8]),
        mtu: 1450,
        up: true,
        carrier: true,
        running: true,
        master: None,
        peer: None,
        peer_in_other_netns: None,
        kind,
        loopback: false,
        point_to_point: false,
        no_arp: false,
        alias: None,
    }
}

fn address(ifindex: u32, address: &str, prefix_len: u8) -> Address {
    Address {
        ifindex,
        address: address.parse().unwrap(),
        prefix_len,
        scope: AddressScope::Universe,
        permanent: true,
        secondary: false,
        deprecated: false,
    }
}

fn route(dst: &str, ifindex: u32) -> Route {
    Route {
        dst: dst.parse().unwrap(),
        gateway: None,
        ifindex: Some(ifindex),
        onlink: false,
        protocol: 2,
        table: TABLE_MAIN,
        metric: 0,
        source: None,
        multipath: false,
        kind: RouteKind::Unicast,
        tos: 0,
        scope: 253,
    }
}

fn lease(subnet: &str, public_ip: Ipv4Addr, vtep_mac: [u8; 6]) -> Lease {
    let key = LeaseKey::v4(subnet.parse().unwrap());
    let attrs = LeaseAttrs::vxlan(public_ip, VtepData { vni: 1, vtep_mac });
    Lease { key, attrs, etcd_lease: Some(7), mod_revision: 3 }
}

fn desired() -> Desired {
    let subnet = "10.5.2.0/24".parse().unwrap();
    let peer = OverlayPeer { subnet, vtep: PEER, vtep_mac: PEER_MAC, direct: false };
    Desired {
        network: "10.5.0.0/16".parse().unwrap(),
        own: "10.5.1.0/24".parse().unwrap(),
        device: DEVICE,
        uplink: UPLINK,
        whole: false,
        peers: BTreeMap::from([(subnet, peer)]),
    }
}

/// The kernel after the agent's plan was carried out.
fn programmed() -> Actual {
    use crate::kernel::{FdbEntry, Neighbour, NeighbourState};
    let mut actual = Actual::default();
    for op in plan(&desired(), &actual.clone()).ops {
        match op {
            Op::SetRoute(route) => actual.routes.push(route),
            Op::SetNeighbour { device, address, mac } => actual.neighbours.push(Neighbour {
                ifindex: device,
                address,
                mac: Some(mac),
                state: NeighbourState::Permanent,
            }),
            Op::SetFdb { device, mac, dst } => actual.fdb.push(FdbEntry {
                ifindex: device,
                mac,
                dst: Some(dst),
                permanent: true,
                ..fdb_entry()
            }),
            other => panic!("{other}"),
        }
    }
    actual
}

fn fdb_entry() -> crate::kernel::FdbEntry {
    crate::kernel::FdbEntry {
        ifindex: 0,
        mac: [0; 6],
        dst: None,
        master: None,
        own: true,
        permanent: true,
        fixed: false,
        ext_learned: false,
        vlan: None,
    }
}

fn healthy() -> Snapshot {
    let desired = desired();
    let settings = Settings {
        v4: Some(FamilySettings {
            network: desired.network,
            subnet_len: 24,
            subnet: desired.own,
            vtep: OWN,
            vxlan: Some(VxlanSettings { ifindex: 2, mac: MAC, vni: 1, port: 8472 }),
            outer_ttl: 64,
        }),
        v6: None,
        source_ports: (32_768, 60_999),
        strict: true,
        drop_forged: true,
        bare_device: false,
        log_packets: false,
    };
    let half = facts::Half {
        network: desired.network,
        subnet: desired.own,
        device: Some(facts::Device {
            name: "flannel.1".into(),
            index: DEVICE,
            mac: MAC,
            mtu: 1450,
            vni: 1,
            port: 8472,
        }),
        overlay: Some(desired),
    };
    let facts = Facts {
        version: "1".into(),
        v4: Some(half.clone()),
        v6: None,
        lost: None,
        backend: "vxlan".into(),
        uplink: Uplink {
            ifindex: UPLINK,
            name: "eth0".into(),
            mtu: 1500,
            address: Some(OWN),
            public_ip: Some(OWN),
            address_v6: None,
            public_ipv6: None,
        },
        wireguard: Vec::new(),
        pod_mtu: 1450,
        programs: Some(settings),
        kernel_alone: None,
        refused: Default::default(),
        etcd: facts::Etcd { endpoints: vec!["http://192.0.2.5:2379".into()], ..Default::default() },
    };
    let vxlan = VxlanAttrs { vni: 1, port: 8472, local: Some(OWN.into()), ..VxlanAttrs::default() };
    let device = Link { mac: Some(MAC), ..link(DEVICE, "flannel.1", LinkKind::Vxlan(vxlan)) };
    let way = RouteTo {
        ifindex: UPLINK,
        gateway: None,
        gateway6: None,
        source: OWN,
        mtu: None,
        multipath: false,
        local: false,
    };
    let tags: BTreeMap<Program, u64> =
        Program::ALL.iter().map(|program| (*program, *program as u64)).collect();
    let hook = |program: Program, ifindex, name: &str| {
        (Hook { program, ifindex }, name.to_owned(), Attached::Tag(program as u64))
    };
    let full = |size| Reach::Full { size, took: Duration::from_micros(300) };
    let health = Health { healthy: Some(true), took: Duration::from_millis(1), ahead: Some(0) };
    let on = ["net.ipv4.ip_forward", host::LIBERAL, host::BRIDGE_RULES];
    let off = ["all", "eth0", "flannel.1"].map(host::rp_filter);
    let sysctls = on
        .map(|name| (name.to_owned(), Some("1".to_owned())))
        .into_iter()
        .chain(off.map(|name| (name, Some("0".to_owned()))))
        .collect();
    Snapshot {
        facts,
        source: Source::Agent,
        not_ready: BTreeMap::new(),
        links: vec![
            link(UPLINK, "eth0", LinkKind::Physical),
            device,
            link(BRIDGE, "docker0", LinkKind::Bridge),
            Link { master: Some(BRIDGE), peer_in_other_netns: Some(0), ..link(POD, "veth1", LinkKind::Veth) },
        ],
        v4: Some(Half {
            facts: half,
            addresses: vec![
                address(UPLINK, "192.0.2.11", 24),
                address(BRIDGE, "10.5.1.1", 24),
                address(DEVICE, "10.5.1.0", 32),
            ],
            routes: vec![
                route("0.0.0.0/0", UPLINK),
                route("192.0.2.0/24", UPLINK),
                route("10.5.1.0/24", BRIDGE),
            ],
            overlay: Ok(programmed()),
            ways: BTreeMap::from([(PEER, Ok(way))]),
        }),
        v6: None,
        wireguard: Vec::new(),
        sysctls,
        gro: Ok(true),
        rules: Ok(String::new()),
        etcd: Etcd {
            endpoints: vec![("http://192.0.2.5:2379".into(), Ok(health))],
            leases: Some(Ok(vec![lease("10.5.1.0/24", OWN, MAC), lease("10.5.2.0/24", PEER, PEER_MAC)])),
        },
        programs: Some(Programs {
            loadable: Ok(tags),
            btf: true,
            hooks: vec![
                hook(Program::FromWire, UPLINK, "eth0"),
                hook(Program::FromPod, POD, "veth1"),
                hook(Program::ToPod, POD, "veth1"),
            ],
            unpinned: Vec::new(),
        }),
        probes: vec![Probe {
            subnet: "10.5.2.0/24".parse().unwrap(),
            vtep: PEER.into(),
            underlay: full(1500),
            overlay: Some(Overlay { echo: full(1450), offload: Some(Offload::Fine) }),
        }],
    }
}

fn v4(snapshot: &mut Snapshot) -> &mut Half {
    snapshot.v4.as_mut().unwrap()
}

/// Names and outcomes of what is not as it should be.
fn wrong(snapshot: &Snapshot) -> Vec<(&'static str, Outcome)> {
    let findings = examine(snapshot);
    findings.iter().filter(|f| f.outcome != Outcome::Ok).map(|f| (f.check, f.outcome)).collect()
}

#[test]
fn nothing_is_wrong_with_a_healthy_node() {
    assert_eq!(wrong(&healthy()), []);
    let names: Vec<_> = examine(&healthy()).iter().map(|finding| finding.check).collect();
    for name in [
        "agent",
        "etcd",
        "clock",
        "lease",
        "public-ip",
        "device",
        "route",
        "neighbour",
        "fdb",
        "programs",
        "pins",
    ] {
        assert!(names.contains(&name), "{name} is looked at: {names:?}");
    }
}

#[test]
fn each_fault_is_found_by_its_name_and_nothing_else_is() {
    use Outcome::{Fault, Unknown, Warning};
    type Break = fn(&mut Snapshot);
    fn probe(snapshot: &mut Snapshot) -> &mut Probe {
        &mut snapshot.probes[0]
    }
    fn actual(snapshot: &mut Snapshot) -> &mut Actual {
        v4(snapshot).overlay.as_mut().unwrap()
    }
    fn overlay(snapshot: &mut Snapshot) -> &mut Overlay {
        probe(snapshot).overlay.as_mut().unwrap()
    }
    fn leases(snapshot: &mut Snapshot) -> &mut Vec<Lease> {
        snapshot.etcd.leases.as_mut().unwrap().as_mut().unwrap()
    }
    fn set(snapshot: &mut Snapshot, name: &str, value: &str) {
        snapshot.sysctls.insert(name.to_owned(), Some(value.to_owned()));
    }
    let table: &[(&str, &str, Outcome, Break)] = &[
        ("no agent", "agent", Fault, |s| s.source = Source::File("no agent answers".into())),
        ("not ready", "agent", Fault, |s| {
            s.not_ready.insert("peers".into(), "not listed yet".into());
        }),
        ("etcd away", "etcd", Fault, |s| s.etcd.endpoints[0].1 = Err("refused".into())),
        ("etcd sick", "etcd", Fault, |s| s.etcd.endpoints[0].1.as_mut().unwrap().healthy = Some(false)),
        ("one of two endpoints", "etcd", Warning, |s| {
            s.etcd.endpoints.push(("x".into(), Err("refused".into())))
        }),
        ("clock", "clock", Warning, |s| s.etcd.endpoints[0].1.as_mut().unwrap().ahead = Some(-3600)),
        ("leases unreadable", "lease", Unknown, |s| s.etcd.leases = Some(Err("no answer".into()))),
        ("record gone", "lease", Fault, |s| drop(leases(s).remove(0))),
        ("lost", "lease", Fault, |s| s.facts.lost = Some("another node has it".into())),
        ("record with another MAC", "lease", Fault, |s| {
            leases(s)[0] = lease("10.5.1.0/24", OWN, [2, 0, 0, 0, 0, 99])
        }),
        ("two subnets of one address", "public-ip", Fault, |s| {
            leases(s).push(lease("10.5.3.0/24", PEER, [2, 0, 0, 0, 0, 3]))
        }),
        ("one MAC twice", "public-ip", Fault, |s| {
            leases(s).push(lease("10.5.3.0/24", Ipv4Addr::new(192, 0, 2, 13), PEER_MAC));
        }),
        ("no forwarding", "ip-forward", Fault, |s| set(s, host::FORWARD, "0")),
        ("not liberal", "be-liberal", Fault, |s| set(s, host::LIBERAL, "0")),
        ("strict on the device", "rp-filter", Warning, |s| set(s, &host::rp_filter("flannel.1"), "1")),
        ("strict for all", "rp-filter", Warning, |s| set(s, &host::rp_filter("all"), "1")),
        ("strict and astray", "rp-filter", Warning, |s| {
            set(s, &host::rp_filter("eth0"), "1");
            v4(s).ways.get_mut(&PEER).unwrap().as_mut().unwrap().ifindex = 77;
        }),
        ("a bridge elsewhere", "bridge", Fault, |s| v4(s).addresses[1] = address(BRIDGE, "172.17.0.1", 16)),
        ("a bridge too wide", "bridge", Warning, |s| s.links[2].mtu = 1500),
        ("another's route", "overlapping-route", Fault, |s| {
            v4(s).routes.push(route("10.5.128.0/17", UPLINK))
        }),
        ("a peer's subnet elsewhere", "overlapping-route", Fault, |s| {
            v4(s).routes.push(route("10.5.2.0/24", UPLINK))
        }),
        ("services without br_netfilter", "br-netfilter", Fault, |s| {
            s.rules = Ok("table ip nat {\n\tchain KUBE-SERVICES {".into());
            set(s, host::BRIDGE_RULES, "0");
        }),
        ("Docker 28", "direct-access", Fault, |s| {
            s.rules = Ok("iifname != \"docker0\" ip daddr 10.5.1.2 counter packets 0 bytes 0 drop".into());
        }),
        ("GRO off", "gro", Warning, |s| s.gro = Ok(false)),
        ("no device", "device", Fault, |s| drop(s.links.remove(1))),
        ("no address", "device", Fault, |s| v4(s).addresses.truncate(2)),
        ("device down", "device", Fault, |s| s.links[1].up = false),
        ("another MAC", "device", Fault, |s| s.links[1].mac = Some([2, 0, 0, 0, 0, 99])),
        ("another MTU", "device", Fault, |s| s.links[1].mtu = 1500),
        ("route gone", "route", Fault, |s| actual(s).routes.clear()),
        ("neighbour wrong", "neighbour", Fault, |s| {
            actual(s).neighbours[0].mac = Some([2, 0, 0, 0, 0, 99]);
        }),
        ("FDB wrong", "fdb", Fault, |s| actual(s).fdb[0].dst = Some(Ipv4Addr::new(192, 0, 2, 99))),
        ("a peer left out", "refused-peer", Fault, |s| s.facts.refused.extend(["10.5.9.0/24".to_owned()])),
        ("programs refused", "kernel", Fault, |s| {
            s.programs.as_mut().unwrap().loadable = Err("no BTF".into())
        }),
        ("kernel alone", "kernel", Warning, |s| {
            s.programs = None;
            s.facts.kernel_alone = Some("no eBPF: there is no bpf_redirect_peer (Linux 5.10)".into());
        }),
        ("kernel alone, in an IPv6-only network", "kernel", Warning, |s| {
            s.programs = None;
            s.facts.kernel_alone = Some("no eBPF: there is no bpf_redirect_peer (Linux 5.10)".into());
            (s.v4, s.facts.v4) = (None, None);
            (s.etcd.leases, s.probes) = (None, Vec::new());
        }),
        ("detached", "programs", Fault, |s| s.programs.as_mut().unwrap().hooks[1].2 = Attached::Missing),
        // In the ring there is one build of the programs only, so this stands here alone.
        ("another version", "programs", Warning, |s| {
            s.programs.as_mut().unwrap().hooks[1].2 = Attached::Tag(99)
        }),
        ("not pinned", "pins", Fault, |s| s.programs.as_mut().unwrap().unpinned.push("FLOWS".into())),
        ("peer away", "underlay", Fault, |s| {
            probe(s).underlay = Reach::Nothing(None);
            *overlay(s) = Overlay { echo: Reach::Nothing(None), offload: None };
        }),
        ("small path", "underlay-mtu", Fault, |s| {
            probe(s).underlay = Reach::Smaller { size: 1400, wanted: 1500 };
            *overlay(s) = Overlay { echo: Reach::Smaller { size: 1350, wanted: 1450 }, offload: None };
        }),
        ("small overlay", "overlay-mtu", Fault, |s| {
            *overlay(s) = Overlay { echo: Reach::Smaller { size: 1350, wanted: 1450 }, offload: None };
        }),
        ("port closed", "vxlan", Fault, |s| {
            *overlay(s) = Overlay { echo: Reach::Nothing(None), offload: None }
        }),
        ("checksums", "checksum", Fault, |s| overlay(s).offload = Some(Offload::BadChecksum)),
        ("segments", "segmentation", Fault, |s| overlay(s).offload = Some(Offload::BadSegments)),
        ("silent peer", "offload", Unknown, |s| overlay(s).offload = Some(Offload::Silent)),
    ];
    for (what, check, outcome, break_it) in table {
        let mut snapshot = healthy();
        break_it(&mut snapshot);
        assert_eq!(wrong(&snapshot), [(*check, *outcome)], "{what}");
        let findings = examine(&snapshot);
        let finding =
            findings.iter().find(|finding| finding.check == *check && finding.outcome == *outcome).unwrap();
        assert!(!finding.evidence.is_empty(), "{what}");
        assert_eq!(finding.remedy.is_some(), *outcome != Unknown, "{what}: what helps");
    }
}

/// The same node with the wireguard backend.
fn encrypted() -> Snapshot {
    use crate::wireguard::{self, ActualPeer, PublicKey};
    let (own, other) = (PublicKey([1; 32]), PublicKey([2; 32]));
    let mut snapshot = healthy();
    let desired = Desired { whole: true, ..desired() };
    let mut actual = Actual::default();
    for op in plan(&desired, &actual.clone()).ops {
        let Op::SetRoute(route) = op else { panic!("{op}") };
        actual.routes.push(route);
    }
    let half = v4(&mut snapshot);
    (half.facts.overlay, half.overlay, half.facts.device) = (Some(desired), Ok(actual), None);
    snapshot.facts.v4 = Some(v4(&mut snapshot).facts.clone());
    let name = "flannel-wg".to_owned();
    let peers = BTreeSet::from([other]);
    let tunnel = facts::Tunnel { name, index: DEVICE, mtu: 1420, port: 51820, public_key: own, peers };
    snapshot.facts.wireguard = vec![tunnel];
    snapshot.wireguard = vec![Ok(wireguard::Actual {
        public_key: Some(own),
        port: 51820,
        peers: BTreeMap::from([(other, ActualPeer::default())]),
        ..wireguard::Actual::default()
    })];
    snapshot.links[1] =
        Link { mac: None, mtu: 1420, ..link(DEVICE, "flannel-wg", LinkKind::Other("wireguard".into())) };
    snapshot
}

#[test]
fn each_fault_of_a_wireguard_device_is_found_by_its_name_and_nothing_else_is() {
    use crate::wireguard::{self, PublicKey};
    fn device(snapshot: &mut Snapshot) -> &mut wireguard::Actual {
        snapshot.wireguard[0].as_mut().unwrap()
    }
    assert_eq!(wrong(&encrypted()), []);
    type Break = fn(&mut Snapshot);
    let table: &[(&str, &str, Break)] = &[
        ("gone", "device", |s| drop(s.links.remove(1))),
        ("of another kind", "device", |s| s.links[1].kind = LinkKind::Bridge),
        ("down", "device", |s| s.links[1].up = false),
        ("another MTU", "device", |s| s.links[1].mtu = 1500),
        ("another port", "device", |s| device(s).port = 1),
        ("another key", "device", |s| device(s).public_key = None),
        ("no peer", "wireguard-peer", |s| device(s).peers.clear()),
        ("a foreign peer", "wireguard-peer", |s| {
            device(s).peers.insert(PublicKey([3; 32]), wireguard::ActualPeer::default());
        }),
        ("no route", "route", |s| v4(s).overlay.as_mut().unwrap().routes.clear()),
        ("silent", "wireguard", |s| {
            s.probes[0].overlay = Some(Overlay { echo: Reach::Nothing(None), offload: None });
        }),
    ];
    for (what, check, break_it) in table {
        let mut snapshot = encrypted();
        break_it(&mut snapshot);
        assert_eq!(wrong(&snapshot), [(*check, Outcome::Fault)], "{what}");
    }
}

#[test]
fn what_harms_nothing_is_no_finding() {
    type Change = fn(&mut Snapshot);
    let table: &[(&str, Change)] = &[
        ("a peer that answers no echo and carries the overlay", |s| {
            s.probes[0].underlay = Reach::Nothing(None)
        }),
        ("a less specific route", |s| v4(s).routes.push(route("10.0.0.0/8", UPLINK))),
        ("a routed container", |s| v4(s).routes.push(route("10.5.1.7/32", POD))),
        ("strict where the way back is the same", |s| {
            s.sysctls.insert(host::rp_filter("eth0"), Some("1".into()));
        }),
        ("no conntrack", |s| drop(s.sysctls.insert(host::LIBERAL.into(), None))),
        ("no br_netfilter and no services", |s| drop(s.sysctls.insert(host::BRIDGE_RULES.into(), None))),
        ("--datapath=kernel", |s| {
            s.programs = None;
            s.facts.kernel_alone = Some("--datapath=kernel".into());
        }),
        ("another bridge", |s| {
            s.links.push(link(9, "virbr0", LinkKind::Bridge));
            v4(s).addresses.push(address(9, "192.168.122.1", 24));
        }),
    ];
    for (what, change) in table {
        let mut snapshot = healthy();
        change(&mut snapshot);
        assert_eq!(wrong(&snapshot), [], "{what}");
    }
}

#[test]
fn rules_that_may_drop_vxlan_are_quoted() {
    let rules = "table ip filter {\n\tchain in {\n\t\ttype filter hook input priority filter; policy drop;\n\t\t\
                 udp dport 8472 counter packets 3 bytes 9 drop\n\t\tudp dport 84720 drop\n\t\tudp dport 8472 accept\n\t}\n}";
    assert_eq!(
        peers::dropping(rules, 8472),
        [
            "type filter hook input priority filter; policy drop;",
            "udp dport 8472 counter packets 3 bytes 9 drop"
        ]
    );
}
