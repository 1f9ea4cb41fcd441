//! A node that is set up as flanneld sets one up (vxlan backend, etcd v3), by hand: `ip`, `bridge`, `etcdctl`.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result};
use ipnet::Ipv4Net;

use crate::{cluster::PREFIX, container::Container, etcd::Etcd, netns::Netns, node::BRIDGE};

/// The device of VNI 1.
const DEVICE: &str = "flannel.1";

/// A plugged namespace that is a flannel node.
#[derive(Debug)]
pub struct FlannelNode {
    netns: Netns,
    address: Ipv4Addr,
    subnet: Ipv4Net,
    mac: String,
    containers: u32,
}

impl FlannelNode {
    /// Makes the VXLAN device, takes the lease, and makes the containers' bridge at the subnet's `.1`.
    ///
    /// # Errors
    ///
    /// Where etcd does not answer.
    pub fn create(netns: Netns, address: Ipv4Addr, subnet: Ipv4Net, etcd: &Etcd) -> Result<Self> {
        let mac = set_up(&netns, address, subnet, etcd)?;
        Ok(Self { netns, address, subnet, mac, containers: 0 })
    }

    /// Its namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Its address on the underlay.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Its lease.
    #[must_use]
    pub fn subnet(&self) -> Ipv4Net {
        self.subnet
    }

    /// The MAC of its VTEP.
    #[must_use]
    pub fn mac(&self) -> &str {
        &self.mac
    }

    /// Does for a peer's lease what flanneld does.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn add_peer(&self, subnet: Ipv4Net, address: Ipv4Addr, mac: &str, direct: bool) -> Result<()> {
        add_peer(&self.netns, subnet, address, mac, direct)
    }

    /// Runs a container at the next free address.
    ///
    /// # Errors
    ///
    /// Where the subnet is full.
    pub fn run_container(&mut self) -> Result<Container> {
        self.containers += 1;
        let gateway =
            Ipv4Net::new(Ipv4Addr::from(u32::from(self.subnet.network()) + 1), self.subnet.prefix_len())?;
        let address = Ipv4Addr::from(u32::from(gateway.addr()) + self.containers);
        anyhow::ensure!(self.subnet.contains(&address), "{} is full", self.subnet);
        let (veth, addresses) = (format!("veth{}", self.containers), [(address.into(), gateway.into())]);
        Container::create(&self.netns, BRIDGE, &veth, &addresses, 1450)
    }
}

/// Makes a plugged namespace a flannel node: device, lease, address, forwarding, the containers' bridge. Returns the
/// VTEP's MAC.
///
/// # Errors
///
/// Where etcd does not answer.
pub fn set_up(netns: &Netns, address: Ipv4Addr, subnet: Ipv4Net, etcd: &Etcd) -> Result<String> {
    let base = subnet.network();
    let [_, _, c, d] = address.octets();
    let mac = format!("0a:fe:00:00:{c:02x}:{d:02x}");
    netns.ip(&format!(
        "link add {DEVICE} address {mac} mtu 1450 type vxlan id 1 dev eth0 local {address} dstport 8472 nolearning"
    ))?;
    let value = format!(
        r#"{{"PublicIP":"{address}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
    );
    let granted = etcd.ctl(&["lease", "grant", "86400"])?;
    let lease = granted.split_whitespace().nth(1).context("etcd granted no lease")?;
    let key = format!("{PREFIX}/subnets/{base}-{}", subnet.prefix_len());
    etcd.ctl(&["put", &key, &value, "--lease", lease])?;
    netns.ip(&format!("address add {base}/32 dev {DEVICE}"))?;
    netns.ip(&format!("link set {DEVICE} up"))?;
    netns.exec("sysctl -qw net.ipv4.ip_forward=1")?;
    netns.ip(&format!("link add {BRIDGE} mtu 1450 type bridge"))?;
    let gateway = Ipv4Addr::from(u32::from(base) + 1);
    netns.ip(&format!("address add {gateway}/{} dev {BRIDGE}", subnet.prefix_len()))?;
    netns.ip(&format!("link set {BRIDGE} up"))?;
    Ok(mac)
}

/// Does on a node what flanneld does for a peer's lease: neighbour, FDB entry and route, or, for a direct one
/// (`DirectRouting`, on the same link), the route alone.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn add_peer(netns: &Netns, subnet: Ipv4Net, address: Ipv4Addr, mac: &str, direct: bool) -> Result<()> {
    let (subnet, base) = (subnet.trunc(), subnet.network());
    if direct {
        netns.ip(&format!("route replace {subnet} via {address}"))?;
        return Ok(());
    }
    netns.ip(&format!("neigh replace {base} lladdr {mac} dev {DEVICE} nud permanent"))?;
    netns.exec(&format!("bridge fdb replace {mac} dev {DEVICE} dst {address} self permanent"))?;
    netns.ip(&format!("route replace {subnet} via {base} dev {DEVICE} onlink"))?;
    Ok(())
}
