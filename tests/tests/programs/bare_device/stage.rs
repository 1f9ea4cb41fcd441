//! A node with a tun device in the place of WireGuard's, and the programs attached.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use loden_agent::{
    dataplane::{
        Dataplane, FamilySettings, Hook, PeerPath,
        Program::{FromOverlay, FromPod, ToOverlay, ToPod},
        Settings, Underlay, Way,
    },
    family::{V4, V6},
};
use loden_ebpf::{abi::Endpoint, reason::Reason};
use loden_tests::{bpffs::Bpffs, capture::Capture, netns::Netns, process::wait_for, tap::Tap};

use crate::{
    packet::{IPV4, IPV6},
    rig::{GATEWAY_MAC, OTHER_POD, POD, POD_MAC},
    v6,
};

/// MTU of the device.
pub(super) const MTU: u16 = 1420;
pub(super) const LIMIT: Duration = Duration::from_secs(10);

/// Makes a packet around eight bytes.
pub(super) type Make = dyn Fn(&[u8]) -> Vec<u8>;

/// A node with a pod, and a device that leads to the other nodes.
pub(super) struct Stage {
    /// The pod's end of its veth; nobody answers there.
    pod: Capture,
    pub(super) device: Tap,
    dataplane: Option<Dataplane>,
    /// Where its maps are.
    pub(super) pins: PathBuf,
    /// Tells samples apart.
    serial: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gate {
    Strict,
    Open,
}

/// Where something comes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Pod,
    Device,
}

impl Stage {
    /// Runs `f` on a stage, inside the node; `None` for one without programs.
    pub(super) fn run(gate: Option<Gate>, f: impl FnOnce(&mut Self) + Send) {
        assert!(nix::unistd::geteuid().is_root(), "attaching programs needs root");
        let (node, pod) = (Netns::create("bare").unwrap(), Netns::create("pod").unwrap());
        let mac = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
        let (gateway_mac, pod_mac) = (mac(GATEWAY_MAC), mac(POD_MAC));
        node.ip(&format!(
            "link add pod address {gateway_mac} type veth peer name eth0 address {pod_mac} netns {}",
            pod.name()
        ))
        .unwrap();
        // The test alone speaks for the pod.
        pod.exec("sysctl -qw net.ipv6.conf.eth0.disable_ipv6=1").unwrap();
        pod.ip("link set eth0 up").unwrap();
        let device = Tap::tun(&node, "bare0").unwrap();
        for sysctl in [
            "net.ipv4.ip_forward=1",
            "net.ipv6.conf.all.forwarding=1",
            "net.ipv4.conf.all.rp_filter=0",
            "net.ipv4.conf.pod.rp_filter=0",
            "net.ipv4.conf.bare0.rp_filter=0",
            "net.ipv4.icmp_ratelimit=0",
            "net.ipv6.icmp.ratelimit=0",
        ] {
            node.exec(&format!("sysctl -qw {sysctl}")).unwrap();
        }
        for command in [
            "link set pod up".to_owned(),
            format!("link set bare0 mtu {MTU}"),
            "address add 10.5.1.1/24 dev pod".to_owned(),
            "-6 address add fc00:0:0:1::1/64 dev pod nodad".to_owned(),
            format!("neighbour add {POD} lladdr {pod_mac} dev pod nud permanent"),
            format!("neighbour add {} lladdr {pod_mac} dev pod nud permanent", v6::POD),
            "route add 10.5.0.0/16 dev bare0".to_owned(),
            "-6 route add fc00::/48 dev bare0".to_owned(),
        ] {
            node.ip(&command).unwrap();
        }
        let directory = tempfile::tempdir().unwrap();
        let bpffs = Bpffs::mount(&directory.path().join("bpf")).unwrap();
        let index = |name: &str| {
            let line = node.ip(&format!("-o link show dev {name}")).unwrap();
            line.split(':').next().unwrap().parse::<u32>().unwrap()
        };
        let (veth, bare) = (index("pod"), index("bare0"));
        let frames = Capture::open(&pod, "eth0").unwrap();
        let pins = bpffs.path().join("bare");
        node.run(|| {
            let dataplane = gate.map(|gate| {
                let mut dataplane = Dataplane::load(&settings(gate), &pins).unwrap();
                fill(&mut dataplane, veth, bare);
                let hook = |program, ifindex, name: &str| (Hook { program, ifindex }, name.to_owned());
                let errors = dataplane.set_hooks(&[
                    hook(FromOverlay, bare, "bare0"),
                    hook(FromPod, veth, "pod"),
                    hook(ToPod, veth, "pod"),
                    hook(ToOverlay, bare, "bare0"),
                ]);
                assert!(errors.is_empty(), "{errors:?}");
                dataplane
            });
            f(&mut Self { pod: frames, device, dataplane, pins, serial: 0 });
        });
    }

    /// Sends an IP packet from one end; returns what comes out at the other with these eight bytes somewhere in it, as a
    /// packet or, at the pod, a frame.
    pub(super) fn send(&mut self, from: End, packet: &[u8], marker: [u8; 8], to: End) -> Vec<u8> {
        self.put(from, packet);
        wait_for("what comes of a packet", LIMIT, || {
            let next = match to {
                End::Pod => self.pod.next().unwrap(),
                End::Device => self.device.next().unwrap(),
            };
            next.filter(|found| found.windows(8).any(|bytes| bytes == marker))
        })
        .unwrap()
    }

    pub(super) fn put(&self, from: End, packet: &[u8]) {
        match from {
            End::Device => self.device.deliver(packet).unwrap(),
            End::Pod => {
                let ether_type = if packet[0] >> 4 == 6 { IPV6 } else { IPV4 };
                let frame = [&GATEWAY_MAC[..], &POD_MAC, &ether_type.to_be_bytes(), packet].concat();
                self.pod.send(&frame).unwrap();
            }
        }
    }

    /// Eight bytes that no other packet has.
    pub(super) fn marker(&mut self) -> [u8; 8] {
        self.serial += 1;
        (0x6c6f_6465_0000_0000 + u64::from(self.serial)).to_be_bytes()
    }

    pub(super) fn counted(&self, reason: Reason) -> u64 {
        self.dataplane.as_ref().unwrap().counters().unwrap()[&reason].packets
    }

    /// What comes of a packet, which the programs should judge for this reason.
    pub(super) fn judged(
        &mut self,
        what: &str,
        from: End,
        reason: Reason,
        to: End,
        packet: &Make,
    ) -> Vec<u8> {
        let (before, marker) = (self.counted(reason), self.marker());
        let found = self.send(from, &packet(&marker), marker, to);
        assert_eq!(self.counted(reason) - before, 1, "{what}: {}", reason.name());
        found
    }
}

fn settings(gate: Gate) -> Settings {
    Settings {
        v4: Some(FamilySettings {
            network: "10.5.0.0/16".parse().unwrap(),
            subnet_len: 24,
            subnet: "10.5.1.0/24".parse().unwrap(),
            vtep: "192.0.2.1".parse().unwrap(),
            vxlan: None,
            outer_ttl: 64,
        }),
        v6: Some(FamilySettings {
            network: "fc00::/48".parse().unwrap(),
            subnet_len: 64,
            subnet: "fc00:0:0:1::/64".parse().unwrap(),
            vtep: "2001:db8::1".parse().unwrap(),
            vxlan: None,
            outer_ttl: 64,
        }),
        source_ports: (32_768, 60_999),
        strict: gate == Gate::Strict,
        drop_forged: true,
        bare_device: true,
        log_packets: false,
    }
}

/// One pod, one peer.
fn fill(dataplane: &mut Dataplane, veth: u32, bare: u32) {
    let of_pod = (veth, POD_MAC, GATEWAY_MAC);
    let (ifindex, mac, gateway_mac) = of_pod;
    let tables = dataplane.half_mut::<V4>();
    let underlay = Underlay { uplink: bare, next_hop: [0; 4].into(), source: [0; 4].into(), mtu: MTU };
    let (subnet, vtep) = ("10.5.2.0/24".parse().unwrap(), "192.0.2.2".parse().unwrap());
    let path = PeerPath { subnet, vtep, vtep_mac: [0; 6], way: Way::Device, underlay: Some(underlay) };
    tables.set_peers(&[path]).unwrap();
    let endpoint = |address| Endpoint { address, ifindex, mac, gateway_mac, ..Endpoint::default() };
    // The other pod is another veth's, which is not there.
    let other = Endpoint { ifindex: 999, ..endpoint(OTHER_POD.octets()) };
    tables.set_endpoints(&BTreeMap::from([(POD, endpoint(POD.octets())), (OTHER_POD, other)])).unwrap();
    tables.prove_endpoint(POD, false).unwrap();
    let tables = dataplane.half_mut::<V6>();
    let underlay = Underlay { uplink: bare, next_hop: [0; 16].into(), source: [0; 16].into(), mtu: MTU };
    let (subnet, vtep) = ("fc00:0:0:2::/64".parse().unwrap(), "2001:db8::2".parse().unwrap());
    let path = PeerPath { subnet, vtep, vtep_mac: [0; 6], way: Way::Device, underlay: Some(underlay) };
    tables.set_peers(&[path]).unwrap();
    let address = v6::POD.octets();
    let endpoint = Endpoint { address, ifindex, mac, gateway_mac, ..Endpoint::default() };
    tables.set_endpoints(&BTreeMap::from([(v6::POD, endpoint)])).unwrap();
    tables.prove_endpoint(v6::POD, false).unwrap();
}
