//! What a routed pod takes: a veth with its far end in another namespace, and one route and neighbour at each end.

use std::{
    collections::BTreeSet,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use nix::errno::Errno;
use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage},
    tc::{TcAttribute, TcMessage},
};

use crate::family::Family;

use super::{
    How, Kernel, KernelError, Result, Route, RouteKind, TABLE_MAIN,
    link::{check_name, for_index},
    neighbour::neighbour_message,
    route::{default_metric, default_scope, route_message},
};

/// The protocol number on the routes to pods that `loden-cni` has wired. Another than on those to peers, because
/// they are the pods' and stay when the agent's own are removed. Not in the kernel's list nor in iproute2's.
pub const POD_ROUTE_PROTOCOL: u8 = 77;

/// A veth pair as it is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VethSpec {
    /// Name of the end that stays here.
    pub name: String,
    /// Its MAC.
    pub mac: [u8; 6],
    /// Name of the far end.
    pub peer_name: String,
    /// Its MAC.
    pub peer_mac: [u8; 6],
    /// MTU of both, in bytes.
    pub mtu: u32,
}

impl Kernel {
    /// Makes a pair; the far end appears in the other namespace, so that a pair half made goes with it.
    ///
    /// # Errors
    ///
    /// As the kernel says: `EEXIST` where one of the names is taken.
    pub async fn create_veth(&self, spec: &VethSpec, peer_netns: BorrowedFd<'_>) -> Result<()> {
        check_name(&spec.name)?;
        check_name(&spec.peer_name)?;
        let end = |name: &str, mac: [u8; 6]| {
            let mut message = LinkMessage::default();
            message.attributes.push(LinkAttribute::IfName(name.to_owned()));
            // A MAC that is given is one that udev's MACAddressPolicy leaves alone.
            message.attributes.push(LinkAttribute::Address(mac.to_vec()));
            message.attributes.push(LinkAttribute::Mtu(spec.mtu));
            message
        };
        let mut peer = end(&spec.peer_name, spec.peer_mac);
        peer.attributes.push(LinkAttribute::NetNsFd(peer_netns.as_raw_fd()));
        let mut message = end(&spec.name, spec.mac);
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]));
        let what = || format!("creating the veth {} and {} in the container", spec.name, spec.peer_name);
        self.change(what, RouteNetlinkMessage::NewLink(message), How::Create).await
    }

    /// Sets the alias of a link: at most 255 bytes.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn set_alias(&self, index: u32, alias: &str) -> Result<()> {
        let mut message = for_index(index);
        message.attributes.push(LinkAttribute::IfAlias(alias.to_owned()));
        self.change_link(|| format!("setting the alias of link {index}"), message).await
    }

    /// Makes a permanent neighbour of either family.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn set_neighbour<F: Family>(&self, ifindex: u32, address: F::Addr, mac: [u8; 6]) -> Result<()> {
        let message = neighbour_message::<F>(ifindex, address, Some(mac));
        let what = || format!("setting the neighbour {address} on link {ifindex}");
        self.change(what, RouteNetlinkMessage::NewNeighbour(message), How::Replace).await
    }

    /// Makes a route that must not be there yet; that it is there just so is fine.
    ///
    /// # Errors
    ///
    /// As the kernel says: `EEXIST` where another link has the destination.
    pub async fn create_route<F: Family>(&self, route: &Route<F>) -> Result<()> {
        let what = || format!("creating the route to {}", route.dst);
        let message = RouteNetlinkMessage::NewRoute(route_message(route));
        match self.change(what, message, How::Create).await {
            Err(error) if error.errno() == Some(Errno::EEXIST) => {
                let there = self.routes_to::<F>(route.dst).await?;
                if there.iter().any(|it| it == route) { Ok(()) } else { Err(error) }
            }
            done => done,
        }
    }

    /// The routes to routed pods, of a family.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn pod_routes<F: Family>(&self) -> Result<Vec<Route<F>>> {
        self.routes_of_protocol(POD_ROUTE_PROTOCOL).await
    }

    /// The unicast routes of the main table to just this destination.
    async fn routes_to<F: Family>(&self, dst: F::Net) -> Result<Vec<Route<F>>> {
        let routes = self.routes_of::<F>().await?;
        Ok(routes.into_iter().filter(|it| it.dst == dst && it.table == TABLE_MAIN).collect())
    }

    /// The links that have a queueing discipline, by their index: one that shapes what leaves, or `ingress`, which
    /// polices what comes. That a device has none (`noqueue`) does not count, nor does `clsact`, which only holds
    /// programs.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn queueing_links(&self) -> Result<BTreeSet<u32>> {
        let message = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
        match self.dump("listing the queueing disciplines", message).await {
            Ok(found) => Ok(found.iter().filter_map(queueing).collect()),
            // A kernel without any.
            Err(error) if error.errno() == Some(Errno::EOPNOTSUPP) => Ok(BTreeSet::new()),
            Err(error) => Err(error),
        }
    }
}

fn queueing(message: &RouteNetlinkMessage) -> Option<u32> {
    let RouteNetlinkMessage::NewQueueDiscipline(message) = message else { return None };
    let kind = message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Kind(kind) => Some(kind.as_str()),
        _ => None,
    })?;
    (!["noqueue", "clsact"].contains(&kind)).then(|| u32::try_from(message.header.index).ok())?
}

/// The route to a pod on its veth.
#[must_use]
pub fn pod_route<F: Family>(address: F::Addr, ifindex: u32) -> Route<F> {
    Route {
        dst: F::Net::from(address),
        gateway: None,
        ifindex: Some(ifindex),
        onlink: false,
        protocol: POD_ROUTE_PROTOCOL,
        table: TABLE_MAIN,
        metric: default_metric::<F>(),
        source: None,
        multipath: false,
        kind: RouteKind::Unicast,
        tos: 0,
        scope: default_scope::<F>(None),
    }
}

/// A pod's way out: everything by its gateway, which no address of the pod tells to be on the link; of IPv6 it is a
/// link-local address, which always is.
#[must_use]
pub fn default_route<F: Family>(gateway: F::Addr, ifindex: u32) -> Route<F> {
    Route {
        dst: F::Net::default(),
        gateway: Some(gateway),
        onlink: F::BITS == 32,
        scope: default_scope::<F>(Some(gateway)),
        ..pod_route(gateway, ifindex)
    }
}

impl KernelError {
    /// Whether what was to be made is there already.
    #[must_use]
    pub fn is_taken(&self) -> bool {
        self.errno() == Some(Errno::EEXIST)
    }
}
