//! Frames, built layer by layer from the outside in, with lengths and checksums that are right unless a test
//! says otherwise. Written from the RFCs, and on purpose without any code of the programs.

use std::net::Ipv4Addr;

/// EtherType of IPv4.
pub(crate) const IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub(crate) const ARP: u16 = 0x0806;
/// EtherType of IPv6.
pub(crate) const IPV6: u16 = 0x86dd;
/// IP protocol numbers (IANA).
pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const GRE: u8 = 47;
pub(crate) const ESP: u8 = 50;
pub(crate) const SCTP: u8 = 132;
/// TCP flags (RFC 9293).
pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const PSH: u8 = 8;
pub(crate) const ACK: u8 = 16;
/// Fragment field of an IPv4 header (RFC 791): don't fragment, more fragments.
pub(crate) const DF: u16 = 0x4000;
pub(crate) const MF: u16 = 0x2000;

/// A MAC address.
pub(crate) type Mac = [u8; 6];

#[derive(Clone, Debug)]
struct Ip {
    version: u8,
    tos: u8,
    total_len: Option<u16>,
    id: u16,
    fragment: u16,
    ttl: u8,
    protocol: Option<u8>,
    checksum_error: u16,
    source: Ipv4Addr,
    destination: Ipv4Addr,
    options: Vec<u8>,
}

#[derive(Clone, Debug)]
enum Layer {
    Ethernet { destination: Mac, source: Mac, ether_type: u16 },
    Vlan { id: u16, ether_type: u16 },
    Ip(Ip),
    Tcp { ports: (u16, u16), flags: u8, sequence: u32 },
    Udp { ports: (u16, u16), length: Option<u16>, checksum: Option<u16> },
    Icmp { kind: u8, code: u8, id: u16, sequence: u16 },
    Bytes(Vec<u8>),
}

/// A frame in the making. Settings act on the last layer of their kind that was added.
#[derive(Clone, Debug)]
pub(crate) struct Packet {
    layers: Vec<Layer>,
}

impl Packet {
    /// Starts a frame.
    pub(crate) fn ethernet(destination: Mac, source: Mac) -> Self {
        Self { layers: vec![Layer::Ethernet { destination, source, ether_type: IPV4 }] }
    }

    /// Adds an IPv4 header: TTL 64, don't fragment.
    pub(crate) fn ipv4(mut self, source: Ipv4Addr, destination: Ipv4Addr) -> Self {
        self.layers.push(Layer::Ip(Ip {
            version: 4,
            tos: 0,
            total_len: None,
            id: 0x1234,
            fragment: DF,
            ttl: 64,
            protocol: None,
            checksum_error: 0,
            source,
            destination,
            options: Vec::new(),
        }));
        self
    }

    /// Adds a TCP header without options.
    pub(crate) fn tcp(mut self, source: u16, destination: u16, flags: u8) -> Self {
        self.layers.push(Layer::Tcp { ports: (source, destination), flags, sequence: 0x0102_0304 });
        self
    }

    /// Adds a UDP header.
    pub(crate) fn udp(mut self, source: u16, destination: u16) -> Self {
        self.layers.push(Layer::Udp { ports: (source, destination), length: None, checksum: None });
        self
    }

    /// Adds an ICMP header; `id` and `sequence` are the second word, whatever the type makes of it.
    pub(crate) fn icmp(mut self, kind: u8, code: u8, id: u16, sequence: u16) -> Self {
        self.layers.push(Layer::Icmp { kind, code, id, sequence });
        self
    }

    /// Adds a VXLAN header (RFC 7348) with the I flag.
    pub(crate) fn vxlan(self, vni: u32) -> Self {
        self.vxlan_words(0x0800_0000, vni << 8)
    }

    /// Adds a VXLAN header of these two words.
    pub(crate) fn vxlan_words(self, flags: u32, vni: u32) -> Self {
        self.bytes(&[flags.to_be_bytes(), vni.to_be_bytes()].concat())
    }

    /// Adds bytes.
    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.layers.push(Layer::Bytes(bytes.to_vec()));
        self
    }

    /// Adds this many bytes that differ from their neighbours.
    pub(crate) fn payload(self, len: usize) -> Self {
        let bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        self.bytes(&bytes)
    }

    /// Puts another frame behind what there is.
    pub(crate) fn then(mut self, inner: Self) -> Self {
        self.layers.extend(inner.layers);
        self
    }

    pub(crate) fn macs(mut self, new_destination: Mac, new_source: Mac) -> Self {
        for layer in self.layers.iter_mut().rev() {
            if let Layer::Ethernet { destination, source, .. } = layer {
                (*destination, *source) = (new_destination, new_source);
                break;
            }
        }
        self
    }

    pub(crate) fn ether_type(mut self, value: u16) -> Self {
        for layer in self.layers.iter_mut().rev() {
            if let Layer::Ethernet { ether_type, .. } = layer {
                *ether_type = value;
                break;
            }
        }
        self
    }

    /// Puts an 802.1Q tag behind the first Ethernet header.
    pub(crate) fn vlan(mut self, id: u16) -> Self {
        if let Some(Layer::Ethernet { ether_type, .. }) = self.layers.first_mut() {
            let inner = std::mem::replace(ether_type, 0x8100);
            self.layers.insert(1, Layer::Vlan { id, ether_type: inner });
        }
        self
    }

    fn ip(mut self, change: impl FnOnce(&mut Ip)) -> Self {
        let last = self.layers.iter_mut().rev().find_map(|layer| match layer {
            Layer::Ip(ip) => Some(ip),
            _ => None,
        });
        change(last.expect("an IPv4 header was added"));
        self
    }

    pub(crate) fn version(self, version: u8) -> Self {
        self.ip(|ip| ip.version = version)
    }

    pub(crate) fn tos(self, tos: u8) -> Self {
        self.ip(|ip| ip.tos = tos)
    }

    pub(crate) fn ttl(self, ttl: u8) -> Self {
        self.ip(|ip| ip.ttl = ttl)
    }

    pub(crate) fn id(self, id: u16) -> Self {
        self.ip(|ip| ip.id = id)
    }

    /// Flags and offset, the offset in units of eight bytes.
    pub(crate) fn fragment(self, fragment: u16) -> Self {
        self.ip(|ip| ip.fragment = fragment)
    }

    pub(crate) fn protocol(self, protocol: u8) -> Self {
        self.ip(|ip| ip.protocol = Some(protocol))
    }

    pub(crate) fn options(self, options: &[u8]) -> Self {
        self.ip(|ip| ip.options = options.to_vec())
    }

    /// A total length that need not be right.
    pub(crate) fn total_len(self, total_len: u16) -> Self {
        self.ip(|ip| ip.total_len = Some(total_len))
    }

    /// Adds this to the header checksum (one's complement), which then is wrong by it.
    pub(crate) fn checksum_error(self, error: u16) -> Self {
        self.ip(|ip| ip.checksum_error = error)
    }

    pub(crate) fn from(self, source: Ipv4Addr) -> Self {
        self.ip(|ip| ip.source = source)
    }

    pub(crate) fn to(self, destination: Ipv4Addr) -> Self {
        self.ip(|ip| ip.destination = destination)
    }

    fn last_udp(mut self, change: impl FnOnce(&mut Option<u16>, &mut Option<u16>)) -> Self {
        let last = self.layers.iter_mut().rev().find_map(|layer| match layer {
            Layer::Udp { length, checksum, .. } => Some((length, checksum)),
            _ => None,
        });
        let (length, checksum) = last.expect("a UDP header was added");
        change(length, checksum);
        self
    }

    /// A UDP length that need not be right.
    pub(crate) fn udp_len(self, value: u16) -> Self {
        self.last_udp(|length, _| *length = Some(value))
    }

    /// A UDP checksum that need not be right; zero for none.
    pub(crate) fn udp_checksum(self, value: u16) -> Self {
        self.last_udp(|_, checksum| *checksum = Some(value))
    }

    /// Sets what a sender of VXLAN is free to choose: the first IPv4 header's identification and the first UDP
    /// header's source port.
    pub(crate) fn outer_choice(mut self, id: u16, source_port: u16) -> Self {
        if let Some(Layer::Ip(ip)) = self.layers.iter_mut().find(|layer| matches!(layer, Layer::Ip(_))) {
            ip.id = id;
        }
        if let Some(Layer::Udp { ports, .. }) =
            self.layers.iter_mut().find(|layer| matches!(layer, Layer::Udp { .. }))
        {
            ports.0 = source_port;
        }
        self
    }

    /// The frame's bytes.
    pub(crate) fn build(&self) -> Vec<u8> {
        let mut rest = Vec::new();
        for (at, layer) in self.layers.iter().enumerate().rev() {
            let before = at.checked_sub(1).and_then(|before| self.layers.get(before));
            rest = layer.build(before, self.layers.get(at + 1), &rest);
        }
        rest
    }
}

impl Layer {
    fn build(&self, before: Option<&Self>, after: Option<&Self>, rest: &[u8]) -> Vec<u8> {
        let mut out = match self {
            Self::Ethernet { destination, source, ether_type } => {
                [&destination[..], source, &ether_type.to_be_bytes()].concat()
            }
            Self::Vlan { id, ether_type } => [id.to_be_bytes(), ether_type.to_be_bytes()].concat(),
            Self::Ip(ip) => ip.build(after, rest.len()),
            Self::Tcp { ports, flags, sequence } => {
                let mut header = vec![0; 20];
                header[0..2].copy_from_slice(&ports.0.to_be_bytes());
                header[2..4].copy_from_slice(&ports.1.to_be_bytes());
                header[4..8].copy_from_slice(&sequence.to_be_bytes());
                header[12] = 5 << 4;
                header[13] = *flags;
                header[14..16].copy_from_slice(&0xfaf0u16.to_be_bytes());
                let sum = transport_checksum(before, TCP, &header, rest);
                header[16..18].copy_from_slice(&sum.to_be_bytes());
                header
            }
            Self::Udp { ports, length, checksum } => {
                let length = length.unwrap_or(8 + rest.len() as u16);
                let mut header =
                    [ports.0.to_be_bytes(), ports.1.to_be_bytes(), length.to_be_bytes(), [0, 0]].concat();
                let sum = checksum.unwrap_or_else(|| match transport_checksum(before, UDP, &header, rest) {
                    // RFC 768: a computed zero is sent as all ones.
                    0 => 0xffff,
                    sum => sum,
                });
                header[6..8].copy_from_slice(&sum.to_be_bytes());
                header
            }
            Self::Icmp { kind, code, id, sequence } => {
                let mut header =
                    [&[*kind, *code, 0, 0][..], &id.to_be_bytes(), &sequence.to_be_bytes()].concat();
                let sum = internet_checksum(&[&header, rest]);
                header[2..4].copy_from_slice(&sum.to_be_bytes());
                header
            }
            Self::Bytes(bytes) => bytes.clone(),
        };
        out.extend_from_slice(rest);
        out
    }
}

impl Ip {
    fn build(&self, after: Option<&Layer>, rest: usize) -> Vec<u8> {
        let protocol = self.protocol.unwrap_or(match after {
            Some(Layer::Tcp { .. }) => TCP,
            Some(Layer::Udp { .. }) => UDP,
            Some(Layer::Icmp { .. }) => ICMP,
            _ => 253,
        });
        let header_len = 20 + self.options.len();
        assert!(self.options.len().is_multiple_of(4), "options fill words");
        let total_len = self.total_len.unwrap_or((header_len + rest) as u16);
        let mut out = vec![self.version << 4 | (header_len / 4) as u8, self.tos];
        out.extend(total_len.to_be_bytes());
        out.extend(self.id.to_be_bytes());
        out.extend(self.fragment.to_be_bytes());
        out.extend([self.ttl, protocol, 0, 0]);
        out.extend(self.source.octets());
        out.extend(self.destination.octets());
        out.extend(&self.options);
        let sum = internet_checksum(&[&out]);
        let wrong = u32::from(sum) + u32::from(self.checksum_error);
        let wrong = (wrong & 0xffff) + (wrong >> 16);
        out[10..12].copy_from_slice(&(wrong as u16).to_be_bytes());
        out
    }
}

/// RFC 1071, over parts of which all but the last have an even length.
pub(crate) fn internet_checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        for word in part.chunks(2) {
            sum += u64::from(word[0]) << 8 | u64::from(word.get(1).copied().unwrap_or(0));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn transport_checksum(before: Option<&Layer>, protocol: u8, header: &[u8], rest: &[u8]) -> u16 {
    let Some(Layer::Ip(ip)) = before else { return 0 };
    let len = (header.len() + rest.len()) as u16;
    let pseudo =
        [&ip.source.octets()[..], &ip.destination.octets(), &[0, protocol], &len.to_be_bytes()].concat();
    internet_checksum(&[&pseudo, header, rest])
}

/// A frame as a line of hex digits, for messages.
pub(crate) fn hex(frame: &[u8]) -> String {
    frame.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_built_frame_has_the_bytes_that_were_added_up_by_hand() {
    let packet = Packet::ethernet([2, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 1])
        .ipv4(Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2))
        .id(0)
        .icmp(8, 0, 1, 1)
        .bytes(b"abcdefgh");
    let ethernet = "0200000000020200000000010800";
    let ip = "4500002400004000400126d70a0000010a000002";
    let icmp = "08006668000100016162636465666768";
    assert_eq!(hex(&packet.build()), [ethernet, ip, icmp].concat());
}
