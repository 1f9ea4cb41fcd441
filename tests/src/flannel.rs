//! A node that is set up as flanneld sets one up (vxlan backend, etcd v3), by hand: `ip`, `bridge`, `etcdctl`. It has IPv4,
//! or both families: of IPv6 alone flannel takes no lease in etcd.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::{Value, json};

use crate::{cluster::PREFIX, container::Container, etcd::Etcd, netns::Netns, node::BRIDGE};

/// flannel's `FLANNEL_MTU` on a link of 1500 bytes, in either family; a device of IPv6 gets no more than 1430 of it.
const MTU: u32 = 1450;

/// What a node has of a family.
#[derive(Clone, Debug)]
pub struct Half {
    /// Its address on the underlay.
    pub address: IpAddr,
    /// Its lease, without host bits.
    pub subnet: IpNet,
    /// The MAC of its VTEP.
    pub mac: String,
}

impl Half {
    /// The half of the node that has these, with a MAC that no other has.
    #[must_use]
    pub fn new(address: IpAddr, subnet: IpNet) -> Self {
        let (family, [c, d]) = match address {
            IpAddr::V4(address) => (4, [address.octets()[2], address.octets()[3]]),
            IpAddr::V6(address) => (6, [address.octets()[14], address.octets()[15]]),
        };
        Self { address, subnet, mac: format!("0a:fe:00:{family:02x}:{c:02x}:{d:02x}") }
    }

    /// The halves of a record in etcd, under the key that ends so.
    ///
    /// # Errors
    ///
    /// Where the key, or the value of a VXLAN node, is no such thing.
    pub fn of_record(key: &str, value: &str) -> Result<Vec<Self>> {
        let value: Value = serde_json::from_str(value)?;
        let segments = key.rsplit('/').next().unwrap_or_default().split('&');
        let half = |(segment, [public, data]): (&str, [&str; 2])| -> Result<Self> {
            let text = |value: &Value| value.as_str().map(str::to_owned).context("no text");
            Ok(Self {
                address: text(&value[public])?.parse()?,
                subnet: segment.replace('-', "/").parse().with_context(|| segment.to_owned())?,
                mac: text(&value[data]["VtepMAC"])?,
            })
        };
        segments.zip([["PublicIP", "BackendData"], ["PublicIPv6", "BackendV6Data"]]).map(half).collect()
    }

    /// The device of VNI 1.
    #[must_use]
    pub fn device(&self) -> &'static str {
        if self.subnet.addr().is_ipv4() { "flannel.1" } else { "flannel-v6.1" }
    }

    /// The `host`-th address of the subnet.
    fn host(&self, host: u32) -> IpAddr {
        match self.subnet {
            IpNet::V4(subnet) => Ipv4Addr::from(u32::from(subnet.network()) + host).into(),
            IpNet::V6(subnet) => Ipv6Addr::from(u128::from(subnet.network()) + u128::from(host)).into(),
        }
    }

    /// The bridge's address with the length of the subnet.
    fn gateway(&self) -> IpNet {
        let length = self.subnet.prefix_len();
        match self.host(1) {
            IpAddr::V4(address) => Ipv4Net::new_assert(address, length).into(),
            IpAddr::V6(address) => Ipv6Net::new_assert(address, length).into(),
        }
    }
}

/// A plugged namespace that is a flannel node.
#[derive(Debug)]
pub struct FlannelNode {
    netns: Netns,
    halves: Vec<Half>,
    containers: u32,
}

impl FlannelNode {
    /// Makes the VXLAN devices, takes the lease, and makes the containers' bridge at the subnets' first addresses. IPv4's
    /// half comes first.
    ///
    /// # Errors
    ///
    /// Where etcd does not answer.
    pub fn create(netns: Netns, halves: Vec<Half>, etcd: &Etcd) -> Result<Self> {
        set_up(&netns, &halves, etcd)?;
        Ok(Self { netns, halves, containers: 0 })
    }

    /// Its namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// What it has of each family, IPv4 first.
    #[must_use]
    pub fn halves(&self) -> &[Half] {
        &self.halves
    }

    /// Does for a peer's lease what flanneld does.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn add_peer(&self, peer: &[Half], direct: bool) -> Result<()> {
        add_peer(&self.netns, peer, direct)
    }

    /// Runs a container at the next free addresses.
    ///
    /// # Errors
    ///
    /// Where the name of the veth is taken.
    pub fn run_container(&mut self) -> Result<Container> {
        self.containers += 1;
        let host = 1 + self.containers;
        let addresses: Vec<_> = self.halves.iter().map(|half| (half.host(host), half.gateway())).collect();
        Container::create(&self.netns, BRIDGE, &format!("veth{}", self.containers), &addresses, MTU)
    }
}

/// Makes a plugged namespace a flannel node: devices, lease, addresses, forwarding, the containers' bridge.
///
/// # Errors
///
/// Where etcd does not answer, or there is no half.
pub fn set_up(netns: &Netns, halves: &[Half], etcd: &Etcd) -> Result<()> {
    for half in halves {
        netns.ip(&format!(
            "link add {} address {} mtu {MTU} type vxlan id 1 dev eth0 local {} dstport 8472 nolearning",
            half.device(),
            half.mac,
            half.address
        ))?;
    }
    let granted = etcd.ctl(&["lease", "grant", "86400"])?;
    let lease = granted.split_whitespace().nth(1).context("etcd granted no lease")?;
    let (key, value) = record(halves)?;
    etcd.ctl(&["put", &key, &value, "--lease", lease])?;
    netns.exec("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")?;
    netns.ip(&format!("link add {BRIDGE} mtu {MTU} type bridge"))?;
    for half in halves {
        let (device, length) = (half.device(), half.subnet.max_prefix_len());
        let nodad = if length == 32 { "" } else { "nodad" };
        netns.ip(&format!("address add {}/{length} dev {device} {nodad}", half.subnet.addr()))?;
        netns.ip(&format!("link set {device} up"))?;
        netns.ip(&format!("address add {} dev {BRIDGE} {nodad}", half.gateway()))?;
    }
    netns.ip(&format!("link set {BRIDGE} up"))?;
    Ok(())
}

/// Key and value of a node's lease, as flannel writes them.
fn record(halves: &[Half]) -> Result<(String, String)> {
    let v4 = halves.first().context("a flannel node has IPv4")?;
    let v6 = halves.get(1);
    let segment = |half: &Half| half.subnet.to_string().replace('/', "-");
    let data = |half: &Half| format!(r#"{{"VNI":1,"VtepMAC":"{}"}}"#, half.mac);
    let second = v6.map_or_else(String::new, |half| format!("&{}", segment(half)));
    let public6 = v6.map_or(Value::Null, |half| json!(half.address.to_string()));
    let data6 = v6.map_or_else(String::new, |half| format!(r#","BackendV6Data":{}"#, data(half)));
    let value = format!(
        r#"{{"PublicIP":"{}","PublicIPv6":{public6},"BackendType":"vxlan","BackendData":{}{data6}}}"#,
        v4.address,
        data(v4)
    );
    Ok((format!("{PREFIX}/subnets/{}{second}", segment(v4)), value))
}

/// Does on a node what flanneld does for a peer's lease: in each family neighbour, FDB entry and route, or, for a direct
/// one (`DirectRouting`, on the same link), the route alone.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn add_peer(netns: &Netns, peer: &[Half], direct: bool) -> Result<()> {
    for half in peer {
        let Half { address, subnet, mac } = half;
        let (device, base) = (half.device(), subnet.addr());
        if direct {
            netns.ip(&format!("route replace {subnet} via {address}"))?;
            continue;
        }
        netns.ip(&format!("neigh replace {base} lladdr {mac} dev {device} nud permanent"))?;
        netns.exec(&format!("bridge fdb replace {mac} dev {device} dst {address} self permanent"))?;
        netns.ip(&format!("route replace {subnet} via {base} dev {device} onlink"))?;
    }
    Ok(())
}
