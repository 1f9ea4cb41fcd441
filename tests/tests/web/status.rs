//! `loden status` as people and scripts use it.

use std::{
    io::{BufRead as _, BufReader},
    process::Stdio,
    time::Duration,
};

use loden_tests::{
    each_family,
    family::Family,
    process::wait_for,
    traffic::stream::{self, Until},
};
use serde_json::Value;

use crate::{served, served_in};

each_family!(the_status_names_the_container_tells_who_was_seen_and_what_was_slow, the_live_view_shows_rates,);

fn the_status_names_the_container_tells_who_was_seen_and_what_was_slow<F: Family>() {
    let (cluster, containers) = served_in::<F>();
    let node = &cluster.nodes[0];
    let seen = || {
        let status = node.status().unwrap();
        let any =
            |what: &str| status[what].as_array().unwrap().iter().any(|it| !it["last_seen_seconds"].is_null());
        any("peers") && any("endpoints")
    };
    // Counters are looked at every five seconds, and what was there before the first look has no date.
    wait_for("a peer and a container that were seen", Duration::from_secs(20), || {
        loden_tests::traffic::ping(containers[0].netns(), F::of(&containers[1]), 1).unwrap();
        seen().then_some(())
    })
    .unwrap();
    let status = node.status().unwrap();
    let endpoint = &status["endpoints"][0];
    assert_eq!(endpoint["name"], containers[0].netns().name(), "{endpoint}");
    assert_eq!(endpoint["interface"], "veth1");
    assert_eq!(endpoint["address"], F::of(&containers[0]).to_string());
    assert_eq!(status["endpoints"].as_array().unwrap().len(), 1, "{status:#}");
    assert!(endpoint["slow"]["pass_pod_gate"].as_u64() >= Some(1), "{endpoint}");
    assert!(endpoint["last_seen_seconds"].as_f64().unwrap() < 20.0, "{endpoint}");
    assert_eq!(status["peers"][0]["direct"], false);
    let lease = &status["lease"];
    assert!(lease["expires_seconds"].as_f64().unwrap() > 86_000.0, "{lease}");
    let etcd = &status["etcd"];
    assert_eq!((&etcd["connected"], &etcd["lag_seconds"]), (&true.into(), &0.0.into()), "{etcd}");
    assert_eq!(etcd["member"], etcd["endpoints"][0], "{etcd}");
    let map = |name: &str| -> Value {
        let maps = status["maps"].as_array().unwrap();
        let name = format!("{}{name}", F::MAPS);
        maps.iter().find(|map| map["name"] == *name).unwrap_or_else(|| panic!("{maps:?}")).clone()
    };
    assert_eq!((&map("PEERS")["entries"], &map("ENDPOINTS")["entries"]), (&2.into(), &1.into()));
    assert!(map("FLOWS")["entries"].as_u64().unwrap() >= 1);
    let programs = status["programs"].as_array().unwrap();
    let from_pod = programs.iter().find(|program| program["name"] == "from_pod").unwrap();
    assert!(from_pod["id"].as_u64().unwrap() > 0 && from_pod["interfaces"] == 1, "{from_pod}");
    let text = node.loden(&["status"]).unwrap();
    for part in
        ["ready      yes", "held, renewed", "followed, revision", "from_pod", containers[0].netns().name()]
    {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
}

#[test]
fn etcd_that_is_gone_shows_as_lag() {
    let (mut cluster, _containers) = served();
    cluster.etcd_mut().kill();
    let node = &cluster.nodes[0];
    wait_for("the lag to show", Duration::from_secs(20), || {
        let etcd = node.status().unwrap()["etcd"].clone();
        let lags = etcd["lag_seconds"].as_f64().unwrap() > 1.0;
        (lags && etcd["connected"] == false && etcd["broken_watches"].as_u64().unwrap() > 0).then_some(())
    })
    .unwrap();
    assert!(node.loden(&["status"]).unwrap().contains("NOT followed for"));
}

fn the_live_view_shows_rates<F: Family>() {
    let (cluster, containers) = served_in::<F>();
    let node = &cluster.nodes[0];
    let binary = loden_tests::node::binary().unwrap().display().to_string();
    let mut command = node.netns().command(&binary);
    command.args(["status", "--watch", "--run-dir"]).arg(node.run_directory()).stdout(Stdio::piped());
    let mut watch = command.spawn().unwrap();
    let lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let (from, to) = (F::host(&containers[0]), F::host(&containers[1]));
    let traffic = || stream::run(from, to, None, Until::Time(Duration::from_secs(6)));
    let line = std::thread::scope(|scope| {
        let traffic = scope.spawn(traffic);
        let peer = F::of_node(&cluster, 1).to_string();
        let line =
            lines.map(Result::unwrap).find(|line| line.contains(&peer) && line.contains(" %")).unwrap();
        traffic.join().unwrap().unwrap();
        line
    });
    watch.kill().unwrap();
    watch.wait().unwrap();
    let share: f64 = line.split(" %").next().unwrap().split_whitespace().last().unwrap().parse().unwrap();
    assert!(share > 95.0, "{line}");
}
