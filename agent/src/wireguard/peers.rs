//! Which peers a device must have: from the leases.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use ipnet::IpNet;

use super::{Peer, PublicKey};
use crate::{
    family::{V4, V6},
    lease::{Lease, WireguardData},
    network::{Mode, Wireguard},
};

/// Which of a node's subnets a device carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// The IPv4 subnet, between IPv4 addresses.
    V4,
    /// The IPv6 subnet, between IPv6 addresses.
    V6,
    /// Both, between addresses that the mode chooses.
    Both,
}

/// What the peers of a device depend on besides the leases.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    /// The backend's settings.
    pub settings: &'a Wireguard,
    /// What the device carries.
    pub half: Half,
    /// The key of this node.
    pub own_key: PublicKey,
    /// The IPv6 address that other nodes are told of this one.
    pub own_ipv6: Option<Ipv6Addr>,
}

/// The peers, and why others are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peers {
    /// By key.
    pub peers: BTreeMap<PublicKey, Peer>,
    /// A line each.
    pub refused: BTreeSet<String>,
}

/// The peers of a device. The leases have only subnets that this node can use, each one once; where two have one key, the
/// one written last counts.
#[must_use]
pub fn peers<'a>(wanted: &Wanted<'_>, leases: impl IntoIterator<Item = &'a Lease>) -> Peers {
    let mut leases: Vec<&Lease> = leases.into_iter().collect();
    leases.sort_by_key(|lease| (Reverse(lease.mod_revision), lease.key));
    let mut found = Peers::default();
    for lease in leases {
        let subnets = lease.key.subnets();
        match peer(wanted, lease) {
            Ok(None) => {}
            Ok(Some((key, peer))) => match found.peers.entry(key) {
                Entry::Vacant(entry) => drop(entry.insert(peer)),
                Entry::Occupied(entry) => {
                    let others: Vec<String> = entry.get().allowed.iter().map(ToString::to_string).collect();
                    found.refused.insert(format!(
                        "peer {subnets} at {} is left out: {} has the same key, and its lease is newer",
                        peer.endpoint.ip(),
                        others.join(" and ")
                    ));
                }
            },
            Err(why) => drop(found.refused.insert(format!("peer {subnets} is left out: {why}"))),
        }
    }
    found
}

/// `None` where the lease has nothing for this half.
fn peer(wanted: &Wanted<'_>, lease: &Lease) -> Result<Option<(PublicKey, Peer)>, String> {
    let (attrs, settings) = (&lease.attrs, wanted.settings);
    let v4 = lease.key.subnet.filter(|_| wanted.half != Half::V6).map(IpNet::V4);
    let v6 = lease.key.subnet_v6.filter(|_| wanted.half != Half::V4).map(IpNet::V6);
    let allowed: BTreeSet<IpNet> = v4.into_iter().chain(v6).collect();
    if allowed.is_empty() {
        return Ok(None);
    }
    // The only device has one key and one port; flannel tells another port in the IPv6 half, where nothing listens.
    let (data, own_port) = match wanted.half {
        Half::V4 => (attrs.wireguard::<V4>(), settings.listen_port),
        Half::V6 => (attrs.wireguard::<V6>(), settings.listen_port_v6),
        Half::Both => (attrs.wireguard::<V4>().or_else(|_| attrs.wireguard::<V6>()), settings.listen_port),
    };
    let WireguardData { public_key, port } = data.map_err(|error| error.to_string())?;
    if public_key == wanted.own_key {
        return Err("its key is this node's own".into());
    }
    let mode = match wanted.half {
        Half::V4 => Mode::Ipv4,
        Half::V6 => Mode::Ipv6,
        Half::Both => settings.mode,
    };
    let address = address(mode, attrs.public_ip, attrs.public_ipv6, wanted.own_ipv6)?;
    // Leases of old flannels have no port: all nodes have the one of the network config.
    let endpoint = SocketAddr::new(address, port.unwrap_or(own_port));
    Ok(Some((public_key, Peer { endpoint, allowed })))
}

/// The address at which a peer is reached. `auto` as flannel: a public IPv4 address, else IPv6 where both nodes have a
/// public one, else IPv4.
fn address(
    mode: Mode,
    v4: Option<Ipv4Addr>,
    v6: Option<Ipv6Addr>,
    own_v6: Option<Ipv6Addr>,
) -> Result<IpAddr, String> {
    let is_public = |address: &Ipv6Addr| !address.is_unique_local() && !address.is_unicast_link_local();
    let over_v6 = match mode {
        Mode::Ipv6 => true,
        Mode::Ipv4 | Mode::Separate => false,
        Mode::Auto => match (v4, v6) {
            (Some(v4), Some(v6)) => {
                v4.is_private() && is_public(&v6) && own_v6.as_ref().is_some_and(is_public)
            }
            (v4, _) => v4.is_none(),
        },
    };
    if over_v6 {
        return v6.map(IpAddr::V6).ok_or_else(|| "its lease has no PublicIPv6".into());
    }
    v4.map(IpAddr::V4).ok_or_else(|| "its lease has no PublicIP".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{LeaseAttrs, LeaseKey};

    const OWN: PublicKey = PublicKey([9; 32]);

    fn settings(mode: Mode) -> Wireguard {
        let (listen_port, listen_port_v6) = (51820, 51821);
        Wireguard { listen_port, listen_port_v6, mtu: None, psk: None, keepalive: 0, mode }
    }

    fn wanted(settings: &Wireguard, half: Half) -> Wanted<'_> {
        Wanted { settings, half, own_key: OWN, own_ipv6: Some("2001:db8::1".parse().unwrap()) }
    }

    fn lease(key: &str, public_ip: &str, data: &str, mod_revision: i64) -> Lease {
        let key: LeaseKey = key.parse().unwrap();
        let json = format!(
            r#"{{"PublicIP":"{public_ip}","PublicIPv6":"2001:db8::2","BackendType":"wireguard","BackendData":{data},"BackendV6Data":{data}}}"#
        );
        let attrs = LeaseAttrs::parse(json.as_bytes()).unwrap();
        Lease { key, attrs, etcd_lease: None, mod_revision }
    }

    fn data(key: u8) -> String {
        format!(r#"{{"PublicKey":"{}","Port":7000}}"#, PublicKey([key; 32]))
    }

    fn peer(endpoint: &str, allowed: &[&str]) -> Peer {
        Peer {
            endpoint: endpoint.parse().unwrap(),
            allowed: allowed.iter().map(|net| net.parse().unwrap()).collect(),
        }
    }

    const KEY: &str = "10.5.2.0-24&fc00:0:0:2::-64";

    #[test]
    fn each_half_has_the_subnet_and_the_address_of_its_family() {
        let lease = lease(KEY, "192.0.2.2", &data(2), 1);
        let each = |mode, half| {
            let settings = settings(mode);
            let found = peers(&wanted(&settings, half), [&lease]);
            assert_eq!(found.refused, BTreeSet::new());
            found.peers[&PublicKey([2; 32])].clone()
        };
        assert_eq!(each(Mode::Separate, Half::V4), peer("192.0.2.2:7000", &["10.5.2.0/24"]));
        assert_eq!(each(Mode::Separate, Half::V6), peer("[2001:db8::2]:7000", &["fc00:0:0:2::/64"]));
        let both = ["10.5.2.0/24", "fc00:0:0:2::/64"];
        assert_eq!(each(Mode::Ipv4, Half::Both), peer("192.0.2.2:7000", &both));
        assert_eq!(each(Mode::Ipv6, Half::Both), peer("[2001:db8::2]:7000", &both));
        assert_eq!(each(Mode::Auto, Half::Both), peer("192.0.2.2:7000", &both));
    }

    #[test]
    fn auto_takes_ipv6_only_where_it_alone_is_public_at_both_ends() {
        let v4 = |text: &str| text.parse::<Ipv4Addr>().ok();
        let (public, private) = (v4("192.0.2.2"), v4("10.0.0.2"));
        let v6 = |text: &str| text.parse::<Ipv6Addr>().ok();
        for (v4, v6, own, ipv6_wins) in [
            (private, v6("2001:db8::2"), v6("2001:db8::1"), true),
            (public, v6("2001:db8::2"), v6("2001:db8::1"), false),
            (private, v6("fd00::2"), v6("2001:db8::1"), false),
            (private, v6("2001:db8::2"), v6("fd00::1"), false),
            (private, v6("2001:db8::2"), None, false),
            (private, None, v6("2001:db8::1"), false),
            (None, v6("fd00::2"), v6("fd00::1"), true),
        ] {
            assert_eq!(
                address(Mode::Auto, v4, v6, own).unwrap().is_ipv6(),
                ipv6_wins,
                "{v4:?} {v6:?} {own:?}"
            );
        }
        assert!(address(Mode::Ipv6, public, None, None).is_err());
    }

    #[test]
    fn a_lease_without_a_port_has_that_of_the_network_config() {
        let data = format!(r#"{{"PublicKey":"{}"}}"#, PublicKey([2; 32]));
        let (settings, lease) = (settings(Mode::Separate), lease(KEY, "192.0.2.2", &data, 1));
        for (half, port) in [(Half::V4, 51820), (Half::V6, 51821)] {
            let found = peers(&wanted(&settings, half), [&lease]);
            assert_eq!(found.peers[&PublicKey([2; 32])].endpoint.port(), port);
        }
    }

    #[test]
    fn a_lease_that_is_wrong_or_contradicts_a_newer_one_is_left_out_and_told_of() {
        let settings = settings(Mode::Separate);
        for (half, lease, says) in [
            (
                Half::V4,
                lease("10.5.2.0-24", "192.0.2.2", &data(9), 1),
                "10.5.2.0/24 is left out: its key is this node's own",
            ),
            (Half::V4, lease("10.5.2.0-24", "192.0.2.2", r#"{"PublicKey":"x"}"#, 1), "BackendData.PublicKey"),
            (Half::V4, lease("10.5.2.0-24", "192.0.2.2", "null", 1), "BackendData is missing"),
            (Half::V4, lease("10.5.2.0-24", "192.0.2.2", &data(3), 1), "10.5.3.0/24 has the same key"),
        ] {
            let newer = self::lease("10.5.3.0-24&fc00:0:0:3::-64", "192.0.2.3", &data(3), 2);
            let found = peers(&wanted(&settings, half), [&lease, &newer]);
            assert_eq!(found.peers.keys().collect::<Vec<_>>(), [&PublicKey([3; 32])], "{says}");
            let refused = found.refused.into_iter().next().unwrap();
            assert!(refused.contains(says), "{refused:?} does not say {says:?}");
        }
    }

    #[test]
    fn a_peer_without_ipv6_is_none_of_the_ipv6_device() {
        let settings = settings(Mode::Separate);
        let lease = lease("10.5.2.0-24", "192.0.2.2", &data(2), 1);
        assert_eq!(peers(&wanted(&settings, Half::V6), [&lease]), Peers::default());
    }
}
