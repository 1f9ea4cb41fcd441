//! A container: a namespace on the node's bridge, wired as Docker wires it.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use anyhow::{Context as _, Result};
use ipnet::{Ipv4Net, Ipv6Net};

use crate::{
    netns::{Netns, run},
    traffic::Host,
};

/// A network namespace with `eth0` on a node's bridge. Dropping it removes it, as `docker rm -f` does.
#[derive(Debug)]
pub struct Container {
    netns: Netns,
    address: Ipv4Addr,
    address6: Option<Ipv6Addr>,
    /// The namespace of the node, and the device's name there; `None` where somebody else sees to it.
    port: Option<(PathBuf, String)>,
}

impl Container {
    /// Makes a container at `address` on a bridge whose own address (`gateway`) lies in the same subnet.
    ///
    /// Its MAC is the one that Docker would give: `02:42` and the address. `veth` is the device's name in the node, and may
    /// have more of what `ip link add` takes behind it, such as the index that the device must have.
    ///
    /// # Errors
    ///
    /// Where the name, or the index, is taken in the node.
    pub fn create(
        node: &Netns,
        bridge: &str,
        veth: &str,
        address: Ipv4Addr,
        gateway: Ipv4Net,
        mtu: u32,
    ) -> Result<Self> {
        let netns = Netns::create(&format!("c-{address}"))?;
        let [a, b, c, d] = address.octets();
        let mac = format!("02:42:{a:02x}:{b:02x}:{c:02x}:{d:02x}");
        node.ip(&format!(
            "link add {veth} mtu {mtu} type veth peer name eth0 address {mac} mtu {mtu} netns {}",
            netns.name()
        ))?;
        let veth = veth.split(' ').next().unwrap_or(veth);
        node.ip(&format!("link set {veth} master {bridge} up"))?;
        netns.ip(&format!("address add {address}/{} dev eth0", gateway.prefix_len()))?;
        netns.ip("link set eth0 up")?;
        netns.ip(&format!("route add default via {}", gateway.addr()))?;
        Ok(Self { netns, address, address6: None, port: Some((node.path(), veth.to_owned())) })
    }

    /// Gives it an IPv6 address as well, and the way out by `gateway`, the bridge's.
    ///
    /// # Errors
    ///
    /// Where it has a way out already.
    pub fn add_ipv6(&mut self, address: Ipv6Addr, gateway: Ipv6Net) -> Result<()> {
        self.netns.ip(&format!("-6 address add {address}/{} dev eth0 nodad", gateway.prefix_len()))?;
        self.netns.ip(&format!("-6 route add default via {}", gateway.addr()))?;
        self.address6 = Some(address);
        Ok(())
    }

    /// A container that somebody else has wired and will take off the network again.
    #[must_use]
    pub fn wired(netns: Netns, address: Ipv4Addr, address6: Option<Ipv6Addr>) -> Self {
        Self { netns, address, address6, port: None }
    }

    /// Its namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Its address, as it sees it itself.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Its IPv6 address, where it has one.
    #[must_use]
    pub fn address6(&self) -> Option<Ipv6Addr> {
        self.address6
    }

    /// Its addresses, IPv4's first.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        let all = [Some(self.address.into()), self.address6.map(IpAddr::from)];
        all.into_iter().flatten()
    }

    /// It as one end of a conversation over IPv6, where it has an address of that.
    #[must_use]
    pub fn host6(&self) -> Option<Host<'_>> {
        self.address6.map(|address| Host { netns: &self.netns, address: address.into() })
    }

    /// It as one end of a conversation over IPv4.
    #[must_use]
    pub fn host(&self) -> Host<'_> {
        Host { netns: &self.netns, address: self.address.into() }
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
