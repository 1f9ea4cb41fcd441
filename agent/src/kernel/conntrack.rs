//! Which connections the host translates, read from its connection table (ctnetlink).

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
        sockopt::ReceiveTimeout,
    },
    time::{TimeVal, TimeValLike as _},
};

use super::sysctl;
use crate::family::Family;

/// `IPS_SRC_NAT` and `IPS_DST_NAT` of linux/netfilter/nf_conntrack_common.h.
const TRANSLATED: [u32; 2] = [1 << 4, 1 << 5];
/// `NFNL_SUBSYS_CTNETLINK` and `IPCTNL_MSG_CT_GET` (linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h).
const GET: u16 = 1 << 8 | 1;
/// `NLM_F_REQUEST | NLM_F_DUMP` (linux/netlink.h).
const DUMP: u16 = 0x301;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;
/// `struct nfgenmsg`.
const GENERIC: usize = 4;
/// Attributes, as in `enum ctattr_type`, `ctattr_tuple` and `ctattr_ip`.
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const STATUS_MASK: u16 = 26;
const TUPLE_IP: u16 = 1;
const IP_SOURCE: u16 = 1;
const IP_DESTINATION: u16 = 2;
const IPV6_SOURCE: u16 = 3;
const IPV6_DESTINATION: u16 = 4;
/// Flags beside an attribute's type.
const TYPE: u16 = 0x3fff;

/// Source and destination of a packet before the host translates it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Path<F: Family> {
    /// Who sends.
    pub source: F::Addr,
    /// To whom, as far as the sender knows.
    pub destination: F::Addr,
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
    let netfilter = SockProtocol::NetlinkNetFilter;
    let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, netfilter)?;
    setsockopt(&fd, ReceiveTimeout, &TimeVal::seconds(5))?;
    // The kernel compares all bits of a mask (since Linux 5.15; before, it tells of every connection): one by one.
    for status in TRANSLATED {
        send(fd.as_raw_fd(), &request::<F>(status), MsgFlags::empty())?;
        receive(&fd, &mut paths)?;
    }
    Ok(paths)
}

fn request<F: Family>(status: u32) -> Vec<u8> {
    let mut message = Vec::new();
    let attributes = [(STATUS, status), (STATUS_MASK, status)];
    let length = HEADER + GENERIC + attributes.len() * 8;
    message.extend((length as u32).to_ne_bytes());
    message.extend(GET.to_ne_bytes());
    message.extend(DUMP.to_ne_bytes());
    message.extend([0; 8]);
    let family = if F::BITS == 32 { nix::libc::AF_INET } else { nix::libc::AF_INET6 };
    message.extend([family as u8, 0, 0, 0]);
    for (kind, value) in attributes {
        message.extend(8_u16.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(value.to_be_bytes());
    }
    message
}

fn receive<F: Family>(fd: &OwnedFd, paths: &mut BTreeSet<Path<F>>) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        let length = match recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Err(nix::Error::EINTR) => continue,
            length => length?,
        };
        let mut rest = &buffer[..length];
        while let Some((kind, body, after)) = message(rest) {
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    let errno = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                    return Err(io::Error::from_raw_os_error(errno.saturating_neg()));
                }
                _ => paths.extend(connection(body).into_iter().flatten()),
            }
            rest = after;
        }
    }
}

/// Type and body of the first netlink message, and what follows it.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::try_from(u32::from_ne_bytes(*bytes.first_chunk()?)).ok()?;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let body = bytes.get(HEADER..length)?;
    Some((kind, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// Both directions of a translated connection; `None` for one that is not, and for what cannot be read.
fn connection<F: Family>(body: &[u8]) -> Option<[Path<F>; 2]> {
    let attributes = body.get(GENERIC..)?;
    let status = u32::from_be_bytes(*attribute(attributes, STATUS)?.first_chunk()?);
    if TRANSLATED.iter().all(|bit| status & bit == 0) {
        return None;
    }
    let path = |kind| {
        let addresses = attribute(attribute(attributes, kind)?, TUPLE_IP)?;
        let (source, destination) =
            if F::BITS == 32 { (IP_SOURCE, IP_DESTINATION) } else { (IPV6_SOURCE, IPV6_DESTINATION) };
        let address = |kind| {
            let bytes = attribute(addresses, kind)?.get(..usize::from(F::BITS / 8))?;
            F::of_number(bytes.iter().fold(0, |number, byte| number << 8 | u128::from(*byte)))
        };
        Some(Path { source: address(source)?, destination: address(destination)? })
    };
    Some([path(TUPLE_ORIG)?, path(TUPLE_REPLY)?])
}

/// The payload of the first attribute of this type.
fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?) & TYPE;
        let payload = bytes.get(4..length)?;
        if kind == wanted {
            return Some(payload);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::{V4, V6};

    fn attribute_of(kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend((payload.len() as u16 + 4).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(payload);
        bytes
    }

    fn tuple(kind: u16, source: &[u8], destination: &[u8]) -> Vec<u8> {
        let family = if source.len() == 4 { 0 } else { 2 };
        let addresses =
            [attribute_of(family + IP_SOURCE, source), attribute_of(family + IP_DESTINATION, destination)]
                .concat();
        attribute_of(kind | 0x8000, &attribute_of(TUPLE_IP | 0x8000, &addresses))
    }

    fn body(status: u32) -> Vec<u8> {
        [
            vec![2, 0, 0, 0],
            tuple(TUPLE_ORIG, &[10, 5, 1, 2], &[10, 96, 0, 1]),
            tuple(TUPLE_REPLY, &[10, 5, 2, 2], &[10, 5, 1, 2]),
            attribute_of(STATUS, &status.to_be_bytes()),
        ]
        .concat()
    }

    #[test]
    fn a_translated_connection_is_read_and_another_is_not() {
        let expected = [([10, 5, 1, 2], [10, 96, 0, 1]), ([10, 5, 2, 2], [10, 5, 1, 2])]
            .map(|(source, destination)| Path { source: source.into(), destination: destination.into() });
        assert_eq!(connection::<V4>(&body(0x1 << 5 | 0xe)), Some(expected));
        assert_eq!(connection::<V4>(&body(0xe)), None, "confirmed and answered, not translated");
    }

    #[test]
    fn what_is_cut_short_is_no_connection() {
        let whole = body(1 << 4);
        for length in 0..whole.len() {
            assert_eq!(connection::<V4>(&whole[..length]), None, "{length} bytes");
        }
        assert_eq!(message(&[1, 0, 0]), None);
        assert_eq!(message(&[200, 0, 0, 0, 1, 1, 0, 0]), None);
    }

    #[test]
    fn addresses_of_ipv6_are_read_whole() {
        let address = |last: u8| std::net::Ipv6Addr::new(0xfc00, 0, 0, last.into(), 1, 2, 3, 4);
        let [a, b] = [address(1), address(2)];
        let body = [
            vec![10, 0, 0, 0],
            tuple(TUPLE_ORIG, &a.octets(), &b.octets()),
            tuple(TUPLE_REPLY, &b.octets(), &a.octets()),
            attribute_of(STATUS, &(1_u32 << 5).to_be_bytes()),
        ]
        .concat();
        let path = |source, destination| Path { source, destination };
        assert_eq!(connection::<V6>(&body), Some([path(a, b), path(b, a)]));
        assert_eq!(connection::<V4>(&body), None, "the other family's attributes");
    }
}
