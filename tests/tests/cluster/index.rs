//! A veth's index that the kernel gives again: what was known of the container behind the old one is not true of the new.

use std::{net::IpAddr, time::Duration};

use loden_tests::{
    capture::Capture,
    cluster::{Cluster, Plan},
    container::Container,
    counters::Share,
    packet::Mac,
    process::wait_for,
    traffic::{Host, hello, ping},
};

/// Far from what the kernel gives by itself.
const INDEX: u32 = 4711;
const LIMIT: Duration = Duration::from_secs(20);

/// A container of both families behind a veth of always the same index.
fn run(cluster: &mut Cluster, host: u32) -> Container {
    cluster.nodes[1].run_container_at_index(host, INDEX).unwrap()
}

fn ends<'a>(of: &'a Container) -> impl Iterator<Item = Host<'a>> {
    of.addresses().map(|address| Host { netns: of.netns(), address })
}

/// Waits until both families take the fast path both ways: the programs are at the new veth, and the maps name it.
fn wait_until_fast(cluster: &Cluster, client: &Container, server: &Container) {
    for (from, to) in ends(client).zip(ends(server)) {
        let mut last = String::new();
        wait_for("the fast path to the new container", LIMIT, || {
            let work = || ping(from.netns, to.address, 40);
            let share = Share::during(&cluster.nodes, &[client, server], work);
            last = format!("{}: {share:?}", to.address);
            share.is_ok_and(|((), share)| share.smaller() > 0.9).then_some(())
        })
        .unwrap_or_else(|error| panic!("{error:#}: {last}"));
        assert_eq!(hello(from, to, None).unwrap(), from.address);
    }
}

/// Sends to addresses that nobody has any more, and wants nothing of it at the container that has the index now.
fn assert_hears_nothing_for(gone: &[IpAddr], client: &Container, now: &Container) {
    let [a, b, c, d] = now.address().octets();
    let own: Mac = [0x02, 0x42, a, b, c, d];
    let at = Capture::open(now.netns(), "eth0").unwrap();
    for address in gone {
        let line = format!("ping -n -q -c 20 -i 0.01 -W 1 {address}");
        assert!(client.netns().exec(&line).is_err(), "somebody answers for {address}");
    }
    // A frame that carries the old one's MAC is dropped by the new one's kernel, as one that a bridge floods.
    let octets = |address: &IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let is_for_gone = |frame: &&Vec<u8>| {
        let (v4, v6) = (frame.get(30..34), frame.get(38..54));
        gone.iter().map(octets).any(|it| v4 == Some(&it[..]) || v6 == Some(&it[..]))
    };
    let frames = at.drain().unwrap();
    let wrong: Vec<_> = frames.iter().filter(|frame| frame[..6] == own).filter(is_for_gone).collect();
    assert!(wrong.is_empty(), "{} frames for {gone:?} reached {}", wrong.len(), now.address());
}

/// Waits until the agent knows these endpoints and no others.
fn wait_for_endpoints(cluster: &Cluster, of: &Container) {
    let wanted: Vec<IpAddr> = of.addresses().collect();
    let mut last = Vec::new();
    wait_for("the endpoints of the new container alone", LIMIT, || {
        last = cluster.nodes[1].endpoints().ok()?;
        (last.len() == wanted.len() && wanted.iter().all(|it| last.contains(it))).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {last:?} instead of {wanted:?}"));
}

#[test]
fn an_index_that_comes_back_for_another_container_is_that_container_in_both_families() {
    let mut cluster = Cluster::start(&Plan { nodes: 2, ..Plan::dual() }, &["--gate=open"]).unwrap();
    let client = cluster.nodes[0].run_container(2).unwrap();
    let first = run(&mut cluster, 2);
    wait_until_fast(&cluster, &client, &first);
    // Beside an agent, which hears of both.
    let gone: Vec<IpAddr> = first.addresses().collect();
    drop(first);
    let second = run(&mut cluster, 3);
    assert_hears_nothing_for(&gone, &client, &second);
    wait_until_fast(&cluster, &client, &second);
    wait_for_endpoints(&cluster, &second);
    // While there is none: its maps and pins tell of a veth that is gone, under an index that is not.
    cluster.nodes[1].kill_agent();
    let gone: Vec<IpAddr> = second.addresses().collect();
    drop(second);
    let third = run(&mut cluster, 4);
    assert_hears_nothing_for(&gone, &client, &third);
    for (from, to) in ends(&client).zip(ends(&third)) {
        wait_for("the kernel's way to the new container", LIMIT, || ping(from.netns, to.address, 1).ok())
            .unwrap();
    }
    cluster.nodes[1].start_agent(&["--gate=open"]).unwrap();
    wait_until_fast(&cluster, &client, &third);
    wait_for_endpoints(&cluster, &third);
}
