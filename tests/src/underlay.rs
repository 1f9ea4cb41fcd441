//! The network between the nodes: a switch (a bridge in a namespace of its own) that is also their router.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};
use ipnet::{Ipv4Net, Ipv6Net};

use crate::netns::{Netns, join};

/// One network segment.
#[derive(Debug)]
pub struct Underlay {
    netns: Netns,
    network: Ipv4Net,
    /// Whether anybody has an IPv4 address.
    ipv4: bool,
    network6: Option<Ipv6Net>,
    mtu: u32,
}

impl Underlay {
    /// Makes a segment with these addresses, IPv4 ones where that is wanted, IPv6 ones where there are any; the first one
    /// is the router's.
    ///
    /// # Errors
    ///
    /// Without root.
    pub fn create(network: Ipv4Net, ipv4: bool, network6: Option<Ipv6Net>, mtu: u32) -> Result<Self> {
        let netns = Netns::create("underlay")?;
        netns.ip(&format!("link add br0 mtu {mtu} type bridge"))?;
        // A switch has no netfilter.
        for family in ["iptables", "ip6tables", "arptables"] {
            netns.exec(&format!("sysctl -qw net.bridge.bridge-nf-call-{family}=0"))?;
        }
        let underlay = Self { netns, network, ipv4, network6, mtu };
        let router = underlay.address(1)?;
        if ipv4 {
            underlay.netns.ip(&format!("address add {router}/{} dev br0", network.prefix_len()))?;
        }
        if let Some(router) = underlay.address6(1) {
            underlay
                .netns
                .ip(&format!("-6 address add {router}/{} dev br0 nodad", underlay.prefix_len6()))?;
        }
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

    /// The `host`-th IPv6 address, counted from the network's own; `None` where there are none.
    #[must_use]
    pub fn address6(&self, host: u32) -> Option<Ipv6Addr> {
        self.network6.map(|network| Ipv6Addr::from(u128::from(network.network()) + u128::from(host)))
    }

    fn prefix_len6(&self) -> u8 {
        self.network6.map_or(0, |network| network.prefix_len())
    }

    /// Plugs a namespace in: `eth0` with the `host`-th address of each family and the default routes. Returns the
    /// IPv4 address; without IPv4 it is a number and nothing more.
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
        if self.ipv4 {
            netns.ip(&format!("address add {address}/{} dev eth0", self.network.prefix_len()))?;
            let router = self.address(1)?;
            netns.ip(&format!("route add default via {router}")).context("the default route")?;
        }
        if let Some((address, router)) = self.address6(host).zip(self.address6(1)) {
            netns.ip(&format!("-6 address add {address}/{} dev eth0 nodad", self.prefix_len6()))?;
            netns.ip(&format!("-6 route add default via {router}")).context("the default route of IPv6")?;
        }
        Ok(address)
    }
}
