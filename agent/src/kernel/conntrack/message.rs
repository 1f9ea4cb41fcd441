//! ctnetlink's messages, written and read. Attributes are numbered as in `enum ctattr_type` and those that follow it in
//! linux/netfilter/nfnetlink_conntrack.h; their numbers are in network order.

use super::{Path, Tuple};
use crate::family::Family;

/// `NFNL_SUBSYS_CTNETLINK` and the messages `IPCTNL_MSG_CT_…` (linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h).
const SUBSYSTEM: u16 = 1 << 8;
pub(super) const NEW: u16 = SUBSYSTEM;
pub(super) const GET: u16 = SUBSYSTEM | 1;
pub(super) const DELETE: u16 = SUBSYSTEM | 2;
/// `NLM_F_REQUEST`, and with it `NLM_F_ACK`, `NLM_F_DUMP` or `NLM_F_ACK | NLM_F_EXCL | NLM_F_CREATE` (linux/netlink.h).
pub(super) const REQUEST: u16 = 1;
pub(super) const CHANGE: u16 = 5;
pub(super) const DUMP: u16 = 0x301;
pub(super) const CREATE: u16 = 0x605;
const HEADER: usize = 16;
/// `struct nfgenmsg`.
const GENERIC: usize = 4;

pub(super) const TUPLE_ORIG: u16 = 1;
pub(super) const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOINFO: u16 = 4;
const TIMEOUT: u16 = 7;
const ID: u16 = 12;
const STATUS_MASK: u16 = 26;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
pub(super) const IP_SOURCE: u16 = 1;
pub(super) const IP_DESTINATION: u16 = 2;
const IPV6_SOURCE: u16 = 3;
const IPV6_DESTINATION: u16 = 4;
const PROTO_NUMBER: u16 = 1;
const PROTO_SOURCE_PORT: u16 = 2;
const PROTO_DESTINATION_PORT: u16 = 3;
const PROTOINFO_TCP: u16 = 1;
const TCP_STATE: u16 = 1;
/// `TCP_CONNTRACK_ESTABLISHED` (linux/netfilter/nf_conntrack_tcp.h).
const TCP_ESTABLISHED: u8 = 3;
/// `NLA_F_NESTED`, and the flags beside an attribute's type.
const NESTED: u16 = 0x8000;
const TYPE: u16 = 0x3fff;

/// `IPS_SEEN_REPLY`, `IPS_ASSURED`, `IPS_CONFIRMED`, `IPS_SRC_NAT` and `IPS_DST_NAT` of
/// linux/netfilter/nf_conntrack_common.h.
const SEEN_REPLY: u32 = 1 << 1;
const ASSURED: u32 = 1 << 2;
const CONFIRMED: u32 = 1 << 3;
/// Either says that the connection is translated.
pub(super) const TRANSLATED: [u32; 2] = [1 << 4, 1 << 5];

/// A request about the connections of a family.
pub(super) struct Request {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Request {
    pub(super) fn new<F: Family>(kind: u16, flags: u16) -> Self {
        let family = if F::BITS == 32 { nix::libc::AF_INET } else { nix::libc::AF_INET6 };
        Self { kind, flags, body: vec![family as u8, 0, 0, 0] }
    }

    /// Of those whose status has this bit.
    pub(super) fn with_status(self, bit: u32) -> Self {
        self.with(&number(STATUS, bit)).with(&number(STATUS_MASK, bit))
    }

    /// Of the one whose replies have this tuple.
    pub(super) fn replying<F: Family>(self, reply: &Tuple<F>) -> Self {
        self.with(&tuple(TUPLE_REPLY, reply))
    }

    /// Of that, and only if it is still the one which had this id.
    pub(super) fn with_id(self, id: u32) -> Self {
        self.with(&number(ID, id))
    }

    /// As one that is established and not translated, to be forgotten after so many seconds.
    pub(super) fn established<F: Family>(self, original: &Tuple<F>, timeout: u32) -> Self {
        let request = self
            .with(&tuple(TUPLE_ORIG, original))
            .with(&tuple(TUPLE_REPLY, &original.reversed()))
            .with(&number(STATUS, SEEN_REPLY | ASSURED | CONFIRMED))
            .with(&number(TIMEOUT, timeout));
        if original.protocol != loden_ebpf::transport::TCP {
            return request;
        }
        let state = attribute(TCP_STATE, &[TCP_ESTABLISHED]);
        request.with(&nested(PROTOINFO, &[nested(PROTOINFO_TCP, &[state])]))
    }

    fn with(mut self, attribute: &[u8]) -> Self {
        self.body.extend(attribute);
        self
    }

    /// Whether the answer is one message, not to be followed by its end.
    pub(super) fn wants_one(&self) -> bool {
        self.flags == REQUEST
    }

    /// The message's bytes.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut message = Vec::new();
        message.extend(((HEADER + self.body.len()) as u32).to_ne_bytes());
        message.extend(self.kind.to_ne_bytes());
        message.extend(self.flags.to_ne_bytes());
        message.extend([0; 8]);
        message.extend(&self.body);
        message
    }
}

/// An attribute, padded.
pub(super) fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend((payload.len() as u16 + 4).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

pub(super) fn nested(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NESTED, &attributes.concat())
}

pub(super) fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

pub(super) fn tuple<F: Family>(kind: u16, tuple: &Tuple<F>) -> Vec<u8> {
    let Tuple { protocol, source: (source, source_port), destination: (destination, destination_port) } =
        *tuple;
    let address = |kind, address: F::Addr| match address.into() {
        std::net::IpAddr::V4(address) => attribute(kind, &address.octets()),
        std::net::IpAddr::V6(address) => attribute(kind, &address.octets()),
    };
    let [source_kind, destination_kind] = address_kinds::<F>();
    let addresses = [address(source_kind, source), address(destination_kind, destination)];
    let protocol = [
        attribute(PROTO_NUMBER, &[protocol]),
        attribute(PROTO_SOURCE_PORT, &source_port.to_be_bytes()),
        attribute(PROTO_DESTINATION_PORT, &destination_port.to_be_bytes()),
    ];
    nested(kind, &[nested(TUPLE_IP, &addresses), nested(TUPLE_PROTO, &protocol)])
}

fn address_kinds<F: Family>() -> [u16; 2] {
    if F::BITS == 32 { [IP_SOURCE, IP_DESTINATION] } else { [IPV6_SOURCE, IPV6_DESTINATION] }
}

/// What the kernel tells of a connection.
pub(super) struct Connection<'a> {
    attributes: &'a [u8],
    status: u32,
}

impl<'a> Connection<'a> {
    /// `None` for what cannot be read.
    pub(super) fn of(body: &'a [u8]) -> Option<Self> {
        let attributes = body.get(GENERIC..)?;
        let status = u32::from_be_bytes(*find(attributes, STATUS)?.first_chunk()?);
        Some(Self { attributes, status })
    }

    pub(super) fn is_translated(&self) -> bool {
        TRANSLATED.iter().any(|bit| self.status & bit != 0)
    }

    /// Whether the other side was heard.
    pub(super) fn is_answered(&self) -> bool {
        self.status & SEEN_REPLY != 0
    }

    /// The kernel's number for it.
    pub(super) fn id(&self) -> Option<u32> {
        Some(u32::from_be_bytes(*find(self.attributes, ID)?.first_chunk()?))
    }

    /// The addresses of both directions.
    pub(super) fn paths<F: Family>(&self) -> Option<[Path<F>; 2]> {
        Some([self.path(TUPLE_ORIG)?, self.path(TUPLE_REPLY)?])
    }

    fn path<F: Family>(&self, direction: u16) -> Option<Path<F>> {
        let addresses = find(find(self.attributes, direction)?, TUPLE_IP)?;
        let address = |kind| {
            let bytes = find(addresses, kind)?.get(..usize::from(F::BITS / 8))?;
            F::of_number(bytes.iter().fold(0, |number, byte| number << 8 | u128::from(*byte)))
        };
        let [source, destination] = address_kinds::<F>();
        Some(Path { source: address(source)?, destination: address(destination)? })
    }
}

/// Type and body of the first netlink message, and what follows it.
pub(super) fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::try_from(u32::from_ne_bytes(*bytes.first_chunk()?)).ok()?;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let body = bytes.get(HEADER..length)?;
    Some((kind, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// The payload of the first attribute of this type.
fn find(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
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
    use std::net::Ipv6Addr;

    use super::*;
    use crate::family::{V4, V6};

    /// Of a pod's connection to a service, by an address and port each.
    fn tuples() -> [Tuple<V4>; 2] {
        let address = |octets: [u8; 4]| std::net::Ipv4Addr::from(octets);
        let [pod, service, backend] = [[10, 5, 1, 2], [10, 96, 0, 1], [10, 5, 2, 2]].map(address);
        [
            Tuple { protocol: 6, source: (pod, 5000), destination: (service, 80) },
            Tuple { protocol: 6, source: (backend, 8080), destination: (pod, 5000) },
        ]
    }

    fn body(status: u32) -> Vec<u8> {
        let [original, reply] = tuples();
        let tuples = [tuple(TUPLE_ORIG, &original), tuple(TUPLE_REPLY, &reply)];
        [vec![2, 0, 0, 0], tuples.concat(), number(STATUS, status), number(ID, 77)].concat()
    }

    #[test]
    fn a_connection_is_read() {
        let (translated, direct) = (body(1 << 5 | CONFIRMED), body(SEEN_REPLY | CONFIRMED));
        let (translated, direct) = (Connection::of(&translated).unwrap(), Connection::of(&direct).unwrap());
        assert!(translated.is_translated() && !translated.is_answered());
        assert!(!direct.is_translated() && direct.is_answered());
        let paths = tuples().map(|it| Path::<V4> { source: it.source.0, destination: it.destination.0 });
        assert_eq!(translated.paths(), Some(paths));
        assert_eq!(translated.paths::<V6>(), None, "the other family's attributes");
        assert_eq!(translated.id(), Some(77));
    }

    #[test]
    fn what_is_cut_short_is_no_connection() {
        let whole = body(1 << 4);
        let without_id = whole.len() - number(ID, 77).len();
        for length in 0..without_id {
            assert!(Connection::of(&whole[..length]).is_none(), "{length} bytes");
        }
        assert_eq!(message(&[1, 0, 0]), None);
        assert_eq!(message(&[200, 0, 0, 0, 1, 1, 0, 0]), None);
    }

    #[test]
    fn addresses_of_ipv6_are_read_whole() {
        let address = |last: u8| Ipv6Addr::new(0xfc00, 0, 0, last.into(), 1, 2, 3, 4);
        let original = Tuple::<V6> { protocol: 17, source: (address(1), 1), destination: (address(2), 2) };
        let tuples = [tuple(TUPLE_ORIG, &original), tuple(TUPLE_REPLY, &original.reversed())].concat();
        let body = [vec![10, 0, 0, 0], tuples, number(STATUS, 1 << 5)].concat();
        let path = |source, destination| Path { source, destination };
        let expected = [path(address(1), address(2)), path(address(2), address(1))];
        assert_eq!(Connection::of(&body).unwrap().paths::<V6>(), Some(expected));
    }

    #[test]
    fn a_request_is_as_long_as_it_says() {
        for request in [
            Request::new::<V4>(GET, DUMP).with_status(TRANSLATED[0]),
            Request::new::<V4>(DELETE, CHANGE).replying(&tuples()[1]).with_id(7),
            Request::new::<V4>(NEW, CREATE).established(&tuples()[0], 120),
        ] {
            let bytes = request.bytes();
            let (kind, body, rest) = message(&bytes).unwrap();
            assert_eq!((kind, rest.len()), (request.kind, 0));
            assert_eq!(body, request.body);
        }
    }
}
