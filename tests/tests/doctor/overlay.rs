//! Faults of the overlay's device and of what stands there for a peer, in either family. Nobody mends them while no agent
//! runs.

use std::{fs, net::IpAddr};

use ipnet::{IpNet, Ipv6Net};
use loden_tests::node::Node;
use serde_json::Value;

use crate::ward::Ward;

/// One family's overlay on the patient, and its peer's end of it.
pub(crate) struct Overlay {
    /// The VXLAN device, and its MTU.
    device: &'static str,
    mtu: u32,
    /// The patient's own address in it.
    own: IpAddr,
    /// The peer's subnet, its public address and the MAC of its device.
    subnet: IpNet,
    vtep: IpAddr,
    mac: String,
    /// A public address that nobody has.
    nobody: IpAddr,
}

impl Overlay {
    pub(crate) fn of_ipv4(ward: &Ward) -> Self {
        let (own, far) = (ward.patient(), &ward.cluster.nodes[1]);
        let mac = far.status().unwrap()["device"]["mac"].as_str().unwrap().to_owned();
        Self {
            device: "flannel.1",
            mtu: 1450,
            own: own.subnet_env().unwrap().subnet().network().into(),
            subnet: far.subnet_env().unwrap().subnet().trunc().into(),
            vtep: far.address().into(),
            mac,
            nobody: [192, 168, 64, 99].into(),
        }
    }

    pub(crate) fn of_ipv6(ward: &Ward) -> Self {
        let (own, far) = (subnet6(ward.patient()), &ward.cluster.nodes[1]);
        let shown = far.netns().ip("-json link show flannel-v6.1").unwrap();
        let links: Value = serde_json::from_str(&shown).unwrap();
        Self {
            device: "flannel-v6.1",
            mtu: 1430,
            own: own.network().into(),
            subnet: subnet6(far).into(),
            vtep: ward.cluster.node_address6(1).unwrap().into(),
            mac: links[0]["address"].as_str().unwrap().to_owned(),
            nobody: "fd77::99".parse().unwrap(),
        }
    }
}

/// On a ward without an agent at the patient.
pub(crate) fn faults(ward: &Ward, overlay: &Overlay) {
    let Overlay { device, mtu, own, subnet, vtep, mac, nobody } = overlay;
    let (base, len) = (subnet.network(), own_len(*own));
    ward.assert_found(
        &format!("bridge fdb replace {mac} dev {device} dst {nobody} self permanent"),
        &format!("bridge fdb replace {mac} dev {device} dst {vtep} self permanent"),
        &["agent", "fdb", "vxlan"],
    );
    ward.assert_found(
        &format!("ip neigh replace {base} lladdr 02:00:00:00:00:99 dev {device} nud permanent"),
        &format!("ip neigh replace {base} lladdr {mac} dev {device} nud permanent"),
        &["agent", "neighbour", "vxlan"],
    );
    ward.assert_found(
        &format!("ip route del {subnet}"),
        &format!("ip route add {subnet} via {base} dev {device} onlink proto 76"),
        &["agent", "route", "vxlan"],
    );
    ward.assert_found(
        &format!("ip link set {device} mtu 1400"),
        &format!("ip link set {device} mtu {mtu}"),
        &["agent", "device", "overlay-mtu"],
    );
    // Another address of the device is left, so that its routes stay; nobody answers to that one.
    let spare = if own.is_ipv4() { "192.0.2.9/32" } else { "2001:db8::9/128 nodad" };
    ward.run(&format!("ip address add {spare} dev {device}"));
    ward.assert_found(
        &format!("ip address del {own}/{len} dev {device}"),
        &format!("ip address add {own}/{len} dev {device}"),
        &["agent", "device", "vxlan"],
    );
    ward.run(&format!("ip address del {} dev {device}", spare.trim_end_matches(" nodad")));
}

/// A node's subnet of IPv6, in a network that may have nothing else.
fn subnet6(node: &Node) -> Ipv6Net {
    let text = fs::read_to_string(node.subnet_file()).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("FLANNEL_IPV6_SUBNET="));
    line.unwrap_or_else(|| panic!("no IPv6 subnet: {text}")).parse::<Ipv6Net>().unwrap().trunc()
}

fn own_len(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}
