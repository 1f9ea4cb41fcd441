//! The agent is restarted again and again under load: nothing breaks and nothing is lost.

use std::{
    thread,
    time::{Duration, Instant},
};

use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    counters::Meter,
    node::Node,
    traffic::{
        load::{self, Report},
        ping,
    },
};

const FLOWS: usize = 50;

/// Runs the load both ways and what happens meanwhile.
fn under_load(
    cluster: &mut Cluster,
    containers: &[Container],
    work: impl FnOnce(&mut Cluster),
) -> [Report; 2] {
    let (a, b) = (&containers[0], &containers[1]);
    let meter = Meter::start(&cluster.nodes, &[a, b]).unwrap();
    let (((), back), there) = load::during(a.host(), b.host(), FLOWS / 2, || {
        load::during(b.host(), a.host(), FLOWS / 2, || {
            work(cluster);
            Ok(())
        })
    })
    .unwrap();
    let share = meter.stop(&cluster.nodes, &[a, b]).unwrap();
    println!("there: {there:?}\nback: {back:?}\n{share:?}: {:.4}", share.smaller());
    assert!(share.smaller() >= 0.95, "{share:?}");
    [there, back]
}

fn restarts_lose_nothing(gate: &str, restarts: u32) {
    let mut cluster = Cluster::start(&Plan { nodes: 2, ..Plan::default() }, &[gate]).unwrap();
    let containers = cluster.run_containers(1).unwrap();
    let calm = under_load(&mut cluster, &containers, |_| thread::sleep(Duration::from_secs(3)));
    let loud = under_load(&mut cluster, &containers, |cluster| {
        let (start, node) = (Instant::now(), &mut cluster.nodes[0]);
        for restart in 0..restarts {
            if restart % 2 == 0 {
                assert!(node.stop_agent().unwrap().success());
            } else {
                node.kill_agent();
            }
            node.start_agent(&[gate]).unwrap_or_else(|error| panic!("restart {restart}: {error:#}"));
        }
        println!("{restarts} restarts in {:?}", start.elapsed());
    });
    for (calm, loud) in calm.iter().zip(&loud) {
        assert!(loud.datagrams > 1000, "{loud:?}");
        assert!(loud.lost <= calm.lost, "without restarts: {calm:?}, with {restarts}: {loud:?}");
        assert_eq!(loud.repeated, 0, "{loud:?}");
    }
}

#[test]
fn a_hundred_restarts_under_load_lose_nothing() {
    restarts_lose_nothing("--gate=strict", 100);
}

#[test]
fn restarts_under_load_lose_nothing_with_the_open_gate() {
    restarts_lose_nothing("--gate=open", 20);
}

#[test]
fn a_pod_that_the_bridge_has_forgotten_stays_an_endpoint_when_the_agent_starts_again() {
    let mut cluster = Cluster::start(&Plan { nodes: 2, ..Plan::default() }, &[]).unwrap();
    let containers = cluster.run_containers(1).unwrap();
    ping(containers[0].netns(), containers[1].address(), 20).unwrap();
    let node = &mut cluster.nodes[0];
    let endpoint = |node: &Node| node.status().unwrap()["endpoints"].clone();
    let before = endpoint(node);
    assert_eq!(before.as_array().unwrap().len(), 1, "{before}");
    node.stop_agent().unwrap();
    // What minutes of silence on the slow path come to.
    node.netns().ip("neigh flush dev docker0").unwrap();
    node.netns().ip("link set docker0 type bridge fdb_flush").unwrap();
    node.start_agent(&[]).unwrap();
    assert_eq!(endpoint(node), before);
}
