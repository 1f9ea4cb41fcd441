//! What is noted on the host's end of a routed pod's veth, as the link's alias: whose it is.
//!
//! The kernel keeps it with the link, and it goes with the link: the agent finds pods by it that were made while it
//! was away, GC finds whom nobody knows any more, and `ip link` shows it to people.

use std::fmt;

use super::{addresses::Addresses, request::Attachment};
use crate::kernel::mac_text;

/// What every alias begins with.
const MARK: &str = "loden-cni";
/// The longest alias that the kernel takes, in bytes (`IFALIASZ`, with the final zero).
const LONGEST: usize = 255;

/// A routed pod, as its veth's alias tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The pod's addresses. Versions that knew of one only do not take a record of two for theirs.
    pub addresses: Addresses,
    /// MAC of the pod's own interface.
    pub mac: [u8; 6],
    /// The network's name in the CNI configuration.
    pub network: String,
    /// The container and its interface.
    pub attachment: Attachment,
    /// `namespace/name` of the pod, where Kubernetes told it and it fits.
    pub pod: Option<String>,
}

impl Record {
    /// So many characters the names of network and container may always have together.
    pub const LONGEST_NAMES: usize = LONGEST - "loden-cni 255.255.255.255,0000:0000:0000:0000:0000:0000:0000:0000 00:00:00:00:00:00  fifteen-bytes-x ".len();

    /// The alias; without the pod's name where it would be too long. `None` where it is too long all the same, as the
    /// longest names of network and container are with addresses of both families.
    #[must_use]
    pub fn alias(&self) -> Option<String> {
        let fits = |alias: &String| alias.len() <= LONGEST;
        let short = || Self { pod: None, ..self.clone() }.to_string();
        Some(self.to_string()).filter(fits).or_else(|| Some(short()).filter(fits))
    }

    /// Reads an alias; `None` for one that is not ours.
    #[must_use]
    pub fn parse(alias: &str) -> Option<Self> {
        let mut words = alias.split(' ');
        if words.next()? != MARK {
            return None;
        }
        let record = Self {
            addresses: words.next()?.parse().ok()?,
            mac: parse_mac(words.next()?)?,
            network: words.next()?.to_owned(),
            attachment: Attachment {
                interface: words.next()?.to_owned(),
                container: words.next()?.to_owned(),
            },
            pod: words.next().map(str::to_owned),
        };
        words.next().is_none().then_some(record)
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { addresses, mac, network, attachment: Attachment { container, interface }, pod } = self;
        write!(f, "{MARK} {addresses} {} {network} {interface} {container}", mac_text(*mac))?;
        pod.iter().try_for_each(|pod| write!(f, " {pod}"))
    }
}

/// Six bytes of two hexadecimal digits, colons between.
pub(crate) fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part =
            parts.next().filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

/// The name of the host's end: the same for the same attachment always, so that DEL finds it by what it is told.
/// 55 bits of FNV-1a (RFC 9923 draft): fifteen bytes hold no more, and two of a node's pods collide less than once
/// in ten million nodes; the record tells whose it is, so that a collision is an error and not a mix-up.
#[must_use]
pub fn host_name(network: &str, attachment: &Attachment) -> String {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for part in [network, &attachment.container, &attachment.interface] {
        for byte in part.bytes().chain([0]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    const DIGITS: &[u8; 32] = b"0123456789abcdefghijklmnopqrstuv";
    let digit = |at: u32| char::from(DIGITS[(hash >> (5 * at + 9)) as usize & 31]);
    let digits: String = (0..11).map(digit).collect();
    format!("pod{digits}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            addresses: "10.5.1.2".parse().unwrap(),
            mac: [2, 0, 0xab, 0, 0, 9],
            network: "cbr0".into(),
            attachment: Attachment { container: "c".repeat(64), interface: "eth0".into() },
            pod: Some("default/web-0".into()),
        }
    }

    #[test]
    fn an_alias_is_read_back_as_it_was_written() {
        for addresses in ["10.5.1.2", "10.5.1.2,fc00:0:0:1::2", "fc00:0:0:1::2"] {
            let record = Record { addresses: addresses.parse().unwrap(), ..record() };
            assert_eq!(Record::parse(&record.alias().unwrap()), Some(record.clone()));
            let nameless = Record { pod: None, ..record };
            assert_eq!(Record::parse(&nameless.alias().unwrap()), Some(nameless));
        }
    }

    #[test]
    fn a_pod_name_that_does_not_fit_is_left_out() {
        let long = Record { pod: Some(format!("default/{}", "x".repeat(200))), ..record() };
        assert_eq!(Record::parse(&long.alias().unwrap()), Some(Record { pod: None, ..record() }));
        let longest = Record {
            network: "n".repeat(64),
            attachment: Attachment { container: "c".repeat(128), interface: "i".repeat(15) },
            pod: None,
            ..record()
        };
        assert!(longest.alias().is_some());
        let both = Record { addresses: "10.5.1.2,fc00:1:2:3:4:5:6:7".parse().unwrap(), ..longest };
        assert_eq!(both.alias(), None, "nothing is cut off that tells whose it is");
        let usual = Attachment { container: "c".repeat(64), interface: "i".repeat(15) };
        assert!(Record { attachment: usual, ..both }.alias().is_some());
    }

    #[test]
    fn the_aliases_of_others_are_not_records() {
        for alias in [
            "",
            "uplink to rack 4",
            "loden-cni",
            "loden-cni 10.5.1.2",
            "loden-cni 10.5.1.2,10.5.1.3 02:00:00:00:00:01 n eth0 c",
            "loden-cni 10.5.1.256 02:00:00:00:00:01 n eth0 c",
            "loden-cni 10.5.1.2 02:00:00:00:00 n eth0 c",
            "loden-cni 10.5.1.2 02:00:00:00:00:+1 n eth0 c",
            "loden-cni 10.5.1.2 02:00:00:00:00:01 n eth0 c p more",
        ] {
            assert_eq!(Record::parse(alias), None, "{alias}");
        }
    }

    #[test]
    fn a_name_is_the_same_for_the_same_attachment_and_another_for_another() {
        let attachment = |container: &str, interface: &str| Attachment {
            container: container.into(),
            interface: interface.into(),
        };
        let name = host_name("n", &attachment("c", "eth0"));
        assert_eq!(name, host_name("n", &attachment("c", "eth0")));
        assert!(name.len() <= 15, "{name}");
        let others = [("m", "c", "eth0"), ("n", "d", "eth0"), ("n", "c", "eth1"), ("nc", "", "eth0")];
        for (network, container, interface) in others {
            assert_ne!(name, host_name(network, &attachment(container, interface)));
        }
        let many: std::collections::BTreeSet<String> =
            (0..10_000).map(|i| host_name("n", &attachment(&format!("{i}"), "eth0"))).collect();
        assert_eq!(many.len(), 10_000);
    }
}
