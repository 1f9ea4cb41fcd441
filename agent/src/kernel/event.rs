//! What the kernel tells of its own accord: changes of links, addresses, routes, rules, neighbours, FDB entries
//! and queueing disciplines.
//!
//! An event is a reason to look, never the truth itself: the socket's buffer is finite, and what does not fit
//! is lost. The loss is told ([`KernelEvent::Overrun`]); whoever listens must then list everything again. It
//! is told when the buffer is empty again: until then the kernel drops further events without a word
//! (`NETLINK_S_CONGESTED`, kernel 6.18), and a list made in the meantime could miss them.
//! Not everything is told at all: the routes that vanish with a link that goes down are not (kernel 6.18,
//! `fib_flush`), so the link's event must count as one of them.

use std::time::Duration;

use futures::{StreamExt as _, channel::mpsc::UnboundedReceiver};
use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};
use rtnetlink::{
    MulticastGroup,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::RouteNetlinkMessage,
    proto::sys::AsyncSocket as _,
    sys::SocketAddr,
};
use tokio::time::{Instant, timeout_at};

use super::{
    Address, Connection, FdbEntry, Kernel, KernelError, Link, Neighbour, Result, Route, address, link,
    neighbour, route,
};
use crate::family::V6;

/// What the receive buffer of the events' socket may hold, in bytes. The default of 208 KiB is full after
/// some hundred events.
const RECEIVE_BUFFER: u32 = 8 << 20;

/// After a loss, this long without an event means that the receive buffer is empty.
const QUIET: Duration = Duration::from_millis(50);

/// How long a loss is kept back at most while events go on.
const SETTLE_LIMIT: Duration = Duration::from_secs(1);

/// What happened to the object that an event tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It is new or has changed; the event holds what it is now.
    New,
    /// It is gone; the event holds what it was.
    Deleted,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KernelEvent {
    /// Of a link.
    Link(Change, Link),
    /// Of an IPv4 address.
    Address(Change, Address),
    /// Of an IPv4 route, in any table.
    Route(Change, Route),
    /// Of an IPv4 neighbour.
    Neighbour(Change, Neighbour),
    /// Of an FDB entry of a bridge, or of a VXLAN device with an IPv4 underlay.
    Fdb(Change, FdbEntry),
    /// Of a queueing discipline: [`Kernel::queueing_links`] may answer otherwise now.
    Queueing,
    /// Of a rule that says which routing table counts for whom, of either family.
    Rule,
    /// Of something of IPv6.
    Ipv6(Ipv6Event),
    /// Events were lost: everything must be read anew.
    Overrun,
}

/// A change of something that has an IPv6 address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ipv6Event {
    /// Of an address.
    Address(Change, Address<V6>),
    /// Of a route, in any table.
    Route(Change, Route<V6>),
    /// Of a neighbour.
    Neighbour(Change, Neighbour<V6>),
    /// Of an FDB entry of a VXLAN device with an IPv6 underlay.
    Fdb(Change, FdbEntry<V6>),
}

/// The stream of events, from the moment of its making on.
#[derive(Debug)]
pub struct Events {
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    /// Events were lost and perhaps still are.
    lost: bool,
    _connection: Connection,
}

impl Kernel {
    /// Begins to listen, on a socket of its own in the network namespace of the calling thread. Must be
    /// called inside a tokio runtime. To miss nothing, listen first and list then.
    ///
    /// # Errors
    ///
    /// [`KernelError::Connect`] where the kernel grants no socket.
    pub fn events(&self) -> Result<Events> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv6Rule,
            MulticastGroup::Neigh,
            MulticastGroup::Tc,
        ];
        let (mut connection, _, messages) =
            rtnetlink::new_multicast_connection(&groups).map_err(KernelError::Connect)?;
        let socket = connection.socket_mut().socket_mut();
        // The force is CAP_NET_ADMIN's; without it `net.core.rmem_max` is the limit.
        if setsockopt(socket, RcvBufForce, &(RECEIVE_BUFFER as usize)).is_err() {
            socket.set_rx_buf_sz(RECEIVE_BUFFER).map_err(KernelError::Connect)?;
        }
        let connection = Connection(tokio::spawn(connection).abort_handle());
        Ok(Events { messages, lost: false, _connection: connection })
    }
}

impl Events {
    /// The next event; `None` when the socket has failed, and a new one must be made. May be dropped while
    /// it waits without losing an event.
    pub async fn next(&mut self) -> Option<KernelEvent> {
        while !self.lost {
            let (message, _) = self.messages.next().await?;
            match parse(message.payload) {
                Some(KernelEvent::Overrun) => self.lost = true,
                Some(event) => return Some(event),
                None => {}
            }
        }
        self.settle().await
    }

    /// Passes over what comes until nothing comes; what it was will be seen in the lists. Where events go on
    /// and on, the loss is told all the same, and once more later.
    async fn settle(&mut self) -> Option<KernelEvent> {
        let end = Instant::now() + SETTLE_LIMIT;
        while Instant::now() < end {
            match timeout_at(Instant::now() + QUIET, self.messages.next()).await {
                Ok(message) => drop(message?),
                Err(_) => {
                    self.lost = false;
                    break;
                }
            }
        }
        Some(KernelEvent::Overrun)
    }
}

fn parse(payload: NetlinkPayload<RouteNetlinkMessage>) -> Option<KernelEvent> {
    use RouteNetlinkMessage as Message;

    let message = match payload {
        NetlinkPayload::InnerMessage(message) => message,
        NetlinkPayload::Overrun(_) => return Some(KernelEvent::Overrun),
        _ => return None,
    };
    let change = match message {
        Message::DelLink(_) | Message::DelAddress(_) | Message::DelRoute(_) | Message::DelNeighbour(_) => {
            Change::Deleted
        }
        _ => Change::New,
    };
    match message {
        Message::NewLink(message) | Message::DelLink(message) => {
            link::parse(&message).map(|link| KernelEvent::Link(change, link))
        }
        Message::NewAddress(message) | Message::DelAddress(message) => {
            let v4 = address::parse(&message).map(|address| KernelEvent::Address(change, address));
            v4.or_else(|| {
                address::parse(&message).map(|it| KernelEvent::Ipv6(Ipv6Event::Address(change, it)))
            })
        }
        Message::NewRoute(message) | Message::DelRoute(message) => {
            let v4 = route::parse(&message).map(|route| KernelEvent::Route(change, route));
            v4.or_else(|| route::parse(&message).map(|it| KernelEvent::Ipv6(Ipv6Event::Route(change, it))))
        }
        Message::NewRule(_) | Message::DelRule(_) => Some(KernelEvent::Rule),
        Message::NewQueueDiscipline(_) | Message::DelQueueDiscipline(_) => Some(KernelEvent::Queueing),
        Message::NewNeighbour(message) | Message::DelNeighbour(message) => {
            let v6 = KernelEvent::Ipv6;
            neighbour::parse(&message)
                .map(|it| KernelEvent::Neighbour(change, it))
                .or_else(|| neighbour::parse_fdb(&message).map(|it| KernelEvent::Fdb(change, it)))
                .or_else(|| neighbour::parse(&message).map(|it| v6(Ipv6Event::Neighbour(change, it))))
                .or_else(|| neighbour::parse_fdb(&message).map(|it| v6(Ipv6Event::Fdb(change, it))))
        }
        _ => None,
    }
}
