//! `docker run --rm` in a loop, with a container beside it that must not notice.

use std::{
    fs,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use loden_tests::{
    node::Node,
    process::wait_for,
    traffic::stream::{self, Until},
};
use serde_json::Value;

use crate::{Fleet, assert_fast, wait_for_endpoints};

/// So many containers at a time.
const AT_ONCE: u32 = 4;
/// And so many in all, where `LODEN_DOCKER_RUNS` does not say otherwise: it takes about a quarter of a second for each.
const RUNS: u32 = 100;

#[test]
fn containers_that_come_and_go_leave_no_endpoint_and_disturb_nobody() {
    let runs = std::env::var("LODEN_DOCKER_RUNS").map_or(RUNS, |text| text.parse().unwrap());
    let fleet = Fleet::start(&[]);
    let [a, b] = fleet.pair();
    let (started, start) = (AtomicU32::new(0), Instant::now());
    thread::scope(|scope| {
        let loops: Vec<_> = (0..AT_ONCE)
            .map(|_| {
                scope.spawn(|| {
                    while started.fetch_add(1, Ordering::Relaxed) < runs {
                        fleet.engines[0].run_and_remove().unwrap();
                    }
                })
            })
            .collect();
        while loops.iter().any(|each| !each.is_finished()) {
            let second = Until::Time(Duration::from_secs(1));
            stream::run(a.host(), b.host(), None, second).expect("the bystander's stream");
        }
    });
    println!("{runs} containers in {:.1} s", start.elapsed().as_secs_f32());
    let node = &fleet.cluster.nodes[0];
    wait_for_endpoints(node, &[a.address()]);
    assert_eq!(fleet.engines[0].docker("ps --all --quiet").unwrap().lines().count(), 1);
    wait_for("links at living interfaces only", Duration::from_secs(5), || {
        stale_links(node).is_empty().then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {:?}", stale_links(node)));
    assert_fast(&fleet.cluster.nodes, &a, &b);
}

/// Pinned links (`PROGRAM-IFINDEX`) at interfaces that the node no longer has.
fn stale_links(node: &Node) -> Vec<String> {
    let json = node.netns().ip("-json link show").unwrap();
    let links: Value = serde_json::from_str(&json).unwrap();
    let living: Vec<String> =
        links.as_array().unwrap().iter().map(|link| link["ifindex"].to_string()).collect();
    let pins = fs::read_dir(node.bpffs().join("v1/links")).unwrap();
    let names: Vec<String> = pins.map(|pin| pin.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!names.is_empty(), "the agent pins its links");
    let is_stale = |name: &String| !living.iter().any(|index| name.rsplit('-').next() == Some(index));
    names.into_iter().filter(is_stale).collect()
}
