//! Our accepting rules in iptables' `FORWARD`: they are there for its policy, not for what the operator denies.

use std::{thread, time::Duration};

use loden_tests::{
    policy::{Matching, deny},
    process::wait_for,
    service::{Tool, at},
    traffic::socket,
};

use crate::{STRICT, cluster};

#[test]
fn what_the_operator_denied_before_our_rules_stays_denied() {
    let (cluster, containers) = cluster(2, 1, &[STRICT]);
    let (a, b) = (&containers[0], &containers[1]);
    let node = cluster.nodes[1].netns();
    deny(node, Tool::Iptables, Matching::UdpTo(9001)).unwrap();
    // Somebody takes our rules away; the agent puts them back, and not before those of others.
    node.exec("iptables -D FORWARD -j LODEN-FWD").unwrap();
    wait_for("our rules to come back", Duration::from_secs(35), || {
        node.exec("iptables -C FORWARD -j LODEN-FWD").ok()
    })
    .unwrap();
    let receiver = socket::udp(b.host(), 9001).unwrap();
    receiver.set_nonblocking(true).unwrap();
    let sender = socket::udp(a.host(), 0).unwrap();
    for _ in 0..500 {
        sender.send_to(b"denied", at(b.address(), 9001)).unwrap();
        thread::sleep(Duration::from_millis(2));
    }
    let rules = node.exec("iptables -S FORWARD").unwrap();
    assert!(receiver.recv(&mut [0; 64]).is_err(), "a denied datagram arrived; FORWARD is\n{rules}");
}
