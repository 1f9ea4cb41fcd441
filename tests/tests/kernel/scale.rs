//! Many peers.

use std::{net::Ipv4Addr, time::Instant};

use loden_agent::overlay::OverlayPeer;

use crate::{inside, lines, node};

/// The n-th of many peers: subnets 10.0.0.0/26 and on, VTEPs 172.16.0.1 and on.
fn peer(n: u32) -> OverlayPeer {
    let [_, a, b, c] = n.to_be_bytes();
    let subnet = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 0, 0)) + n * 64);
    let vtep = Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 16, 0, 1)) + n);
    node::peer(&format!("{subnet}/26"), &vtep.to_string(), [2, 0, 0, a, b, c])
}

#[test]
fn five_thousand_peers_are_programmed_and_purged() {
    const PEERS: u32 = 5000;
    let (a, _b) = node::pair();
    let spec = node::spec(&a, "192.168.77.11");
    let peers: Vec<_> = (1..=PEERS).map(peer).collect();
    inside(&a, async |kernel| {
        let device = node::set_up(&kernel, &spec, "10.0.0.0/26").await.index;
        let desired = |peers: &[OverlayPeer]| {
            let mut desired = node::desired("10.0.0.0/26", device, spec.uplink, peers);
            desired.network = "10.0.0.0/8".parse().unwrap();
            desired
        };
        let timed = async |what: &str, peers: &[OverlayPeer]| {
            let start = Instant::now();
            let steps = node::reconcile(&kernel, &desired(peers)).await;
            println!("{what}: {steps} steps in {:?}", start.elapsed());
            steps
        };
        assert_eq!(timed("5000 new peers", &peers).await, 15_000);
        assert_eq!(lines(&a, "ip route show dev flannel.1").len(), 5000);
        assert_eq!(lines(&a, "ip neigh show dev flannel.1 nud permanent").len(), 5000);
        assert_eq!(lines(&a, "bridge fdb show dev flannel.1").len(), 5000);
        assert_eq!(timed("5000 peers that are there", &peers).await, 0);
        assert_eq!(timed("one peer less", &peers[1..]).await, 3);
        assert_eq!(timed("none left", &[]).await, 14_997);
        assert!(lines(&a, "ip route show dev flannel.1").is_empty());
    });
}
