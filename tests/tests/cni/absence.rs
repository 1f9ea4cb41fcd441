//! Pods come and go while the agent is away.

use std::time::Duration;

use loden_tests::{
    counters::Counters,
    process::wait_for,
    traffic::{
        hello, ping,
        stream::{self, Until},
    },
};

use crate::{assert_known, assert_nothing_is_left, fast_share, knows, routed_cluster};

#[test]
fn pods_are_made_and_removed_while_the_agent_is_down_and_are_fast_at_once() {
    let (mut cluster, runtimes) = routed_cluster(2, &[]);
    let far = runtimes[1].add("far").unwrap();
    let old = runtimes[0].add("old").unwrap();
    let before = Counters::read(&cluster.nodes[0]).unwrap();
    cluster.nodes[0].kill_agent();

    let new = runtimes[0].add("new").unwrap();
    assert_eq!(hello(new.host(), far.host(), None).unwrap(), new.address);
    ping(&new.netns, far.address, 20).unwrap();
    let sent = new.packets_sent().unwrap() + far.packets_sent().unwrap();
    let stream = stream::run(new.host(), far.host(), None, Until::Bytes(50_000_000)).unwrap();
    assert_eq!((stream.bytes, stream.source), (50_000_000, new.address.into()));
    let sent = new.packets_sent().unwrap() + far.packets_sent().unwrap() - sent;
    let gone = old.address;
    runtimes[0].remove(old).unwrap();

    cluster.nodes[0].start_agent(&[]).unwrap();
    // The maps have outlived the agent, and with them what was counted meanwhile.
    let counters = Counters::read(&cluster.nodes[0]).unwrap().since(&before);
    let fast = counters.get("fast_encap") + counters.get("fast_decap") + counters.get("fast_overlay");
    assert!(fast as f64 >= 0.98 * sent as f64, "{fast} of {sent}: {counters:?}");
    assert_known(&cluster.nodes[0], new.address);
    assert!(!knows(&cluster.nodes[0], gone));
    let work = || stream::run(far.host(), new.host(), None, Until::Bytes(50_000_000));
    let (_, share) = fast_share(&cluster.nodes, &[&new, &far], work);
    assert!(share >= 0.99, "{share}");
    runtimes[0].remove(new).unwrap();
    assert_nothing_is_left(&cluster.nodes[0], &runtimes[0]);
}

#[test]
fn an_agent_that_could_attach_nothing_before_finds_the_pods_when_it_can() {
    let (mut cluster, runtimes) = routed_cluster(2, &["--datapath=kernel"]);
    let pods = [runtimes[0].add("a").unwrap(), runtimes[1].add("b").unwrap()];
    let (a, b) = (&pods[0], &pods[1]);
    assert_eq!(hello(a.host(), b.host(), None).unwrap(), a.address);
    for node in &mut cluster.nodes {
        node.stop_agent().unwrap();
        node.start_agent(&[]).unwrap();
    }
    wait_for("the fast path", Duration::from_secs(5), || {
        ping(&a.netns, b.address, 20).unwrap();
        let work = || ping(&a.netns, b.address, 40);
        (fast_share(&cluster.nodes, &[a, b], work).1 > 0.9).then_some(())
    })
    .unwrap();
}

#[test]
fn what_a_namespace_that_vanished_has_left_goes_with_del() {
    let (mut cluster, runtimes) = routed_cluster(1, &[]);
    let pod = runtimes[0].add("a").unwrap();
    cluster.nodes[0].kill_agent();
    let (id, result) = (pod.id.clone(), pod.result.clone());
    let veth = pod.veth().to_owned();
    drop(pod);
    wait_for("the kernel to remove the veth", Duration::from_secs(5), || {
        cluster.nodes[0].netns().ip(&format!("link show {veth}")).err()
    })
    .unwrap();
    runtimes[0].del(&id, None, &result).unwrap();
    let pins = std::fs::read_dir(cluster.nodes[0].bpffs().join("v1/links")).unwrap();
    let names: Vec<_> = pins.map(|pin| pin.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!names.iter().any(|name| name.contains("_pod-")), "{names:?}");
    cluster.nodes[0].start_agent(&[]).unwrap();
    assert_nothing_is_left(&cluster.nodes[0], &runtimes[0]);
}

#[test]
fn a_flushed_route_to_a_pod_comes_back_within_two_seconds() {
    for datapath in ["--datapath=auto", "--datapath=kernel"] {
        let (cluster, runtimes) = routed_cluster(1, &[datapath]);
        let pod = runtimes[0].add("a").unwrap();
        let host = cluster.nodes[0].netns();
        let before = host.ip("route show proto 77").unwrap();
        assert!(before.contains(&pod.address.to_string()), "{before}");
        host.ip("route flush proto 77").unwrap();
        wait_for("the route", Duration::from_secs(2), || {
            (host.ip("route show proto 77").unwrap() == before).then_some(())
        })
        .unwrap_or_else(|error| panic!("{datapath}: {error:#}"));
        ping(host, pod.address, 1).unwrap();
    }
}
