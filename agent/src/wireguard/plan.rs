//! Desired minus actual, of one device.
//!
//! Only what differs is set: the kernel keeps the session of a peer that it is not told to remove. A peer's endpoint is
//! where it was last heard of, by packets that only it can make; so it may differ from the lease's (behind a NAT), and
//! the lease's is set where the lease changes, and where no handshake has worked for a while.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use ipnet::IpNet;

use super::{PublicKey, SecretKey};

/// For how long after a handshake a session may be used (`REJECT_AFTER_TIME` of the WireGuard paper): an endpoint of an
/// older one proves nothing.
const SESSION: Duration = Duration::from_secs(180);

/// A device as it ought to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Desired {
    /// Of this node.
    pub private_key: SecretKey,
    /// UDP port.
    pub port: u16,
    /// Shared by all nodes.
    pub psk: Option<SecretKey>,
    /// In seconds; 0: none.
    pub keepalive: u16,
    /// By key.
    pub peers: BTreeMap<PublicKey, Peer>,
}

/// A peer as it ought to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Where it listens, as its lease says.
    pub endpoint: SocketAddr,
    /// Its subnets: from where it may send, and what is sent to it.
    pub allowed: BTreeSet<IpNet>,
}

/// A device as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Actual {
    /// `None` where it has none yet.
    pub private_key: Option<SecretKey>,
    /// What the kernel makes of the private key.
    pub public_key: Option<PublicKey>,
    /// UDP port.
    pub port: u16,
    /// By key.
    pub peers: BTreeMap<PublicKey, ActualPeer>,
}

/// A peer as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ActualPeer {
    /// Where packets to it go.
    pub endpoint: Option<SocketAddr>,
    /// See [`Peer::allowed`].
    pub allowed: BTreeSet<IpNet>,
    /// See [`Desired::psk`].
    pub psk: Option<SecretKey>,
    /// See [`Desired::keepalive`].
    pub keepalive: u16,
    /// When the last handshake was completed; `None`: none yet.
    pub handshake: Option<SystemTime>,
    /// Bytes that came from it, encrypted.
    pub received: u64,
    /// Bytes that went to it, encrypted.
    pub sent: u64,
}

/// What must change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The private key to set.
    pub private_key: Option<SecretKey>,
    /// The UDP port to set.
    pub port: Option<u16>,
    /// In order: a subnet moves from a peer to another without ever being nobody's, and then the peer goes.
    pub peers: Vec<(PublicKey, PeerChange)>,
}

/// What must change at a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerChange {
    /// What is `Some` is set; a peer that is not there is made.
    Set {
        /// See [`Peer::endpoint`].
        endpoint: Option<SocketAddr>,
        /// See [`Peer::allowed`]; replaces what is there.
        allowed: Option<BTreeSet<IpNet>>,
        /// See [`Desired::psk`]; the inner `None` takes it away.
        psk: Option<Option<SecretKey>>,
        /// See [`Desired::keepalive`].
        keepalive: Option<u16>,
    },
    /// It is of no lease.
    Remove,
}

impl Plan {
    /// Whether everything is as it ought to be.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The steps from the actual state to the desired one. `earlier`: the endpoints that leases told last time.
#[must_use]
pub fn plan(
    desired: &Desired,
    actual: &Actual,
    earlier: &BTreeMap<PublicKey, SocketAddr>,
    now: SystemTime,
) -> Plan {
    let private_key =
        (actual.private_key.as_ref() != Some(&desired.private_key)).then(|| desired.private_key.clone());
    let port = (actual.port != desired.port).then_some(desired.port);
    let mut peers = Vec::new();
    for (key, peer) in &desired.peers {
        let change = match actual.peers.get(key) {
            Some(found) => difference(desired, peer, found, earlier.get(key), now),
            None => PeerChange::Set {
                endpoint: Some(peer.endpoint),
                allowed: Some(peer.allowed.clone()),
                psk: desired.psk.clone().map(Some),
                keepalive: (desired.keepalive != 0).then_some(desired.keepalive),
            },
        };
        if change != NOTHING {
            peers.push((*key, change));
        }
    }
    let foreign = actual.peers.keys().filter(|key| !desired.peers.contains_key(*key));
    peers.extend(foreign.map(|key| (*key, PeerChange::Remove)));
    Plan { private_key, port, peers }
}

const NOTHING: PeerChange = PeerChange::Set { endpoint: None, allowed: None, psk: None, keepalive: None };

fn difference(
    desired: &Desired,
    peer: &Peer,
    found: &ActualPeer,
    earlier: Option<&SocketAddr>,
    now: SystemTime,
) -> PeerChange {
    let told_anew = earlier.is_some_and(|earlier| *earlier != peer.endpoint);
    let alive = found.handshake.is_some_and(|at| now.duration_since(at).unwrap_or_default() < SESSION);
    let move_it = found.endpoint != Some(peer.endpoint) && (told_anew || !alive);
    PeerChange::Set {
        endpoint: move_it.then_some(peer.endpoint),
        allowed: (found.allowed != peer.allowed).then(|| peer.allowed.clone()),
        psk: (found.psk != desired.psk).then(|| desired.psk.clone()),
        keepalive: (found.keepalive != desired.keepalive).then_some(desired.keepalive),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: PublicKey = PublicKey([1; 32]);
    const B: PublicKey = PublicKey([2; 32]);

    fn secret(byte: u8) -> SecretKey {
        SecretKey::new([byte; 32]).unwrap()
    }

    fn nets(text: &str) -> BTreeSet<IpNet> {
        text.split_whitespace().map(|net| net.parse().unwrap()).collect()
    }

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000)
    }

    fn desired() -> Desired {
        let peer = |host: u8| Peer {
            endpoint: SocketAddr::from(([192, 0, 2, host], 51820)),
            allowed: nets(&format!("10.5.{host}.0/24")),
        };
        Desired {
            private_key: secret(7),
            port: 51820,
            psk: Some(secret(8)),
            keepalive: 25,
            peers: BTreeMap::from([(A, peer(1)), (B, peer(2))]),
        }
    }

    /// What the kernel says when all of it is carried out.
    fn carried_out(desired: &Desired) -> Actual {
        let peer = |peer: &Peer| ActualPeer {
            endpoint: Some(peer.endpoint),
            allowed: peer.allowed.clone(),
            psk: desired.psk.clone(),
            keepalive: desired.keepalive,
            handshake: Some(now() - Duration::from_secs(10)),
            ..ActualPeer::default()
        };
        Actual {
            private_key: Some(desired.private_key.clone()),
            public_key: None,
            port: desired.port,
            peers: desired.peers.iter().map(|(key, wanted)| (*key, peer(wanted))).collect(),
        }
    }

    fn peer(actual: &mut Actual) -> &mut ActualPeer {
        actual.peers.get_mut(&B).unwrap()
    }

    fn steps(change: impl FnOnce(&mut Actual)) -> Plan {
        let desired = desired();
        let mut actual = carried_out(&desired);
        change(&mut actual);
        plan(&desired, &actual, &BTreeMap::new(), now())
    }

    #[test]
    fn nothing_is_done_where_all_is_right() {
        assert!(steps(|_| {}).is_empty());
    }

    #[test]
    fn a_new_device_gets_everything() {
        let plan = plan(&desired(), &Actual::default(), &BTreeMap::new(), now());
        assert_eq!((plan.private_key, plan.port), (Some(secret(7)), Some(51820)));
        let expected = PeerChange::Set {
            endpoint: Some(at("192.0.2.1:51820")),
            allowed: Some(nets("10.5.1.0/24")),
            psk: Some(Some(secret(8))),
            keepalive: Some(25),
        };
        assert_eq!(plan.peers[0], (A, expected));
        assert_eq!(plan.peers.len(), 2);
    }

    #[test]
    fn only_what_differs_of_the_peer_that_differs_is_set() {
        let set = |endpoint: Option<SocketAddr>, allowed: Option<&str>, psk, keepalive| {
            vec![(B, PeerChange::Set { endpoint, allowed: allowed.map(nets), psk, keepalive })]
        };
        let plan = steps(|actual| peer(actual).allowed = nets("0.0.0.0/0"));
        assert_eq!(plan.peers, set(None, Some("10.5.2.0/24"), None, None));
        let plan = steps(|actual| peer(actual).psk = None);
        assert_eq!(plan.peers, set(None, None, Some(Some(secret(8))), None));
        let plan = steps(|actual| peer(actual).keepalive = 0);
        assert_eq!(plan.peers, set(None, None, None, Some(25)));
        let plan = steps(|actual| actual.port = 1);
        assert_eq!((plan.port, plan.peers.len(), plan.private_key), (Some(51820), 0, None));
    }

    #[test]
    fn an_endpoint_with_a_live_session_is_left_where_it_is() {
        let roamed = Some(at("198.51.100.1:4000"));
        assert!(steps(|actual| peer(actual).endpoint = roamed).is_empty());
        for handshake in [None, Some(now() - Duration::from_secs(181))] {
            let plan = steps(|actual| {
                *peer(actual) = ActualPeer { endpoint: roamed, handshake, ..peer(actual).clone() };
            });
            let PeerChange::Set { endpoint, allowed, .. } = &plan.peers[0].1 else { panic!("{plan:?}") };
            assert_eq!((*endpoint, allowed), (Some(at("192.0.2.2:51820")), &None));
        }
    }

    #[test]
    fn a_lease_that_tells_another_endpoint_is_followed_at_once() {
        let mut desired = desired();
        let actual = carried_out(&desired);
        let earlier = desired.peers.iter().map(|(key, peer)| (*key, peer.endpoint)).collect();
        desired.peers.get_mut(&B).unwrap().endpoint = at("192.0.2.99:51820");
        let plan = plan(&desired, &actual, &earlier, now());
        let [(B, PeerChange::Set { endpoint, .. })] = plan.peers[..] else { panic!("{plan:?}") };
        assert_eq!(endpoint, Some(at("192.0.2.99:51820")));
    }

    #[test]
    fn the_peer_with_the_new_key_takes_the_subnet_before_the_old_one_goes() {
        let old = PublicKey([0; 32]);
        let plan = steps(|actual| {
            let peer = actual.peers.remove(&B).unwrap();
            actual.peers.insert(old, peer);
        });
        assert!(
            matches!(&plan.peers[..], [(B, PeerChange::Set { .. }), (o, PeerChange::Remove)] if *o == old)
        );
    }

    #[test]
    fn no_secret_is_in_what_debugging_shows() {
        let desired = desired();
        let shown = format!(
            "{desired:?}{:?}{:?}",
            carried_out(&desired),
            steps(|actual| *actual = Actual::default())
        );
        assert!(shown.contains("(secret)") && !shown.contains("7, 7") && !shown.contains("8, 8"), "{shown}");
    }
}
