//! What the maps say of a flow, in words and with the arithmetic.

use std::time::Duration;

use loden_ebpf::{
    abi::{Endpoint, Flow, FlowKey, Peer, TRANSLATED, UNPROVEN, way},
    flow::{self, Direction},
    vxlan::{ENCAP_LEN, ENCAP_LEN_V6},
};
use nix::time::{ClockId, clock_gettime};

use super::{View, packet::Packet};
use crate::{dataplane::Mapped, kernel::mac_text};

/// What the maps hold of a packet's flow.
pub(super) struct Known<F: Mapped> {
    /// The peer at the far end, and its slot.
    pub(super) peer: Option<(u32, Peer<F::Octets>)>,
    /// The local pod that sends.
    pub(super) sender: Option<Endpoint<F::Octets>>,
    /// The local pod that receives.
    pub(super) receiver: Option<Endpoint<F::Octets>>,
    /// The gate's entry.
    pub(super) flow: Option<(FlowKey<F::Octets>, Flow)>,
    /// The epoch of entries that count.
    pub(super) epoch: u32,
}

/// Lines of name and value.
pub(super) fn tell<F: Mapped>(
    known: &Known<F>,
    view: &View<'_, F>,
    packet: &Packet<F>,
    direction: Direction,
    size: u16,
) -> Vec<(&'static str, String)> {
    let own = |address: F::Addr| F::contains(view.half.subnet, address);
    let mut lines = Vec::new();
    for (name, (address, _), found) in
        [("sender", packet.source, known.sender), ("receiver", packet.destination, known.receiver)]
    {
        if own(address) {
            lines.push((name, endpoint(view, address, found)));
        }
    }
    let far = if direction == Direction::Outbound { packet.destination.0 } else { packet.source.0 };
    if !own(far) {
        lines.push(("peer", peer(view, far, known.peer)));
        if let Some((_, peer)) = known.peer.filter(|_| direction == Direction::Outbound) {
            lines.push(("size", arithmetic::<F>(&peer, size, view.facts.pod_mtu)));
        }
        if F::BITS == 32
            && known.peer.is_some_and(|(_, peer)| peer.way == way::ENCAPSULATED)
            && direction == Direction::Inbound
        {
            let outer = "as the peer's fast path sends it, without a checksum; one of its kernel's has one, and is fast \
                         where that is right";
            lines.push(("outer", outer.to_owned()));
        }
    }
    let local = match direction {
        Direction::Outbound => known.sender,
        Direction::Inbound => known.receiver,
    };
    lines.push(("gate", gate(view, local)));
    lines.push(("flow", entry(known, direction, now())));
    lines
}

fn endpoint<F: Mapped>(view: &View<'_, F>, address: F::Addr, found: Option<Endpoint<F::Octets>>) -> String {
    let Some(endpoint) = found else {
        return format!(
            "{address} is no endpoint: no veth on a bridge of {} is known to have it (it has not spoken yet, or is \
             not there)",
            view.half.subnet
        );
    };
    format!(
        "{address} behind {}, MAC {}, gateway {}",
        view.interface(endpoint.ifindex),
        mac_text(endpoint.mac),
        mac_text(endpoint.gateway_mac)
    )
}

fn peer<F: Mapped>(view: &View<'_, F>, address: F::Addr, found: Option<(u32, Peer<F::Octets>)>) -> String {
    let Some((_, peer)) = found else {
        return if F::contains(view.half.network, address) {
            format!("no lease covers {address}")
        } else {
            format!(
                "{address} is outside the network {}: the host routes or translates it",
                view.half.network
            )
        };
    };
    let subnet = format!("{}/{}", F::of_octets(peer.subnet), peer.prefix_len);
    let vtep = F::of_octets(peer.vtep);
    if peer.uplink == 0 {
        return format!(
            "{subnet} at {vtep}, to which the fast path has no way: several next hops, or another uplink"
        );
    }
    if peer.way == way::DEVICE {
        return format!("{subnet} at {vtep}, encrypted by {}", view.interface(peer.uplink));
    }
    format!(
        "{subnet} at {vtep}, by {} on {}, {}",
        F::of_octets(peer.next_hop),
        view.interface(peer.uplink),
        if peer.way == way::DIRECT { "routed without encapsulation" } else { "encapsulated" }
    )
}

fn arithmetic<F: Mapped>(peer: &Peer<F::Octets>, size: u16, pod_mtu: u32) -> String {
    let headers = if F::BITS == 32 { ENCAP_LEN } else { ENCAP_LEN_V6 };
    let added = if peer.way == way::ENCAPSULATED { headers as u32 } else { 0 };
    let sum = |inner: u32| {
        let outer = inner + added;
        let answer = if outer > u32::from(peer.mtu) { "too big" } else { "fits" };
        format!("{inner} + {added} = {outer} bytes of {}: {answer}", peer.mtu)
    };
    format!("{}; the pods' largest {}", sum(size.into()), sum(pod_mtu))
}

fn gate<F: Mapped>(view: &View<'_, F>, local: Option<Endpoint<F::Octets>>) -> String {
    match local.map_or(0, |endpoint| endpoint.gated) {
        _ if view.settings.strict => {
            "strict: every flow must qualify, and SYN, FIN and RST take the host's way".to_owned()
        }
        TRANSLATED => "open, but the host translates flows of this pod: its flows must qualify".to_owned(),
        UNPROVEN => {
            "open, but the pod is new: its flows must qualify until the host's connections have been read"
                .to_owned()
        }
        _ => "open: nothing must qualify".to_owned(),
    }
}

/// Times are CLOCK_MONOTONIC, in nanoseconds.
fn entry<F: Mapped>(known: &Known<F>, direction: Direction, now: u64) -> String {
    let Some((_, flow)) = known.flow else {
        return "not in the table: no packet of it has gone into the host's stack lately".to_owned();
    };
    if flow.translated == 1 {
        return "the host was seen to translate it: it never skips the host".to_owned();
    }
    let (seen, until) = match direction {
        Direction::Outbound => (flow.outbound_seen, flow.outbound_until),
        Direction::Inbound => (flow.inbound_seen, flow.inbound_until),
    };
    let seconds = |nanoseconds| Duration::from_nanos(nanoseconds).as_secs_f64();
    let state = if flow::is_fast(&flow, direction, now, known.epoch) {
        format!("qualified for another {:.1} s", seconds(until - now))
    } else if until > now {
        format!(
            "qualified in epoch {}, and this is epoch {}: rules, a peer or a pod have changed since",
            flow.epoch, known.epoch
        )
    } else if until != 0 {
        format!(
            "its qualification ended {:.1} s ago: the next packet through the host renews it",
            seconds(now - until)
        )
    } else {
        "has not qualified this way: none of its packets has come out of the host's stack unchanged (dropped by a \
         rule, translated, or there was none)"
            .to_owned()
    };
    if seen == 0 {
        return state;
    }
    format!("{state}; last went into the host's stack {:.1} s ago", seconds(now.saturating_sub(seen)))
}

/// The programs' clock.
fn now() -> u64 {
    // It cannot fail with this clock.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| Duration::from(time).as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::{V4, V6};

    const NOW: u64 = 100_000_000_000;

    fn known(flow: Flow, epoch: u32) -> Known<V4> {
        Known { peer: None, sender: None, receiver: None, flow: Some((FlowKey::default(), flow)), epoch }
    }

    #[test]
    fn an_entry_is_told_as_the_gate_judges_it() {
        let told = |flow, epoch| entry(&known(flow, epoch), Direction::Outbound, NOW);
        let fast = Flow { outbound_seen: NOW - 1, outbound_until: NOW + 2_500_000_000, ..Flow::default() };
        assert!(told(fast, 0).starts_with("qualified for another 2.5 s"), "{}", told(fast, 0));
        assert!(told(fast, 1).contains("epoch 0, and this is epoch 1"));
        assert!(told(Flow { outbound_until: NOW - 500_000_000, ..fast }, 0).contains("ended 0.5 s ago"));
        assert!(told(Flow { outbound_until: 0, ..fast }, 0).contains("has not qualified"));
        assert!(told(Flow { translated: 1, ..fast }, 0).contains("translate"));
        let inbound = entry(&known(fast, 0), Direction::Inbound, NOW);
        assert!(inbound.contains("has not qualified this way"), "each direction for itself: {inbound}");
    }

    #[test]
    fn the_arithmetic_adds_what_encapsulation_adds() {
        let peer = Peer { mtu: 1500, ..Peer::default() };
        assert_eq!(
            arithmetic::<V4>(&peer, 100, 1450),
            "100 + 50 = 150 bytes of 1500: fits; the pods' largest 1450 + 50 = 1500 bytes of 1500: fits"
        );
        assert!(arithmetic::<V4>(&peer, 1451, 1450).starts_with("1451 + 50 = 1501 bytes of 1500: too big"));
        assert!(
            arithmetic::<V4>(&Peer { way: way::DIRECT, ..peer }, 1500, 1500)
                .starts_with("1500 + 0 = 1500 bytes")
        );
        let peer = Peer { mtu: 1500, ..Peer::default() };
        assert!(arithmetic::<V6>(&peer, 100, 1430).starts_with("100 + 70 = 170 bytes of 1500: fits"));
    }
}
