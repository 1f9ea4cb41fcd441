//! The agent is restarted again and again under load: nothing breaks and nothing is lost.

use std::{
    thread,
    time::{Duration, Instant},
};

use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    counters::Meter,
    each_plan,
    node::Node,
    traffic::{
        load::{self, Report},
        ping,
    },
};

/// TCP flows of each pair of hosts, each way.
const FLOWS: usize = 25;

each_plan!(restarts_under_load_lose_nothing_with_the_open_gate);

/// Runs the load both ways in each family, and what happens meanwhile; wants both to be on the fast path.
fn under_load(
    cluster: &mut Cluster,
    containers: &[Container],
    work: impl FnOnce(&mut Cluster),
) -> Vec<Report> {
    let (a, b) = (&containers[0], &containers[1]);
    let meter = Meter::start(&cluster.nodes, &[a, b]).unwrap();
    let pairs: Vec<_> = a.hosts().zip(b.hosts()).flat_map(|(a, b)| [(a, b), (b, a)]).collect();
    let work = Box::new(|| {
        work(cluster);
        Ok(())
    });
    let ((), reports) = load::during_all(&pairs, FLOWS, work).unwrap();
    let share = meter.stop(&cluster.nodes, &[a, b]).unwrap();
    println!("{reports:?}\n{share:?}: {:.4}", share.smaller());
    assert!(share.smaller() >= 0.95, "{share:?}");
    reports
}

/// Wants that nothing was lost beyond what a calm run lost.
fn assert_nothing_lost(calm: &[Report], loud: &[Report]) {
    for (calm, loud) in calm.iter().zip(loud) {
        assert!(loud.datagrams > 1000, "{loud:?}");
        assert!(loud.lost <= calm.lost, "calm: {calm:?}, and then: {loud:?}");
        assert_eq!(loud.repeated, 0, "{loud:?}");
    }
}

fn restarts_lose_nothing(plan: &Plan, gate: &str, restarts: u32) {
    let (mut cluster, containers) = Cluster::start_with_containers(plan, &[gate]).unwrap();
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
    assert_nothing_lost(&calm, &loud);
}

/// In both families at once, since each restart is of both.
#[test]
fn a_hundred_restarts_under_load_lose_nothing() {
    restarts_lose_nothing(&Plan { nodes: 2, ..Plan::dual() }, "--gate=strict", 100);
}

fn restarts_under_load_lose_nothing_with_the_open_gate(plan: &Plan) {
    restarts_lose_nothing(plan, "--gate=open", 20);
}

/// Whatever an agent was about to do, the next one does; what is there meanwhile goes on in both families.
#[test]
fn an_agent_killed_at_any_moment_of_its_start_loses_nothing_of_either_family() {
    const MOMENTS: u32 = 24;
    let plan = Plan { nodes: 2, ..Plan::dual() };
    let (mut cluster, containers) = Cluster::start_with_containers(&plan, &[]).unwrap();
    let calm = under_load(&mut cluster, &containers, |_| thread::sleep(Duration::from_secs(3)));
    let node = &mut cluster.nodes[0];
    node.kill_agent();
    let start = Instant::now();
    node.start_agent(&[]).unwrap();
    let whole = start.elapsed();
    let loud = under_load(&mut cluster, &containers, |cluster| {
        let node = &mut cluster.nodes[0];
        for moment in 1..=MOMENTS {
            node.kill_agent();
            node.launch_agent(&[]).unwrap();
            thread::sleep(whole * moment / MOMENTS);
        }
        node.kill_agent();
        node.start_agent(&[]).unwrap();
    });
    assert_nothing_lost(&calm, &loud);
    println!("killed at {MOMENTS} moments of {whole:?}");
}

#[test]
fn a_pod_that_the_bridge_has_forgotten_stays_an_endpoint_when_the_agent_starts_again() {
    let plan = Plan { nodes: 2, ..Plan::dual() };
    let (mut cluster, containers) = Cluster::start_with_containers(&plan, &[]).unwrap();
    for address in containers[1].addresses() {
        ping(containers[0].netns(), address, 20).unwrap();
    }
    let node = &mut cluster.nodes[0];
    let endpoint = |node: &Node| {
        let mut endpoints = node.status().unwrap()["endpoints"].take();
        for endpoint in endpoints.as_array_mut().unwrap() {
            // An agent that has just started has seen nobody yet.
            endpoint["last_seen_seconds"].take();
        }
        endpoints
    };
    let before = endpoint(node);
    assert_eq!(before.as_array().unwrap().len(), 2, "of each family one: {before}");
    node.stop_agent().unwrap();
    // What minutes of silence on the slow path come to.
    node.netns().ip("neigh flush dev docker0").unwrap();
    node.netns().ip("link set docker0 type bridge fdb_flush").unwrap();
    node.start_agent(&[]).unwrap();
    assert_eq!(endpoint(node), before);
}
