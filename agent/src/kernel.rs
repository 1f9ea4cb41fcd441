//! The kernel's network objects over rtnetlink: links, addresses, routes, neighbours, FDB entries, and their
//! events.
//!
//! The only module that uses rtnetlink, its packet types and those of generic netlink; nothing of them is visible outside. It reads
//! and writes what it is told to; what ought to be there is decided in [`crate::overlay`]. A dump that the
//! kernel marks as interrupted (something changed while it was read) is read again, so that a caller sees
//! one state and not a mix of two. What has an address is of one family, IPv4 where none is named.

mod address;
pub mod conntrack;
mod event;
mod group;
mod headroom;
pub mod ipvs;
mod link;
mod neighbour;
mod netns;
pub mod offload;
mod peers;
mod proxy;
mod route;
mod ruleset;
pub mod sysctl;
mod veth;
mod vxlan;
mod wireguard;
pub mod xfrm;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{Stream, StreamExt as _};
use nix::errno::Errno;
use rtnetlink::{
    Handle,
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
        NetlinkMessage, NetlinkPayload,
    },
    packet_route::{AddressFamily, RouteNetlinkMessage},
};
use tokio::{
    sync::Mutex,
    task::AbortHandle,
    time::{sleep, timeout},
};

use crate::family::Family;

pub use self::{
    address::{Address, AddressScope},
    event::{Change, Events, Ipv6Event, KernelEvent},
    headroom::room_for,
    link::{Link, LinkKind, VxlanAttrs},
    neighbour::{FdbEntry, FdbOf, Neighbour, NeighbourState},
    peers::{OpError, Removed},
    route::{
        ROUTE_PROTOCOL, Route, RouteKind, RouteTo, TABLE_LOCAL, TABLE_MAIN, default_metric, default_scope,
    },
    ruleset::RulesetEvents,
    veth::{POD_ROUTE_PROTOCOL, VethSpec, default_route, pod_route},
    vxlan::{DEFAULT_PORT, VxlanDevice, VxlanSpec, overhead},
    wireguard::{WireguardDevice, WireguardSocket, WireguardSpec},
};
pub(crate) use self::{
    link::interface_name, route::PROTOCOL_BOOT, vxlan::random_mac, wireguard::is_wireguard,
};

/// What all functions here return.
pub type Result<T, E = KernelError> = std::result::Result<T, E>;

/// How long one answer of the kernel may take. It answers at once; only a lost message can take longer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// How often a dump is tried that changes while it is read.
const DUMP_TRIES: u32 = 20;

/// How long the rest of a dump that nobody waits for may keep the socket.
const BUSY_PAUSE: Duration = Duration::from_millis(10);

/// Why the kernel did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// No netlink socket.
    #[error("a netlink socket cannot be opened: {0}")]
    Connect(#[source] io::Error),
    /// The kernel said no.
    #[error("{what}: {source}")]
    Refused {
        /// What was asked, in words.
        what: String,
        /// The kernel's errno.
        source: io::Error,
    },
    /// The kernel said that we may not.
    #[error("{what}: {source}: this takes the capability CAP_NET_ADMIN")]
    NotPermitted {
        /// What was asked, in words.
        what: String,
        /// EPERM.
        source: io::Error,
    },
    /// The connection has ended: a bug or a dead runtime.
    #[error("{what}: the netlink connection is closed")]
    Closed {
        /// What was asked, in words.
        what: String,
    },
    /// No answer within ten seconds.
    #[error("{what}: the kernel has not answered within {} s", ANSWER_LIMIT.as_secs())]
    Silent {
        /// What was asked, in words.
        what: String,
    },
    /// The objects changed each time while they were listed.
    #[error("{what}: the list changed {DUMP_TRIES} times while it was read")]
    Restless {
        /// What was asked, in words.
        what: String,
    },
    /// An answer that is not understood. What it was is not said, as it may hold keys.
    #[error("{what}: the kernel's answer is not understood")]
    Unreadable {
        /// What was asked, in words.
        what: String,
    },
    /// The kernel has no WireGuard, or may not load it for us.
    #[error(
        "this kernel has no WireGuard, which the backend wireguard needs: it takes the module wireguard (`modprobe \
         wireguard`; Linux 5.6 or newer, CONFIG_WIREGUARD); or choose another Backend.Type"
    )]
    NoWireguard,
    /// A link that ought to be there is not.
    #[error("there is no link {0}")]
    NoLink(String),
    /// Another device has the VNI and port that are wanted.
    #[error(
        "{name} cannot be created: {other} has VNI {vni} on UDP port {port} already; \
         remove it, or choose another VNI or Port in the network config"
    )]
    VniTaken {
        /// The device that was to be created.
        name: String,
        /// The device that is in the way.
        other: String,
        /// The VXLAN network identifier, 0 to 2^24-1.
        vni: u32,
        /// The UDP port.
        port: u16,
    },
    /// The link's name is longer than the kernel takes (15 bytes), or empty.
    #[error("link name {0:?} must have 1 to 15 bytes, none of them a slash or a blank")]
    BadName(String),
    /// A MAC address was set and something (systemd's MACAddressPolicy, for one) changes it again and again.
    #[error("the MAC address of {name} does not stay: it was set to {wanted}, it is {found}")]
    MacChanged {
        /// The device.
        name: String,
        /// The address that was set.
        wanted: String,
        /// The address that was read back.
        found: String,
    },
    /// A sysctl could not be read or written.
    #[error(transparent)]
    Sysctl(#[from] sysctl::SysctlError),
}

impl KernelError {
    /// The errno with which the kernel refused, where it did.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { source, .. } | Self::NotPermitted { source, .. } => {
                source.raw_os_error().map(Errno::from_raw)
            }
            _ => None,
        }
    }

    /// Whether the kernel refused for what was asked, and not because it had no memory, time or buffer for it.
    #[must_use]
    pub fn is_an_answer(&self) -> bool {
        let passing = [Errno::ENOBUFS, Errno::ENOMEM, Errno::EINTR, Errno::EBUSY];
        self.errno().is_some_and(|errno| !passing.contains(&errno))
    }
}

/// One rtnetlink connection, in the network namespace of the thread that made it. Clones share it; it ends
/// with the last one.
#[derive(Debug, Clone)]
pub struct Kernel {
    handle: Handle,
    /// One socket carries one dump at a time; the kernel answers EBUSY to a second.
    dumping: Arc<Mutex<()>>,
    requests: Arc<AtomicU64>,
    _connection: Arc<Connection>,
}

#[derive(Debug)]
struct Connection(AbortHandle);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Kernel {
    /// Opens a connection. Must be called inside a tokio runtime, which carries it from then on.
    ///
    /// # Errors
    ///
    /// [`KernelError::Connect`] where the kernel grants no netlink socket.
    pub fn connect() -> Result<Self> {
        let (mut connection, handle, _) =
            rtnetlink::new_connection_with_strict_check().map_err(KernelError::Connect)?;
        // Seen here, an end of a dump and an acknowledgement tell a whole answer from a dead connection.
        connection.set_forward_done(true);
        connection.set_forward_ack(true);
        let connection = Arc::new(Connection(tokio::spawn(connection).abort_handle()));
        Ok(Self { handle, dumping: Arc::default(), requests: Arc::default(), _connection: connection })
    }

    /// How many requests were made so far, dumps counted once.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Sends a request; `None` where the connection is closed.
    fn request(
        &self,
        request: NetlinkMessage<RouteNetlinkMessage>,
    ) -> Option<impl Stream<Item = NetlinkMessage<RouteNetlinkMessage>>> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.handle.clone().request(request).ok()
    }

    /// Lists objects; the kernel filters by what `message` says where it can.
    async fn dump(&self, what: &str, message: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>> {
        self.dump_as(what, message, Some).await
    }

    /// As [`Self::dump`], of what `parse` makes of each object: many take less space so.
    async fn dump_as<T>(
        &self,
        what: &str,
        message: RouteNetlinkMessage,
        parse: impl Fn(RouteNetlinkMessage) -> Option<T>,
    ) -> Result<Vec<T>> {
        let _one = self.dumping.lock().await;
        for _ in 0..DUMP_TRIES {
            let request = with_flags(message.clone(), NLM_F_REQUEST | NLM_F_DUMP);
            match self.try_dump(what, request, &parse).await {
                Ok(Some(found)) => return Ok(found),
                Ok(None) => {}
                // Whoever waited for the dump before has gone away, and its rest is still on the way.
                Err(error) if error.errno() == Some(Errno::EBUSY) => sleep(BUSY_PAUSE).await,
                Err(error) => return Err(error),
            }
        }
        Err(KernelError::Restless { what: what.to_owned() })
    }

    /// One reading; `None` where it was interrupted by a change.
    async fn try_dump<T>(
        &self,
        what: &str,
        request: NetlinkMessage<RouteNetlinkMessage>,
        parse: &impl Fn(RouteNetlinkMessage) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let closed = || KernelError::Closed { what: what.to_owned() };
        let mut answers = self.request(request).ok_or_else(closed)?;
        let mut found = Vec::new();
        let mut interrupted = false;
        loop {
            let answer = timeout(ANSWER_LIMIT, answers.next())
                .await
                .map_err(|_| KernelError::Silent { what: what.to_owned() })?
                .ok_or_else(closed)?;
            interrupted |= answer.header.flags & NLM_F_DUMP_INTR != 0;
            match answer.payload {
                NetlinkPayload::InnerMessage(message) => found.extend(parse(message)),
                NetlinkPayload::Done(done) if done.code == 0 => return Ok((!interrupted).then_some(found)),
                NetlinkPayload::Done(done) => return Err(refused(what, done.code)),
                NetlinkPayload::Error(error) => return Err(refused(what, error.raw_code())),
                _ => return Ok(None),
            }
        }
    }

    /// Asks for one object.
    async fn get(&self, what: &str, message: RouteNetlinkMessage) -> Result<RouteNetlinkMessage> {
        let closed = || KernelError::Closed { what: what.to_owned() };
        let request = with_flags(message, NLM_F_REQUEST);
        let mut answers = self.request(request).ok_or_else(closed)?;
        let answer = timeout(ANSWER_LIMIT, answers.next())
            .await
            .map_err(|_| KernelError::Silent { what: what.to_owned() })?
            .ok_or_else(closed)?;
        match answer.payload {
            NetlinkPayload::InnerMessage(message) => Ok(message),
            NetlinkPayload::Error(error) => Err(refused(what, error.raw_code())),
            _ => Err(closed()),
        }
    }

    /// Changes one object and waits for the kernel's acknowledgement. Requests are sent in the order in
    /// which their futures are first polled, so several may be under way at once.
    async fn change(&self, what: impl Fn() -> String, message: RouteNetlinkMessage, how: How) -> Result<()> {
        let request = with_flags(message, NLM_F_REQUEST | NLM_F_ACK | how.flags());
        let closed = || KernelError::Closed { what: what() };
        let mut answers = self.request(request).ok_or_else(closed)?;
        loop {
            let answer = timeout(ANSWER_LIMIT, answers.next())
                .await
                .map_err(|_| KernelError::Silent { what: what() })?
                .ok_or_else(closed)?;
            match answer.payload {
                NetlinkPayload::Error(error) if error.code.is_none() => return Ok(()),
                NetlinkPayload::Error(error) => return Err(refused(&what(), error.raw_code())),
                _ => {}
            }
        }
    }
}

/// What becomes of an object that is there, and of one that is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// It must not be there yet.
    Create,
    /// Made, or put in the place of the one that is there.
    Replace,
    /// Changed or deleted: it must be there.
    Existing,
}

impl How {
    fn flags(self) -> u16 {
        match self {
            Self::Create => NLM_F_CREATE | NLM_F_EXCL,
            Self::Replace => NLM_F_CREATE | NLM_F_REPLACE,
            Self::Existing => 0,
        }
    }
}

fn wire_family<F: Family>() -> AddressFamily {
    if F::BITS == 32 { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn with_flags(message: RouteNetlinkMessage, flags: u16) -> NetlinkMessage<RouteNetlinkMessage> {
    let mut request = NetlinkMessage::from(message);
    request.header.flags = flags;
    request
}

fn refused(what: &str, code: i32) -> KernelError {
    let (what, source) = (what.to_owned(), io::Error::from_raw_os_error(code.abs()));
    if source.raw_os_error() == Some(Errno::EPERM as i32) {
        return KernelError::NotPermitted { what, source };
    }
    KernelError::Refused { what, source }
}

/// A MAC address in the form in which it is written everywhere: lower case, colons.
#[must_use]
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
