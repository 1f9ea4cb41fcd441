//! Containers come and go, agents too.

use std::{thread, time::Duration};

use loden_tests::{
    cluster::{Cluster, Plan},
    counters::Share,
    process::wait_for,
    traffic::{
        hello, ping,
        stream::{self, Until},
    },
};

#[test]
fn a_container_that_comes_back_at_its_address_on_another_veth_is_reached_fast() {
    let mut cluster = Cluster::start(&Plan { nodes: 2, ..Plan::default() }, &[]).unwrap();
    let client = cluster.nodes[0].run_container(2).unwrap();
    for round in 0..3 {
        let server = cluster.nodes[1].run_container(2).unwrap();
        let seen = hello(client.host(), server.host(), None).unwrap_or_else(|error| {
            panic!("round {round}, container {}: {error:#}", server.address());
        });
        assert_eq!(seen, client.address());
        wait_for("the fast path to the new container", Duration::from_secs(10), || {
            let work = || ping(client.netns(), server.address(), 40);
            let ((), share) = Share::during(&cluster.nodes, &[&client, &server], work).ok()?;
            (share.smaller() > 0.9).then_some(())
        })
        .unwrap_or_else(|error| panic!("round {round}: {error:#}"));
    }
}

/// A stream runs across `disturb`, ends whole, and stays on the fast path.
fn assert_stream_survives(disturb: impl FnOnce(&mut Cluster)) {
    let mut cluster = Cluster::start(&Plan { nodes: 2, ..Plan::default() }, &[]).unwrap();
    let containers = cluster.run_containers(1).unwrap();
    let (a, b) = (&containers[0], &containers[1]);
    ping(a.netns(), b.address(), 20).unwrap();
    let before: Vec<_> = cluster.nodes.iter().map(|node| node.subnet_env().unwrap()).collect();
    let stream = thread::scope(|scope| {
        let four_seconds = Until::Time(Duration::from_secs(4));
        let running = scope.spawn(move || stream::run(a.host(), b.host(), None, four_seconds));
        thread::sleep(Duration::from_secs(1));
        disturb(&mut cluster);
        running.join().unwrap().unwrap()
    });
    assert_eq!(stream.source, a.address());
    let after: Vec<_> = cluster.nodes.iter().map(|node| node.subnet_env().unwrap()).collect();
    assert_eq!(before, after, "every node keeps its subnet");
    let work = || stream::run(a.host(), b.host(), None, Until::Bytes(100_000_000));
    let (_, share) = Share::during(&cluster.nodes, &[a, b], work).unwrap();
    assert!(share.smaller() >= 0.99, "after the disturbance: {share:?}");
}

#[test]
fn a_stream_goes_on_while_an_agent_is_stopped_and_started() {
    assert_stream_survives(|cluster| {
        assert!(cluster.nodes[0].stop_agent().unwrap().success());
        cluster.nodes[0].start_agent(&[]).unwrap();
    });
}

#[test]
fn a_stream_goes_on_while_an_agent_crashes_and_starts_again() {
    assert_stream_survives(|cluster| {
        cluster.nodes[1].kill_agent();
        cluster.nodes[1].start_agent(&[]).unwrap();
    });
}

#[test]
fn a_stream_goes_on_while_the_programs_are_detached_and_attached_again() {
    assert_stream_survives(|cluster| {
        cluster.nodes[0].stop_agent().unwrap();
        cluster.nodes[0].start_agent(&["--datapath=kernel"]).unwrap();
        cluster.nodes[0].stop_agent().unwrap();
        cluster.nodes[0].start_agent(&[]).unwrap();
    });
}

#[test]
fn what_works_goes_on_while_etcd_is_away() {
    let mut cluster = Cluster::start(&Plan { nodes: 2, ..Plan::default() }, &[]).unwrap();
    let containers = cluster.run_containers(1).unwrap();
    cluster.etcd_mut().kill();
    let work = || stream::run(containers[0].host(), containers[1].host(), None, Until::Bytes(50_000_000));
    assert_eq!(work().unwrap().bytes, 50_000_000);
    cluster.etcd_mut().restart().unwrap();
    assert_eq!(work().unwrap().bytes, 50_000_000);
    assert_eq!(cluster.leases().unwrap().len(), 2);
}
