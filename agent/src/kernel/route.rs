//! Routes, and the question by which route a destination is reached.

use std::net::{IpAddr, Ipv6Addr};

use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
        RouteType, RouteVia,
    },
};

use super::{Kernel, KernelError, Result, wire_family};
use crate::family::{Family, V4};

/// Number of UDP (IANA).
const UDP: u8 = 17;

/// The protocol number on every route that Loden writes, by which it knows its own again. Not in the
/// kernel's list (`rtnetlink.h`) nor in iproute2's `rt_protos`.
pub const ROUTE_PROTOCOL: u8 = 76;

/// The table that `ip route` shows and that all hosts use.
pub const TABLE_MAIN: u32 = 254;

/// The table in which the kernel keeps the host's own addresses.
pub const TABLE_LOCAL: u32 = 255;

/// `RTPROT_BOOT`: what flannel's routes carry, as all that `ip route add` makes.
pub(crate) const PROTOCOL_BOOT: u8 = 3;

/// A route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route<F: Family = V4> {
    /// Where it leads.
    pub dst: F::Net,
    /// The next hop; none where the destination is on the link.
    pub gateway: Option<F::Addr>,
    /// The link by which it goes; none for a multipath route and for one that forbids.
    pub ifindex: Option<u32>,
    /// The gateway counts as on the link, whatever the addresses say.
    pub onlink: bool,
    /// Who made it (`RTPROT_*`).
    pub protocol: u8,
    /// The routing table.
    pub table: u32,
    /// The priority; the lowest wins. Where none is set: [`default_metric`].
    pub metric: u32,
    /// The preferred source address.
    pub source: Option<F::Addr>,
    /// Has several next hops.
    pub multipath: bool,
    /// Whether it carries or forbids.
    pub kind: RouteKind,
    /// The type of service that it is for, 0 for all.
    pub tos: u8,
    /// How far away its destination is (`RT_SCOPE_*`), where nothing is said: [`default_scope`]. IPv6 has none: 0.
    pub scope: u8,
}

/// What a route does with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteKind {
    /// Sends it on.
    Unicast,
    /// Drops it in silence.
    Blackhole,
    /// Drops it with an ICMP error.
    Unreachable,
    /// Drops it with an ICMP error (administratively prohibited).
    Prohibit,
    /// Sends the look-up on to the next table.
    Throw,
    /// Delivers it here: an own address.
    Local,
    /// Another kind, by its number (`RTN_*`).
    Other(u8),
}

/// By which way the kernel reaches a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteTo<F: Family = V4> {
    /// The link by which packets leave.
    pub ifindex: u32,
    /// The next hop; none where the destination is on the link.
    pub gateway: Option<F::Addr>,
    /// The next hop of an IPv4 route, where it has an IPv6 address (RFC 5549).
    pub gateway6: Option<Ipv6Addr>,
    /// The source address that the kernel would choose.
    pub source: F::Addr,
    /// The path MTU in bytes, where the route or path MTU discovery gives one.
    pub mtu: Option<u32>,
    /// The route has several next hops, and this is the one for a packet without ports.
    pub multipath: bool,
    /// The destination is this host itself.
    pub local: bool,
}

impl Kernel {
    /// The IPv4 routes of all tables: those that carry packets elsewhere or forbid it. Routes to the host's
    /// own addresses, to broadcast and multicast are left out.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn routes(&self) -> Result<Vec<Route>> {
        self.routes_of().await
    }

    /// As [`Self::routes`], of a family.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn routes_of<F: Family>(&self) -> Result<Vec<Route<F>>> {
        let mut routes = self.routes_like(message::<F>()).await?;
        routes.retain(|route: &Route<F>| !matches!(route.kind, RouteKind::Local | RouteKind::Other(_)));
        Ok(routes)
    }

    /// Routes of the main table by this link.
    pub(super) async fn routes_by_link<F: Family>(&self, ifindex: u32) -> Result<Vec<Route<F>>> {
        let mut wanted = message::<F>();
        wanted.attributes.push(RouteAttribute::Oif(ifindex));
        let mut routes = self.routes_like(wanted).await?;
        routes.retain(|route: &Route<F>| route.ifindex == Some(ifindex) && route.table == TABLE_MAIN);
        Ok(routes)
    }

    /// Routes that carry Loden's protocol number, in any table.
    pub(super) async fn own_routes<F: Family>(&self) -> Result<Vec<Route<F>>> {
        self.routes_of_protocol(ROUTE_PROTOCOL).await
    }

    /// Routes that carry this protocol number, in any table.
    pub(super) async fn routes_of_protocol<F: Family>(&self, protocol: u8) -> Result<Vec<Route<F>>> {
        let mut wanted = message::<F>();
        wanted.header.protocol = RouteProtocol::Other(protocol);
        let mut routes = self.routes_like(wanted).await?;
        routes.retain(|route: &Route<F>| route.protocol == protocol);
        Ok(routes)
    }

    async fn routes_like<F: Family>(&self, wanted: RouteMessage) -> Result<Vec<Route<F>>> {
        let parse = |message| match message {
            RouteNetlinkMessage::NewRoute(message) => parse(&message),
            _ => None,
        };
        self.dump_as("listing the routes", RouteNetlinkMessage::GetRoute(wanted), parse).await
    }

    /// By which way the kernel reaches a destination now.
    ///
    /// # Errors
    ///
    /// As the kernel says: `ENETUNREACH` without a route, `EHOSTUNREACH` and others where one forbids.
    pub async fn route_to<F: Family>(&self, dst: F::Addr) -> Result<RouteTo<F>> {
        self.route_from(None, dst).await
    }

    /// The same for UDP with this source address, which must be the host's own: of several next hops the kernel chooses
    /// one by both addresses, of IPv6 also by the protocol (`fib_multipath_hash_policy` 0, the default).
    ///
    /// # Errors
    ///
    /// As [`Self::route_to`].
    pub async fn route_from<F: Family>(&self, source: Option<F::Addr>, dst: F::Addr) -> Result<RouteTo<F>> {
        let what = format!("looking for the route to {dst}");
        // The plain answer is the one path chosen; the route itself tells whether there was a choice.
        let (resolved, matched) = tokio::join!(
            self.route_answer::<F>(&what, source, dst, RouteFlags::empty()),
            self.route_answer::<F>(&what, source, dst, RouteFlags::FibMatch),
        );
        let resolved = resolved?;
        let several = |message: RouteMessage| {
            message.attributes.iter().any(|a| matches!(a, RouteAttribute::MultiPath(_)))
        };
        let mut way = RouteTo {
            ifindex: 0,
            gateway: None,
            gateway6: None,
            source: F::UNSPECIFIED,
            mtu: None,
            multipath: matched.is_ok_and(several),
            local: resolved.header.kind == RouteType::Local,
        };
        for attribute in &resolved.attributes {
            match attribute {
                RouteAttribute::Oif(ifindex) => way.ifindex = *ifindex,
                RouteAttribute::Gateway(gateway) => way.gateway = ip::<F>(gateway),
                RouteAttribute::Via(RouteVia::Inet6(gateway)) => way.gateway6 = Some(*gateway),
                RouteAttribute::PrefSource(source) => way.source = ip::<F>(source).unwrap_or(way.source),
                RouteAttribute::Metrics(metrics) => way.mtu = mtu(metrics),
                _ => {}
            }
        }
        Ok(way)
    }

    async fn route_answer<F: Family>(
        &self,
        what: &str,
        source: Option<F::Addr>,
        dst: F::Addr,
        flags: RouteFlags,
    ) -> Result<RouteMessage> {
        let mut question = message::<F>();
        if let Some(source) = source {
            question.header.source_prefix_length = F::BITS;
            question.attributes.push(RouteAttribute::Source(wire_address::<F>(source)));
            question.attributes.push(RouteAttribute::IpProto(UDP));
        }
        question.header.destination_prefix_length = F::BITS;
        question.header.flags = flags;
        question.attributes.push(RouteAttribute::Destination(wire_address::<F>(dst)));
        match self.get(what, RouteNetlinkMessage::GetRoute(question)).await? {
            RouteNetlinkMessage::NewRoute(message) => Ok(message),
            _ => Err(KernelError::Closed { what: what.to_owned() }),
        }
    }
}

/// What the kernel makes of a route without a priority: IPv6's have 1024 (`IP6_RT_PRIO_USER`).
#[must_use]
pub fn default_metric<F: Family>() -> u32 {
    if F::BITS == 32 { 0 } else { 1024 }
}

/// What iproute2 makes of a unicast route without a scope: everywhere by a next hop, and on the link without one.
#[must_use]
pub fn default_scope<F: Family>(gateway: Option<F::Addr>) -> u8 {
    if F::BITS == 32 && gateway.is_none() { RouteScope::Link.into() } else { RouteScope::Universe.into() }
}

fn message<F: Family>() -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = wire_family::<F>();
    message
}

/// The message that sets or deletes a unicast route.
pub(super) fn route_message<F: Family>(route: &Route<F>) -> RouteMessage {
    let mut message = message::<F>();
    message.header.destination_prefix_length = F::prefix_len(route.dst);
    message.header.protocol = RouteProtocol::from(route.protocol);
    message.header.kind = RouteType::Unicast;
    message.header.tos = route.tos;
    message.header.scope = RouteScope::from(route.scope);
    message.header.flags.set(RouteFlags::Onlink, route.onlink);
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Destination(wire_address::<F>(F::base(route.dst))));
    match u8::try_from(route.table) {
        Ok(table) => message.header.table = table,
        Err(_) => attributes.push(RouteAttribute::Table(route.table)),
    }
    attributes.extend(route.ifindex.map(RouteAttribute::Oif));
    attributes.extend(route.gateway.map(|gateway| RouteAttribute::Gateway(wire_address::<F>(gateway))));
    if route.metric != 0 {
        attributes.push(RouteAttribute::Priority(route.metric));
    }
    attributes.extend(route.source.map(|source| RouteAttribute::PrefSource(wire_address::<F>(source))));
    message
}

fn wire_address<F: Family>(address: F::Addr) -> RouteAddress {
    let address: IpAddr = address.into();
    address.into()
}

fn ip<F: Family>(address: &RouteAddress) -> Option<F::Addr> {
    match address {
        RouteAddress::Inet(address) => F::addr((*address).into()),
        RouteAddress::Inet6(address) => F::addr((*address).into()),
        _ => None,
    }
}

/// `None` for a route of another family, and for cached answers.
pub(super) fn parse<F: Family>(message: &RouteMessage) -> Option<Route<F>> {
    let header = &message.header;
    if header.address_family != wire_family::<F>() || header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let mut dst = F::UNSPECIFIED;
    let mut route = Route {
        dst: F::Net::default(),
        gateway: None,
        ifindex: None,
        onlink: header.flags.contains(RouteFlags::Onlink),
        protocol: header.protocol.into(),
        table: u32::from(header.table),
        metric: 0,
        source: None,
        multipath: false,
        kind: kind(header.kind),
        tos: header.tos,
        scope: header.scope.into(),
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => dst = ip::<F>(address)?,
            RouteAttribute::Gateway(gateway) => route.gateway = ip::<F>(gateway),
            RouteAttribute::Oif(ifindex) => route.ifindex = Some(*ifindex),
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::PrefSource(source) => route.source = ip::<F>(source),
            RouteAttribute::MultiPath(_) => route.multipath = true,
            _ => {}
        }
    }
    route.dst = F::net(dst, header.destination_prefix_length)?;
    Some(route)
}

fn kind(kind: RouteType) -> RouteKind {
    match kind {
        RouteType::Unicast => RouteKind::Unicast,
        RouteType::BlackHole => RouteKind::Blackhole,
        RouteType::Unreachable => RouteKind::Unreachable,
        RouteType::Prohibit => RouteKind::Prohibit,
        RouteType::Throw => RouteKind::Throw,
        RouteType::Local => RouteKind::Local,
        other => RouteKind::Other(other.into()),
    }
}

fn mtu(metrics: &[RouteMetric]) -> Option<u32> {
    metrics.iter().find_map(|metric| match metric {
        RouteMetric::Mtu(mtu) => Some(*mtu),
        _ => None,
    })
}
