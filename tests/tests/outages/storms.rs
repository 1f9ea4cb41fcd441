//! What comes again and again, by whose fault ever, does not fill the log: it says how much it left out.

use std::{
    fs,
    net::{IpAddr, UdpSocket},
    thread,
    time::Duration,
};

use loden_tests::{
    cluster::{Cluster, PREFIX, Plan, lease_key},
    etcd::{Gateway, Write},
    node::Node,
    process::wait_for,
};

use crate::wait_ready;

/// Rewrites of one key, forged packets, turns of a peer.
const TIMES: usize = 400;
/// What one place in the code may say at once, and what time brings meanwhile, with room.
const OF_ONE_PLACE: usize = 50 + 20;

/// Who sends VXLAN and is no peer.
const STRANGERS: [&str; 2] = ["192.168.64.66", "fd77::66"];

/// The key of a lease of both families.
fn peers_key(n: u8) -> String {
    format!("{PREFIX}/subnets/10.5.{n}.0-24&fc00:0:0:{n:x}::-64")
}

fn lines(node: &Node, what: &str) -> usize {
    node.log().lines().filter(|line| line.contains(what)).count()
}

#[test]
fn storms_leave_a_log_of_bounded_length_that_says_what_it_left_out() {
    let plan = Plan { nodes: 2, ..Plan::dual() };
    let mut cluster = Cluster::start(&plan, &["--bpf-log"]).unwrap();
    let node = &cluster.nodes[0];
    let quiet = node.log().lines().count();
    assert!(quiet < 50, "a start is told in few lines, not {quiet}: {}", node.log());

    let mut etcd = Gateway::connect(cluster.etcd()).unwrap();
    let (hostile, own) = (peers_key(200), lease_key(node).unwrap());
    let record = |mac: usize| {
        let data = |family: u8| {
            let (high, low) = (mac / 256, mac % 256);
            format!(r#"{{"VNI":1,"VtepMAC":"0a:00:00:{family:02x}:{high:02x}:{low:02x}"}}"#)
        };
        format!(
            r#"{{"PublicIP":"192.168.64.200","PublicIPv6":"fd77::c8","BackendType":"vxlan","BackendData":{},"BackendV6Data":{}}}"#,
            data(4),
            data(6)
        )
    };
    for n in 0..TIMES {
        // A lease that is wrong in another way each time; one that comes and goes; ours, rewritten.
        etcd.write(&[
            Write::Put(hostile.clone(), format!("{{\"PublicIP\":\"{n}\"}}")),
            Write::Put(peers_key(201), record(n)),
            Write::Put(own.clone(), format!("nonsense {n}")),
        ])
        .unwrap();
        etcd.write(&[Write::Delete(peers_key(201))]).unwrap();
        if n % 20 == 0 {
            // Faster than this the agent sees only the last of many.
            thread::sleep(Duration::from_millis(20));
        }
    }
    etcd.write(&[Write::Delete(hostile)]).unwrap();

    // VXLAN by strangers of either family, each packet told of.
    let far = &cluster.nodes[1];
    far.netns().ip("address add 192.168.64.66/24 dev eth0").unwrap();
    far.netns().ip("address add fd77::66/64 dev eth0 nodad").unwrap();
    let to: [IpAddr; 2] = [node.address().into(), cluster.node_address6(0).unwrap().into()];
    let strangers = far.netns().run(|| STRANGERS.map(|stranger| UdpSocket::bind((stranger, 0)).unwrap()));
    let vxlan = [&[8, 0, 0, 0, 0, 0, 1, 0][..], &[0; 60]].concat();
    for n in 0..TIMES * 10 {
        strangers[n % 2].send_to(&vxlan, (to[n % 2], 8472)).unwrap();
        if n % 100 == 0 {
            thread::sleep(Duration::from_millis(5));
        }
    }
    let dropped = wait_for("the packets to be counted", Duration::from_secs(10), || {
        let counted = node.status().unwrap()["counters"]["drop_unknown_vtep"].as_u64().unwrap();
        (counted > 2 * TIMES as u64).then_some(counted)
    })
    .unwrap();

    // An etcd that comes and goes.
    for _ in 0..3 {
        cluster.etcd_mut().kill();
        thread::sleep(Duration::from_millis(300));
        cluster.etcd_mut().restart().unwrap();
    }
    let node = &mut cluster.nodes[0];
    wait_ready(node, 60);
    node.stop_agent().unwrap();

    let log = node.log();
    for (what, most) in [
        ("something is wrong with a key in etcd", OF_ONE_PLACE),
        ("not as it should be; writing it again", OF_ONE_PLACE),
        ("drop_unknown_vtep", 1500),
    ] {
        let told = lines(node, what);
        assert!((1..=most).contains(&told), "{told} lines say {what:?}");
    }
    for stranger in STRANGERS {
        assert!(lines(node, &format!(" {stranger} > ")) >= 1, "{stranger} is among those that were told of");
    }
    let told = lines(node, "lines were left out, because so many of one kind came");
    assert!(told >= 1, "it says that it left something out: {log}");
    let total = log.lines().count() - lines(node, "drop_unknown_vtep");
    assert!(total < 500, "{total} lines after {dropped} packets and {TIMES} times three writes");
    let bytes = fs::metadata(node.directory().join("agent.log")).unwrap().len();
    assert!(bytes < 500_000, "{bytes} bytes");
}
