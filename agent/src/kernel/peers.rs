//! The kernel's side of the overlay: reads what [`crate::overlay`] compares, and carries out its plan.

use std::collections::BTreeSet;

use futures::{StreamExt as _, stream};
use ipnet::IpNet;
use nix::errno::Errno;
use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    route::{RouteMessage, RouteScope},
};

use super::{
    FdbOf, How, Kernel, KernelError, LinkKind, Result, Route, is_wireguard,
    neighbour::{fdb_message, neighbour_message},
    route::{PROTOCOL_BOOT, default_scope, route_message},
};
use crate::{
    family::{Family, V4, V6},
    overlay::{Actual, Op, Plan},
};

/// How many requests are under way at once. The kernel works on them one after the other; what is saved is
/// the way there and back.
const UNDER_WAY: usize = 256;

/// A step of a plan that failed.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct OpError<F: Family = V4> {
    /// The step.
    pub op: Op<F>,
    /// Why; it names the step.
    #[source]
    pub error: KernelError,
}

/// What [`Kernel::remove_overlay`] has done.
#[derive(Debug, Default)]
pub struct Removed {
    /// What is gone, one line each.
    pub done: Vec<String>,
    /// What could not be removed.
    pub errors: Vec<KernelError>,
}

impl Kernel {
    /// What there is now: the routes, neighbours and FDB entries on the VXLAN device (0 where the backend has
    /// none), and the routes on other links that carry Loden's protocol number.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn overlay_actual<F: Family>(&self, device: u32) -> Result<Actual<F>> {
        if device == 0 {
            return Ok(Actual { routes: self.own_routes().await?, ..Actual::default() });
        }
        let (by_link, own, neighbours, fdb) = tokio::try_join!(
            self.routes_by_link::<F>(device),
            self.own_routes::<F>(),
            self.neighbours_of::<F>(device),
            self.fdb_of::<F>(FdbOf::Device(device)),
        )?;
        let mut routes = by_link;
        routes.extend(own.into_iter().filter(|route| route.ifindex != Some(device)));
        Ok(Actual { routes, neighbours, fdb })
    }

    /// Carries out a plan, in its order, and goes on after a failure. What is to be deleted and is gone
    /// already is no failure.
    pub async fn apply<F: Family>(&self, plan: &Plan<F>) -> Vec<OpError<F>> {
        stream::iter(&plan.ops)
            .map(|op| async move {
                let done = self.apply_one(op).await;
                done.err().map(|error| OpError { op: op.clone(), error })
            })
            .buffered(UNDER_WAY)
            .filter_map(std::future::ready)
            .collect()
            .await
    }

    async fn apply_one<F: Family>(&self, op: &Op<F>) -> Result<()> {
        let what = || op.to_string();
        let (message, how) = match op {
            Op::SetFdb { device, mac, dst } => {
                (RouteNetlinkMessage::NewNeighbour(fdb_message::<F>(*device, *mac, *dst)), How::Replace)
            }
            Op::SetNeighbour { device, address, mac } => {
                let message = neighbour_message::<F>(*device, *address, Some(*mac));
                (RouteNetlinkMessage::NewNeighbour(message), How::Replace)
            }
            Op::SetRoute(route) => return self.set_route(route, what).await,
            Op::DelRoute(route) => (RouteNetlinkMessage::DelRoute(deletion(route)), How::Existing),
            Op::DelNeighbour { device, address } => {
                let message = neighbour_message::<F>(*device, *address, None);
                (RouteNetlinkMessage::DelNeighbour(message), How::Existing)
            }
            Op::DelFdb { device, mac, dst } => {
                (RouteNetlinkMessage::DelNeighbour(fdb_message::<F>(*device, *mac, *dst)), How::Existing)
            }
        };
        match self.change(what, message, how).await {
            Err(error) if op.is_removal() && is_gone(&error) => Ok(()),
            done => done,
        }
    }

    /// Sets a route, in place where there is one.
    ///
    /// IPv6 refuses an onlink next hop while a route leads to it by another link, default routes apart
    /// (`ip6_route_check_nh_onlink` in net/ipv6/route.c), and one may: that of a peer that was direct, or an operator's
    /// wider one. As long as it takes, a route to the next hop alone stands before it.
    async fn set_route<F: Family>(&self, route: &Route<F>, what: impl Fn() -> String) -> Result<()> {
        let set = |route: &Route<F>| {
            self.change(&what, RouteNetlinkMessage::NewRoute(route_message(route)), How::Replace)
        };
        let error = match set(route).await {
            Err(error) if F::BITS == 128 && route.onlink && error.errno() == Some(Errno::EINVAL) => error,
            done => return done,
        };
        let Some(dst) = route.gateway.and_then(|gateway| F::net(gateway, F::BITS)) else { return Err(error) };
        let alone = Route { dst, gateway: None, onlink: false, ..route.clone() };
        set(&alone).await?;
        let done = set(route).await;
        let removal = RouteNetlinkMessage::DelRoute(deletion(&alone));
        match self.change(&what, removal, How::Existing).await {
            Err(error) if !is_gone(&error) => done.and(Err(error)),
            _ => done,
        }
    }

    /// Removes the overlay's devices of these names and the routes into these networks that carry Loden's protocol
    /// number, and nothing else; goes on after a failure.
    pub async fn remove_overlay(
        &self,
        devices: impl IntoIterator<Item = &str>,
        networks: &BTreeSet<IpNet>,
    ) -> Removed {
        let mut removed = Removed::default();
        self.remove_own_routes::<V4>(networks, &mut removed).await;
        self.remove_own_routes::<V6>(networks, &mut removed).await;
        for device in devices {
            match self.delete_overlay_device(device).await {
                Ok(true) => removed.done.push(format!("link {device}")),
                Ok(false) => {}
                Err(error) => removed.errors.push(error),
            }
        }
        removed
    }

    async fn remove_own_routes<F: Family>(&self, networks: &BTreeSet<IpNet>, removed: &mut Removed) {
        match self.own_routes_into::<F>(networks).await {
            Ok(routes) => {
                for route in routes {
                    match self.apply_one(&Op::DelRoute(route.clone())).await {
                        Ok(()) => removed.done.push(format!("route {}", route.dst)),
                        Err(error) => removed.errors.push(error),
                    }
                }
            }
            Err(error) => removed.errors.push(error),
        }
    }

    /// Another agent of this host may have routes of the same kind into a network of its own.
    async fn own_routes_into<F: Family>(&self, networks: &BTreeSet<IpNet>) -> Result<Vec<Route<F>>> {
        let mut routes = self.own_routes::<F>().await?;
        routes.retain(|route| networks.iter().any(|network| network.contains(&route.dst.into())));
        Ok(routes)
    }

    /// Gives the routes into these networks the protocol number that flannel's have, in place: a flanneld that
    /// takes the node back finds what it would have made itself. Says how many there were.
    ///
    /// # Errors
    ///
    /// The first that the kernel tells.
    pub async fn hand_back_routes(&self, networks: &BTreeSet<IpNet>) -> Result<usize> {
        Ok(self.hand_back::<V4>(networks).await? + self.hand_back::<V6>(networks).await?)
    }

    async fn hand_back<F: Family>(&self, networks: &BTreeSet<IpNet>) -> Result<usize> {
        let own = self.own_routes_into::<F>(networks).await?;
        for route in &own {
            let scope = default_scope::<F>(route.gateway);
            let flannels = Route { protocol: PROTOCOL_BOOT, scope, ..route.clone() };
            self.apply_one(&Op::SetRoute(flannels)).await?;
        }
        Ok(own.len())
    }

    /// Whether the device is one of an overlay, up, with exactly the address that it should have of these networks:
    /// the cheap question before [`Self::set_overlay_address`].
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn has_overlay_address<F: Family>(
        &self,
        device: u32,
        subnet: F::Net,
        networks: &BTreeSet<IpNet>,
    ) -> Result<bool> {
        let Some(link) = self.link_by_index(device).await? else { return Ok(false) };
        let addresses = self.addresses_of::<F>().await?;
        let is_of_networks =
            |address: F::Addr| networks.iter().any(|network| network.contains(&address.into()));
        let mut theirs = addresses.iter().filter(|it| it.ifindex == device && is_of_networks(it.address));
        let only = theirs.next().is_some_and(|it| it.address == F::base(subnet) && it.prefix_len == F::BITS);
        let of_overlay = matches!(link.kind, LinkKind::Vxlan(_)) || is_wireguard(&link);
        Ok(of_overlay && link.up && only && theirs.next().is_none())
    }
}

/// For a deletion the kernel takes the scope "nowhere" as "any".
fn deletion<F: Family>(route: &Route<F>) -> RouteMessage {
    let mut message = route_message(route);
    message.header.scope = RouteScope::NoWhere;
    message
}

/// The errno of an object that is not there: ESRCH for a route, ENOENT for a neighbour or an FDB entry,
/// ENODEV (or ENXIO) where the whole link has gone.
fn is_gone(error: &KernelError) -> bool {
    matches!(error.errno(), Some(Errno::ESRCH | Errno::ENOENT | Errno::ENODEV | Errno::ENXIO))
}
