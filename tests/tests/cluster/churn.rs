//! Containers come and go, agents too.

use std::{net::UdpSocket, thread, time::Duration};

use anyhow::Context as _;
use loden_tests::{
    capture::Capture,
    cluster::Cluster,
    container::Container,
    counters::Share,
    each_family,
    family::Family,
    netns::Netns,
    node::{BRIDGE, Node},
    packet::{self, Mac},
    process::wait_for,
    traffic::{
        hello, ping,
        stream::{self, Until},
        wait_for_answer,
    },
};

each_family!(
    a_container_that_comes_back_at_its_address_on_another_veth_is_reached_fast,
    a_pod_whose_veth_has_the_index_of_one_that_is_gone_is_reached_fast,
    a_container_that_sends_from_ever_new_addresses_takes_no_room_from_others,
    a_stream_goes_on_while_an_agent_is_stopped_and_started,
    a_stream_goes_on_while_an_agent_crashes_and_starts_again,
    a_stream_goes_on_while_the_programs_are_detached_and_attached_again,
    what_works_goes_on_while_etcd_is_away,
);

fn a_container_that_comes_back_at_its_address_on_another_veth_is_reached_fast<F: Family>() {
    let mut cluster = Cluster::start(&F::alone(), &[]).unwrap();
    let client = cluster.nodes[0].run_container(2).unwrap();
    for round in 0..3 {
        let server = cluster.nodes[1].run_container(2).unwrap();
        wait_for_answer(&client, &server).unwrap();
        let seen = hello(F::host(&client), F::host(&server), None).unwrap_or_else(|error| {
            panic!("round {round}, container {}: {error:#}", F::of(&server));
        });
        assert_eq!(seen, F::of(&client).into());
        wait_until_fast::<F>(&cluster.nodes, &client, &server)
            .unwrap_or_else(|error| panic!("round {round}: {error:#}"));
    }
}

/// The kernel counts a namespace's devices up and begins anew one day: a new pod's veth then has the index by which the
/// maps and the pinned links know one that is gone.
fn a_pod_whose_veth_has_the_index_of_one_that_is_gone_is_reached_fast<F: Family>() {
    let mut cluster = Cluster::start(&F::alone(), &[]).unwrap();
    let client = cluster.nodes[0].run_container(2).unwrap();
    let mut server = cluster.nodes[1].run_container(2).unwrap();
    let links: serde_json::Value =
        serde_json::from_str(&cluster.nodes[1].netns().ip("-j link show veth1").unwrap()).unwrap();
    let index = u32::try_from(links[0]["ifindex"].as_u64().unwrap()).unwrap();
    wait_for_answer(&client, &server).unwrap();
    wait_until_fast::<F>(&cluster.nodes, &client, &server).unwrap();
    // The agent sees one go and the next come; then it sees neither.
    for (host, is_away) in [(3, false), (4, true)] {
        let node = &mut cluster.nodes[1];
        if is_away {
            node.kill_agent();
        }
        drop(server);
        server = node.run_container_at_index(host, index).unwrap();
        if is_away {
            node.start_agent(&[]).unwrap();
        }
        wait_for_answer(&client, &server).unwrap();
        assert_eq!(hello(F::host(&client), F::host(&server), None).unwrap(), F::of(&client).into());
        wait_until_fast::<F>(&cluster.nodes, &client, &server)
            .unwrap_or_else(|error| panic!("host {host}: {error:#}\n{}", cluster.nodes[1].log()));
        let gone = F::in_subnet_of(F::of(&server), host as u8 - 1);
        wait_for("the agent to forget the pod that is gone", Duration::from_secs(10), || {
            (!cluster.nodes[1].endpoints().unwrap().contains(&gone.into())).then_some(())
        })
        .unwrap();
    }
}

fn a_container_that_sends_from_ever_new_addresses_takes_no_room_from_others<F: Family>() {
    let mut cluster = Cluster::start(&F::alone(), &[]).unwrap();
    let greedy = cluster.nodes[0].run_container(2).unwrap();
    let server = cluster.nodes[1].run_container(2).unwrap();
    wait_for_answer(&greedy, &server).unwrap();
    // Nothing is answered: the host, whom the answers would come by, looks for nobody.
    let port = 7777;
    let _listener = server.netns().run(|| UdpSocket::bind((F::of(&server).into(), port)).unwrap());
    let mac = |netns: &Netns, name: &str| -> Mac {
        let links: serde_json::Value =
            serde_json::from_str(&netns.ip(&format!("-j link show {name}")).unwrap()).unwrap();
        let bytes =
            links[0]["address"].as_str().unwrap().split(':').map(|it| u8::from_str_radix(it, 16).unwrap());
        bytes.collect::<Vec<_>>().try_into().unwrap()
    };
    let (gateway, own) = (mac(cluster.nodes[0].netns(), BRIDGE), mac(greedy.netns(), "eth0"));
    let socket = Capture::open(greedy.netns(), "eth0").unwrap();
    let send_from_all = || {
        for host in 10..250 {
            let source = F::in_subnet_of(F::of(&greedy), host);
            let packet = F::udp(source, F::of(&server), (5555, port), b"one of many");
            socket.send(&packet::ethernet(gateway, own, F::ETHER_TYPE, &packet.bytes())).unwrap();
            socket.drain().unwrap();
        }
    };
    let node = &cluster.nodes[0];
    let limit = 64;
    wait_for("as many endpoints as one may have", Duration::from_secs(10), || {
        send_from_all();
        (node.endpoints().unwrap().len() >= limit).then_some(())
    })
    .unwrap();
    for _ in 0..4 {
        send_from_all();
        thread::sleep(Duration::from_millis(500));
    }
    // Its own address is one that the host has asked for.
    let found = node.endpoints().unwrap().len();
    assert!((limit..=limit + 1).contains(&found), "{found} endpoints");
    assert_eq!(node.log().matches("further ones are left to the kernel").count(), 1, "{}", node.log());
    let next = cluster.nodes[0].run_container(3).unwrap();
    wait_for_answer(&next, &server).unwrap();
    wait_until_fast::<F>(&cluster.nodes, &next, &server).unwrap();
}

fn wait_until_fast<F: Family>(nodes: &[Node], client: &Container, server: &Container) -> anyhow::Result<()> {
    let mut last = None;
    wait_for("the fast path to the new container", Duration::from_secs(10), || {
        let work = || ping(client.netns(), F::of(server), 40);
        let ((), share) = Share::during(nodes, &[client, server], work).ok()?;
        last = Some(share);
        (share.smaller() > 0.9).then_some(())
    })
    .with_context(|| format!("{last:?}"))
}

/// A stream runs across `disturb`, ends whole, and stays on the fast path.
fn assert_stream_survives<F: Family>(disturb: impl FnOnce(&mut Cluster)) {
    let (mut cluster, containers) = Cluster::start_with_containers(&F::alone(), &[]).unwrap();
    let (a, b) = (&containers[0], &containers[1]);
    ping(a.netns(), F::of(b), 20).unwrap();
    let before: Vec<_> = cluster.nodes.iter().map(|node| node.subnet_env().unwrap()).collect();
    let ((), stream) = stream::during(F::host(a), F::host(b), || disturb(&mut cluster)).unwrap();
    assert_eq!(stream.source, F::of(a).into());
    let after: Vec<_> = cluster.nodes.iter().map(|node| node.subnet_env().unwrap()).collect();
    assert_eq!(before, after, "every node keeps its subnet");
    let work = || stream::run(F::host(a), F::host(b), None, Until::Bytes(100_000_000));
    let (_, share) = Share::during(&cluster.nodes, &[a, b], work).unwrap();
    assert!(share.smaller() >= 0.99, "after the disturbance: {share:?}");
}

fn a_stream_goes_on_while_an_agent_is_stopped_and_started<F: Family>() {
    assert_stream_survives::<F>(|cluster| {
        assert!(cluster.nodes[0].stop_agent().unwrap().success());
        cluster.nodes[0].start_agent(&[]).unwrap();
    });
}

fn a_stream_goes_on_while_an_agent_crashes_and_starts_again<F: Family>() {
    assert_stream_survives::<F>(|cluster| {
        cluster.nodes[1].kill_agent();
        cluster.nodes[1].start_agent(&[]).unwrap();
    });
}

fn a_stream_goes_on_while_the_programs_are_detached_and_attached_again<F: Family>() {
    assert_stream_survives::<F>(|cluster| {
        cluster.nodes[0].stop_agent().unwrap();
        cluster.nodes[0].start_agent(&["--datapath=kernel"]).unwrap();
        cluster.nodes[0].stop_agent().unwrap();
        cluster.nodes[0].start_agent(&[]).unwrap();
    });
}

fn what_works_goes_on_while_etcd_is_away<F: Family>() {
    let (mut cluster, containers) = Cluster::start_with_containers(&F::alone(), &[]).unwrap();
    let (a, b) = (F::host(&containers[0]), F::host(&containers[1]));
    cluster.etcd_mut().kill();
    let work = || stream::run(a, b, None, Until::Bytes(50_000_000));
    assert_eq!(work().unwrap().bytes, 50_000_000);
    cluster.etcd_mut().restart().unwrap();
    assert_eq!(work().unwrap().bytes, 50_000_000);
    assert_eq!(cluster.leases().unwrap().len(), 2);
}
