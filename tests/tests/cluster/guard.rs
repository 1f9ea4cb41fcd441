//! VXLAN from strangers ends at the guard, or behind it at the uplink's program.

use std::net::{IpAddr, UdpSocket};

use loden_tests::{
    cluster::Cluster,
    counters::Counters,
    each_family,
    family::Family,
    netns::Netns,
    traffic::{
        ping,
        stream::{self, Until},
    },
};

each_family!(
    the_generic_guard_drops_strangers,
    the_native_guard_drops_strangers,
    on_a_veth_auto_means_none_and_the_uplinks_program_drops_strangers,
);

/// VXLAN with the network's VNI; what follows does not matter, nobody gets to it.
const FRAME: [u8; 64] = {
    let mut frame = [0; 64];
    frame[0] = 8;
    frame[6] = 1;
    frame
};
const FRAMES: u64 = 100;

/// Sends from an address that is no VTEP and returns what the node counted.
fn strangers_frames<F: Family>(args: &[&str]) -> Counters {
    let (cluster, containers) = Cluster::start_with_containers(&F::alone(), args).unwrap();
    let stranger = Netns::create("stranger").unwrap();
    cluster.underlay().plug(&stranger, 77).unwrap();
    let node = &cluster.nodes[0];
    let before = Counters::read(node).unwrap();
    let target: (IpAddr, u16) = (F::of_node(&cluster, 0).into(), 8472);
    let source: IpAddr = F::on_underlay(cluster.underlay(), 77).into();
    stranger.run(|| {
        let socket = UdpSocket::bind((source, 0)).unwrap();
        for _ in 0..FRAMES {
            assert_eq!(socket.send_to(&FRAME, target).unwrap(), FRAME.len());
        }
    });
    let counted = Counters::read(node).unwrap().since(&before);
    // The guard lets through what it must.
    let (a, b) = (&containers[0], &containers[1]);
    ping(a.netns(), F::of(b), 5).unwrap();
    stream::run(F::host(a), F::host(b), None, Until::Bytes(20_000_000)).unwrap();
    counted
}

fn the_generic_guard_drops_strangers<F: Family>() {
    let counted = strangers_frames::<F>(&["--xdp=generic"]);
    assert_eq!((counted.get("drop_guard"), counted.get("drop_unknown_vtep")), (FRAMES, 0), "{counted:?}");
}

fn the_native_guard_drops_strangers<F: Family>() {
    let counted = strangers_frames::<F>(&["--xdp=native"]);
    assert_eq!((counted.get("drop_guard"), counted.get("drop_unknown_vtep")), (FRAMES, 0), "{counted:?}");
}

fn on_a_veth_auto_means_none_and_the_uplinks_program_drops_strangers<F: Family>() {
    let counted = strangers_frames::<F>(&["--xdp=auto"]);
    assert_eq!((counted.get("drop_guard"), counted.get("drop_unknown_vtep")), (0, FRAMES), "{counted:?}");
}
