//! Containers, agents and engines end and start again.

use std::time::Duration;

use loden_tests::{
    process::wait_for,
    traffic::{hello, ping, stream},
};

use crate::{Fleet, assert_fast, by_subnet_env, wait_for_endpoints, words};

#[test]
fn a_container_that_restarts_keeps_its_address_and_is_reached_fast() {
    let fleet = Fleet::start(&[]);
    let [client, server] = fleet.pair();
    let (engine, id, address) = (&fleet.engines[1], server.id().to_owned(), server.address());
    drop(server);
    for _ in 0..3 {
        engine.docker(&format!("restart --time 0 {id}")).unwrap();
        let server = engine.find(&id).unwrap();
        assert_eq!(server.address(), address, "nobody else wanted it");
        ping(client.netns(), address, 20).unwrap();
        assert_fast(&fleet.cluster.nodes, &client, &server);
    }
    engine.docker(&format!("stop --time 0 {id}")).unwrap();
    wait_for_endpoints::<std::net::IpAddr>(&fleet.cluster.nodes[1], &[]);
}

#[test]
fn an_agent_restarts_while_containers_run_come_and_go() {
    let mut fleet = Fleet::start(&[]);
    let [a, b] = fleet.pair();
    let gone = fleet.engines[0].run("").unwrap();
    ping(gone.netns(), b.address(), 5).unwrap();
    let work = || {
        fleet.cluster.nodes[0].kill_agent();
        let came = fleet.engines[0].run("").unwrap();
        fleet.engines[0].docker(&format!("rm --force {}", gone.id())).unwrap();
        fleet.cluster.nodes[0].start_agent(&[]).unwrap();
        came
    };
    let (came, _) = stream::during(a.host(), b.host(), work).unwrap();
    ping(came.netns(), b.address(), 20).unwrap();
    for container in [&a, &came] {
        assert_fast(&fleet.cluster.nodes, container, &b);
    }
    let mut known = vec![a.address(), came.address()];
    known.sort_unstable();
    wait_for_endpoints(&fleet.cluster.nodes[0], &known);
}

#[test]
fn a_dockerd_that_restarts_finds_its_subnet_and_its_containers_the_overlay() {
    let mut fleet = Fleet::start(&[]);
    let [client, server] = fleet.pair();
    let (id, env) = (server.id().to_owned(), fleet.cluster.nodes[1].subnet_env().unwrap());
    drop(server);
    fleet.engines[1].docker(&format!("update --restart always {id}")).unwrap();
    let options = by_subnet_env(&fleet.cluster.nodes[1]);
    fleet.engines[1].stop_daemon().unwrap();
    wait_for_endpoints::<std::net::IpAddr>(&fleet.cluster.nodes[1], &[]);
    fleet.engines[1].start_daemon(&words(&options)).unwrap();
    let server =
        wait_for("the container to run again", Duration::from_secs(10), || fleet.engines[1].find(&id).ok());
    let server = server.unwrap();
    assert!(env.subnet().contains(&server.address()));
    assert_eq!(hello(client.host(), server.host(), None).unwrap(), client.address());
    ping(client.netns(), server.address(), 20).unwrap();
    assert_fast(&fleet.cluster.nodes, &client, &server);
    assert_eq!(fleet.cluster.nodes[1].subnet_env().unwrap(), env);
}

#[test]
fn containers_that_outlive_their_dockerd_stay_on_the_fast_path() {
    let mut fleet = Fleet::without_engines(&[]);
    fleet.start_engines(|node| [by_subnet_env(node).to_vec(), vec!["--live-restore".into()]].concat());
    let [a, b] = fleet.pair();
    let work = || {
        fleet.engines[0].kill_daemon().unwrap();
        let options =
            [by_subnet_env(&fleet.cluster.nodes[0]).to_vec(), vec!["--live-restore".into()]].concat();
        fleet.engines[0].start_daemon(&words(&options)).unwrap();
    };
    stream::during(a.host(), b.host(), work).unwrap();
    assert_fast(&fleet.cluster.nodes, &a, &b);
    wait_for_endpoints(&fleet.cluster.nodes[0], &[a.address()]);
}
