//! VXLAN from strangers ends at the guard, or behind it at the uplink's program.

use std::net::UdpSocket;

use loden_tests::{
    cluster::{Cluster, Plan},
    counters::Counters,
    netns::Netns,
    traffic::{
        ping,
        stream::{self, Until},
    },
};

/// VXLAN with the network's VNI; what follows does not matter, nobody gets to it.
const FRAME: [u8; 64] = {
    let mut frame = [0; 64];
    frame[0] = 8;
    frame[6] = 1;
    frame
};
const FRAMES: u64 = 100;

/// Sends from an address that is no VTEP and returns what the node counted.
fn strangers_frames(args: &[&str]) -> Counters {
    let mut cluster = Cluster::start(&Plan { nodes: 2, ..Plan::default() }, args).unwrap();
    let containers = cluster.run_containers(1).unwrap();
    let stranger = Netns::create("stranger").unwrap();
    cluster.underlay().plug(&stranger, 77).unwrap();
    let node = &cluster.nodes[0];
    let before = Counters::read(node).unwrap();
    let target = (node.address(), 8472);
    stranger.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        for _ in 0..FRAMES {
            assert_eq!(socket.send_to(&FRAME, target).unwrap(), FRAME.len());
        }
    });
    let counted = Counters::read(node).unwrap().since(&before);
    // The guard lets through what it must.
    let (a, b) = (&containers[0], &containers[1]);
    ping(a.netns(), b.address(), 5).unwrap();
    stream::run(a.host(), b.host(), None, Until::Bytes(20_000_000)).unwrap();
    counted
}

#[test]
fn the_generic_guard_drops_strangers() {
    let counted = strangers_frames(&["--xdp=generic"]);
    assert_eq!((counted.get("drop_guard"), counted.get("drop_unknown_vtep")), (FRAMES, 0), "{counted:?}");
}

#[test]
fn the_native_guard_drops_strangers() {
    let counted = strangers_frames(&["--xdp=native"]);
    assert_eq!((counted.get("drop_guard"), counted.get("drop_unknown_vtep")), (FRAMES, 0), "{counted:?}");
}

#[test]
fn on_a_veth_auto_means_none_and_the_uplinks_program_drops_strangers() {
    let counted = strangers_frames(&["--xdp=auto"]);
    assert_eq!((counted.get("drop_guard"), counted.get("drop_unknown_vtep")), (0, FRAMES), "{counted:?}");
}
