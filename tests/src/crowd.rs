//! A crowd: peers that are nothing but leases in etcd, as many as one likes.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result};

use crate::{
    cluster::PREFIX,
    etcd::{Gateway, Write},
    node::Node,
};

/// The network config of a crowd: 65 536 subnets.
pub const CONFIG: &str = r#"{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#;

/// The most peers that a crowd can have.
pub const MAX: u32 = 65_280;

/// Number of the subnet that the first peer has.
const FIRST_SUBNET: u32 = 0x8000;
/// The lowest subnets are left to agents, which pick from that end.
const SPARED: u32 = 0x1_0000 - MAX;
/// VTEPs of the crowd: 198.18.0.0/15 is for tests of this kind (RFC 2544).
const FIRST_VTEP: u32 = 0xc612_0001;

/// Peers 0 to `size` of a crowd.
#[derive(Debug)]
pub struct Crowd {
    gateway: Gateway,
    size: u32,
}

impl Crowd {
    /// Writes their leases.
    ///
    /// # Errors
    ///
    /// Where etcd refuses.
    pub fn gather(mut gateway: Gateway, size: u32) -> Result<Self> {
        let writes: Vec<Write> = (0..size).map(|n| join(n, 0)).collect();
        gateway.write(&writes)?;
        Ok(Self { gateway, size })
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
        self.gateway.write(&[join(n, generation)])?;
        Ok(mac(n, generation))
    }

    /// Takes a peer away.
    ///
    /// # Errors
    ///
    /// Where etcd refuses.
    pub fn leave(&mut self, n: u32) -> Result<()> {
        self.gateway.write(&[Write::Delete(key(n))])
    }
}

/// The base of a peer's subnet: the upper half of the network first.
#[must_use]
pub fn base(n: u32) -> Ipv4Addr {
    let subnet = if n < FIRST_SUBNET { FIRST_SUBNET + n } else { n - FIRST_SUBNET + SPARED };
    Ipv4Addr::from(0x0a00_0000 + subnet * 256)
}

/// The MAC that a node's kernel has for a peer.
///
/// # Errors
///
/// Where it has none.
pub fn mac_at(node: &Node, n: u32) -> Result<String> {
    let shown = node.netns().ip(&format!("neigh show {} dev flannel.1", base(n)))?;
    let mut words = shown.split_whitespace().skip_while(|word| *word != "lladdr").skip(1);
    words.next().map(str::to_owned).with_context(|| format!("no neighbour: {shown:?}"))
}

fn key(n: u32) -> String {
    format!("{PREFIX}/subnets/{}-24", base(n))
}

fn mac(n: u32, generation: u8) -> String {
    let [a, b, c, d] = n.to_be_bytes();
    format!("0a:{generation:02x}:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

fn join(n: u32, generation: u8) -> Write {
    let (vtep, mac) = (Ipv4Addr::from(FIRST_VTEP + n), mac(n, generation));
    let value = format!(
        r#"{{"PublicIP":"{vtep}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
    );
    Write::Put(key(n), value)
}
