//! The WireGuard devices: what they have against what the agent wants, as far as it is no secret.

use super::{few, overlay::REMEDY};
use crate::{
    doctor::{finding::Finding, snapshot::Snapshot},
    facts::Tunnel,
    kernel::is_wireguard,
    wireguard::Actual,
};

pub(super) fn examine(snapshot: &Snapshot) -> Vec<Finding> {
    let tunnels = snapshot.facts.wireguard.iter().zip(&snapshot.wireguard);
    tunnels.flat_map(|(tunnel, actual)| device(snapshot, tunnel, actual)).collect()
}

fn device(snapshot: &Snapshot, tunnel: &Tunnel, actual: &Result<Actual, String>) -> Vec<Finding> {
    const CHECK: &str = "device";
    let name = &tunnel.name;
    let Some(link) = snapshot.links.iter().find(|link| link.name == *name) else {
        return vec![Finding::fault(CHECK, format_args!("there is no {name}"), REMEDY)];
    };
    if !is_wireguard(link) {
        let found = format_args!("{name} is no WireGuard device ({:?})", link.kind);
        return vec![Finding::fault(CHECK, found, REMEDY)];
    }
    let actual = match actual {
        Ok(actual) => actual,
        Err(why) => return vec![Finding::unknown(CHECK, why)],
    };
    let mut wrong = Vec::new();
    if !link.up {
        wrong.push("it is down".to_owned());
    }
    if link.mtu != tunnel.mtu {
        wrong.push(format!("its MTU is {} and should be {}", link.mtu, tunnel.mtu));
    }
    if actual.port != tunnel.port {
        wrong.push(format!("it listens on port {} and should on {}", actual.port, tunnel.port));
    }
    if actual.public_key != Some(tunnel.public_key) {
        let found = actual.public_key.map_or_else(|| "none".to_owned(), |key| key.to_string());
        wrong.push(format!("its public key is {found}, the lease says {}", tunnel.public_key));
    }
    let device = if wrong.is_empty() {
        let (key, port, mtu) = (tunnel.public_key, tunnel.port, tunnel.mtu);
        Finding::ok(CHECK, format_args!("{name}, public key {key}, port {port}, MTU {mtu}"))
    } else {
        Finding::fault(CHECK, format_args!("{name}: {}", few(&wrong)), REMEDY)
    };
    vec![device, peers(tunnel, actual)]
}

fn peers(tunnel: &Tunnel, actual: &Actual) -> Finding {
    const CHECK: &str = "wireguard-peer";
    let missing = tunnel.peers.iter().filter(|key| !actual.peers.contains_key(*key));
    let foreign = actual.peers.keys().filter(|key| !tunnel.peers.contains(*key));
    let wrong: Vec<String> = missing
        .map(|key| format!("missing: {key}"))
        .chain(foreign.map(|key| format!("of no lease: {key}")))
        .collect();
    if !wrong.is_empty() {
        return Finding::fault(CHECK, format_args!("{}: {}", tunnel.name, few(&wrong)), REMEDY);
    }
    let silent = actual.peers.values().filter(|peer| peer.handshake.is_none()).count();
    let all = actual.peers.len();
    Finding::ok(CHECK, format_args!("{}: {all} peers, {silent} of them without a handshake yet", tunnel.name))
}
