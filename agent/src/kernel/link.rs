//! Links: what network devices there are, and their attributes.

use std::net::IpAddr;

use nix::{errno::Errno, net::if_::if_indextoname};
use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{
        InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkExtentMask, LinkFlags, LinkHeader, LinkInfo,
        LinkMessage,
    },
};

use super::{How, Kernel, KernelError, Result};

/// The name of an interface of the calling thread's network namespace; `None` where there is none of this index.
pub(crate) fn interface_name(index: u32) -> Option<String> {
    let name = if_indextoname(index).ok()?.into_string().ok()?;
    // nix 0.31 answers with nothing where there is no such interface.
    (!name.is_empty()).then_some(name)
}

/// A network device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// The interface index.
    pub index: u32,
    /// The name, such as `eth0`.
    pub name: String,
    /// The MAC address, where the device has one of six bytes.
    pub mac: Option<[u8; 6]>,
    /// The MTU in bytes, without the Ethernet header.
    pub mtu: u32,
    /// Set up by the administrator (`IFF_UP`).
    pub up: bool,
    /// Up, and the other side is there (`IFF_LOWER_UP`).
    pub carrier: bool,
    /// Up and able to carry packets (`IFF_RUNNING`, RFC 2863's operational state).
    pub running: bool,
    /// The bridge, bond or VRF that this link is a port of.
    pub master: Option<u32>,
    /// `IFLA_LINK`: the peer of a veth, the lower device of a VLAN or MACVLAN. An index of the namespace
    /// that [`Self::peer_in_other_netns`] names, where it names one.
    pub peer: Option<u32>,
    /// The id by which this namespace knows the one where [`Self::peer`] lives (`IFLA_LINK_NETNSID`).
    pub peer_in_other_netns: Option<i32>,
    /// What sort of device it is.
    pub kind: LinkKind,
    /// `lo`.
    pub loopback: bool,
    /// Has exactly one other end (`IFF_POINTOPOINT`), such as a tun device.
    pub point_to_point: bool,
    /// Does no ARP (`IFF_NOARP`).
    pub no_arp: bool,
    /// What people and programs have noted on it.
    pub alias: Option<String>,
}

/// The sort of a network device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum LinkKind {
    /// One end of a virtual Ethernet pair.
    Veth,
    /// A bridge.
    Bridge,
    /// A VXLAN device.
    Vxlan(VxlanAttrs),
    /// Another virtual device, by the kernel's name for its kind.
    Other(String),
    /// A device without a kind: hardware, and `lo`.
    #[default]
    Physical,
}

/// The attributes of a VXLAN device that matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VxlanAttrs {
    /// The VXLAN network identifier, 0 to 2^24-1.
    pub vni: u32,
    /// The UDP port to which it sends and on which it listens.
    pub port: u16,
    /// The outer source address.
    pub local: Option<IpAddr>,
    /// The index of the device that carries the outer packets.
    pub uplink: Option<u32>,
    /// Whether it learns FDB entries from what it receives.
    pub learning: bool,
    /// The Group Policy extension.
    pub gbp: bool,
    /// Asks user space for unknown MAC addresses.
    pub l2miss: bool,
    /// Takes tunnel attributes from each packet (`external`).
    pub collect_metadata: bool,
}

impl Kernel {
    /// All links of the namespace.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn links(&self) -> Result<Vec<Link>> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let found = self.dump("listing the links", RouteNetlinkMessage::GetLink(message)).await?;
        Ok(found
            .iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewLink(message) => parse(message),
                _ => None,
            })
            .collect())
    }

    /// The link of this name, if there is one.
    ///
    /// # Errors
    ///
    /// As the kernel says; that there is none is not an error.
    pub async fn link_by_name(&self, name: &str) -> Result<Option<Link>> {
        check_name(name)?;
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        self.link(&format!("looking for the link {name}"), message).await
    }

    /// The link of this index, if there is one.
    ///
    /// # Errors
    ///
    /// As the kernel says; that there is none is not an error.
    pub async fn link_by_index(&self, index: u32) -> Result<Option<Link>> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        self.link(&format!("looking for the link with index {index}"), message).await
    }

    async fn link(&self, what: &str, message: LinkMessage) -> Result<Option<Link>> {
        match self.get(what, RouteNetlinkMessage::GetLink(message)).await {
            Ok(RouteNetlinkMessage::NewLink(message)) => Ok(parse(&message)),
            Ok(_) => Ok(None),
            Err(error) if error.errno() == Some(Errno::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sets a link up.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn set_up(&self, index: u32) -> Result<()> {
        let mut message = for_index(index);
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.change_link(|| format!("setting link {index} up"), message).await
    }

    /// Sets the MTU of a link, in bytes.
    ///
    /// # Errors
    ///
    /// As the kernel says: `EINVAL` where the device (or the one below it) cannot take so much.
    pub async fn set_mtu(&self, index: u32, mtu: u32) -> Result<()> {
        let mut message = for_index(index);
        message.attributes.push(LinkAttribute::Mtu(mtu));
        self.change_link(|| format!("setting the MTU of link {index} to {mtu}"), message).await
    }

    /// Sets the MAC address of a link.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn set_mac(&self, index: u32, mac: [u8; 6]) -> Result<()> {
        let mut message = for_index(index);
        message.attributes.push(LinkAttribute::Address(mac.to_vec()));
        let what = || format!("setting the MAC address of link {index} to {}", super::mac_text(mac));
        self.change_link(what, message).await
    }

    /// Deletes a link; that it is gone already is not an error.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn delete_link(&self, index: u32) -> Result<()> {
        let what = || format!("deleting link {index}");
        match self.change(what, RouteNetlinkMessage::DelLink(for_index(index)), How::Existing).await {
            Err(error) if error.errno() == Some(Errno::ENODEV) => Ok(()),
            done => done,
        }
    }

    pub(super) async fn change_link(&self, what: impl Fn() -> String, message: LinkMessage) -> Result<()> {
        self.change(what, RouteNetlinkMessage::NewLink(message), How::Existing).await
    }
}

pub(super) fn for_index(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

/// What `dev_valid_name` of the kernel asks for.
pub(super) fn check_name(name: &str) -> Result<()> {
    let bad = name.is_empty()
        || name.len() > 15
        || name == "."
        || name == ".."
        || name.contains(|c: char| c == '/' || c == ':' || c == '\0' || c.is_whitespace());
    if bad { Err(KernelError::BadName(name.to_owned())) } else { Ok(()) }
}

/// `None` for what describes a port of a bridge and not a link.
pub(super) fn parse(message: &LinkMessage) -> Option<Link> {
    // The same group and message type also carry bridge ports; their end is not the link's end.
    if message.header.interface_family == AddressFamily::Bridge {
        return None;
    }
    let LinkHeader { index, flags, .. } = message.header;
    let mut link = Link {
        index,
        up: flags.contains(LinkFlags::Up),
        carrier: flags.contains(LinkFlags::LowerUp),
        running: flags.contains(LinkFlags::Running),
        loopback: flags.contains(LinkFlags::Loopback),
        point_to_point: flags.contains(LinkFlags::Pointopoint),
        no_arp: flags.contains(LinkFlags::Noarp),
        ..Link::default()
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(mac) => link.mac = <[u8; 6]>::try_from(mac.as_slice()).ok(),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Controller(master) => link.master = (*master != 0).then_some(*master),
            LinkAttribute::Link(peer) => link.peer = (*peer != 0).then_some(*peer),
            LinkAttribute::LinkNetNsId(id) => link.peer_in_other_netns = Some(*id),
            LinkAttribute::LinkInfo(info) => link.kind = kind(info),
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
            _ => {}
        }
    }
    Some(link)
}

fn kind(info: &[LinkInfo]) -> LinkKind {
    let mut kind = LinkKind::Physical;
    let mut vxlan = VxlanAttrs::default();
    for item in info {
        match item {
            LinkInfo::Kind(InfoKind::Veth) => kind = LinkKind::Veth,
            LinkInfo::Kind(InfoKind::Bridge) => kind = LinkKind::Bridge,
            LinkInfo::Kind(InfoKind::Vxlan) => kind = LinkKind::Vxlan(vxlan),
            LinkInfo::Kind(other) => kind = LinkKind::Other(other.to_string()),
            LinkInfo::Data(InfoData::Vxlan(data)) => vxlan = vxlan_attrs(data),
            _ => {}
        }
    }
    if let LinkKind::Vxlan(attrs) = &mut kind {
        *attrs = vxlan;
    }
    kind
}

fn vxlan_attrs(data: &[InfoVxlan]) -> VxlanAttrs {
    let mut attrs = VxlanAttrs::default();
    for item in data {
        match item {
            InfoVxlan::Id(vni) => attrs.vni = *vni,
            InfoVxlan::Port(port) => attrs.port = *port,
            InfoVxlan::Local(local) => attrs.local = (!local.is_unspecified()).then_some((*local).into()),
            InfoVxlan::Local6(local) => attrs.local = (!local.is_unspecified()).then_some((*local).into()),
            InfoVxlan::Link(uplink) => attrs.uplink = (*uplink != 0).then_some(*uplink),
            InfoVxlan::Learning(learning) => attrs.learning = *learning,
            InfoVxlan::Gbp => attrs.gbp = true,
            InfoVxlan::L2Miss(l2miss) => attrs.l2miss = *l2miss,
            InfoVxlan::CollectMetadata(external) => attrs.collect_metadata = *external,
            _ => {}
        }
    }
    attrs
}
