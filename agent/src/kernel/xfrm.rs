//! IPsec policies (XFRM): of which packets that leave this host the kernel wants more than to send them. Only those that
//! count for packets without a mark and outside of XFRM interfaces are read.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use nix::errno::Errno;
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_XFRM};

use super::{Kernel, Result, group::Group};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `NLM_F_REQUEST | NLM_F_DUMP` (linux/netlink.h).
const DUMP: u16 = 0x301;
/// `XFRM_MSG_NEWPOLICY`, `XFRM_MSG_GETPOLICY`, `XFRMNLGRP_POLICY` as a bit of the socket's groups, `XFRMA_TMPL`,
/// `XFRMA_MARK` and `XFRMA_IF_ID` (linux/xfrm.h).
const NEW_POLICY: u16 = 0x13;
const GET_POLICY: u16 = 0x15;
const GROUP: u32 = 1 << (4 - 1);
const TEMPLATES: u16 = 5;
const MARK: u16 = 21;
const INTERFACE_ID: u16 = 31;
/// `XFRM_POLICY_OUT`.
const OUT: u8 = 1;

/// More than the kernel puts into one datagram of a dump (32 KiB).
const DATAGRAM: usize = 64 * 1024;
/// Length of netlink's header, of `struct xfrm_userpolicy_id` and of `struct xfrm_userpolicy_info`, and where in the last
/// one the fields stand, in bytes. Its selector comes first.
const HEADER: usize = 16;
const ID_LEN: usize = 64;
const INFO_LEN: usize = 168;
const PRIORITY: usize = 152;
const DIRECTION: usize = 160;
const ACTION: usize = 161;

/// A policy for what this host sends or sends on. Of several that fit a packet the one with the lowest priority counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Policy {
    /// The lower the number, the earlier it counts.
    pub priority: u32,
    /// It wants nothing: neither a transformation nor that the packet be dropped.
    pub exempts: bool,
    /// Who sends.
    pub source: IpNet,
    /// To whom.
    pub destination: IpNet,
    /// Protocol number; 0 for all.
    pub protocol: u8,
    /// The port from which: a value and which of its bits count. Of other protocols than UDP and TCP something else.
    pub source_port: (u16, u16),
    /// The port to which.
    pub destination_port: (u16, u16),
    /// The link by which the packets leave; 0 for all.
    pub ifindex: u32,
}

/// The policies of the network namespace of the calling thread for what leaves it, the one that counts first in front; of
/// two with one priority, the one that wants something. None where the kernel has no IPsec.
///
/// # Errors
///
/// As the kernel says.
pub fn policies() -> io::Result<Vec<Policy>> {
    let socket = match Socket::new(NETLINK_XFRM) {
        Err(error) if error.raw_os_error() == Some(Errno::EPROTONOSUPPORT as i32) => return Ok(Vec::new()),
        socket => socket?,
    };
    socket.connect(&SocketAddr::new(0, 0))?;
    // The answer is there as soon as the request is sent: one that is not there will not come.
    socket.set_non_blocking(true)?;
    let length = (HEADER + ID_LEN) as u32;
    let mut request = length.to_ne_bytes().to_vec();
    request.extend(GET_POLICY.to_ne_bytes());
    request.extend(DUMP.to_ne_bytes());
    request.resize(HEADER + ID_LEN, 0);
    socket.send(&request, 0)?;
    let mut found = Vec::new();
    loop {
        let mut datagram = Vec::with_capacity(DATAGRAM);
        socket.recv(&mut datagram, 0)?;
        let mut rest = datagram.as_slice();
        while let Some((kind, body, after)) = message(rest) {
            match kind {
                NLMSG_DONE => {
                    // By priority, and by whether they exempt.
                    found.sort_unstable();
                    return Ok(found);
                }
                NLMSG_ERROR => {
                    let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                    return Err(io::Error::from_raw_os_error(code.saturating_neg()));
                }
                NEW_POLICY => found.extend(policy(body)),
                _ => {}
            }
            rest = after;
        }
    }
}

/// The first message: its type, its body and what follows.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let ([a, b, c, d, low, high], _) = bytes.split_first_chunk::<6>()?;
    let length = u32::from_ne_bytes([*a, *b, *c, *d]) as usize;
    let body = bytes.get(HEADER..length)?;
    let after = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((u16::from_ne_bytes([*low, *high]), body, after))
}

/// `None` for one that is not for what leaves, or that counts only for packets with a mark or for XFRM interfaces.
fn policy(body: &[u8]) -> Option<Policy> {
    let info = body.get(..INFO_LEN)?;
    let word = |at: usize| Some(u32::from_ne_bytes(*info.get(at..)?.first_chunk()?));
    let half = |at: usize| Some(u16::from_be_bytes(*info.get(at..)?.first_chunk()?));
    if info[DIRECTION] != OUT {
        return None;
    }
    let (mut transforms, mut rest) = (false, &body[INFO_LEN..]);
    while let Some(([a, b, low, high], _)) = rest.split_first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([*a, *b]));
        let value = rest.get(4..length)?;
        let number = |at: usize| {
            value.get(at..).and_then(|it| it.first_chunk()).map_or(0, |it| u32::from_ne_bytes(*it))
        };
        match u16::from_ne_bytes([*low, *high]) {
            TEMPLATES => transforms = !value.is_empty(),
            MARK if number(0) & number(4) != 0 => return None,
            INTERFACE_ID if number(0) != 0 => return None,
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    let is_ipv4 = i32::from(u16::from_ne_bytes(*info.get(40..)?.first_chunk()?)) == nix::libc::AF_INET;
    let net = |at: usize, len: u8| {
        let address: IpAddr = if is_ipv4 {
            Ipv4Addr::from(*info.get(at..)?.first_chunk::<4>()?).into()
        } else {
            Ipv6Addr::from(*info.get(at..)?.first_chunk::<16>()?).into()
        };
        Some(IpNet::new(address, len).ok()?.trunc())
    };
    Some(Policy {
        priority: word(PRIORITY)?,
        exempts: !transforms && info[ACTION] == 0,
        source: net(16, info[43])?,
        destination: net(0, info[42])?,
        protocol: info[44],
        source_port: (half(36)?, half(38)?),
        destination_port: (half(32)?, half(34)?),
        ifindex: word(48)?,
    })
}

/// Tells when policies have changed, from the moment of its making on.
pub struct PolicyEvents {
    group: Group,
}

impl Kernel {
    /// Begins to listen, on a socket of its own in the network namespace of the calling thread. Must be called inside a
    /// tokio runtime.
    ///
    /// # Errors
    ///
    /// [`KernelError::Connect`](super::KernelError::Connect) where the kernel grants no socket: it has no IPsec, or
    /// `CAP_NET_ADMIN` is missing.
    pub fn policy_events(&self) -> Result<PolicyEvents> {
        Ok(PolicyEvents { group: Group::join(NETLINK_XFRM, GROUP)? })
    }
}

impl PolicyEvents {
    /// Waits until policies have changed since the last call; several changes are one. May be dropped while it waits
    /// without losing a change.
    ///
    /// # Errors
    ///
    /// Where the socket has failed, and a new one must be made.
    pub async fn changed(&mut self) -> io::Result<()> {
        // Whatever it tells.
        self.group.changed(|_| true).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// For UDP from 10.0.0.0/8 to port 8472 of 10.1.2.0/24, as the kernel writes it.
    fn body(attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = vec![0; INFO_LEN];
        body[..4].copy_from_slice(&[10, 1, 2, 0]);
        body[16..20].copy_from_slice(&[10, 0, 0, 0]);
        body[32..34].copy_from_slice(&8472_u16.to_be_bytes());
        body[34..36].copy_from_slice(&[0xff; 2]);
        body[40..42].copy_from_slice(&2_u16.to_ne_bytes());
        body[42..45].copy_from_slice(&[24, 8, 17]);
        body[PRIORITY..PRIORITY + 4].copy_from_slice(&1000_u32.to_ne_bytes());
        body[DIRECTION] = OUT;
        for (kind, value) in attributes {
            let length = 4 + value.len();
            body.extend(u16::try_from(length).unwrap().to_ne_bytes());
            body.extend(kind.to_ne_bytes());
            body.extend(*value);
            body.resize(body.len().next_multiple_of(4), 0);
        }
        body
    }

    #[test]
    fn a_policy_is_read_with_its_selector() {
        let read = policy(&body(&[(16, &[0; 6]), (TEMPLATES, &[0; 64])])).unwrap();
        let expected = Policy {
            priority: 1000,
            exempts: false,
            source: "10.0.0.0/8".parse().unwrap(),
            destination: "10.1.2.0/24".parse().unwrap(),
            protocol: 17,
            source_port: (0, 0),
            destination_port: (8472, 0xffff),
            ifindex: 0,
        };
        assert_eq!(read, expected);
        assert!(policy(&body(&[])).unwrap().exempts);
        let mut blocks = body(&[]);
        blocks[ACTION] = 1;
        assert!(!policy(&blocks).unwrap().exempts);
    }

    #[test]
    fn policies_for_other_packets_are_passed_over() {
        let mark = [1_u32.to_ne_bytes(), 0xff_u32.to_ne_bytes()].concat();
        assert_eq!(policy(&body(&[(MARK, &mark)])), None);
        assert!(policy(&body(&[(MARK, &[0; 8])])).is_some());
        assert_eq!(policy(&body(&[(INTERFACE_ID, &7_u32.to_ne_bytes())])), None);
        let mut enters = body(&[]);
        enters[DIRECTION] = 0;
        assert_eq!(policy(&enters), None);
        assert_eq!(policy(&body(&[])[..100]), None);
        assert_eq!(policy(&[]), None);
    }

    #[test]
    fn messages_that_are_cut_end_the_list() {
        assert_eq!(message(&[]), None);
        assert_eq!(message(&[0xff; 20]), None);
        let mut whole = 20_u32.to_ne_bytes().to_vec();
        whole.extend(NLMSG_DONE.to_ne_bytes());
        whole.resize(20, 0);
        assert_eq!(message(&whole), Some((NLMSG_DONE, &[0; 4][..], &[][..])));
    }
}
