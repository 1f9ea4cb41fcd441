//! etcd crashes, forgets, loses members, hangs, or cannot be reached. The nodes go on, and catch up by themselves.

use std::{
    net::{SocketAddr, TcpStream},
    os::fd::{AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use loden_agent::registry::{Claim, ConfigState, GRACE, Registry, RegistryError};
use loden_tests::etcd::{Etcd, Members};

use crate::{node::*, way::Way};

#[tokio::test]
async fn a_killed_etcd_changes_nothing_and_the_nodes_catch_up() {
    let mut etcd = etcd_with(CONFIG);
    let (one, two) = (Node::start(&etcd, 1).await, Node::start(&etcd, 2).await);
    let before = one.until("one sees two", |cluster| peers_are(cluster, &[2])).await;
    etcd.kill();
    let during = one.until("one notices", |cluster| !cluster.connected).await;
    assert_eq!((&during.own, &during.peers), (&before.own, &before.peers));
    tokio::time::sleep(Duration::from_secs(2)).await;
    etcd.restart().unwrap();
    etcd.ctl(&["put", &key(net("10.5.240.0/24")), &attrs(3).to_json()]).unwrap();
    let after =
        one.until("one sees what came", |cluster| cluster.connected && peers_are(cluster, &[2, 3])).await;
    assert_eq!(after.own, before.own);
    two.until("so does two", |cluster| cluster.connected && peers_are(cluster, &[1, 3])).await;
    assert_eq!(held(&two.now()), Some(&two.lease));
}

#[tokio::test]
async fn what_happened_during_an_outage_is_seen_whole() {
    let etcd = etcd_with(CONFIG);
    let way = Way::to(&etcd).await;
    let registry = Registry::connect(options(std::slice::from_ref(&way.endpoint))).await.unwrap();
    let [kept, changed, gone] = ["10.5.241.0/24", "10.5.242.0/24", "10.5.243.0/24"].map(net);
    for (number, subnet) in [(3, kept), (4, changed), (5, gone)] {
        etcd.ctl(&["put", &key(subnet), &attrs(number).to_json()]).unwrap();
    }
    let node = Node::join(&registry, claim(1)).await.unwrap();
    node.until("it sees three", |cluster| cluster.connected && peers_are(cluster, &[3, 4, 5])).await;
    way.cut();
    node.until("it notices", |cluster| !cluster.connected).await;
    etcd.ctl(&["put", &key(changed), &vxlan(4, 44).to_json()]).unwrap();
    etcd.ctl(&["del", &key(gone)]).unwrap();
    etcd.ctl(&["put", &key(net("10.5.244.0/24")), &attrs(6).to_json()]).unwrap();
    // The history in between is not to be had any more.
    let revision = node.now().revision + 3;
    etcd.ctl(&["compact", &revision.to_string()]).unwrap();
    way.mend();
    let cluster =
        node.until("it sees what is", |cluster| cluster.connected && peers_are(cluster, &[3, 4, 6])).await;
    assert_eq!(cluster.peers[&LeaseKey::v4(changed)].attrs, vxlan(4, 44));
    assert_eq!(held(&cluster), Some(&node.lease));
}

#[tokio::test]
async fn an_etcd_restored_empty_gets_our_lease_back() {
    let mut etcd = etcd_with(CONFIG);
    let (one, two) = (Node::start(&etcd, 1).await, Node::start(&etcd, 2).await);
    one.until("one sees two", |cluster| peers_are(cluster, &[2])).await;
    etcd.restart_empty().unwrap();
    one.until("one sees two again", |cluster| {
        cluster.connected
            && held(cluster).is_some()
            && peers_are(cluster, &[2])
            && cluster.config == ConfigState::Missing
    })
    .await;
    for node in [&one, &two] {
        eventually("the record is back", || {
            etcd.ctl(&["get", &key(node.lease.subnet())]).unwrap().contains(&node.lease.attrs.to_json())
        })
        .await;
    }
}

#[tokio::test]
async fn a_peer_that_a_new_etcd_does_not_have_stays_for_a_while_and_no_longer() {
    let mut etcd = etcd_with(CONFIG);
    let (one, two) = (Node::start(&etcd, 1).await, Node::start(&etcd, 2).await);
    let three = Node::start(&etcd, 3).await;
    one.until("one sees both", |cluster| peers_are(cluster, &[2, 3])).await;
    drop(three);
    etcd.restart_empty().unwrap();
    let start = Instant::now();
    one.until("it follows the new one", |cluster| cluster.connected).await;
    while start.elapsed() < GRACE - Duration::from_secs(5) {
        assert!(peers_are(&one.now(), &[2, 3]), "{:#?}", one.now());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(one.now().connected);
    one.within(GRACE, "who has not come back is no peer", |cluster| peers_are(cluster, &[2])).await;
    two.within(GRACE, "so it is for two", |cluster| peers_are(cluster, &[1])).await;
}

#[tokio::test]
async fn an_etcd_restored_from_a_backup_gets_our_lease_back() {
    let mut etcd = etcd_with(CONFIG);
    let gone = net("10.5.240.0/24");
    let one = Node::start(&etcd, 1).await;
    let (three, four) = (Node::start(&etcd, 13).await, Node::start(&etcd, 14).await);
    let backup = tempfile::tempdir().unwrap();
    etcd.kill();
    copy(etcd.data(), backup.path());
    etcd.restart().unwrap();
    etcd.ctl(&["put", &key(gone), &attrs(3).to_json()]).unwrap();
    let two = Node::start(&etcd, 2).await;
    // Since the backup, one has begun anew by another etcd lease, and one has got another MAC.
    drop(three);
    let three = Node::start(&etcd, 13).await;
    four.set_attrs(vxlan(14, 99));
    one.until("one sees all", |cluster| {
        cluster.connected
            && peers_are(cluster, &[2, 3, 13, 14])
            && cluster.peers[&LeaseKey::v4(four.lease.subnet())].attrs == vxlan(14, 99)
    })
    .await;
    // Nothing of the nodes runs from here until etcd is back: some of them have just listed what is not there any
    // more, and begin to watch a store that is behind that.
    etcd.kill();
    std::fs::remove_dir_all(etcd.data()).unwrap();
    copy(backup.path(), etcd.data());
    etcd.restart().unwrap();
    let limit = GRACE + Duration::from_secs(20);
    one.within(limit, "one sees two, which came after the backup, and no ghost", |cluster| {
        cluster.connected
            && held(cluster).is_some_and(|lease| lease.subnet() == one.lease.subnet())
            && peers_are(cluster, &[2, 13, 14])
            && cluster.peers[&LeaseKey::v4(four.lease.subnet())].attrs == vxlan(14, 99)
    })
    .await;
    for node in [&three, &four] {
        node.until("it has its lease", |cluster| cluster.connected && held(cluster).is_some()).await;
        assert_eq!(held(&node.now()).unwrap().subnet(), node.lease.subnet());
    }
    two.until("two has its lease", |cluster| {
        cluster.connected && held(cluster).is_some_and(|lease| lease.subnet() == two.lease.subnet())
    })
    .await;
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    loden_tests::netns::run("cp", &["-a", &format!("{}/.", from.display()), &to.display().to_string()])
        .unwrap();
}

/// A node with a lease of two seconds, whose way to etcd can be cut.
async fn short_lived(etcd: &Etcd) -> (Way, Node) {
    let way = Way::to(etcd).await;
    let registry = Registry::connect(options(std::slice::from_ref(&way.endpoint))).await.unwrap();
    let claim = Claim { ttl: Duration::from_secs(2), ..claim(1) };
    let node = Node::join(&registry, claim).await.unwrap();
    node.until("it follows etcd", |cluster| cluster.connected).await;
    (way, node)
}

async fn until_expired(etcd: &Etcd, node: &Node) {
    eventually("the lease has run out", || etcd.ctl(&["get", &key(node.lease.subnet())]).unwrap().is_empty())
        .await;
}

#[tokio::test]
async fn a_lease_is_kept_alive_past_its_ttl() {
    let etcd = etcd_with(CONFIG);
    let (_way, node) = short_lived(&etcd).await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    let now = node.now();
    assert_eq!(held(&now), Some(&node.lease), "the same record, not written again");
    assert!(now.renewed.unwrap().elapsed() < Duration::from_secs(2));
    assert!(etcd.ctl(&["get", &key(node.lease.subnet())]).unwrap().contains(&attrs(1).to_json()));
}

#[tokio::test]
async fn a_lease_that_ran_out_while_cut_off_is_taken_back() {
    let etcd = etcd_with(CONFIG);
    let (way, node) = short_lived(&etcd).await;
    way.cut();
    until_expired(&etcd, &node).await;
    assert_eq!(held(&node.now()), Some(&node.lease), "cut off, it goes on");
    way.mend();
    let is_new = |cluster: &_| held(cluster).is_some_and(|lease| lease.etcd_lease != node.lease.etcd_lease);
    let cluster = node.until("it has a lease again", is_new).await;
    assert_eq!(held(&cluster).unwrap().subnet(), node.lease.subnet());
}

#[tokio::test]
async fn a_subnet_that_another_node_took_while_cut_off_is_left_to_it() {
    let etcd = etcd_with(CONFIG);
    let (way, node) = short_lived(&etcd).await;
    way.cut();
    until_expired(&etcd, &node).await;
    let taker = Claim { previous: Some(node.lease.subnet()), ..claim(2) };
    let taker = Node::join(&connect(&etcd).await, taker).await.unwrap();
    assert_eq!(taker.lease.subnet(), node.lease.subnet());
    way.mend();
    let moved = |cluster: &_| held(cluster).is_some_and(|lease| lease.subnet() != node.lease.subnet());
    let cluster = node.until("it has another subnet", moved).await;
    assert_eq!(held(&taker.now()), Some(&taker.lease), "the taker is not disturbed");
    assert!(etcd.ctl(&["get", &key(taker.lease.subnet())]).unwrap().contains(&attrs(2).to_json()));
    let ours = held(&cluster).unwrap().subnet();
    taker
        .until("the taker sees it at its new subnet", |cluster| {
            cluster.peers.contains_key(&LeaseKey::v4(ours))
        })
        .await;
}

#[tokio::test]
async fn a_claim_whose_answer_is_lost_is_our_own_when_it_shows() {
    let etcd = etcd_with(CONFIG);
    let way = Way::to(&etcd).await;
    let registry = Registry::connect(options(std::slice::from_ref(&way.endpoint))).await.unwrap();
    let node = Node::join(&registry, claim(1)).await.unwrap();
    node.until("it follows etcd", |cluster| cluster.connected).await;
    way.mute_after(&attrs(1).to_json());
    etcd.ctl(&["del", &key(node.lease.subnet())]).unwrap();
    eventually("the record is back", || {
        etcd.ctl(&["get", &key(node.lease.subnet())]).unwrap().contains(&attrs(1).to_json())
    })
    .await;
    way.cut();
    node.until("it has no answer", |cluster| !cluster.connected && held(cluster).is_none()).await;
    way.mend();
    let cluster =
        node.until("it has its lease", |cluster| cluster.connected && held(cluster).is_some()).await;
    let lease = held(&cluster).unwrap();
    assert_eq!(lease.subnet(), node.lease.subnet());
    assert_ne!(lease.etcd_lease, node.lease.etcd_lease, "that of the lost answer");
    eventually("one etcd lease is left", || etcd.ctl(&["lease", "list"]).unwrap().contains("found 1 leases"))
        .await;
    // Also the next write is compared with what is there.
    node.set_attrs(vxlan(1, 99));
    eventually("the record has the news", || {
        etcd.ctl(&["get", &key(node.lease.subnet())]).unwrap().contains(&vxlan(1, 99).to_json())
    })
    .await;
}

#[tokio::test]
async fn a_frozen_etcd_is_noticed_and_its_thaw_too() {
    let etcd = etcd_with(CONFIG);
    let (_way, node) = short_lived(&etcd).await;
    etcd.freeze().unwrap();
    node.within(Duration::from_secs(30), "it notices", |cluster| !cluster.connected).await;
    assert_eq!(held(&node.now()), Some(&node.lease));
    etcd.thaw().unwrap();
    node.within(Duration::from_secs(30), "it follows again", |cluster| {
        cluster.connected && held(cluster).is_some()
    })
    .await;
    assert_eq!(held(&node.now()).unwrap().subnet(), node.lease.subnet());
}

#[tokio::test]
async fn a_dead_and_a_frozen_endpoint_are_passed_over() {
    let (frozen, etcd) = (Etcd::on_loopback().unwrap(), etcd_with(CONFIG));
    frozen.freeze().unwrap();
    let dead = "http://127.0.0.1:1".to_owned();
    let endpoints = [dead.clone(), frozen.endpoint(), etcd.endpoint()];
    // Several times, because the order is random.
    for number in 1..=4 {
        let start = Instant::now();
        let registry = Registry::connect(options(&endpoints)).await.unwrap();
        Node::join(&registry, claim(number)).await.unwrap();
        assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    }
    let registry = Registry::connect(options(&[dead, frozen.endpoint()])).await.unwrap();
    let error = registry.network_config().await.unwrap_err().to_string();
    assert!(error.contains("http://127.0.0.1:1: ") && error.contains("refused"), "{error}");
    assert!(error.contains(&format!("{}: ", frozen.endpoint())), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
}

#[tokio::test]
async fn an_etcd_that_comes_after_the_node_is_found() {
    let mut etcd = etcd_with(CONFIG);
    etcd.kill();
    let registry = connect(&etcd).await;
    let error = registry.network_config().await.unwrap_err();
    assert!(matches!(error, RegistryError::Unreachable { .. }), "{error}");
    let endpoint = etcd.endpoint();
    assert_eq!(
        error.to_string(),
        format!(
            "etcd: cannot read the network config: {endpoint}: tcp connect error: transport error: Connection refused (os error 111)"
        )
    );
    etcd.restart().unwrap();
    assert_eq!(registry.network_config().await.unwrap().v4.unwrap().network, net("10.5.0.0/16"));
}

/// A port that answers no SYN, as behind a firewall that drops: a listener whose backlog is full.
fn black_hole() -> (OwnedFd, Vec<TcpStream>, SocketAddr) {
    use nix::sys::socket::*;
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None).unwrap();
    bind(socket.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0)).unwrap();
    listen(&socket, Backlog::new(0).unwrap()).unwrap();
    let address: SockaddrIn = getsockname(socket.as_raw_fd()).unwrap();
    let address = SocketAddr::from((address.ip(), address.port()));
    let mut waiting = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
        waiting.push(stream);
    }
    (socket, waiting, address)
}

#[tokio::test]
async fn an_endpoint_that_swallows_everything_is_passed_over() {
    let etcd = etcd_with(CONFIG);
    let (_socket, _waiting, address) = black_hole();
    for number in 1..=4 {
        let start = Instant::now();
        let registry =
            Registry::connect(options(&[format!("http://{address}"), etcd.endpoint()])).await.unwrap();
        Node::join(&registry, claim(number)).await.unwrap();
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    }
}

#[tokio::test]
async fn a_watch_that_falls_behind_a_compaction_starts_again_from_a_listing() {
    let etcd = etcd_with(CONFIG);
    let way = Way::to(&etcd).await;
    let registry = Registry::connect(options(std::slice::from_ref(&way.endpoint))).await.unwrap();
    let node = Node::join(&registry, claim(1)).await.unwrap();
    node.until("it follows etcd", |cluster| cluster.connected).await;
    let watches =
        || etcd.calls().unwrap().iter().find(|(name, _)| name == "Watch/Watch").map(|(_, count)| *count);
    assert_eq!(watches(), Some(1));
    way.hold();
    // Big ones fill what is on the way, then etcd's own queue of 1024 for the watcher runs over.
    let client = etcd_client::Client::connect([etcd.endpoint()], None).await.unwrap();
    let put = |name: String, value: Vec<u8>| {
        let mut kv = client.kv_client();
        async move { kv.put(format!("{PREFIX}/subnets/{name}"), value, None).await.unwrap() }
    };
    for n in 0..24 {
        put(format!("big-{n}"), vec![b'x'; 1 << 20]).await;
    }
    futures::future::join_all((0..2000).map(|n| put(format!("small-{}", n % 10), vec![b'x']))).await;
    etcd.ctl(&["put", &key(net("10.5.240.0/24")), &attrs(2).to_json()]).unwrap();
    let status = etcd.ctl(&["endpoint", "status", "--write-out", "fields"]).unwrap();
    let revision = status.lines().find_map(|line| line.strip_prefix("\"Revision\" : ")).unwrap();
    etcd.ctl(&["compact", revision]).unwrap();
    way.mend();
    node.until("it sees what is", |cluster| cluster.connected && peers_are(cluster, &[2])).await;
    assert_eq!(watches(), Some(2), "the first watch was ended by the compaction");
    assert_eq!(held(&node.now()), Some(&node.lease));
}

#[tokio::test]
async fn a_cluster_of_three_may_lose_its_leader_and_then_its_majority() {
    let mut etcds = Members::start().unwrap();
    etcds.all[0].ctl(&["put", &format!("{PREFIX}/config"), CONFIG]).unwrap();
    let registry = Registry::connect(options(&etcds.endpoints())).await.unwrap();
    let node = Node::join(&registry, claim(1)).await.unwrap();
    node.until("it follows etcd", |cluster| cluster.connected).await;

    let leader = etcds.leader().unwrap();
    etcds.all[leader].kill();
    let survivors = [(leader + 1) % 3, (leader + 2) % 3];
    eventually("the others go on", || {
        etcds.all[survivors[0]].ctl(&["put", &key(net("10.5.240.0/24")), &attrs(2).to_json()]).is_ok()
    })
    .await;
    node.until("it sees the news", |cluster| cluster.connected && peers_are(cluster, &[2])).await;
    let late = Registry::connect(options(&etcds.endpoints())).await.unwrap();
    let late = Node::join(&late, claim(3)).await.unwrap();
    node.until("it sees a node that came without the leader", |cluster| peers_are(cluster, &[2, 3])).await;

    etcds.all[survivors[0]].kill();
    let during = node.within(Duration::from_secs(30), "it notices", |cluster| !cluster.connected).await;
    assert!(held(&during) == Some(&node.lease) && peers_are(&during, &[2, 3]), "all stays: {during:#?}");
    etcds.all[leader].restart().unwrap();
    eventually("a majority goes on", || {
        etcds.all[leader].ctl(&["put", &key(net("10.5.241.0/24")), &attrs(4).to_json()]).is_ok()
    })
    .await;
    let after = node.within(Duration::from_secs(30), "it catches up", |cluster| {
        cluster.connected && peers_are(cluster, &[2, 3, 4])
    });
    assert_eq!(held(&*after.await), Some(&node.lease));
    late.within(Duration::from_secs(30), "so does the other", |cluster| {
        cluster.connected && peers_are(cluster, &[1, 2, 4])
    })
    .await;
}
