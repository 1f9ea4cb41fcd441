//! IPv4 routes, and the question by which route a destination is reached.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::Ipv4Net;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        route::{
            RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
            RouteType, RouteVia,
        },
    },
};

use super::{Kernel, KernelError, Result};

/// The protocol number on every route that Loden writes, by which it knows its own again. Not in the
/// kernel's list (`rtnetlink.h`) nor in iproute2's `rt_protos`.
pub const ROUTE_PROTOCOL: u8 = 76;

/// The table that `ip route` shows and that all hosts use.
pub const TABLE_MAIN: u32 = 254;

/// `RTPROT_BOOT`: what flannel's routes carry, as all that `ip route add` makes.
pub(crate) const PROTOCOL_BOOT: u8 = 3;

/// An IPv4 route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Where it leads.
    pub dst: Ipv4Net,
    /// The next hop; none where the destination is on the link.
    pub gateway: Option<Ipv4Addr>,
    /// The link by which it goes; none for a multipath route and for one that forbids.
    pub ifindex: Option<u32>,
    /// The gateway counts as on the link, whatever the addresses say.
    pub onlink: bool,
    /// Who made it (`RTPROT_*`).
    pub protocol: u8,
    /// The routing table.
    pub table: u32,
    /// The priority; the lowest wins, 0 where none is set.
    pub metric: u32,
    /// The preferred source address.
    pub source: Option<Ipv4Addr>,
    /// Has several next hops.
    pub multipath: bool,
    /// Whether it carries or forbids.
    pub kind: RouteKind,
    /// The type of service that it is for, 0 for all.
    pub tos: u8,
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
pub struct RouteTo {
    /// The link by which packets leave.
    pub ifindex: u32,
    /// The next hop; none where the destination is on the link.
    pub gateway: Option<Ipv4Addr>,
    /// The next hop, where it has an IPv6 address (RFC 5549).
    pub gateway6: Option<Ipv6Addr>,
    /// The source address that the kernel would choose.
    pub source: Ipv4Addr,
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
        let mut routes = self.routes_like(message()).await?;
        routes.retain(|route| !matches!(route.kind, RouteKind::Local | RouteKind::Other(_)));
        Ok(routes)
    }

    /// Routes of the main table by this link.
    pub(super) async fn routes_by_link(&self, ifindex: u32) -> Result<Vec<Route>> {
        let mut wanted = message();
        wanted.attributes.push(RouteAttribute::Oif(ifindex));
        let mut routes = self.routes_like(wanted).await?;
        routes.retain(|route| route.ifindex == Some(ifindex) && route.table == TABLE_MAIN);
        Ok(routes)
    }

    /// Routes that carry Loden's protocol number, in any table.
    pub(super) async fn own_routes(&self) -> Result<Vec<Route>> {
        let mut wanted = message();
        wanted.header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
        let mut routes = self.routes_like(wanted).await?;
        routes.retain(|route| route.protocol == ROUTE_PROTOCOL);
        Ok(routes)
    }

    async fn routes_like(&self, wanted: RouteMessage) -> Result<Vec<Route>> {
        let found = self.dump("listing the routes", RouteNetlinkMessage::GetRoute(wanted)).await?;
        Ok(found
            .iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewRoute(message) => parse(message),
                _ => None,
            })
            .collect())
    }

    /// By which way the kernel reaches a destination now.
    ///
    /// # Errors
    ///
    /// As the kernel says: `ENETUNREACH` without a route, `EHOSTUNREACH` and others where one forbids.
    pub async fn route_get(&self, dst: Ipv4Addr) -> Result<RouteTo> {
        let what = format!("looking for the route to {dst}");
        // The plain answer is the one path chosen; the route itself tells whether there was a choice.
        let (resolved, matched) = tokio::join!(
            self.route_answer(&what, dst, RouteFlags::empty()),
            self.route_answer(&what, dst, RouteFlags::FibMatch),
        );
        let resolved = resolved?;
        let several = |message: RouteMessage| {
            message.attributes.iter().any(|a| matches!(a, RouteAttribute::MultiPath(_)))
        };
        let mut way = RouteTo {
            ifindex: 0,
            gateway: None,
            gateway6: None,
            source: Ipv4Addr::UNSPECIFIED,
            mtu: None,
            multipath: matched.is_ok_and(several),
            local: resolved.header.kind == RouteType::Local,
        };
        for attribute in &resolved.attributes {
            match attribute {
                RouteAttribute::Oif(ifindex) => way.ifindex = *ifindex,
                RouteAttribute::Gateway(RouteAddress::Inet(gateway)) => way.gateway = Some(*gateway),
                RouteAttribute::Via(RouteVia::Inet6(gateway)) => way.gateway6 = Some(*gateway),
                RouteAttribute::PrefSource(RouteAddress::Inet(source)) => way.source = *source,
                RouteAttribute::Metrics(metrics) => way.mtu = mtu(metrics),
                _ => {}
            }
        }
        Ok(way)
    }

    async fn route_answer(&self, what: &str, dst: Ipv4Addr, flags: RouteFlags) -> Result<RouteMessage> {
        let mut question = message();
        question.header.destination_prefix_length = 32;
        question.header.flags = flags;
        question.attributes.push(RouteAttribute::Destination(RouteAddress::Inet(dst)));
        match self.get(what, RouteNetlinkMessage::GetRoute(question)).await? {
            RouteNetlinkMessage::NewRoute(message) => Ok(message),
            _ => Err(KernelError::Closed { what: what.to_owned() }),
        }
    }
}

fn message() -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message
}

/// The message that sets or deletes a unicast route.
pub(super) fn route_message(route: &Route) -> RouteMessage {
    let mut builder = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(route.dst.network(), route.dst.prefix_len())
        .protocol(RouteProtocol::from(route.protocol))
        .table_id(route.table)
        .tos(route.tos);
    if let Some(ifindex) = route.ifindex {
        builder = builder.output_interface(ifindex);
    }
    if let Some(gateway) = route.gateway {
        builder = builder.gateway(gateway);
    } else {
        builder = builder.scope(RouteScope::Link);
    }
    if route.onlink {
        builder = builder.onlink();
    }
    if route.metric != 0 {
        builder = builder.priority(route.metric);
    }
    if let Some(source) = route.source {
        builder = builder.pref_source(source);
    }
    builder.build()
}

/// `None` for what is not an IPv4 route, and for cached answers.
pub(super) fn parse(message: &RouteMessage) -> Option<Route> {
    let header = &message.header;
    if header.address_family != AddressFamily::Inet || header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let mut dst = Ipv4Addr::UNSPECIFIED;
    let mut route = Route {
        dst: Ipv4Net::default(),
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
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => dst = *address,
            RouteAttribute::Gateway(RouteAddress::Inet(gateway)) => route.gateway = Some(*gateway),
            RouteAttribute::Oif(ifindex) => route.ifindex = Some(*ifindex),
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::PrefSource(RouteAddress::Inet(source)) => route.source = Some(*source),
            RouteAttribute::MultiPath(_) => route.multipath = true,
            _ => {}
        }
    }
    route.dst = Ipv4Net::new(dst, header.destination_prefix_length).ok()?;
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
