//! The VXLAN device, with exactly flannel's attributes: adopted where it is there and right, else made anew.
//!
//! flannel (v0.28, `pkg/backend/vxlan/device.go`) keeps a device when type, VNI, uplink, local address, port,
//! L2 miss and GBP agree, and so does this; unlike flannel it also corrects MTU, learning and MAC address in
//! place. Peers send to the MAC address that the lease tells them, so it must outlive the device.

mod attributes;

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use nix::errno::Errno;
use rtnetlink::packet_route::{RouteNetlinkMessage, link::InfoVxlan};

pub(crate) use self::attributes::random_mac;
pub(super) use self::attributes::vxlan_info;
use self::attributes::{creation, difference, learning, wanted_port};
use super::{
    How, Kernel, KernelError, Link, LinkKind, Result, VxlanAttrs, is_wireguard,
    link::{check_name, for_index},
    mac_text,
    sysctl::{self, SysctlError},
};
use crate::family::Family;

/// The port of the kernel's VXLAN driver where none is given, and so flannel's. Not IANA's 4789.
pub const DEFAULT_PORT: u16 = 8472;

/// What outer IP, UDP, VXLAN and inner Ethernet headers take of the uplink's MTU, in bytes (RFC 7348): 50 over
/// IPv4, 70 over IPv6.
#[must_use]
pub fn overhead(local: IpAddr) -> u32 {
    if local.is_ipv4() { 50 } else { 70 }
}

/// The VXLAN device as it ought to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanSpec {
    /// `flannel.<VNI>`; at most 15 bytes.
    pub name: String,
    /// The VXLAN network identifier, 1 to 2^24-1.
    pub vni: u32,
    /// The UDP port; 0 for [`DEFAULT_PORT`].
    pub port: u16,
    /// The outer source address: the node's public IP.
    pub local: IpAddr,
    /// The index of the device that carries the outer packets.
    pub uplink: u32,
    /// The MTU of the device in bytes: [`overhead`] less than that of the uplink.
    pub mtu: u32,
    /// The Group Policy extension.
    pub gbp: bool,
    /// Learn FDB entries from received packets.
    pub learning: bool,
    /// The MAC address that peers know of this node. `None`: that of an adopted device; of a new one see [`Self::noted`].
    pub mac: Option<[u8; 6]>,
    /// The MAC address that this node's device had when an agent last ran here, for one that has to be made. `None`: that
    /// of the device that it replaces, or a random one.
    pub noted: Option<[u8; 6]>,
}

/// The VXLAN device as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanDevice {
    /// Its interface index.
    pub index: u32,
    /// Its MAC address, to be published as `VtepMAC`.
    pub mac: [u8; 6],
    /// Its MTU in bytes; less than asked for where the uplink carries less.
    pub mtu: u32,
    /// It was there already.
    pub adopted: bool,
    /// Why one that was there was deleted and made anew: the attribute that differed.
    pub replaced: Option<String>,
    /// What was put right in an adopted device.
    pub corrected: Vec<String>,
}

impl Kernel {
    /// Sees to it that the device is there. It may be called again at any time to put right what somebody
    /// changed; a device that is right is only read.
    ///
    /// # Errors
    ///
    /// [`KernelError::VniTaken`], [`KernelError::MacChanged`], or as the kernel says.
    pub async fn ensure_vxlan(&self, spec: &VxlanSpec) -> Result<VxlanDevice> {
        check_name(&spec.name)?;
        let spec = &self.fit_mtu(spec).await?;
        let (mut replaced, mut known) = (None, spec.mac.or(spec.noted));
        if let Some(link) = self.link_by_name(&spec.name).await? {
            match difference(spec, &link) {
                None => return self.adopt(spec, link).await,
                Some(why) => {
                    tracing::info!(device = %spec.name, %why, "VXLAN device is made anew");
                    self.delete_link(link.index).await?;
                    let is_vtep = matches!(link.kind, LinkKind::Vxlan(_));
                    known = known.or(link.mac.filter(|_| is_vtep));
                    replaced = Some(why);
                }
            }
        }
        let mac = known.unwrap_or_else(random_mac);
        self.create_vxlan(spec, mac).await?;
        let link = self.hold_mac(&spec.name, mac).await?;
        refuse_router_advertisements(&spec.name)?;
        Ok(VxlanDevice {
            index: link.index,
            mac,
            mtu: link.mtu,
            adopted: false,
            replaced,
            corrected: Vec::new(),
        })
    }

    /// The kernel cuts the MTU of a new device to what the uplink carries, but refuses a larger one later: only
    /// what fits is asked for, so that a device once made stays right.
    async fn fit_mtu(&self, spec: &VxlanSpec) -> Result<VxlanSpec> {
        let uplink = self.link_by_index(spec.uplink).await?;
        let uplink =
            uplink.ok_or_else(|| KernelError::NoLink(format!("with index {} (the uplink)", spec.uplink)))?;
        Ok(VxlanSpec { mtu: spec.mtu.min(uplink.mtu.saturating_sub(overhead(spec.local))), ..spec.clone() })
    }

    async fn adopt(&self, spec: &VxlanSpec, link: Link) -> Result<VxlanDevice> {
        let mut corrected = Vec::new();
        if link.mtu != spec.mtu {
            self.set_mtu(link.index, spec.mtu).await?;
            corrected.push(format!("MTU {} to {}", link.mtu, spec.mtu));
        }
        if learning(&link) != spec.learning {
            self.set_learning(link.index, spec.learning).await?;
            corrected.push(format!("learning to {}", spec.learning));
        }
        let mac = spec.mac.or(link.mac).unwrap_or_else(random_mac);
        if link.mac != Some(mac) {
            self.set_mac(link.index, mac).await?;
            corrected.push(format!(
                "MAC {} to {}",
                link.mac.map_or_else(String::new, mac_text),
                mac_text(mac)
            ));
        }
        let link = self.hold_mac(&spec.name, mac).await?;
        refuse_router_advertisements(&spec.name)?;
        Ok(VxlanDevice { index: link.index, mac, mtu: link.mtu, adopted: true, replaced: None, corrected })
    }

    async fn create_vxlan(&self, spec: &VxlanSpec, mac: [u8; 6]) -> Result<()> {
        let message = RouteNetlinkMessage::NewLink(creation(spec, mac));
        let done =
            self.change(|| format!("creating the VXLAN device {}", spec.name), message, How::Create).await;
        match done {
            Err(error) if error.errno() == Some(Errno::EEXIST) => {
                Err(self.taken(spec).await?.unwrap_or(error))
            }
            done => done,
        }
    }

    /// The device that has the VNI and port already, as an error.
    async fn taken(&self, spec: &VxlanSpec) -> Result<Option<KernelError>> {
        let port = wanted_port(spec);
        let taken = |link: &Link| matches!(link.kind, LinkKind::Vxlan(VxlanAttrs { vni, port: other, .. }) if vni == spec.vni && other == port);
        Ok(self.links().await?.into_iter().find(taken).map(|link| KernelError::VniTaken {
            name: spec.name.clone(),
            other: link.name,
            vni: spec.vni,
            port,
        }))
    }

    /// Reads the device back and, where something has changed its MAC address meanwhile, sets it once more.
    async fn hold_mac(&self, name: &str, mac: [u8; 6]) -> Result<Link> {
        let read =
            || async { self.link_by_name(name).await?.ok_or_else(|| KernelError::NoLink(name.to_owned())) };
        let link = read().await?;
        if link.mac == Some(mac) {
            return Ok(link);
        }
        self.set_mac(link.index, mac).await?;
        let link = read().await?;
        if link.mac == Some(mac) {
            return Ok(link);
        }
        let found = link.mac.map_or_else(|| "none".to_owned(), mac_text);
        Err(KernelError::MacChanged { name: name.to_owned(), wanted: mac_text(mac), found })
    }

    async fn set_learning(&self, index: u32, learning: bool) -> Result<()> {
        let mut message = for_index(index);
        message.attributes.push(vxlan_info(vec![InfoVxlan::Learning(learning)]));
        self.change_link(|| format!("setting learning of link {index} to {learning}"), message).await
    }

    /// Gives the device the base of the own subnet as a /32 (IPv6: /128), takes any other address of these networks from
    /// it, and sets it up. The new address comes first: a device that loses its last address loses its routes. The
    /// networks are all that the node has been in: of several addresses the host talks to pods from the oldest.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn set_overlay_address<F: Family>(
        &self,
        device: u32,
        subnet: F::Net,
        networks: &BTreeSet<IpNet>,
    ) -> Result<()> {
        let base = F::base(subnet);
        let there = self.addresses_of::<F>().await?;
        let there = || there.iter().filter(|address| address.ifindex == device);
        if !there().any(|it| it.address == base && it.prefix_len == F::BITS) {
            self.add_address::<F>(device, base, F::BITS).await?;
        }
        for it in there() {
            let right = it.address == base && it.prefix_len == F::BITS;
            if !right && networks.iter().any(|network| network.contains(&it.address.into())) {
                self.delete_address::<F>(device, it.address, it.prefix_len).await?;
            }
        }
        match self.link_by_index(device).await? {
            Some(link) if link.up => Ok(()),
            Some(_) => self.set_up(device).await,
            None => Err(KernelError::NoLink(format!("with index {device}"))),
        }
    }

    /// Deletes the VXLAN or WireGuard device of this name, and with it its addresses, routes, neighbours, FDB and peers.
    /// Says whether there was one; a link of another kind is left alone.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn delete_overlay_device(&self, name: &str) -> Result<bool> {
        match self.link_by_name(name).await? {
            Some(link) if matches!(link.kind, LinkKind::Vxlan(_)) || is_wireguard(&link) => {
                self.delete_link(link.index).await?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}

/// The overlay has no IPv6 routers; a pod that sends advertisements must not become one for the host.
fn refuse_router_advertisements(device: &str) -> Result<()> {
    match sysctl::set(&format!("net/ipv6/conf/{device}/accept_ra"), "0") {
        // The kernel was built or started without IPv6.
        Err(SysctlError::Absent { .. }) => Ok(()),
        done => Ok(done?),
    }
}
