//! The messages: plans to requests, answers to what a device has. Pure.

use std::{
    net::IpAddr,
    time::{Duration, SystemTime},
};

use ipnet::IpNet;
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd,
    WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags, WireguardTimeSpec,
};

use crate::wireguard::{Actual, ActualPeer, PeerChange, Plan, PublicKey, SecretKey};

/// How many peers go into one request: all of them are one attribute, which has a length of 16 bits.
const PEERS: usize = 128;

/// Asks for everything about a device.
pub(super) fn question(index: u32) -> WireguardMessage {
    WireguardMessage { cmd: WireguardCmd::GetDevice, attributes: vec![WireguardAttribute::IfIndex(index)] }
}

/// The requests that carry out a plan; none for an empty one.
pub(super) fn changes(index: u32, plan: &Plan) -> Vec<WireguardMessage> {
    let message = |attributes: Vec<WireguardAttribute>| {
        let attributes = [WireguardAttribute::IfIndex(index)].into_iter().chain(attributes).collect();
        WireguardMessage { cmd: WireguardCmd::SetDevice, attributes }
    };
    let mut device = Vec::new();
    device.extend(plan.private_key.as_ref().map(|key| WireguardAttribute::PrivateKey(key.expose())));
    device.extend(plan.port.map(WireguardAttribute::ListenPort));
    let device = (!device.is_empty()).then(|| message(device));
    let peers = plan.peers.chunks(PEERS).map(|peers| {
        let peers = peers.iter().map(|(key, change)| peer(*key, change)).collect();
        message(vec![WireguardAttribute::Peers(peers)])
    });
    device.into_iter().chain(peers).collect()
}

fn peer(key: PublicKey, change: &PeerChange) -> WireguardPeer {
    let mut attributes = vec![WireguardPeerAttribute::PublicKey(key.0)];
    match change {
        PeerChange::Remove => attributes.push(WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe)),
        PeerChange::Set { endpoint, allowed, psk, keepalive } => {
            attributes.extend(endpoint.map(WireguardPeerAttribute::Endpoint));
            attributes.extend(keepalive.map(WireguardPeerAttribute::PersistentKeepalive));
            if let Some(psk) = psk {
                // Zeros take it away.
                let psk = psk.as_ref().map_or([0; 32], SecretKey::expose);
                attributes.push(WireguardPeerAttribute::PresharedKey(psk));
            }
            if let Some(allowed) = allowed {
                attributes.push(WireguardPeerAttribute::Flags(WireguardPeerFlags::ReplaceAllowedIps));
                let allowed = allowed.iter().map(allowed_ip).collect();
                attributes.push(WireguardPeerAttribute::AllowedIps(allowed));
            }
        }
    }
    WireguardPeer(attributes)
}

fn allowed_ip(net: &IpNet) -> WireguardAllowedIp {
    let family = match net {
        IpNet::V4(_) => WireguardAddressFamily::Ipv4,
        IpNet::V6(_) => WireguardAddressFamily::Ipv6,
    };
    WireguardAllowedIp(vec![
        WireguardAllowedIpAttr::Family(family),
        WireguardAllowedIpAttr::IpAddr(net.network()),
        WireguardAllowedIpAttr::Cidr(net.prefix_len()),
    ])
}

/// What the answers to [`question`] say together: a device with many peers comes in several, and a peer with many
/// allowed addresses may be in more than one.
pub(super) fn read(answers: &[WireguardMessage]) -> Actual {
    let mut device = Actual::default();
    for attribute in answers.iter().flat_map(|answer| &answer.attributes) {
        match attribute {
            WireguardAttribute::PrivateKey(key) => device.private_key = SecretKey::new(*key),
            WireguardAttribute::PublicKey(key) => device.public_key = Some(PublicKey(*key)),
            WireguardAttribute::ListenPort(port) => device.port = *port,
            WireguardAttribute::Peers(peers) => peers.iter().for_each(|peer| read_peer(peer, &mut device)),
            _ => {}
        }
    }
    device
}

fn read_peer(peer: &WireguardPeer, device: &mut Actual) {
    let key = peer.iter().find_map(|attribute| match attribute {
        WireguardPeerAttribute::PublicKey(key) => Some(PublicKey(*key)),
        _ => None,
    });
    let Some(key) = key else { return };
    let found: &mut ActualPeer = device.peers.entry(key).or_default();
    for attribute in peer.iter() {
        match attribute {
            WireguardPeerAttribute::PresharedKey(psk) => found.psk = SecretKey::new(*psk),
            WireguardPeerAttribute::Endpoint(endpoint) => found.endpoint = Some(*endpoint),
            WireguardPeerAttribute::PersistentKeepalive(seconds) => found.keepalive = *seconds,
            WireguardPeerAttribute::LastHandshake(at) => found.handshake = time(*at),
            WireguardPeerAttribute::RxBytes(bytes) => found.received = *bytes,
            WireguardPeerAttribute::TxBytes(bytes) => found.sent = *bytes,
            WireguardPeerAttribute::AllowedIps(allowed) => {
                found.allowed.extend(allowed.iter().filter_map(net))
            }
            _ => {}
        }
    }
}

/// The kernel says zero where there was none.
fn time(at: WireguardTimeSpec) -> Option<SystemTime> {
    let seconds = u64::try_from(at.seconds).ok()?;
    let nanoseconds = u32::try_from(at.nano_seconds).ok()?;
    let since = Duration::new(seconds, nanoseconds);
    (!since.is_zero()).then(|| SystemTime::UNIX_EPOCH + since)
}

fn net(allowed: &WireguardAllowedIp) -> Option<IpNet> {
    let (mut address, mut len) = (None::<IpAddr>, None);
    for attribute in allowed.iter() {
        match attribute {
            WireguardAllowedIpAttr::IpAddr(found) => address = Some(*found),
            WireguardAllowedIpAttr::Cidr(found) => len = Some(*found),
            _ => {}
        }
    }
    IpNet::new(address?, len?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: PublicKey = PublicKey([3; 32]);

    fn set(allowed: &[&str]) -> PeerChange {
        PeerChange::Set {
            endpoint: Some("192.0.2.1:51820".parse().unwrap()),
            allowed: Some(allowed.iter().map(|net| net.parse().unwrap()).collect()),
            psk: Some(SecretKey::new([5; 32])),
            keepalive: Some(25),
        }
    }

    #[test]
    fn what_is_set_is_what_is_read() {
        let plan = Plan {
            private_key: SecretKey::new([7; 32]),
            port: Some(51820),
            peers: vec![(KEY, set(&["10.5.1.0/24", "fc00::/64"]))],
        };
        let device = read(&changes(9, &plan));
        assert_eq!((device.private_key, device.port), (plan.private_key, 51820));
        let expected = ActualPeer {
            endpoint: Some("192.0.2.1:51820".parse().unwrap()),
            allowed: ["10.5.1.0/24", "fc00::/64"].map(|net| net.parse().unwrap()).into(),
            psk: SecretKey::new([5; 32]),
            keepalive: 25,
            ..ActualPeer::default()
        };
        assert_eq!(device.peers[&KEY], expected);
    }

    #[test]
    fn many_peers_are_many_requests_and_none_are_none() {
        assert!(changes(9, &Plan::default()).is_empty());
        let peer = |n: u16| {
            let mut key = [1; 32];
            key[..2].copy_from_slice(&n.to_be_bytes());
            (PublicKey(key), set(&["10.5.1.0/24", "fc00::/64"]))
        };
        let plan = Plan { peers: (0..300).map(peer).collect(), ..Plan::default() };
        let requests = changes(9, &plan);
        assert_eq!(requests.len(), 3);
        use rtnetlink::packet_core::Emitable as _;
        assert!(requests.iter().all(|request| request.buffer_len() < 65_535));
        assert_eq!(read(&requests).peers.len(), 300);
    }

    #[test]
    fn a_peer_in_two_answers_is_one() {
        let part = |net: &str| {
            let plan = Plan { peers: vec![(KEY, set(&[net]))], ..Plan::default() };
            changes(9, &plan).remove(0)
        };
        let device = read(&[part("10.5.1.0/24"), part("10.5.2.0/24")]);
        assert_eq!(device.peers[&KEY].allowed.len(), 2);
    }

    #[test]
    fn a_handshake_that_never_was_has_no_time() {
        assert_eq!(time(WireguardTimeSpec { seconds: 0, nano_seconds: 0 }), None);
        assert_eq!(time(WireguardTimeSpec { seconds: -1, nano_seconds: 0 }), None);
        let at = time(WireguardTimeSpec { seconds: 2, nano_seconds: 5 });
        assert_eq!(at, Some(SystemTime::UNIX_EPOCH + Duration::new(2, 5)));
    }
}
