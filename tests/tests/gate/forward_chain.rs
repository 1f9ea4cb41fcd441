//! Our accepting rules in iptables' `FORWARD`: they are there for its policy, not for what the operator denies.

use std::{thread, time::Duration};

use loden_tests::{
    each_family,
    family::Family,
    policy::{Matching, deny},
    process::wait_for,
    service::{Tool, at},
    traffic::socket,
};

use crate::{STRICT, cluster};

each_family!(what_the_operator_denied_before_our_rules_stays_denied,);

fn what_the_operator_denied_before_our_rules_stays_denied<F: Family>() {
    let (cluster, containers) = cluster::<F>(1, &[STRICT]);
    let (a, b) = (F::host(&containers[0]), F::host(&containers[1]));
    let node = cluster.nodes[1].netns();
    deny(node, Tool::Iptables, F::IS_IPV4, Matching::UdpTo(9001)).unwrap();
    // Somebody takes our rules away; the agent puts them back, and not before those of others.
    let iptables = if F::IS_IPV4 { "iptables" } else { "ip6tables" };
    node.exec(&format!("{iptables} -D FORWARD -j LODEN-FWD")).unwrap();
    wait_for("our rules to come back", Duration::from_secs(35), || {
        node.exec(&format!("{iptables} -C FORWARD -j LODEN-FWD")).ok()
    })
    .unwrap();
    let receiver = socket::udp(b, 9001).unwrap();
    receiver.set_nonblocking(true).unwrap();
    let sender = socket::udp(a, 0).unwrap();
    for _ in 0..500 {
        sender.send_to(b"denied", at(b.address, 9001)).unwrap();
        thread::sleep(Duration::from_millis(2));
    }
    let rules = node.exec(&format!("{iptables} -S FORWARD")).unwrap();
    assert!(receiver.recv(&mut [0; 64]).is_err(), "a denied datagram arrived; FORWARD is\n{rules}");
}
