//! What interfaces do for the kernel: segmentation and aggregation, switched by ethtool.

use anyhow::Result;

use crate::{cluster::Cluster, container::Container, netns::Netns};

/// Makes an interface get segments of the MTU's size instead of large packets.
///
/// # Errors
///
/// Where ethtool is missing or there is no such interface.
pub fn segment(netns: &Netns, interface: &str) -> Result<()> {
    let off = "tso off gso off tx-udp_tnl-segmentation off tx-udp_tnl-csum-segmentation off tx-udp-segmentation off";
    netns.exec(&format!("ethtool -K {interface} {off}")).map(drop)
}

/// Makes an interface aggregate what it receives.
///
/// # Errors
///
/// As [`segment`].
pub fn aggregate(netns: &Netns, interface: &str) -> Result<()> {
    netns.exec(&format!("ethtool -K {interface} gro on")).map(drop)
}

/// Makes the nodes' uplinks like those of real NICs without offloads: segments on the wire, GRO behind it.
///
/// # Errors
///
/// As [`segment`].
pub fn segment_underlay(cluster: &Cluster) -> Result<()> {
    for node in &cluster.nodes {
        segment(node.netns(), "eth0")?;
        aggregate(node.netns(), "eth0")?;
    }
    // A veth aggregates only what its other end does not send in large packets: here that is the switch's port.
    let switch = cluster.underlay().netns();
    let ports: serde_json::Value = serde_json::from_str(&switch.ip("-json link show master br0")?)?;
    let names = ports.as_array().into_iter().flatten().filter_map(|port| port["ifname"].as_str());
    names.into_iter().try_for_each(|name| segment(switch, name))
}

/// TCP segments that a container has sent again.
///
/// # Errors
///
/// Where the kernel's counters are not as documented.
pub fn retransmitted(container: &Container) -> Result<u64> {
    retransmitted_in(container.netns())
}

/// TCP segments that a namespace has sent again.
///
/// # Errors
///
/// As [`retransmitted`].
pub fn retransmitted_in(netns: &Netns) -> Result<u64> {
    let text = netns.exec("cat /proc/net/snmp")?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let column = names.split(' ').position(|name| name == "RetransSegs");
    let value = column.and_then(|column| values.split(' ').nth(column)).unwrap_or_default();
    Ok(value.parse()?)
}
