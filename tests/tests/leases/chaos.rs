//! Everything at once: short leases, nodes cut off and mended, etcd killed and restarted. Then quiet, and all is well.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use loden_agent::registry::{Claim, Registry};
use loden_tests::etcd::Etcd;

use crate::{node::*, way::Way};

const NODES: u8 = 8;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_any_trouble_every_node_has_a_subnet_of_its_own_and_sees_all_others() {
    // Two subnets more than nodes, so that a node which lost its own can move, and meets others often.
    let mut etcd = etcd_with(r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.10.0"}"#);
    let mut nodes = Vec::new();
    for number in 1..=NODES {
        let way = Way::to(&etcd).await;
        let registry = Registry::connect(options(std::slice::from_ref(&way.endpoint))).await.unwrap();
        let claim = Claim { ttl: Duration::from_secs(2), ..claim(number) };
        nodes.push((way, Node::join(&registry, claim).await.unwrap()));
    }
    let seed = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().subsec_nanos();
    println!("seed {seed}");
    let mut state = seed | 1;
    let mut random = |below: u32| {
        // xorshift32: no need for more.
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state % below
    };
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(20) {
        let (way, _) = &nodes[random(NODES.into()) as usize];
        match random(8) {
            0..3 => way.cut(),
            3..5 => way.mend(),
            5 => way.hold(),
            6 => {
                etcd.kill();
                etcd.restart().unwrap();
            }
            _ => {
                let (_, node) = &nodes[random(NODES.into()) as usize];
                if let Some(lease) = held(&node.now()) {
                    etcd.ctl(&["del", &key(lease.subnet())]).unwrap();
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(random(1500).into())).await;
    }
    nodes.iter().for_each(|(way, _)| way.mend());
    let nodes: Vec<_> = nodes.iter().map(|(_, node)| node).collect();
    let start = Instant::now();
    while let Err(wrong) = is_well(&etcd, &nodes) {
        assert!(start.elapsed() < Duration::from_secs(40), "after 40 s of quiet: {wrong}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn is_well(etcd: &Etcd, nodes: &[&Node]) -> Result<(), String> {
    let mut subnets = BTreeSet::new();
    for (number, node) in (1..).zip(nodes) {
        let cluster = node.now();
        let others: Vec<u8> = (1..=NODES).filter(|other| *other != number).collect();
        match held(&cluster) {
            Some(lease) if cluster.connected && peers_are(&cluster, &others) => {
                subnets.insert(key(lease.subnet()));
            }
            _ => return Err(format!("node {number} is not well: {cluster:#?}")),
        }
    }
    let keys = etcd.ctl(&["get", "--prefix", "--keys-only", &format!("{PREFIX}/subnets/")]).unwrap();
    let keys: BTreeSet<_> = keys.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect();
    if subnets.len() == nodes.len() && subnets == keys {
        Ok(())
    } else {
        Err(format!("nodes hold {subnets:?}, etcd has {keys:?}"))
    }
}
