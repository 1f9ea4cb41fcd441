//! Hosts for the tests: a namespace with an uplink `eth0`, and a pod behind a bridge.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use ipnet::{IpNet, Ipv4Net};
use loden_agent::{
    family::{Family, V4},
    kernel::{Kernel, VxlanDevice, VxlanSpec},
    overlay::{Desired, OverlayPeer, plan},
};
use loden_tests::netns::{self, Netns};

pub(crate) const NETWORK: &str = "10.5.0.0/16";

/// The network, as the agent's state lists it.
pub(crate) fn networks() -> BTreeSet<IpNet> {
    BTreeSet::from([NETWORK.parse().unwrap()])
}

/// Two hosts on one wire: `192.168.77.11` and `192.168.77.12`, both at `eth0`.
pub(crate) fn pair() -> (Netns, Netns) {
    let (a, b) = (Netns::create("a").unwrap(), Netns::create("b").unwrap());
    netns::join(&a, "eth0", &b, "eth0").unwrap();
    a.ip("addr add 192.168.77.11/24 dev eth0").unwrap();
    b.ip("addr add 192.168.77.12/24 dev eth0").unwrap();
    for host in [&a, &b] {
        host.exec("sysctl -qw net.ipv4.ip_forward=1").unwrap();
    }
    (a, b)
}

/// The index of a link.
pub(crate) fn index(netns: &Netns, name: &str) -> u32 {
    let links = crate::json(netns, &format!("ip -j link show dev {name}"));
    links[0]["ifindex"].as_u64().unwrap().try_into().unwrap()
}

/// The device that the tests want: `flannel.1` over `eth0`, as for a network config without options.
pub(crate) fn spec(netns: &Netns, local: &str) -> VxlanSpec {
    VxlanSpec {
        name: "flannel.1".to_owned(),
        vni: 1,
        port: 0,
        local: local.parse().unwrap(),
        uplink: index(netns, "eth0"),
        mtu: 1450,
        gbp: false,
        learning: false,
        mac: None,
        noted: None,
    }
}

/// A peer reached through the VXLAN device.
pub(crate) fn peer(subnet: &str, vtep: &str, vtep_mac: [u8; 6]) -> OverlayPeer {
    OverlayPeer { subnet: subnet.parse().unwrap(), vtep: vtep.parse().unwrap(), vtep_mac, direct: false }
}

/// The overlay of a host with these peers.
pub(crate) fn desired(own: &str, device: u32, uplink: u32, peers: &[OverlayPeer]) -> Desired {
    let peers: BTreeMap<Ipv4Net, OverlayPeer> = peers.iter().map(|peer| (peer.subnet, *peer)).collect();
    Desired {
        network: NETWORK.parse().unwrap(),
        own: own.parse().unwrap(),
        device,
        uplink,
        whole: false,
        peers,
    }
}

/// Reads, plans and applies once; every step must succeed. Returns how many there were.
pub(crate) async fn reconcile<F: Family>(kernel: &Kernel, desired: &Desired<F>) -> usize {
    let actual = kernel.overlay_actual(desired.device).await.unwrap();
    let plan = plan(desired, &actual);
    assert_eq!(plan.refused, []);
    let errors = kernel.apply(&plan).await;
    assert!(errors.is_empty(), "{errors:?}");
    plan.ops.len()
}

/// Device and address of a host, made by the agent's code.
pub(crate) async fn set_up(kernel: &Kernel, spec: &VxlanSpec, own: &str) -> VxlanDevice {
    let device = kernel.ensure_vxlan(spec).await.unwrap();
    let (own, networks) = (own.parse().unwrap(), [NETWORK.parse().unwrap()].into());
    kernel.set_overlay_address::<V4>(device.index, own, &networks).await.unwrap();
    device
}

/// A pod: a namespace of its own with the address `.2` of the subnet, behind the bridge `cni0` of the host,
/// which has `.1`.
pub(crate) fn pod(host: &Netns, subnet: &str) -> Netns {
    let subnet: Ipv4Net = subnet.parse().unwrap();
    let address = |n: u32| Ipv4Addr::from(u32::from(subnet.network()) + n);
    let pod = Netns::create("pod").unwrap();
    host.ip("link add cni0 type bridge").unwrap();
    host.ip(&format!("addr add {}/24 dev cni0", address(1))).unwrap();
    host.ip("link set cni0 up").unwrap();
    netns::join(host, "vethpod", &pod, "eth0").unwrap();
    host.ip("link set vethpod master cni0").unwrap();
    pod.ip(&format!("addr add {}/24 dev eth0", address(2))).unwrap();
    pod.ip(&format!("route add default via {}", address(1))).unwrap();
    pod
}

/// One ping that must be answered within two seconds.
pub(crate) fn ping(from: &Netns, to: &str) -> anyhow::Result<String> {
    from.exec(&format!("ping -n -c 1 -W 2 {to}"))
}
