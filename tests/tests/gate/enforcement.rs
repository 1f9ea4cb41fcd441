//! A rule against flows that run, and are fast: the strict gate goes by it, the open one by none.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
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
    traffic::{Host, socket},
};

use crate::{OPEN, STRICT, cluster};

/// Where the flows lead that no rule concerns; those that rules concern lead to the ports behind it.
const PORT: u16 = 9000;
/// Past every expiry and every tick of the agent, which might undo what it did at first.
const AFTERWARDS: Duration = Duration::from_secs(32);

each_family!(a_rule_added_in_the_middle_of_a_fast_flow_stops_it, no_rule_stops_a_flow_through_the_open_gate);

/// From a change of the rules to its effect: at once where the kernel tells of it, when what has qualified
/// expires where it does not.
fn effect(tool: Tool) -> Duration {
    Duration::from_secs(if tool == Tool::LegacyIptables { 17 } else { 3 })
}

fn a_rule_added_in_the_middle_of_a_fast_flow_stops_it<F: Family>() {
    for Silence { of, flow, after_the_rule, .. } in &silences::<F>(STRICT) {
        assert!(
            *after_the_rule < effect(of.1),
            "{of:?}, {flow}: bytes arrived {after_the_rule:?} after the rule"
        );
    }
}

/// Nobody's rules are enforced for pods that are not translated, and the documentation says so.
fn no_rule_stops_a_flow_through_the_open_gate<F: Family>() {
    for Silence { of, flow, until_the_end, .. } in &silences::<F>(OPEN) {
        assert!(*until_the_end < Duration::from_secs(5), "{of:?}, {flow}: silent for {until_the_end:?}");
    }
}

/// How a flow fared after a rule against it.
struct Silence {
    /// The node that has the rule, and what it was made with.
    of: (usize, Tool),
    flow: String,
    /// From the rule to the last byte that arrived.
    after_the_rule: Duration,
    /// From that to the end.
    until_the_end: Duration,
}

/// Has TCP connections and flows of UDP run to seven ports, of which rules forbid all but the first, on either node and
/// with every tool.
fn silences<F: Family>(gate: &str) -> Vec<Silence> {
    let (cluster, containers) = cluster::<F>(1, &[gate]);
    let (a, b) = (F::host(&containers[0]), F::host(&containers[1]));
    // Legacy rules first, of which nobody is told: the others' changes make every flow qualify anew.
    let tools = [Tool::LegacyIptables, Tool::Iptables, Tool::Nft];
    let rules: Vec<(usize, Tool)> = tools.iter().flat_map(|&tool| [(0, tool), (1, tool)]).collect();
    let ports = PORT..=PORT + rules.len() as u16;
    let flows: Vec<Flow> = ports.flat_map(|port| [Flow::tcp(a, b, port), Flow::udp(a, b, port)]).collect();
    let (stop, last) = (AtomicBool::new(false), Mutex::new(vec![Instant::now(); flows.len()]));
    let mut changed = vec![Instant::now(); rules.len()];
    thread::scope(|scope| {
        let (stop, last) = (&stop, &last);
        for (n, flow) in flows.iter().enumerate() {
            scope.spawn(move || talk(&flow.send, stop));
            scope.spawn(move || listen(&flow.receive, stop, |at| last.lock().unwrap()[n] = at));
        }
        let _end = Finally(stop);
        let encapsulated = || Counters::read(&cluster.nodes[0]).unwrap().get(FAST_ENCAP);
        let before = encapsulated();
        wait_for("the flows to be fast", Duration::from_secs(20), || {
            (encapsulated() > before + 1000).then_some(())
        })
        .unwrap();
        for (n, &(node, tool)) in rules.iter().enumerate() {
            if n == 2 {
                // What expires, expires before anything else can end it.
                thread::sleep(effect(Tool::LegacyIptables));
            }
            let (netns, port): (&Netns, u16) = (cluster.nodes[node].netns(), PORT + 1 + n as u16);
            for matching in [Matching::TcpTo(port), Matching::UdpTo(port)] {
                deny(netns, tool, F::IS_IPV4, matching).unwrap();
            }
            changed[n] = Instant::now();
        }
        thread::sleep(AFTERWARDS);
    });
    let last = last.into_inner().unwrap();
    let end = *last.iter().max().unwrap();
    let (allowed, denied) = last.split_at(2);
    assert!(allowed.iter().all(|last| end - *last < Duration::from_secs(5)), "what no rule concerns goes on");
    let silence = |(n, last): (usize, &Instant)| Silence {
        of: rules[n / 2],
        flow: flows[n + 2].name.clone(),
        after_the_rule: last.saturating_duration_since(changed[n / 2]),
        until_the_end: end - *last,
    };
    denied.iter().enumerate().map(silence).collect()
}

/// Sends a few bytes, or receives some.
type Act = Box<dyn Fn() -> io::Result<usize> + Send + Sync>;

/// A flow between two pods.
struct Flow {
    name: String,
    send: Act,
    receive: Act,
}

impl Flow {
    /// How long its receiver waits for bytes.
    const PATIENCE: Option<Duration> = Some(Duration::from_millis(100));

    fn tcp(from: Host<'_>, to: Host<'_>, port: u16) -> Self {
        let listener = socket::listen(to, port).unwrap();
        let (near, far) = socket::open(from.netns, None, at(to.address, port), &listener).unwrap();
        near.set_nonblocking(true).unwrap();
        far.set_read_timeout(Self::PATIENCE).unwrap();
        Self {
            name: format!("TCP to port {port}"),
            send: Box::new(move || (&near).write(b"a few bytes")),
            receive: Box::new(move || (&far).read(&mut [0; 4096])),
        }
    }

    fn udp(from: Host<'_>, to: Host<'_>, port: u16) -> Self {
        let (near, far) = (socket::udp(from, 0).unwrap(), socket::udp(to, port).unwrap());
        near.connect(at(to.address, port)).unwrap();
        far.set_read_timeout(Self::PATIENCE).unwrap();
        Self {
            name: format!("UDP to port {port}"),
            send: Box::new(move || near.send(b"a few bytes")),
            receive: Box::new(move || far.recv(&mut [0; 64])),
        }
    }
}

/// Sends every 5 ms, as long as the other side takes it.
fn talk(send: &Act, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        match send() {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("a flow ended: {error}"),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Tells when bytes arrive.
fn listen(receive: &Act, stop: &AtomicBool, mut heard: impl FnMut(Instant)) {
    while !stop.load(Ordering::Relaxed) {
        if receive().is_ok_and(|n| n > 0) {
            heard(Instant::now());
        }
    }
}

/// Ends the threads of a scope also where an assertion fails in it.
struct Finally<'a>(&'a AtomicBool);

impl Drop for Finally<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
