//! The gate on IPv6.

use std::{net::UdpSocket, process::Command};

use super::*;

pub(super) const TABLES: &[Table] = &[qualified, translated, taken];

#[test]
fn the_gate_lets_a_direction_pass_that_came_out_of_the_host_unchanged() {
    Lab::run(qualified);
}

fn qualified(lab: &Lab) -> Produced {
    let mut rig = Rig::load(lab, true, false);
    let out = Ip::new(POD, REMOTE).udp(5000, 53, b"a query of some length");
    rig.passes("a new flow", FromPod, &sent(&out), PassPodGate);
    let left = ethernet(
        PEER_VTEP_MAC,
        VTEP_MAC,
        &Ip::new(POD, REMOTE).hops(63).udp(5000, 53, b"a querY of some length"),
    );
    rig.row("another packet leaves", ToOverlay, &left, None, None);
    rig.passes("which proves nothing", FromPod, &sent(&out), PassPodGate);
    let left = ethernet(
        PEER_VTEP_MAC,
        VTEP_MAC,
        &Ip::new(POD, REMOTE).hops(63).udp(5000, 53, b"a query of some length"),
    );
    rig.row("the same leaves", ToOverlay, &left, None, None);
    assert_eq!(rig.run(FromPod, &sent(&out), Context::default()).1, Some(FastEncap));
    let back = Ip::new(REMOTE, POD).udp(53, 5000, b"the answer");
    rig.passes("the other direction", FromWire, &arrived(PEER_VTEP, &back), PassWireGate);
    rig.passes(
        "as the kernel decapsulates it",
        FromOverlay,
        &ethernet(VTEP_MAC, PEER_VTEP_MAC, &back),
        PassOverlay,
    );
    let delivered = Ip::new(REMOTE, POD).hops(63).udp(53, 5000, b"the answer");
    rig.row("into the pod", ToPod, &ethernet(POD_MAC, GATEWAY_MAC, &delivered), None, None);
    assert_eq!(rig.run(FromWire, &arrived(PEER_VTEP, &back), Context::default()).1, Some(FastDecap));
    let syn = Ip::new(POD, REMOTE).tcp(5000, 80, 0x02, b"");
    rig.passes("SYN", FromPod, &sent(&syn), PassPodTcpControl);
    let syn = Ip::new(REMOTE, POD).tcp(80, 5000, 0x12, b"");
    rig.passes("SYN and ACK", FromWire, &arrived(PEER_VTEP, &syn), PassWireTcpControl);
    rig.dataplane.bump_epoch().unwrap();
    rig.passes("another epoch", FromPod, &sent(&out), PassPodGate);
    rig.produced
}

#[test]
fn a_flow_that_the_host_translates_gates_its_pod() {
    Lab::run(translated);
}

fn translated(lab: &Lab) -> Produced {
    let mut rig = Rig::load(lab, false, false);
    // What a pod sent to a service leaves for a backend: nobody saw that go in.
    let out = Ip::new(POD, REMOTE).hops(63).tcp(5000, 80, 0x10, b"x");
    rig.passes("point 2", ToOverlay, &ethernet(PEER_VTEP_MAC, VTEP_MAC, &out), NoteTranslated);
    let back = Ip::new(REMOTE, POD).tcp(80, 5000, 0x10, b"y");
    rig.passes("its answer", FromWire, &arrived(PEER_VTEP, &back), PassWireGate);
    let key = FlowKey::of(6, (POD.octets(), 5000), (REMOTE.octets(), 80));
    assert_eq!(rig.flows.get(&key, 0).unwrap().translated, 1);
    let endpoints = rig.dataplane.half::<V6>().endpoints().unwrap();
    assert_eq!(endpoints.iter().filter(|endpoint| endpoint.gated != 0).count(), 1);
    rig.produced
}

#[test]
fn a_tuple_that_the_pod_has_itself_is_not_given_to_another_flow() {
    Lab::run(taken);
}

fn taken(lab: &Lab) -> Produced {
    // The pods of the lab have its namespace; where the socket's packets would go is of no matter.
    for line in [&format!("address add {POD}/128 dev lo nodad"), "route add fc00:0:0:2::/64 dev lo"] {
        let done = Command::new("ip").arg("-6").args(line.split(' ')).status();
        assert!(done.unwrap().success(), "{line}");
    }
    let mut rig = Rig::load(lab, false, false);
    let out = Ip::new(POD, REMOTE).hops(63).udp(5000, 53, b"x");
    let out = ethernet(PEER_VTEP_MAC, VTEP_MAC, &out);
    let socket = UdpSocket::bind((POD, 5000)).unwrap();
    socket.connect((REMOTE, 53)).unwrap();
    rig.row("to_overlay", ToOverlay, &out, Some(DropTupleTaken), None);
    let back = ethernet(POD_MAC, GATEWAY_MAC, &Ip::new(REMOTE, POD).hops(63).udp(53, 5000, b"y"));
    rig.row("to_pod", ToPod, &back, Some(DropTupleTaken), None);
    drop(socket);
    let out = Ip::new(POD, REMOTE).hops(63).udp(5001, 53, b"x");
    rig.passes("nobody has it", ToOverlay, &ethernet(PEER_VTEP_MAC, VTEP_MAC, &out), NoteTranslated);
    rig.produced
}
