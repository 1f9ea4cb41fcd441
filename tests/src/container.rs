//! A container: a namespace on the node's bridge, wired as Docker wires it.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use anyhow::{Context as _, Result};
use ipnet::IpNet;

use crate::{
    netns::{Netns, run},
    traffic::Host,
};

/// A network namespace with `eth0` on a node's bridge. Dropping it removes it, as `docker rm -f` does.
#[derive(Debug)]
pub struct Container {
    netns: Netns,
    address: Option<Ipv4Addr>,
    address6: Option<Ipv6Addr>,
    /// The namespace of the node, and the device's name there; `None` where somebody else sees to it.
    port: Option<(PathBuf, String)>,
}

impl Container {
    /// Makes a container at these addresses, one of a family, on a bridge; with each the bridge's own address in the same
    /// subnet, by which the container's way out leads.
    ///
    /// Its MAC is as Docker would give it, of the first address: `02:42` and IPv4's four bytes, or those of IPv6 by which
    /// subnets and containers differ here. `veth` is the device's name in the node.
    ///
    /// # Errors
    ///
    /// Where the name is taken in the node, or there is no address.
    pub fn create(
        node: &Netns,
        bridge: &str,
        veth: &str,
        addresses: &[(IpAddr, IpNet)],
        mtu: u32,
    ) -> Result<Self> {
        Self::create_by(node, bridge, veth, veth, addresses, mtu)
    }

    /// As [`Self::create`], on a veth that has this index in the node (`ifindex`).
    ///
    /// # Errors
    ///
    /// As [`Self::create`], and where the index is taken.
    pub fn create_at_index(
        node: &Netns,
        bridge: &str,
        (veth, index): (&str, u32),
        addresses: &[(IpAddr, IpNet)],
        mtu: u32,
    ) -> Result<Self> {
        Self::create_by(node, bridge, veth, &format!("{veth} index {index}"), addresses, mtu)
    }

    /// `link`: what `ip link add` takes for the device in the node.
    fn create_by(
        node: &Netns,
        bridge: &str,
        veth: &str,
        link: &str,
        addresses: &[(IpAddr, IpNet)],
        mtu: u32,
    ) -> Result<Self> {
        let (first, _) = addresses.first().context("a container has an address")?;
        let netns = Netns::create(&format!("c-{first}"))?;
        let [a, b, c, d] = match first {
            IpAddr::V4(address) => address.octets(),
            IpAddr::V6(address) => {
                let octets = address.octets();
                [octets[6], octets[7], octets[14], octets[15]]
            }
        };
        let mac = format!("02:42:{a:02x}:{b:02x}:{c:02x}:{d:02x}");
        node.ip(&format!(
            "link add {link} mtu {mtu} type veth peer name eth0 address {mac} mtu {mtu} netns {}",
            netns.name()
        ))?;
        node.ip(&format!("link set {veth} master {bridge} up"))?;
        netns.ip("link set eth0 up")?;
        let mut container =
            Self { netns, address: None, address6: None, port: Some((node.path(), veth.to_owned())) };
        for &(address, gateway) in addresses {
            container.add(address, gateway)?;
        }
        Ok(container)
    }

    /// Gives it an address, known to be its own alone, and the way out of its family by `gateway`, the bridge's.
    ///
    /// # Errors
    ///
    /// Where it has a way out already.
    pub fn add(&mut self, address: IpAddr, gateway: IpNet) -> Result<()> {
        let (length, gateway) = (gateway.prefix_len(), gateway.addr());
        match address {
            IpAddr::V4(address) => {
                self.netns.ip(&format!("address add {address}/{length} dev eth0"))?;
                self.address = Some(address);
            }
            IpAddr::V6(address) => {
                self.netns.ip(&format!("address add {address}/{length} dev eth0 nodad"))?;
                self.address6 = Some(address);
            }
        }
        // `ip` takes the family from the gateway.
        self.netns.ip(&format!("route add default via {gateway}")).map(drop)
    }

    /// A container that somebody else has wired and will take off the network again.
    #[must_use]
    pub fn wired(netns: Netns, address: Ipv4Addr, address6: Option<Ipv6Addr>) -> Self {
        Self { netns, address: Some(address), address6, port: None }
    }

    /// Its namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Its IPv4 address, as it sees it itself.
    ///
    /// # Panics
    ///
    /// Where it has none: see [`Self::addresses`].
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address.expect("a container with an IPv4 address")
    }

    /// Its IPv6 address, where it has one.
    #[must_use]
    pub fn address6(&self) -> Option<Ipv6Addr> {
        self.address6
    }

    /// Its addresses, IPv4's first where it has any.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        let all = [self.address.map(IpAddr::from), self.address6.map(IpAddr::from)];
        all.into_iter().flatten()
    }

    /// It as one end of a conversation over IPv6, where it has an address of that.
    #[must_use]
    pub fn host6(&self) -> Option<Host<'_>> {
        self.address6.map(|address| Host { netns: &self.netns, address: address.into() })
    }

    /// It as one end of a conversation over IPv4.
    ///
    /// # Panics
    ///
    /// Where it has no IPv4 address.
    #[must_use]
    pub fn host(&self) -> Host<'_> {
        Host { netns: &self.netns, address: self.address().into() }
    }

    /// It as one end of a conversation in each family that it has, IPv4 first.
    pub fn hosts(&self) -> impl Iterator<Item = Host<'_>> {
        self.addresses().map(|address| Host { netns: &self.netns, address })
    }

    /// Packets that left through `eth0` since it was made; a GSO packet counts once, as in the programs.
    ///
    /// # Errors
    ///
    /// Where the container is gone.
    pub fn packets_sent(&self) -> Result<u64> {
        let json = self.netns.ip("-json -statistics link show eth0")?;
        let links: serde_json::Value = serde_json::from_str(&json)?;
        links[0]["stats64"]["tx"]["packets"].as_u64().context("eth0 has no counter of sent packets")
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let Some((node, veth)) = &self.port else { return };
        // The kernel removes a namespace some time after its name; the container must be off the network now.
        if node.exists()
            && let Err(error) =
                run("nsenter", &[&format!("--net={}", node.display()), "ip", "link", "del", veth])
        {
            eprintln!("{veth} is left behind: {error:#}");
        }
    }
}
