//! A container: a namespace on the node's bridge, wired as Docker wires it.

use std::{net::Ipv4Addr, path::PathBuf};

use anyhow::{Context as _, Result};
use ipnet::Ipv4Net;

use crate::{
    netns::{Netns, run},
    traffic::Host,
};

/// A network namespace with `eth0` on a node's bridge. Dropping it removes it, as `docker rm -f` does.
#[derive(Debug)]
pub struct Container {
    netns: Netns,
    address: Ipv4Addr,
    /// The namespace of the node, and the device's name there; `None` where somebody else sees to it.
    port: Option<(PathBuf, String)>,
}

impl Container {
    /// Makes a container at `address` on a bridge whose own address (`gateway`) lies in the same subnet.
    ///
    /// Its MAC is the one that Docker would give: `02:42` and the address. `veth` is the device's name in the node.
    ///
    /// # Errors
    ///
    /// Where the name is taken in the node.
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
        node.ip(&format!("link set {veth} master {bridge} up"))?;
        netns.ip(&format!("address add {address}/{} dev eth0", gateway.prefix_len()))?;
        netns.ip("link set eth0 up")?;
        netns.ip(&format!("route add default via {}", gateway.addr()))?;
        Ok(Self { netns, address, port: Some((node.path(), veth.to_owned())) })
    }

    /// A container that somebody else has wired and will take off the network again.
    #[must_use]
    pub fn wired(netns: Netns, address: Ipv4Addr) -> Self {
        Self { netns, address, port: None }
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

    /// It as one end of a conversation.
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
