//! A firewall with a memory, before and behind connections whose middle it has not seen.

use std::{
    io::{ErrorKind, Read as _},
    net::{Shutdown, TcpStream},
    thread,
    time::{Duration, Instant},
};

use loden_tests::{
    each_family,
    family::Family,
    node::Node,
    policy::stateful,
    service::{Tool, at},
    traffic::socket::{self, ask, open, pour, say, wants_end},
};
use nix::sys::socket::{setsockopt, sockopt::Linger};

use crate::{STRICT, assert_direct_is_fast, cluster, fast};

const PORT: u16 = 8080;

each_family!(
    connections_live_and_end_behind_a_stateful_iptables_firewall,
    connections_live_and_end_behind_a_stateful_nft_firewall,
    forgetting_the_connections_behind_a_fast_flow_does_not_stop_it,
    an_idle_connection_of_few_packets_stays_established_for_both_hosts,
    a_new_connection_of_the_same_ports_is_established_for_both_hosts,
);

fn connections_live_and_end_behind_a_stateful_iptables_firewall<F: Family>() {
    connections_live_and_end::<F>(Tool::Iptables);
}

fn connections_live_and_end_behind_a_stateful_nft_firewall<F: Family>() {
    connections_live_and_end::<F>(Tool::Nft);
}

fn connections_live_and_end<F: Family>(tool: Tool) {
    let (cluster, containers) = cluster::<F>(1, &[STRICT, "--iptables-forward-rules=false"]);
    let (a, b) = (F::host(&containers[0]), F::host(&containers[1]));
    for node in &cluster.nodes {
        stateful(node.netns(), tool, F::IS_IPV4, &[PORT]).unwrap();
        for sysctl in ["nf_conntrack_tcp_be_liberal", "nf_conntrack_tcp_ignore_invalid_rst"] {
            let value = node.netns().exec(&format!("sysctl -n net.netfilter.{sysctl}")).unwrap();
            assert_eq!(value.trim(), "1", "{sysctl} on {}", node.name());
        }
    }
    let listener = socket::listen(b, PORT).unwrap();
    let connect = || open(a.netns, None, at(b.address, PORT), &listener).unwrap();
    let not_allowed = socket::listen(b, PORT + 1).unwrap();
    let refused =
        a.netns.run(|| TcpStream::connect_timeout(&at(b.address, PORT + 1), Duration::from_millis(500)));
    assert!(refused.is_err(), "the firewall allows port {PORT} only");
    drop(not_allowed);

    // Idle for longer than any entry of the gate lives; then each side is the first to speak once.
    let idle = [connect(), connect()];
    for (near, far) in &idle {
        pour(near, far, 5_000_000).unwrap();
        pour(far, near, 5_000_000).unwrap();
    }
    let pause = Instant::now();

    let (near, far) = connect();
    exchange_bulk(&near, &far);
    drop(near);
    timely("the client's FIN", || wants_end(&far).unwrap());

    let (near, far) = connect();
    exchange_bulk(&near, &far);
    drop(far);
    timely("the server's FIN", || wants_end(&near).unwrap());

    let (near, far) = connect();
    exchange_bulk(&near, &far);
    near.shutdown(Shutdown::Write).unwrap();
    timely("the half-close", || wants_end(&far).unwrap());
    pour(&far, &near, 50_000_000).unwrap();
    drop(far);
    timely("the other half's", || wants_end(&near).unwrap());

    // More than 2^31 bytes since the firewall saw the connection last: the RST looks older than what it knows.
    for client_sends in [true, false] {
        let (near, far) = connect();
        let (from, to) = if client_sends { (near, far) } else { (far, near) };
        pour(&from, &to, 3_000_000_000).unwrap();
        reset(from);
        timely("RST", || {
            let error = (&to).read(&mut [0; 16]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
        });
    }

    let (asker, answerer) = (socket::udp(a, 0).unwrap(), socket::udp(b, PORT).unwrap());
    asker.connect(at(b.address, PORT)).unwrap();
    for round in 0..50 {
        ask(&asker, &answerer, &format!("datagram {round}")).unwrap();
    }

    thread::sleep(Duration::from_secs(17).saturating_sub(pause.elapsed()));
    let [(near, far), (near2, far2)] = &idle;
    timely("the client after the pause", || say(near, far, "client first").unwrap());
    timely("the server after the pause", || say(far2, near2, "server first").unwrap());
    exchange_bulk(near, far);
    exchange_bulk(near2, far2);
    for (near, far) in idle {
        drop(near);
        timely("the FIN after the pause", || wants_end(&far).unwrap());
    }
}

fn exchange_bulk(near: &TcpStream, far: &TcpStream) {
    pour(near, far, 50_000_000).unwrap();
    pour(far, near, 50_000_000).unwrap();
}

/// Closes a connection by RST.
fn reset(stream: TcpStream) {
    setsockopt(&stream, Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 }).unwrap();
}

/// Runs what must not take a retransmission's time.
fn timely(what: &str, run: impl FnOnce()) {
    let start = Instant::now();
    run();
    assert!(start.elapsed() < Duration::from_millis(190), "{what} took {:?}", start.elapsed());
}

fn forgetting_the_connections_behind_a_fast_flow_does_not_stop_it<F: Family>() {
    let (cluster, containers) = cluster::<F>(1, &[STRICT]);
    let (a, b) = (F::host(&containers[0]), F::host(&containers[1]));
    let listener = socket::listen(b, PORT).unwrap();
    let (near, far) = open(a.netns, None, at(b.address, PORT), &listener).unwrap();
    exchange_bulk(&near, &far);
    for node in &cluster.nodes {
        node.netns().exec("conntrack -F").unwrap();
    }
    exchange_bulk(&near, &far);
    drop(near);
    timely("FIN", || wants_end(&far).unwrap());
    assert_direct_is_fast::<F>(&cluster.nodes, &containers[0], &containers[1]);
}

/// Ends what a host knows of half-open connections after three seconds, so that an idle connection which it takes for one
/// shows within a test's time.
fn forget_half_open_connections(node: &Node) {
    node.netns().exec("sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_syn_recv=3").unwrap();
}

/// Wants one connection to [`PORT`], established, confirmed and kept while idle.
fn assert_established<F: Family>(node: &Node) {
    let family = if F::IS_IPV4 { "ipv4" } else { "ipv6" };
    let list = node.netns().exec(&format!("conntrack -L -f {family} -p tcp --orig-port-dst {PORT}")).unwrap();
    let words: Vec<&str> = list.split_whitespace().collect();
    // Protocol, its number, seconds, state, addresses.
    let seconds: u64 = words.get(2).and_then(|word| word.parse().ok()).unwrap_or_default();
    let established = list.lines().count() == 1 && words[3] == "ESTABLISHED" && list.contains("[ASSURED]");
    assert!(established && seconds > 3600, "{}: {list}", node.name());
}

fn an_idle_connection_of_few_packets_stays_established_for_both_hosts<F: Family>() {
    let (cluster, containers) = cluster::<F>(1, &[STRICT, "--iptables-forward-rules=false"]);
    let (a, b) = (F::host(&containers[0]), F::host(&containers[1]));
    for (node, tool) in cluster.nodes.iter().zip([Tool::Iptables, Tool::Nft]) {
        stateful(node.netns(), tool, F::IS_IPV4, &[PORT]).unwrap();
        forget_half_open_connections(node);
    }
    let listener = socket::listen(b, PORT).unwrap();
    let (near, far) = open(a.netns, None, at(b.address, PORT), &listener).unwrap();
    let before = cluster.nodes.iter().map(fast).sum::<u64>();
    for _ in 0..3 {
        say(&near, &far, "a few bytes").unwrap();
        say(&far, &near, "and back").unwrap();
    }
    let after = cluster.nodes.iter().map(fast).sum::<u64>();
    assert!(after - before >= 10, "{} of 12 passings are fast", after - before);
    for node in &cluster.nodes {
        assert_established::<F>(node);
    }
    // Past every entry of the gate.
    thread::sleep(Duration::from_secs(17));
    timely("the server after the pause", || say(&far, &near, "server first").unwrap());
    drop(far);
    timely("the server's FIN", || wants_end(&near).unwrap());
}

/// A connection from the ports of one that was fast until just now.
fn a_new_connection_of_the_same_ports_is_established_for_both_hosts<F: Family>() {
    let (cluster, containers) = cluster::<F>(1, &[STRICT]);
    let (a, b) = (F::host(&containers[0]), F::host(&containers[1]));
    // Conntrack follows connections where a rule asks for it.
    for node in &cluster.nodes {
        stateful(node.netns(), Tool::Nft, F::IS_IPV4, &[PORT]).unwrap();
    }
    let listener = socket::listen(b, PORT).unwrap();
    for round in 0..3 {
        let from = at(a.address, 40_000);
        let (near, far) = open(a.netns, Some(from), at(b.address, PORT), &listener).unwrap();
        say(&near, &far, "a few bytes").unwrap();
        say(&far, &near, "and back").unwrap();
        for node in &cluster.nodes {
            assert_established::<F>(node);
        }
        reset(near);
        let ended = (&far).read(&mut [0; 16]);
        assert!(ended.is_err(), "round {round}: {ended:?}");
    }
}
