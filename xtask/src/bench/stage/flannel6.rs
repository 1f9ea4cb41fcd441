//! The IPv6 half of a dual-stack flannel node, as flanneld sets it up.

use std::net::Ipv6Addr;

use anyhow::Result;
use ipnet::Ipv6Net;
use loden_tests::{netns::Netns, node::BRIDGE};

/// The device of VNI 1.
const DEVICE: &str = "flannel-v6.1";
/// Of the device, the bridge and the pods. flanneld tells its pods of 20 bytes more, which do not fit (IPv6 headers are
/// longer), and leaves it to path MTU discovery; here every mode has the same.
pub(super) const MTU: u32 = 1430;

/// The `n`-th node's MAC on the device.
fn mac(n: u32) -> String {
    format!("0a:fe:00:00:06:{n:02x}")
}

/// Makes the device, the way to the peer, and the bridge's address.
pub(super) fn set_up(
    node: &Netns,
    (n, address, subnet): (u32, Ipv6Addr, Ipv6Net),
    (peer, vtep, peers_subnet): (u32, Ipv6Addr, Ipv6Net),
) -> Result<()> {
    let (base, peers_base) = (subnet.network(), peers_subnet.network());
    let device = format!("type vxlan id 1 dev eth0 local {address} dstport 8472 nolearning");
    node.ip(&format!("link add {DEVICE} address {} mtu {MTU} {device}", mac(n)))?;
    node.ip(&format!("-6 address add {base}/128 dev {DEVICE} nodad"))?;
    node.ip(&format!("link set {DEVICE} up"))?;
    node.ip(&format!("-6 neigh replace {peers_base} lladdr {} dev {DEVICE} nud permanent", mac(peer)))?;
    node.exec(&format!("bridge fdb replace {} dev {DEVICE} dst {vtep} self permanent", mac(peer)))?;
    node.ip(&format!("-6 route replace {peers_subnet} via {peers_base} dev {DEVICE} onlink"))?;
    node.ip(&format!("link set {BRIDGE} mtu {MTU}"))?;
    node.ip(&format!("-6 address add {} dev {BRIDGE} nodad", super::pair::gateway6(subnet)?)).map(drop)
}
