//! Many at once, twice, and half done.

use std::{
    collections::BTreeSet,
    os::unix::process::ExitStatusExt as _,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use loden_tests::{
    cni::Pod,
    netns::Netns,
    process::wait_for,
    traffic::{hello, ping},
};

use crate::{assert_nothing_is_left, knows, routed_cluster};

#[test]
fn fifty_pods_at_once_get_addresses_of_their_own_and_all_work() {
    let (cluster, runtimes) = routed_cluster(2, &[]);
    let far = runtimes[1].add("far").unwrap();
    let pods: Vec<Pod> = thread::scope(|scope| {
        let made: Vec<_> = (0..50)
            .map(|i| {
                scope.spawn({
                    let runtime = &runtimes[0];
                    move || runtime.add(&format!("p{i}"))
                })
            })
            .collect();
        made.into_iter().map(|pod| pod.join().unwrap().unwrap()).collect()
    });
    let addresses: BTreeSet<_> = pods.iter().map(|pod| pod.address).collect();
    assert_eq!(addresses.len(), 50);
    for pod in &pods {
        ping(&pod.netns, far.address, 1).unwrap_or_else(|error| panic!("{}: {error:#}", pod.address));
    }
    assert_eq!(hello(pods[0].host(), pods[49].host(), None).unwrap(), pods[0].address);
    wait_for("the agent to know all", Duration::from_secs(5), || {
        pods.iter().all(|pod| knows(&cluster.nodes[0], pod.address)).then_some(())
    })
    .unwrap();
    thread::scope(|scope| {
        let runtime = &runtimes[0];
        let removed: Vec<_> = pods.into_iter().map(|pod| scope.spawn(move || runtime.remove(pod))).collect();
        removed.into_iter().for_each(|removed| removed.join().unwrap().unwrap());
    });
    assert_nothing_is_left(&cluster.nodes[0], &runtimes[0]);
}

#[test]
fn add_twice_is_add_once_and_del_twice_is_del_once() {
    let (cluster, runtimes) = routed_cluster(1, &[]);
    let runtime = &runtimes[0];
    let pod = runtime.add("a").unwrap();
    assert_eq!(runtime.add_to("a", &pod.netns).unwrap(), pod.result);
    // One that somebody has damaged is made anew.
    cluster.nodes[0].netns().ip(&format!("route del {}", pod.address)).unwrap();
    let again = runtime.add_to("a", &pod.netns).unwrap();
    assert_eq!(again["interfaces"][0]["name"], pod.result["interfaces"][0]["name"]);
    assert_eq!(runtime.given_out().len(), 1);
    let (id, netns) = (&pod.id, &pod.netns);
    runtime.del(id, Some(netns), &again).unwrap();
    runtime.del(id, Some(netns), &again).unwrap();
    runtime.del(id, None, &serde_json::Value::Null).unwrap();
    runtime.del("nobody", None, &serde_json::Value::Null).unwrap();
    // Also without the agent's file, which a reboot takes.
    let other = runtime.add("b").unwrap();
    std::fs::remove_file(cluster.nodes[0].subnet_file()).unwrap();
    runtime.remove(other).unwrap();
    assert_eq!(runtime.given_out(), Vec::<String>::new());
}

/// Killed at whatever point: the next ADD succeeds all the same, and DEL leaves nothing.
#[test]
fn an_add_that_is_killed_half_way_is_undone() {
    const POINTS: u32 = 12;
    let (cluster, runtimes) = routed_cluster(1, &[]);
    let runtime = &runtimes[0];
    let add = |netns: &Netns| -> Child {
        let conf = runtime.first().to_string();
        let mut child = cluster.nodes[0]
            .netns()
            .command(&loden_tests::cni::binary().unwrap().display().to_string())
            .env("CNI_COMMAND", "ADD")
            .env("CNI_CONTAINERID", "killed")
            .env("CNI_IFNAME", "eth0")
            .env("CNI_NETNS", netns.path())
            .env("CNI_PATH", "/usr/lib/cni")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), conf.as_bytes()).unwrap();
        child
    };
    // How long one takes here that is left alone.
    let netns = Netns::create("p-measured").unwrap();
    let start = Instant::now();
    assert!(add(&netns).wait().unwrap().success());
    let whole = start.elapsed();
    runtime.del("killed", Some(&netns), &serde_json::Value::Null).unwrap();
    let mut killed = 0;
    for point in 0..POINTS {
        let after = whole * point / POINTS;
        let netns = Netns::create("p-killed").unwrap();
        let mut child = add(&netns);
        thread::sleep(after);
        child.kill().unwrap();
        killed += u32::from(child.wait().unwrap().signal().is_some());
        let result = runtime.add_to("killed", &netns).unwrap_or_else(|error| panic!("{after:?}: {error:#}"));
        let address: std::net::Ipv4Addr =
            result["ips"][0]["address"].as_str().unwrap().trim_end_matches("/32").parse().unwrap();
        ping(cluster.nodes[0].netns(), address, 1).unwrap();
        assert_eq!(runtime.given_out().len(), 1, "{after:?}");
        runtime.del("killed", Some(&netns), &result).unwrap();
        assert_eq!(runtime.given_out().len(), 0, "{after:?}");
    }
    assert!(killed > POINTS / 3, "only {killed} of {POINTS} had not ended by themselves, of {whole:?} each");
    assert_nothing_is_left(&cluster.nodes[0], runtime);
}

#[test]
fn an_add_that_fails_leaves_nothing() {
    let (cluster, runtimes) = routed_cluster(1, &[]);
    let runtime = &runtimes[0];
    let netns = Netns::create("p-fails").unwrap();
    netns.ip("link add eth0 type veth peer name other").unwrap();
    let taken = runtime.call("ADD", "c", Some(&netns), &runtime.first()).unwrap().error().unwrap();
    assert_eq!(taken.0, 103);
    assert!(taken.1.starts_with("CNI_IFNAME=eth0 is in "), "{}", taken.1);
    let mut conf = runtime.first();
    conf["ipam"] = serde_json::json!({ "type": "static", "addresses": [{ "address": "10.9.9.9/24" }] });
    let other = Netns::create("p-outside").unwrap();
    let outside = runtime.call("ADD", "c", Some(&other), &conf).unwrap().error().unwrap();
    assert!(outside.1.starts_with("\"ipam\": 10.9.9.9 is not in this node's subnet"), "{}", outside.1);
    other.ip("link show eth0").unwrap_err();
    conf["ipam"]["addresses"] = serde_json::json!([{ "address": "fc00::9/64" }]);
    let none = runtime.call("ADD", "c", Some(&other), &conf).unwrap().error().unwrap();
    assert!(
        none.1.starts_with("\"ipam\": fc00::9 is not in this node's subnet (there is none)"),
        "{}",
        none.1
    );
    assert_nothing_is_left(&cluster.nodes[0], runtime);
}
