//! The host's connection table (ctnetlink): which connections it translates, and one that it has not seen itself.

mod message;

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use loden_ebpf::transport;
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
            sockopt::ReceiveTimeout,
        },
        time::{TimeVal, TimeValLike as _},
    },
};

use self::message::{CHANGE, CREATE, Connection, DELETE, DUMP, GET, NEW, REQUEST, Request, TRANSLATED};
use super::sysctl;
use crate::family::Family;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// For how long the table holds a connection that we enter, in seconds, while no packet of it is seen: what Linux gives
/// those that it has seen, by default.
const TCP_TIMEOUT: u32 = 432_000;
const UDP_TIMEOUT: u32 = 120;

/// Source and destination of a packet before the host translates it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Path<F: Family> {
    /// Who sends.
    pub source: F::Addr,
    /// To whom, as far as the sender knows.
    pub destination: F::Addr,
}

/// Addresses and ports of packets of one direction of a flow, TCP's or UDP's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tuple<F: Family> {
    /// Protocol number.
    pub protocol: u8,
    /// Who sends, from which port.
    pub source: (F::Addr, u16),
    /// To whom.
    pub destination: (F::Addr, u16),
}

impl<F: Family> Tuple<F> {
    fn reversed(&self) -> Self {
        Self { source: self.destination, destination: self.source, ..*self }
    }
}

/// What became of a tuple that two flows had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The host knows it now as that of the connection that is not translated.
    Given,
    /// The translated flow keeps it, as somebody has answered it.
    Kept,
    /// No translated flow has it.
    Free,
}

/// The packets that the host translates now, of both directions of each connection of the family, in the network namespace
/// of the calling thread. Empty where no connection is tracked.
///
/// # Errors
///
/// Where the kernel has a connection table and does not show it.
pub fn translated<F: Family>() -> io::Result<BTreeSet<Path<F>>> {
    let mut paths = BTreeSet::new();
    if sysctl::get("net.netfilter.nf_conntrack_count").is_err() {
        return Ok(paths);
    }
    let table = Table::open()?;
    // The kernel compares all bits of a mask (since Linux 5.15; before, it tells of every connection): one by one.
    for status in TRANSLATED {
        table.ask(&Request::new::<F>(GET, DUMP).with_status(status), |connection| {
            paths.extend(connection.paths().filter(|_| connection.is_translated()).into_iter().flatten());
        })?;
    }
    Ok(paths)
}

/// Gives a tuple to the connection which has it without any translation, and takes it from a flow that the host has
/// translated to it, unless that has been answered: its next packet gets another tuple.
///
/// # Errors
///
/// Where the kernel has no connection table, or refuses the change.
pub fn give<F: Family>(tuple: &Tuple<F>) -> io::Result<Taken> {
    let table = Table::open()?;
    let reply = tuple.reversed();
    let mut found = None;
    let asked = table.ask(&Request::new::<F>(GET, REQUEST).replying(&reply), |connection| {
        found = Some((connection.is_translated(), connection.is_answered(), connection.id()));
    });
    match (asked, found) {
        (Err(error), _) if error.raw_os_error() == Some(Errno::ENOENT as i32) => {}
        (Err(error), _) => return Err(error),
        (Ok(()), Some((true, false, Some(id)))) => {
            table.ask(&Request::new::<F>(DELETE, CHANGE).replying(&reply).with_id(id), |_| ())?;
        }
        (Ok(()), Some((true, ..))) => return Ok(Taken::Kept),
        (Ok(()), _) => return Ok(Taken::Free),
    }
    let timeout = if tuple.protocol == transport::TCP { TCP_TIMEOUT } else { UDP_TIMEOUT };
    match table.ask(&Request::new::<F>(NEW, CREATE).established(tuple, timeout), |_| ()) {
        // One of its packets was quicker.
        Err(error) if error.raw_os_error() == Some(Errno::EEXIST as i32) => Ok(Taken::Given),
        done => done.map(|()| Taken::Given),
    }
}

/// The table of the network namespace of the calling thread.
struct Table {
    fd: OwnedFd,
}

impl Table {
    fn open() -> io::Result<Self> {
        let netfilter = SockProtocol::NetlinkNetFilter;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, netfilter)?;
        setsockopt(&fd, ReceiveTimeout, &TimeVal::seconds(5))?;
        Ok(Self { fd })
    }

    /// Sends a request and hands on each connection of the answer.
    fn ask(&self, request: &Request, mut each: impl FnMut(&Connection<'_>)) -> io::Result<()> {
        send(self.fd.as_raw_fd(), &request.bytes(), MsgFlags::empty())?;
        let mut buffer = vec![0; 1 << 16];
        loop {
            let length = match recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                length => length?,
            };
            let mut rest = &buffer[..length];
            while let Some((kind, body, after)) = message::message(rest) {
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        return match body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code)) {
                            0 => Ok(()),
                            errno => Err(io::Error::from_raw_os_error(errno.saturating_neg())),
                        };
                    }
                    _ => {
                        Connection::of(body).iter().for_each(&mut each);
                        // One that was asked for stands alone, without anything after it.
                        if request.wants_one() {
                            return Ok(());
                        }
                    }
                }
                rest = after;
            }
        }
    }
}
