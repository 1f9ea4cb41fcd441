//! A large cluster in small: what the agent asks of etcd and of the kernel does not grow faster than the cluster,
//! and a change costs what has changed.

use std::time::{Duration, Instant};

use loden_tests::{
    cluster::Cluster,
    crowd::{self, Crowd, Peers},
    each_family,
    etcd::Gateway,
    node::Node,
    process::wait_for,
};

use crate::wait_ready;

const PEERS: u32 = 1000;

/// How often the agent has asked the kernel something (netlink) so far.
fn kernel_requests(node: &Node) -> u64 {
    node.status().unwrap()["kernel_requests"].as_u64().unwrap()
}

fn etcd_calls(cluster: &Cluster) -> u64 {
    cluster.etcd().calls().unwrap().iter().map(|(_, count)| count).sum()
}

each_family!(a_thousand_peers_are_programmed_with_few_requests_and_a_change_with_fewer);

fn a_thousand_peers_are_programmed_with_few_requests_and_a_change_with_fewer<F: Peers>() {
    let mut cluster = Cluster::create(&F::wide(1)).unwrap();
    let mut crowd = Crowd::<F>::gather(Gateway::connect(cluster.etcd()).unwrap(), PEERS).unwrap();
    let before = etcd_calls(&cluster);
    let start = Instant::now();
    cluster.nodes[0].start_agent(&[]).unwrap();
    println!("ready after {:?}", start.elapsed());
    let node = &cluster.nodes[0];
    let count = |line: &str| node.netns().exec(line).unwrap().lines().count();
    let routes = format!("ip {} route show dev {} proto 76", F::FLAG, F::DEVICE);
    assert_eq!(count(&routes), PEERS as usize);
    assert_eq!(count(&format!("ip neigh show dev {} nud permanent", F::DEVICE)), PEERS as usize);
    let fdb = node.netns().exec(&format!("bridge fdb show dev {}", F::DEVICE)).unwrap();
    assert_eq!(fdb.lines().filter(|line| line.contains(" dst ")).count(), PEERS as usize);
    let (calls, requests) = (etcd_calls(&cluster) - before, kernel_requests(node));
    println!("{calls} calls to etcd, {requests} requests to the kernel");
    assert!(calls < 20, "one listing, not one call a peer: {calls}");
    // For each the way there (two questions), an FDB entry, a neighbour and a route.
    // And the two again for each address or link that comes meanwhile, such as IPv6's own: another way may lead there.
    assert!(requests < 10 * u64::from(PEERS) + 100, "{requests}");

    let requests = wait_for("the agent to be calm", Duration::from_secs(20), || {
        let before = kernel_requests(node);
        std::thread::sleep(Duration::from_secs(1));
        (kernel_requests(node) == before).then_some(before)
    })
    .unwrap();

    // One change at a time: three requests each, and the few that every pass makes.
    for n in 0..20 {
        let mac = crowd.change(n, 1).unwrap();
        wait_for("the change", Duration::from_secs(2), || {
            (crowd::mac_at::<F>(node, n).ok()? == mac).then_some(())
        })
        .unwrap();
    }
    let changes = kernel_requests(node) - requests;
    println!("{changes} requests for 20 changes");
    assert!(changes < 20 * 9, "{changes}");
    for n in 0..20 {
        crowd.leave(n).unwrap();
    }
    wait_for("20 peers to be gone", Duration::from_secs(5), || {
        (count(&routes) == PEERS as usize - 20).then_some(())
    })
    .unwrap();
    wait_ready(node, 5);
}
