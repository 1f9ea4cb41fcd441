//! A crowd: peers that are nothing but leases in etcd, as many as one likes.

use std::{marker::PhantomData, net::Ipv6Addr};

use anyhow::{Context as _, Result};

use crate::{
    cluster::{PREFIX, Plan},
    etcd::{Gateway, Write},
    family::Family,
    node::Node,
    packet::{Ipv4, Ipv6},
};

/// The network config of a crowd of IPv4: 65 536 subnets.
pub const CONFIG: &str = r#"{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#;

/// The most peers that a crowd can have.
pub const MAX: u32 = 65_280;

/// Number of the subnet that the first peer has.
const FIRST_SUBNET: u32 = 0x8000;
/// The lowest subnets are left to agents, which pick from that end.
const SPARED: u32 = 0x1_0000 - MAX;
/// VTEPs of the crowd: 198.18.0.0/15 is for tests of this kind (RFC 2544).
const FIRST_VTEP: u32 = 0xc612_0001;
/// The same of IPv6: 2001:2::/48 (RFC 5180).
const FIRST_VTEP6: u128 = 0x2001_0002_0000_0000_0000_0000_0000_0001;

/// What peers of a family are.
pub trait Peers: Family {
    /// So many nodes of this family alone, in a network of 65 536 subnets.
    fn wide(nodes: u32) -> Plan;
    /// The base of a peer's subnet: the upper half of the network first.
    fn base(n: u32) -> Self::Address;
    /// The peer's key, without the prefix.
    fn segment(n: u32) -> String;
    /// Its lease.
    fn lease(n: u32, mac: &str) -> String;
}

/// Number of a peer's subnet in the network.
fn subnet(n: u32) -> u32 {
    if n < FIRST_SUBNET { FIRST_SUBNET + n } else { n - FIRST_SUBNET + SPARED }
}

impl Peers for Ipv4 {
    fn wide(nodes: u32) -> Plan {
        Plan { nodes, config: CONFIG.to_owned(), ..Self::alone() }
    }

    fn base(n: u32) -> Self::Address {
        (0x0a00_0000 + subnet(n) * 256).into()
    }

    fn segment(n: u32) -> String {
        format!("{}-24", Self::base(n))
    }

    fn lease(n: u32, mac: &str) -> String {
        let vtep = Self::Address::from(FIRST_VTEP + n);
        format!(
            r#"{{"PublicIP":"{vtep}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
        )
    }
}

impl Peers for Ipv6 {
    fn wide(nodes: u32) -> Plan {
        Plan { nodes, ..Self::alone() }
    }

    fn base(n: u32) -> Self::Address {
        let subnet = u16::try_from(subnet(n)).expect("one of 65 536 subnets");
        Ipv6Addr::new(0xfc00, 0, 0, subnet, 0, 0, 0, 0)
    }

    fn segment(n: u32) -> String {
        format!("0.0.0.0-0&{}-64", Self::base(n))
    }

    fn lease(n: u32, mac: &str) -> String {
        let vtep = Ipv6Addr::from(FIRST_VTEP6 + u128::from(n));
        format!(
            r#"{{"PublicIP":"0.0.0.0","PublicIPv6":"{vtep}","BackendType":"vxlan","BackendV6Data":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
        )
    }
}

/// Peers 0 to `size` of a crowd.
#[derive(Debug)]
pub struct Crowd<F: Peers = Ipv4> {
    gateway: Gateway,
    size: u32,
    family: PhantomData<F>,
}

impl<F: Peers> Crowd<F> {
    /// Writes their leases.
    ///
    /// # Errors
    ///
    /// Where etcd refuses.
    pub fn gather(mut gateway: Gateway, size: u32) -> Result<Self> {
        let writes: Vec<Write> = (0..size).map(|n| join::<F>(n, 0)).collect();
        gateway.write(&writes)?;
        Ok(Self { gateway, size, family: PhantomData })
    }

    /// How many they are.
    #[must_use]
    pub fn size(&self) -> u32 {
        self.size
    }

    /// Changes one lease: the peer has another VTEP MAC then. Returns that.
    ///
    /// # Errors
    ///
    /// Where etcd refuses.
    pub fn change(&mut self, n: u32, generation: u8) -> Result<String> {
        self.gateway.write(&[join::<F>(n, generation)])?;
        Ok(mac(n, generation))
    }

    /// Takes a peer away.
    ///
    /// # Errors
    ///
    /// Where etcd refuses.
    pub fn leave(&mut self, n: u32) -> Result<()> {
        self.gateway.write(&[Write::Delete(key::<F>(n))])
    }
}

/// The MAC that a node's kernel has for a peer.
///
/// # Errors
///
/// Where it has none.
pub fn mac_at<F: Peers>(node: &Node, n: u32) -> Result<String> {
    let shown = node.netns().ip(&format!("neigh show {} dev {}", F::base(n), F::DEVICE))?;
    let mut words = shown.split_whitespace().skip_while(|word| *word != "lladdr").skip(1);
    words.next().map(str::to_owned).with_context(|| format!("no neighbour: {shown:?}"))
}

fn key<F: Peers>(n: u32) -> String {
    format!("{PREFIX}/subnets/{}", F::segment(n))
}

fn mac(n: u32, generation: u8) -> String {
    let [a, b, c, d] = n.to_be_bytes();
    format!("0a:{generation:02x}:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

fn join<F: Peers>(n: u32, generation: u8) -> Write {
    Write::Put(key::<F>(n), F::lease(n, &mac(n, generation)))
}
