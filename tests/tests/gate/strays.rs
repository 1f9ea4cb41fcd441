//! A pod that becomes known while a packet for it waits in the host: that comes out without having gone in, as far as the
//! programs know. The pod does not stay gated for it; for flows that are translated it does.

use std::time::{Duration, Instant};

use loden_tests::{
    container::Container,
    counters::Counters,
    each_family,
    family::Family,
    node::{BRIDGE, Node},
    process::wait_for,
    service::{Front, Tool, at, publish},
    traffic::socket::{self, open, say},
};

use crate::{OPEN, assert_direct_is_fast, cluster};

const PORT: u16 = 9000;
/// The agent looks again five seconds after it knows a pod; the rest is for a busy machine.
const SECOND_LOOK: Duration = Duration::from_secs(30);

each_family!(
    a_packet_from_before_its_pod_was_known_gates_it_not_for_good,
    a_pod_with_a_translated_connection_stays_gated,
);

fn a_packet_from_before_its_pod_was_known_gates_it_not_for_good<F: Family>() {
    let (mut cluster, containers) = cluster::<F>(1, &[OPEN]);
    let sender = &containers[0];
    // On a busy machine the agent may take longer to find the pod than its packets wait.
    let attempts = 10;
    let pod = (0..attempts).find_map(|attempt| {
        let pod = cluster.nodes[1].run_container(20 + attempt).unwrap();
        has_a_stray::<F>(&cluster.nodes[1], sender, &pod).then_some(pod)
    });
    let pod = pod.unwrap_or_else(|| panic!("in {attempts} attempts no packet came out as it should"));
    let node = &cluster.nodes[1];
    wait_for("the pod not to be gated", SECOND_LOOK, || {
        (node.gated(F::of(&pod)) == Some(false)).then_some(())
    })
    .unwrap();
    assert_direct_is_fast::<F>(&cluster.nodes, sender, &pod);
    assert_eq!(node.gated(F::of(&pod)), Some(false), "direct flows gate nobody");
}

/// Sends three datagrams to a pod that its node does not know yet, and has the last two wait in the queue of the bridge,
/// for 1.3 s each, while the agent finds the pod. Whether they came out, and looked translated.
fn has_a_stray<F: Family>(node: &Node, sender: &Container, pod: &Container) -> bool {
    let (from, to) = (F::host(sender), F::host(pod));
    assert_eq!(node.gated(to.address), None, "the pod has said nothing yet");
    let translated = || Counters::read(node).unwrap().get("note_translated");
    let before = translated();
    let receiver = socket::udp(to, PORT).unwrap();
    receiver.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let queue = |what: &str| node.netns().exec(&format!("tc qdisc {what}")).unwrap();
    queue(&format!("add dev {BRIDGE} root tbf rate 8kbit burst 1600 latency 20s"));
    let socket = socket::udp(from, 0).unwrap();
    for _ in 0..3 {
        socket.send_to(&[0; 1300], at(to.address, PORT)).unwrap();
    }
    let arrived = (0..3).all(|_| socket::uninterrupted(|| receiver.recv(&mut [0; 1500])).is_ok());
    queue(&format!("del dev {BRIDGE} root"));
    arrived && translated() > before
}

fn a_pod_with_a_translated_connection_stays_gated<F: Family>() {
    let (mut cluster, containers) = cluster::<F>(1, &[OPEN]);
    let [client, backend] = [0, 1].map(|n| F::host(&containers[n]));
    let front = at(F::vip(1), 80);
    publish(cluster.nodes[0].netns(), Tool::Nft, &[Front::new(front, &[at(backend.address, PORT)])]).unwrap();
    let listener = socket::listen(backend, PORT).unwrap();
    let (near, far) = open(client.netns, None, front, &listener).unwrap();
    say(&near, &far, "to the service").unwrap();
    // Once for the agent that found the pod, once for one that finds it in the map.
    for _ in 0..2 {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(8) {
            assert_eq!(cluster.nodes[0].gated(client.address), Some(true), "after {:?}", start.elapsed());
            say(&far, &near, "from the service").unwrap();
        }
        cluster.nodes[0].kill_agent();
        cluster.nodes[0].start_agent(&[OPEN, "--datapath=ebpf"]).unwrap();
        wait_for("the agent to know the pod", Duration::from_secs(20), || {
            cluster.nodes[0].gated(client.address)
        })
        .unwrap();
    }
    say(&near, &far, "to the service again").unwrap();
}
