//! The network between the nodes: a switch (a bridge in a namespace of its own) that is also their router.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result};
use ipnet::Ipv4Net;

use crate::netns::{Netns, join};

/// One network segment.
#[derive(Debug)]
pub struct Underlay {
    netns: Netns,
    network: Ipv4Net,
    mtu: u32,
}

impl Underlay {
    /// Makes a segment with these addresses; the first one is the router's.
    ///
    /// # Errors
    ///
    /// Without root.
    pub fn create(network: Ipv4Net, mtu: u32) -> Result<Self> {
        let netns = Netns::create("underlay")?;
        netns.ip(&format!("link add br0 mtu {mtu} type bridge"))?;
        // A switch has no netfilter.
        for family in ["iptables", "ip6tables", "arptables"] {
            netns.exec(&format!("sysctl -qw net.bridge.bridge-nf-call-{family}=0"))?;
        }
        let underlay = Self { netns, network, mtu };
        let router = underlay.address(1)?;
        underlay.netns.ip(&format!("address add {router}/{} dev br0", network.prefix_len()))?;
        underlay.netns.ip("link set br0 up")?;
        Ok(underlay)
    }

    /// The namespace of switch and router.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The `host`-th address, counted from the network's own.
    ///
    /// # Errors
    ///
    /// Where the network is too small.
    pub fn address(&self, host: u32) -> Result<Ipv4Addr> {
        let address = Ipv4Addr::from(u32::from(self.network.network()) + host);
        anyhow::ensure!(self.network.contains(&address), "{} has no host {host}", self.network);
        Ok(address)
    }

    /// Plugs a namespace in: `eth0` with the `host`-th address and the default route. Returns the address.
    ///
    /// # Errors
    ///
    /// Where it has an `eth0`, or the network no such host.
    pub fn plug(&self, netns: &Netns, host: u32) -> Result<Ipv4Addr> {
        let address = self.address(host)?;
        let port = format!("port{host}");
        join(netns, "eth0", &self.netns, &port)?;
        self.netns.ip(&format!("link set {port} mtu {} master br0", self.mtu))?;
        netns.ip(&format!("link set eth0 mtu {}", self.mtu))?;
        netns.ip(&format!("address add {address}/{} dev eth0", self.network.prefix_len()))?;
        let router = self.address(1)?;
        netns.ip(&format!("route add default via {router}")).context("the default route")?;
        Ok(address)
    }
}
