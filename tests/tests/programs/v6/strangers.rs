//! VXLAN over IPv6 of those who may not send it: hidden, by another way, at the guard.

use super::*;

pub(super) const TABLES: &[Table] = &[hidden_by_extensions, guarded, by_another_way];

/// An extension header of eight bytes, whose first byte is the next one's number.
const OPTIONS: &[u8] = &[0, 0, 1, 4, 0, 0, 0, 0];
/// The same of a fragment that holds what follows, and of one that does not.
const FIRST_FRAGMENT: &[u8] = &[0, 0, 0, 1, 0, 0, 0, 9];
const LATER_FRAGMENT: &[u8] = &[0, 0, 0, 9, 0, 0, 0, 9];

/// VXLAN for this node behind a chain of extension headers.
fn hidden(from: Ipv6Addr, headers: &[(u8, &[u8])]) -> Vec<u8> {
    let udp = Ip::new(REMOTE, POD).udp(53, 5000, b"payload");
    let outer = vxlan(from, VTEP, &ethernet(VTEP_MAC, PEER_VTEP_MAC, &udp));
    let mut payload = outer[40..].to_vec();
    let mut next = 17;
    for (number, header) in headers.iter().rev() {
        let mut header = header.to_vec();
        header[0] = next;
        payload = [header, payload].concat();
        next = *number;
    }
    ethernet(WIRE_MAC, PEER_VTEP_MAC, &Ip::new(from, VTEP).next(next, &payload))
}

#[test]
fn extension_headers_hide_no_stranger() {
    Lab::run(hidden_by_extensions);
}

fn hidden_by_extensions(lab: &Lab) -> Produced {
    let mut rig = Rig::load(lab, false, false);
    let chains: [&[(u8, &[u8])]; 4] = [
        &[(60, OPTIONS)],
        &[(44, FIRST_FRAGMENT)],
        &[(0, OPTIONS), (60, OPTIONS), (44, FIRST_FRAGMENT)],
        &[(60, OPTIONS); 9],
    ];
    for chain in chains {
        rig.row("a stranger's", FromWire, &hidden(STRANGER, chain), Some(DropUnknownVtep), None);
        rig.passes("a peer's", FromWire, &hidden(PEER_VTEP, chain), PassWireOuter);
    }
    rig.row("a later fragment", FromWire, &hidden(STRANGER, &[(44, LATER_FRAGMENT)]), None, None);
    let tcp = Ip::new(STRANGER, VTEP).next(60, &[&[6, 0, 1, 4, 0, 0, 0, 0][..], &[0; 20]].concat());
    rig.row("TCP to the node", FromWire, &ethernet(WIRE_MAC, PEER_VTEP_MAC, &tcp), None, None);
    rig.produced
}

#[test]
fn the_guard_drops_strangers_vxlan_of_ipv6_and_the_programs_load_that_tell_of_packets() {
    Lab::run(guarded);
}

fn guarded(lab: &Lab) -> Produced {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _inside = runtime.enter();
    let mut rig = Rig::load(lab, true, true);
    let udp = Ip::new(REMOTE, POD).udp(53, 5000, b"payload");
    for (from, action) in [(STRANGER, 1), (PEER_VTEP, 2)] {
        let frame = arrived(from, &udp);
        let mut options = aya::programs::TestRunOptions::new();
        options.data_in = Some(&frame);
        let before = rig.dataplane.counters().unwrap();
        let guard = rig.dataplane.guard().unwrap();
        let result = aya::programs::TestRun::test_run(guard, options).unwrap();
        assert_eq!(result.return_value, action, "XDP_DROP is 1, XDP_PASS 2");
        let after = rig.dataplane.counters().unwrap();
        let counted: Vec<_> = after.keys().filter(|reason| after[reason] != before[reason]).collect();
        assert_eq!(counted, [DropGuard].iter().filter(|_| action == 1).collect::<Vec<_>>());
        rig.produced.extend(counted);
    }
    let frame = sent(&Ip::new(POD, REMOTE).udp(5000, 53, b"told of"));
    assert_eq!(rig.run(FromPod, &frame, Context::default()).1, Some(PassPodGate));
    rig.produced
}

#[test]
fn vxlan_by_another_way_is_dropped_unless_it_is_a_peers_own() {
    Lab::run(by_another_way);
}

fn by_another_way(lab: &Lab) -> Produced {
    /// All nodes of the link (RFC 4291).
    const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let mut rig = Rig::load(lab, true, false);
    let inner = ethernet(VTEP_MAC, PEER_VTEP_MAC, &Ip::new(REMOTE, POD).udp(1, 2, b"x"));
    let forged = ethernet(VTEP_MAC, PEER_VTEP_MAC, &Ip::new(OTHER_POD, POD).udp(1, 2, b"x"));
    let came = |from, to, inner: &[u8]| ethernet(WIRE_MAC, PEER_VTEP_MAC, &vxlan(from, to, inner));
    for (what, to) in [
        ("for this node", VTEP),
        ("for all", ALL_NODES),
        ("for another address of the host", OUTSIDE),
        ("for a peer", PEER_VTEP),
    ] {
        let frame = came(STRANGER, to, &inner);
        rig.row(&format!("a stranger's, {what}"), FromOther, &frame, Some(DropUnknownVtep), None);
    }
    rig.row(
        "a stranger's, for all, at the uplink",
        FromWire,
        &came(STRANGER, ALL_NODES, &inner),
        Some(DropUnknownVtep),
        None,
    );
    rig.row("a peer's", FromOther, &came(PEER_VTEP, VTEP, &inner), None, None);
    rig.row("a peer's, forged", FromOther, &came(PEER_VTEP, VTEP, &forged), Some(DropForgedPeerSource), None);
    let other_port = ethernet(WIRE_MAC, PEER_VTEP_MAC, &Ip::new(STRANGER, VTEP).udp(1, 53, &[0; 90]));
    rig.row("another port", FromOther, &other_port, None, None);
    for chain in [&[(60, OPTIONS)][..], &[(44, FIRST_FRAGMENT)], &[(60, OPTIONS); 9]] {
        rig.row("a stranger's, hidden", FromOther, &hidden(STRANGER, chain), Some(DropUnknownVtep), None);
    }
    rig.row("a later fragment", FromOther, &hidden(STRANGER, &[(44, LATER_FRAGMENT)]), None, None);
    for (what, to) in [("to its node", VTEP), ("to another node", PEER_VTEP), ("to all", ALL_NODES)] {
        rig.row(
            &format!("a pod's, {what}"),
            FromPod,
            &sent(&vxlan(POD, to, &inner)),
            Some(DropPodVxlan),
            None,
        );
    }
    rig.produced
}
