//! WireGuard devices: made by rtnetlink, set up and read by the generic netlink family `wireguard`.
//!
//! The socket is read and written by this module alone, and at once: the kernel has answered when the request is sent.
//! Keys pass through here, so nothing is logged, and no error holds what was asked or answered.

mod message;
mod socket;

use nix::errno::Errno;
use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
};

pub use self::socket::WireguardSocket;
use super::{How, Kernel, KernelError, Link, LinkKind, Result, link::check_name};

/// The kernel's name for this kind of link.
const KIND: &str = "wireguard";

/// A WireGuard device as it ought to be, apart from keys and peers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireguardSpec {
    /// `flannel-wg`; at most 15 bytes.
    pub name: String,
    /// In bytes.
    pub mtu: u32,
}

/// A WireGuard device as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireguardDevice {
    /// Its interface index.
    pub index: u32,
    /// In bytes.
    pub mtu: u32,
    /// It was there already.
    pub adopted: bool,
    /// What was put right in an adopted device.
    pub corrected: Vec<String>,
}

impl Kernel {
    /// Sees to it that the device is there; one that is there is kept, with its keys, peers and sessions. May be called
    /// again at any time.
    ///
    /// # Errors
    ///
    /// [`KernelError::NoWireguard`], or as the kernel says.
    pub async fn ensure_wireguard(&self, spec: &WireguardSpec) -> Result<WireguardDevice> {
        check_name(&spec.name)?;
        if let Some(link) = self.link_by_name(&spec.name).await? {
            if is_wireguard(&link) {
                return self.adopt_wireguard(spec, &link).await;
            }
            tracing::info!(device = spec.name, kind = ?link.kind, "it is no WireGuard device and is made anew");
            self.delete_link(link.index).await?;
        }
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(spec.name.clone()),
            LinkAttribute::Mtu(spec.mtu),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Wireguard)]),
        ];
        let what = || format!("creating the WireGuard device {}", spec.name);
        match self.change(what, RouteNetlinkMessage::NewLink(message), How::Create).await {
            Err(error) if error.errno() == Some(Errno::EOPNOTSUPP) => return Err(KernelError::NoWireguard),
            done => done?,
        }
        let link = self.link_by_name(&spec.name).await?;
        let link = link.ok_or_else(|| KernelError::NoLink(spec.name.clone()))?;
        Ok(WireguardDevice { index: link.index, mtu: link.mtu, adopted: false, corrected: Vec::new() })
    }

    async fn adopt_wireguard(&self, spec: &WireguardSpec, link: &Link) -> Result<WireguardDevice> {
        let mut corrected = Vec::new();
        if link.mtu != spec.mtu {
            self.set_mtu(link.index, spec.mtu).await?;
            corrected.push(format!("MTU {} to {}", link.mtu, spec.mtu));
        }
        Ok(WireguardDevice { index: link.index, mtu: spec.mtu, adopted: true, corrected })
    }
}

/// Whether a link is a WireGuard device.
#[must_use]
pub(crate) fn is_wireguard(link: &Link) -> bool {
    matches!(&link.kind, LinkKind::Other(kind) if kind == KIND)
}
