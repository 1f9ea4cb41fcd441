//! A rule against TCP connections that run, and are fast: the strict gate goes by it, the open one by none.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::TcpStream,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use loden_tests::{
    counters::{Counters, FAST_ENCAP},
    each_family,
    family::Family,
    netns::Netns,
    policy::{Matching, deny},
    process::wait_for,
    service::{Tool, at},
    traffic::socket,
};

use crate::{
    OPEN, STRICT, cluster,
    policy::{Finally, effect},
};

/// Where the connection leads that no rule concerns; those that rules concern lead to the ports behind it.
const PORT: u16 = 9000;
/// Past every expiry and every tick of the agent, which might undo what it did at first.
const AFTERWARDS: Duration = Duration::from_secs(32);

each_family!(
    a_rule_added_in_the_middle_of_a_fast_connection_stops_it,
    no_rule_stops_a_connection_through_the_open_gate,
);

fn a_rule_added_in_the_middle_of_a_fast_connection_stops_it<F: Family>() {
    let silences = silences::<F>(STRICT);
    for Silence { of, port, after_the_rule, .. } in &silences {
        let within = effect(of.1);
        assert!(
            *after_the_rule < within,
            "{of:?}, port {port}: bytes arrived {after_the_rule:?} after the rule"
        );
    }
}

/// Nobody's rules are enforced for pods that are not translated, and the documentation says so.
fn no_rule_stops_a_connection_through_the_open_gate<F: Family>() {
    for Silence { of, port, until_the_end, .. } in &silences::<F>(OPEN) {
        assert!(*until_the_end < Duration::from_secs(5), "{of:?}, port {port}: silent for {until_the_end:?}");
    }
}

/// How a connection fared after a rule against it.
struct Silence {
    /// The node that has the rule, and what it was made with.
    of: (usize, Tool),
    port: u16,
    /// From the rule to the last byte that arrived.
    after_the_rule: Duration,
    /// From that to the end.
    until_the_end: Duration,
}

/// Has seven connections run, of which rules forbid all but the first, on either node and with every tool.
fn silences<F: Family>(gate: &str) -> Vec<Silence> {
    let (cluster, containers) = cluster::<F>(1, &[gate]);
    let (a, b) = (F::host(&containers[0]), F::host(&containers[1]));
    // Legacy rules first, of which nobody is told: the others' changes make every flow qualify anew.
    let tools = [Tool::LegacyIptables, Tool::Iptables, Tool::Nft];
    let rules: Vec<(usize, Tool)> = tools.iter().flat_map(|&tool| [(0, tool), (1, tool)]).collect();
    let connections: Vec<(TcpStream, TcpStream)> = (PORT..=PORT + rules.len() as u16)
        .map(|port| {
            let listener = socket::listen(b, port).unwrap();
            socket::open(a.netns, None, at(b.address, port), &listener).unwrap()
        })
        .collect();
    let (stop, last) = (AtomicBool::new(false), Mutex::new(vec![Instant::now(); connections.len()]));
    let mut changed = vec![Instant::now(); rules.len()];
    thread::scope(|scope| {
        let (stop, last) = (&stop, &last);
        for (n, (near, far)) in connections.iter().enumerate() {
            scope.spawn(move || talk(near, stop));
            scope.spawn(move || listen(far, stop, |at| last.lock().unwrap()[n] = at));
        }
        let _end = Finally(stop);
        let encapsulated = || Counters::read(&cluster.nodes[0]).unwrap().get(FAST_ENCAP);
        let before = encapsulated();
        wait_for("the connections to be fast", Duration::from_secs(20), || {
            (encapsulated() > before + 500).then_some(())
        })
        .unwrap();
        for (n, &(node, tool)) in rules.iter().enumerate() {
            if n == 2 {
                // What expires, expires before anything else can end it.
                thread::sleep(effect(Tool::LegacyIptables));
            }
            let netns: &Netns = cluster.nodes[node].netns();
            deny(netns, tool, F::IS_IPV4, Matching::TcpTo(PORT + 1 + n as u16)).unwrap();
            changed[n] = Instant::now();
        }
        thread::sleep(AFTERWARDS);
    });
    let last = last.into_inner().unwrap();
    let end = *last.iter().max().unwrap();
    assert!(end - last[0] < Duration::from_secs(5), "the connection that no rule concerns goes on");
    let silence = |(n, &of): (usize, &(usize, Tool))| Silence {
        of,
        port: PORT + 1 + n as u16,
        after_the_rule: last[n + 1].saturating_duration_since(changed[n]),
        until_the_end: end - last[n + 1],
    };
    rules.iter().enumerate().map(silence).collect()
}

/// Sends a few bytes every 5 ms, as long as the other side takes them.
fn talk(mut near: &TcpStream, stop: &AtomicBool) {
    near.set_nonblocking(true).unwrap();
    while !stop.load(Ordering::Relaxed) {
        match near.write(b"a few bytes") {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("a connection ended: {error}"),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Tells when bytes arrive.
fn listen(mut far: &TcpStream, stop: &AtomicBool, mut heard: impl FnMut(Instant)) {
    far.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    while !stop.load(Ordering::Relaxed) {
        if far.read(&mut [0; 4096]).is_ok_and(|n| n > 0) {
            heard(Instant::now());
        }
    }
}
