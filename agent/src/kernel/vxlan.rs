//! The VXLAN device, with exactly flannel's attributes: adopted where it is there and right, else made anew.
//!
//! flannel (v0.28, `pkg/backend/vxlan/device.go`) keeps a device when type, VNI, uplink, local address, port,
//! L2 miss and GBP agree, and so does this; unlike flannel it also corrects MTU, learning and MAC address in
//! place. Peers send to the MAC address that the lease tells them, so it must outlive the device.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use nix::errno::Errno;
use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    link::{InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage},
};

use super::{
    How, Kernel, KernelError, Link, LinkKind, Result, VxlanAttrs,
    link::{check_name, for_index},
    mac_text,
    sysctl::{self, SysctlError},
};

/// The port of the kernel's VXLAN driver where none is given, and so flannel's. Not IANA's 4789.
pub const DEFAULT_PORT: u16 = 8472;

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
    pub local: Ipv4Addr,
    /// The index of the device that carries the outer packets.
    pub uplink: u32,
    /// The MTU of the device in bytes: 50 less than that of the uplink.
    pub mtu: u32,
    /// The Group Policy extension.
    pub gbp: bool,
    /// Learn FDB entries from received packets.
    pub learning: bool,
    /// The MAC address that peers know of this node. `None`: that of an adopted device, a random one for a
    /// new device.
    pub mac: Option<[u8; 6]>,
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
        let mut replaced = None;
        if let Some(link) = self.link_by_name(&spec.name).await? {
            match difference(spec, &link) {
                None => return self.adopt(spec, link).await,
                Some(why) => {
                    tracing::info!(device = %spec.name, %why, "VXLAN device is made anew");
                    self.delete_link(link.index).await?;
                    replaced = Some(why);
                }
            }
        }
        let mac = spec.mac.unwrap_or_else(random_mac);
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

    /// Gives the device the base of the own subnet as a /32, takes any other address of the network from it,
    /// and sets it up. The new address comes first: a device that loses its last address loses its routes.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn set_overlay_address(&self, device: u32, subnet: Ipv4Net, network: Ipv4Net) -> Result<()> {
        let base = subnet.network();
        let there = self.addresses().await?;
        let there = || there.iter().filter(|address| address.ifindex == device);
        if !there().any(|it| it.address == base && it.prefix_len == 32) {
            self.add_address(device, base, 32).await?;
        }
        for it in there() {
            let right = it.address == base && it.prefix_len == 32;
            if !right && network.contains(&it.address) {
                self.delete_address(device, it.address, it.prefix_len).await?;
            }
        }
        match self.link_by_index(device).await? {
            Some(link) if link.up => Ok(()),
            Some(_) => self.set_up(device).await,
            None => Err(KernelError::NoLink(format!("with index {device}"))),
        }
    }

    /// Deletes the VXLAN device of this name, and with it its addresses, routes, neighbours and FDB. Says
    /// whether there was one; a link of another kind is left alone.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn delete_vxlan(&self, name: &str) -> Result<bool> {
        match self.link_by_name(name).await? {
            Some(Link { index, kind: LinkKind::Vxlan(_), .. }) => {
                self.delete_link(index).await?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}

/// What makes a device unfit to be adopted, in words; `None` where it is fit.
fn difference(spec: &VxlanSpec, link: &Link) -> Option<String> {
    let LinkKind::Vxlan(found) = &link.kind else {
        return Some(format!("it is a {:?} link, not a VXLAN device", link.kind));
    };
    let address = |address: Option<Ipv4Addr>| address.map_or_else(|| "none".to_owned(), |it| it.to_string());
    let port = wanted_port(spec);
    if found.collect_metadata {
        Some("it is an external (collect metadata) device".to_owned())
    } else if found.vni != spec.vni {
        Some(format!("VNI is {}, not {}", found.vni, spec.vni))
    } else if found.uplink != Some(spec.uplink) {
        Some(format!("uplink is link {}, not link {}", found.uplink.unwrap_or(0), spec.uplink))
    } else if found.local != Some(spec.local) {
        Some(format!("local address is {}, not {}", address(found.local), spec.local))
    } else if found.port != port {
        Some(format!("port is {}, not {port}", found.port))
    } else if found.gbp != spec.gbp {
        Some(format!("GBP is {}, not {}", found.gbp, spec.gbp))
    } else if found.l2miss {
        Some("L2 miss notifications are on".to_owned())
    } else {
        None
    }
}

/// What `ip link add NAME address MAC mtu MTU type vxlan id VNI dev UPLINK local LOCAL dstport PORT
/// nolearning` sends. TTL (auto), ageing (300 s) and UDP checksum (on) are the kernel's defaults.
fn creation(spec: &VxlanSpec, mac: [u8; 6]) -> LinkMessage {
    let mut data = vec![
        InfoVxlan::Id(spec.vni),
        InfoVxlan::Link(spec.uplink),
        InfoVxlan::Local(spec.local),
        InfoVxlan::Learning(spec.learning),
        InfoVxlan::Port(wanted_port(spec)),
    ];
    if spec.gbp {
        data.push(InfoVxlan::Gbp);
    }
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(spec.name.clone()),
        // At creation, not after: an address that was set (NET_ADDR_SET) is left alone by systemd's
        // MACAddressPolicy=persistent, a random one is not (flannel #1155).
        LinkAttribute::Address(mac.to_vec()),
        LinkAttribute::Mtu(spec.mtu),
        vxlan_info(data),
    ];
    message
}

fn vxlan_info(data: Vec<InfoVxlan>) -> LinkAttribute {
    LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(InfoData::Vxlan(data))])
}

fn wanted_port(spec: &VxlanSpec) -> u16 {
    if spec.port == 0 { DEFAULT_PORT } else { spec.port }
}

fn learning(link: &Link) -> bool {
    matches!(link.kind, LinkKind::Vxlan(VxlanAttrs { learning: true, .. }))
}

/// A random unicast address with the locally administered bit (IEEE 802).
fn random_mac() -> [u8; 6] {
    let mut mac: [u8; 6] = rand::random();
    mac[0] = mac[0] & 0xfe | 0x02;
    mac
}

/// The overlay has no IPv6 routers; a pod that sends advertisements must not become one for the host.
fn refuse_router_advertisements(device: &str) -> Result<()> {
    match sysctl::set(&format!("net/ipv6/conf/{device}/accept_ra"), "0") {
        // The kernel was built or started without IPv6.
        Err(SysctlError::Absent { .. }) => Ok(()),
        done => Ok(done?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VxlanSpec {
        VxlanSpec {
            name: "flannel.1".to_owned(),
            vni: 1,
            port: 0,
            local: Ipv4Addr::new(192, 168, 77, 11),
            uplink: 2,
            mtu: 1450,
            gbp: false,
            learning: false,
            mac: None,
        }
    }

    fn link(change: impl FnOnce(&mut VxlanAttrs)) -> Link {
        let mut attrs = VxlanAttrs {
            vni: 1,
            port: 8472,
            local: Some(Ipv4Addr::new(192, 168, 77, 11)),
            uplink: Some(2),
            ..VxlanAttrs::default()
        };
        change(&mut attrs);
        Link {
            index: 7,
            name: "flannel.1".to_owned(),
            mac: Some([2, 0, 0, 0, 0, 1]),
            mtu: 1450,
            up: true,
            carrier: true,
            running: true,
            master: None,
            peer: None,
            peer_in_other_netns: None,
            kind: LinkKind::Vxlan(attrs),
            loopback: false,
            point_to_point: false,
            no_arp: false,
        }
    }

    #[test]
    fn the_attributes_that_flannel_compares_decide() {
        assert_eq!(difference(&spec(), &link(|_| {})), None);
        let why = |change: fn(&mut VxlanAttrs)| difference(&spec(), &link(change)).unwrap();
        assert_eq!(why(|it| it.vni = 2), "VNI is 2, not 1");
        assert_eq!(why(|it| it.uplink = None), "uplink is link 0, not link 2");
        assert_eq!(why(|it| it.local = None), "local address is none, not 192.168.77.11");
        assert_eq!(why(|it| it.port = 4789), "port is 4789, not 8472");
        assert_eq!(why(|it| it.gbp = true), "GBP is true, not false");
        assert_eq!(why(|it| it.l2miss = true), "L2 miss notifications are on");
        assert_eq!(why(|it| it.collect_metadata = true), "it is an external (collect metadata) device");
        assert_eq!(difference(&spec(), &link(|it| it.learning = true)), None);
        let bridge = Link { kind: LinkKind::Bridge, ..link(|_| {}) };
        assert_eq!(difference(&spec(), &bridge).unwrap(), "it is a Bridge link, not a VXLAN device");
    }

    #[test]
    fn a_random_mac_is_unicast_and_locally_administered() {
        for _ in 0..1000 {
            assert_eq!(random_mac()[0] & 3, 2);
        }
    }
}
