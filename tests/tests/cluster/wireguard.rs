//! The wireguard backend: encrypted between nodes, by the kernel. The tests need a kernel with the module wireguard, and
//! run by `cargo xtask test --kernels`.
//!
//! `wg` is the tool of WireGuard's own authors: it reads what the agent has set, and sets up the other side.

mod cost;
mod doctor;
mod shortcut;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use loden_tests::{
    capture::Capture,
    cluster::{Cluster, PREFIX, Plan},
    container::Container,
    counters::Counters,
    netns::Netns,
    node::{BRIDGE, Node},
    process::wait_for,
    traffic::{
        hello, ping, socket,
        stream::{self, Until},
    },
};

use crate::{assert_all_reach_all, show_logs};

const DEVICE: &str = "flannel-wg";
const PSK: &str = "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2U=";
/// Within this everything is repaired: the loop's tick of 30 seconds, and what a slow machine adds.
const REPAIR: Duration = Duration::from_secs(60);

const LIMIT: Duration = Duration::from_secs(10);

fn plan(settings: &str) -> Plan {
    let config = format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"wireguard"{settings}}}}}"#);
    Plan { nodes: 2, config, ..Plan::default() }
}

fn start(plan: &Plan, args: &[&str]) -> Cluster {
    let mut cluster = Cluster::create(plan).unwrap();
    for node in &mut cluster.nodes {
        node.start_agent(args).unwrap();
        node.make_bridge().unwrap();
    }
    let others = cluster.nodes.len() - 1;
    for node in &cluster.nodes {
        wait_for("the peers", LIMIT, || (peers(node.netns()).len() == others).then_some(())).unwrap();
    }
    cluster
}

/// What `wg` says of each peer: key, and allowed addresses.
fn peers(netns: &Netns) -> BTreeMap<String, String> {
    let text = netns.exec(&format!("wg show {DEVICE} allowed-ips")).unwrap_or_default();
    let peer = |line: &str| line.split_once('\t').map(|(key, allowed)| (key.to_owned(), allowed.to_owned()));
    text.lines().filter_map(peer).collect()
}

fn public_key(netns: &Netns) -> String {
    netns.exec(&format!("wg show {DEVICE} public-key")).unwrap().trim().to_owned()
}

fn index(netns: &Netns) -> String {
    netns.ip(&format!("-o link show {DEVICE}")).unwrap().split(':').next().unwrap().to_owned()
}

fn subnet(node: &Node) -> String {
    node.subnet_env().unwrap().subnet().trunc().to_string()
}

/// A node that is set up as flanneld's wireguard backend sets one up.
struct ByHand {
    netns: Netns,
    address: Ipv4Addr,
    containers: u32,
}

const HAND_SUBNET: &str = "10.5.200.0/24";

impl ByHand {
    fn create(cluster: &Cluster) -> Self {
        let netns = Netns::create("hand").unwrap();
        let address = cluster.underlay().plug(&netns, 60).unwrap();
        netns.ip(&format!("link add {DEVICE} mtu 1420 type wireguard")).unwrap();
        let hand = Self { netns, address, containers: 0 };
        hand.new_key(cluster);
        for command in [
            format!("address add 10.5.200.0/32 dev {DEVICE}"),
            format!("link set {DEVICE} up"),
            format!("route add 10.5.0.0/16 dev {DEVICE} scope link"),
            format!("link add {BRIDGE} mtu 1420 type bridge"),
            format!("address add 10.5.200.1/24 dev {BRIDGE}"),
            format!("link set {BRIDGE} up"),
        ] {
            hand.netns.ip(&command).unwrap();
        }
        hand.netns.exec("sysctl -qw net.ipv4.ip_forward=1").unwrap();
        hand
    }

    /// Another private key, and the lease that tells of it.
    fn new_key(&self, cluster: &Cluster) -> String {
        let file = cluster.directory().join("hand.key");
        new_key_file(&self.netns, &file);
        self.netns
            .exec(&format!("wg set {DEVICE} listen-port 51820 private-key {}", file.display()))
            .unwrap();
        let key = public_key(&self.netns);
        let value = format!(
            r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"wireguard","BackendData":{{"PublicKey":"{key}","Port":51820}}}}"#,
            self.address
        );
        cluster.etcd().ctl(&["put", &format!("{PREFIX}/subnets/10.5.200.0-24"), &value]).unwrap();
        key
    }

    /// What flanneld does for a node's lease.
    fn add_peer(&self, node: &Node) {
        let (key, subnet) = (public_key(node.netns()), subnet(node));
        let endpoint = format!("{}:51820", node.address());
        let command = format!("wg set {DEVICE} peer {key} endpoint {endpoint} allowed-ips {subnet}");
        self.netns.exec(&command).unwrap();
    }

    fn run_container(&mut self) -> Container {
        self.containers += 1;
        let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 5, 200, 1)) + self.containers);
        let addresses = [(address.into(), "10.5.200.1/24".parse().unwrap())];
        Container::create(&self.netns, BRIDGE, &format!("veth{}", self.containers), &addresses, 1420).unwrap()
    }
}

fn new_key_file(netns: &Netns, file: &Path) {
    let key = netns.exec("wg genkey").unwrap();
    let _ = fs::remove_file(file);
    // As flannel writes it: without an end of line.
    fs::write(file, key.trim()).unwrap();
    fs::set_permissions(file, fs::Permissions::from_mode(0o400)).unwrap();
}

#[test]
#[ignore = "needs a kernel with WireGuard: cargo xtask test --kernels"]
fn containers_reach_each_other_and_the_underlay_sees_none_of_it() {
    const MARKER: &str = "a text that nobody in between may read";
    let mut cluster = start(&plan(&format!(r#","PSK":"{PSK}""#)), &["-v=10"]);
    let containers = cluster.run_containers(2).unwrap();
    let (a, b) = (&containers[0], &containers[2]);
    let capture = Capture::open(cluster.nodes[1].netns(), "eth0").unwrap();
    assert_all_reach_all(&containers);
    for _ in 0..3 {
        let (server, client) = (socket::udp(b.host(), 0).unwrap(), socket::udp(a.host(), 0).unwrap());
        let port = server.local_addr().unwrap().port();
        client.send_to(MARKER.as_bytes(), (b.address(), port)).unwrap();
        let mut heard = [0; 100];
        let (len, from) = server.recv_from(&mut heard).unwrap();
        assert_eq!((&heard[..len], from.ip()), (MARKER.as_bytes(), a.address().into()));
    }
    let frames = capture.drain().unwrap();
    let encrypted = frames.iter().filter(|frame| is_wireguard(frame)).count();
    assert!(encrypted > 20, "{encrypted} of {} frames", frames.len());
    for frame in &frames {
        assert!(!frame.windows(MARKER.len()).any(|bytes| bytes == MARKER.as_bytes()), "{frame:02x?}");
        assert!(!is_pods(frame), "{frame:02x?}");
    }
    for (node, other) in [(0, 1), (1, 0)].map(|(a, b)| (&cluster.nodes[a], &cluster.nodes[b])) {
        let env = node.subnet_env().unwrap();
        assert_eq!(env.mtu, 1420, "80 less than the underlay's, as flannel's");
        let key = public_key(other.netns());
        assert_eq!(peers(node.netns()), BTreeMap::from([(key.clone(), subnet(other))]));
        let psks = node.netns().exec(&format!("wg show {DEVICE} preshared-keys")).unwrap();
        assert_eq!(psks.trim(), format!("{key}\t{PSK}"));
        assert_eq!(
            node.netns()
                .ip(&format!("-4 -o address show {DEVICE}"))
                .unwrap()
                .split_whitespace()
                .nth(3)
                .unwrap(),
            format!("{}/32", env.subnet().network())
        );
        let status = node.status().unwrap();
        assert_eq!(status["backend"], "wireguard");
        assert_eq!(status["wireguard"][0]["public_key"], public_key(node.netns()));
        let peer = &status["peers"][0]["wireguard"];
        assert_eq!(
            (peer["public_key"].as_str(), peer["endpoint"].as_str()),
            (Some(&*key), Some(&*format!("{}:51820", other.address())))
        );
        assert!(
            peer["handshake_seconds"].is_number() && peer["received_bytes"].as_u64().unwrap() > 1000,
            "{status:#}"
        );
        let lease = format!(
            r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"wireguard","BackendData":{{"PublicKey":"{}","Port":51820}}}}"#,
            node.address(),
            public_key(node.netns())
        );
        assert!(cluster.leases().unwrap().iter().any(|(_, value)| *value == lease), "{:?}", cluster.leases());
        assert_no_secret_is_told(node);
    }
}

/// UDP over IPv4 to or from WireGuard's port.
fn is_wireguard(frame: &[u8]) -> bool {
    let port = 51820_u16.to_be_bytes();
    frame.len() > 42
        && frame[12..14] == [8, 0]
        && frame[23] == 17
        && (frame[34..36] == port || frame[36..38] == port)
}

/// IPv4 to or from an address of a pod.
fn is_pods(frame: &[u8]) -> bool {
    frame.len() >= 34 && frame[12..14] == [8, 0] && (frame[26..28] == [10, 5] || frame[30..32] == [10, 5])
}

/// Neither the private key nor the shared one is anywhere but where it belongs.
fn assert_no_secret_is_told(node: &Node) {
    let file = node.wireguard_key_file();
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o400);
    let private = fs::read_to_string(&file).unwrap();
    assert_eq!(node.netns().exec(&format!("wg show {DEVICE} private-key")).unwrap().trim(), private);
    let run = node.run_directory();
    let mut told = vec![("log", node.log()), ("status", node.status().unwrap().to_string())];
    told.push(("facts.json", fs::read_to_string(run.join("facts.json")).unwrap()));
    told.push(("state.json", fs::read_to_string(run.join("state.json")).unwrap()));
    let doctor = node.loden_output(&["doctor", "--no-probes"]).unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    told.push(("doctor", text(&doctor.stdout) + &text(&doctor.stderr)));
    for (what, told) in told {
        assert!(!told.is_empty(), "{what}");
        for secret in [private.trim(), PSK, "secretsecret"] {
            assert!(!told.contains(secret), "{what} tells a secret");
        }
    }
}

/// Sends a numbered datagram every 20 ms while `work` runs: so few that none is lost for want of CPU. Returns how many
/// were sent, and how many arrived.
fn trickle(from: &Container, to: &Container, work: impl FnOnce()) -> (u64, usize) {
    let (sender, receiver) = (socket::udp(from.host(), 0).unwrap(), socket::udp(to.host(), 0).unwrap());
    let to = (to.address(), receiver.local_addr().unwrap().port());
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let sent = scope.spawn(|| {
            let mut sent = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                sender.send_to(&sent.to_be_bytes(), to).unwrap();
                sent += 1;
                thread::sleep(Duration::from_millis(20));
            }
            sent
        });
        let heard = scope.spawn(|| {
            let (mut heard, mut number) = (BTreeSet::new(), [0; 8]);
            // The socket gives up after seconds in which nothing comes: then the sender has stopped.
            while let Ok(8) = receiver.recv(&mut number) {
                heard.insert(u64::from_be_bytes(number));
            }
            heard.len()
        });
        work();
        stop.store(true, Ordering::Relaxed);
        (sent.join().unwrap(), heard.join().unwrap())
    })
}

#[test]
#[ignore = "needs a kernel with WireGuard: cargo xtask test --kernels"]
fn restarts_lose_no_packet_and_keep_key_device_session_and_fast_path() {
    let mut cluster = start(&plan(""), &[]);
    let containers = cluster.run_containers(1).unwrap();
    let (a, b) = (&containers[0], &containers[1]);
    stream::run(a.host(), b.host(), None, Until::Bytes(3_000_000)).unwrap();
    stream::run(b.host(), a.host(), None, Until::Bytes(3_000_000)).unwrap();
    let of = |node: &Node| (public_key(node.netns()), index(node.netns()), peers(node.netns()));
    let before = (of(&cluster.nodes[0]), transferred(&cluster.nodes[0]));
    let fast = |node: &Node| {
        let counters = Counters::read(node).unwrap();
        ["fast_overlay_out", "fast_overlay"].map(|reason| counters.get(reason))
    };
    let fast_before = fast(&cluster.nodes[0]);
    let node = &mut cluster.nodes[0];
    let mut back = (0, 0);
    let there = trickle(a, b, || {
        back = trickle(b, a, || {
            assert!(node.stop_agent().unwrap().success());
            node.start_agent(&[]).unwrap();
            node.kill_agent();
            node.start_agent(&[]).unwrap();
        });
    });
    for (sent, heard) in [there, back] {
        assert!(sent > 50, "{sent}");
        assert_eq!(u64::try_from(heard).unwrap(), sent, "datagrams that arrived");
    }
    // The programs go on without an agent. What is not fast are flows that prove themselves anew.
    for ((after, before), (sent, _)) in
        fast(&cluster.nodes[0]).into_iter().zip(fast_before).zip([there, back])
    {
        assert!(after - before > sent / 2, "{} of {sent}", after - before);
    }
    assert_eq!(of(&cluster.nodes[0]), before.0);
    // A peer that is made anew begins to count anew, and what has come since is less than what came before.
    let after = transferred(&cluster.nodes[0]);
    assert!(after.iter().zip(&before.1).all(|(after, before)| after >= before), "{before:?} {after:?}");
}

/// Bytes from and to the only peer.
fn transferred(node: &Node) -> Vec<u64> {
    let text = node.netns().exec(&format!("wg show {DEVICE} transfer")).unwrap();
    text.split_whitespace().skip(1).map(|bytes| bytes.parse().unwrap()).collect()
}

#[test]
#[ignore = "needs a kernel with WireGuard: cargo xtask test --kernels"]
fn a_node_set_up_as_flannels_shares_the_cluster_and_its_new_key_is_followed() {
    let mut cluster = start(&plan(""), &[]);
    let containers = cluster.run_containers(1).unwrap();
    let mut hand = ByHand::create(&cluster);
    for node in &cluster.nodes {
        hand.add_peer(node);
    }
    let by_hand = hand.run_container();
    let meet = |hand: &ByHand, key: &str| {
        for node in &cluster.nodes {
            wait_for("the key", LIMIT, || {
                let peers = peers(node.netns());
                (peers.len() == 2 && peers.get(key).is_some_and(|allowed| allowed == HAND_SUBNET))
                    .then_some(())
            })
            .unwrap_or_else(|error| panic!("{error:#}: {:?}", peers(node.netns())));
        }
        for container in &containers {
            for (client, server) in [(container, &by_hand), (&by_hand, container)] {
                let seen = hello(client.host(), server.host(), None).unwrap_or_else(|error| {
                    show_logs(&cluster);
                    panic!("{error:#}\n{}", hand.netns.exec("wg show all dump").unwrap())
                });
                assert_eq!(seen, client.address());
            }
        }
    };
    let session = || cluster.nodes[0].netns().exec(&format!("wg show {DEVICE} latest-handshakes")).unwrap();
    meet(&hand, &public_key(&hand.netns));
    ping(containers[0].netns(), containers[1].address(), 1).unwrap();
    let other = public_key(cluster.nodes[1].netns());
    let of_other =
        |text: String| text.lines().find(|line| line.starts_with(&other)).map(str::to_owned).unwrap();
    let before = of_other(session());
    let key = hand.new_key(&cluster);
    meet(&hand, &key);
    assert_eq!(of_other(session()), before, "the other peer's session is the old one");
}

#[test]
#[ignore = "needs a kernel with WireGuard: cargo xtask test --kernels"]
fn what_somebody_changes_of_a_device_is_put_right() {
    let mut cluster = start(&plan(""), &[]);
    let containers = cluster.run_containers(1).unwrap();
    let (netns, other) = (cluster.nodes[0].netns(), &cluster.nodes[1]);
    let (key, own) = (public_key(other.netns()), public_key(netns));
    let right = BTreeMap::from([(key.clone(), subnet(other))]);
    let foreign = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";
    let damages = [
        format!("wg set {DEVICE} peer {key} remove"),
        format!("wg set {DEVICE} peer {key} allowed-ips 10.5.99.0/24"),
        format!("wg set {DEVICE} peer {foreign} allowed-ips 10.5.98.0/24"),
        format!("wg set {DEVICE} listen-port 4000 private-key /dev/null"),
        format!("ip link delete {DEVICE}"),
        format!("ip route delete 10.5.0.0/16 dev {DEVICE}"),
    ];
    for damage in damages {
        netns.exec(&damage).unwrap();
        wait_for(&damage, REPAIR, || {
            let port = netns.exec(&format!("wg show {DEVICE} listen-port")).ok()?;
            let route = netns.ip("route show exact 10.5.0.0/16").ok()?;
            let device = peers(netns) == right && port.trim() == "51820" && public_key(netns) == own;
            (device && route.contains(&format!("dev {DEVICE} proto 76 scope link"))).then_some(())
        })
        .unwrap_or_else(|error| {
            show_logs(&cluster);
            panic!("{error:#}: {}", netns.exec(&format!("wg show {DEVICE} dump")).unwrap())
        });
        assert_all_reach_all(&containers);
    }
}

#[test]
#[ignore = "needs a kernel with WireGuard: cargo xtask test --kernels"]
fn a_node_of_flannel_is_taken_over_with_key_and_device_and_cleaned_up_to_the_key() {
    let mut cluster = Cluster::create(&plan("")).unwrap();
    let node = &mut cluster.nodes[0];
    let file = node.wireguard_key_file();
    new_key_file(node.netns(), &file);
    node.netns().ip(&format!("link add {DEVICE} mtu 1420 type wireguard")).unwrap();
    node.netns().exec(&format!("wg set {DEVICE} listen-port 51820 private-key {}", file.display())).unwrap();
    node.netns().ip(&format!("link set {DEVICE} up")).unwrap();
    node.netns().ip(&format!("route add 10.5.0.0/16 dev {DEVICE} scope link")).unwrap();
    let before = (public_key(node.netns()), index(node.netns()));
    node.start_agent(&[]).unwrap();
    assert_eq!((public_key(node.netns()), index(node.netns())), before);
    let route = || node.netns().ip("route show exact 10.5.0.0/16").unwrap();
    assert_eq!(route().trim(), format!("10.5.0.0/16 dev {DEVICE} proto 76 scope link"));
    // A key that is none is told of and left alone.
    assert!(node.stop_agent().unwrap().success());
    let key = fs::read_to_string(&file).unwrap();
    fs::remove_file(&file).unwrap();
    fs::write(&file, "geheimwort").unwrap();
    node.launch_agent(&[]).unwrap();
    assert!(!node.wait_until_ended(LIMIT).unwrap().success());
    assert!(
        node.log().contains("wgkey holds no WireGuard private key") && !node.log().contains("geheim"),
        "{}",
        node.log()
    );
    assert_eq!(fs::read_to_string(&file).unwrap(), "geheimwort");
    fs::write(&file, &key).unwrap();
    node.loden(&["cleanup"]).unwrap();
    assert!(node.netns().ip(&format!("link show {DEVICE}")).is_err());
    assert_eq!(node.netns().ip("route show exact 10.5.0.0/16").unwrap().trim(), "");
    assert_eq!(fs::read_to_string(&file).unwrap(), key, "the key is the operator's");
}

/// Both families between two nodes; `device` carries IPv6.
fn dual(settings: &str, device_v6: &str, endpoint_v6: bool) {
    let config = format!(
        r#"{{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{{"Type":"wireguard"{settings}}}}}"#
    );
    let mut cluster = Cluster::create(&Plan { nodes: 2, config, ..Plan::dual() }).unwrap();
    for node in &mut cluster.nodes {
        node.start_agent(&[]).unwrap();
        node.make_bridge().unwrap();
    }
    let containers = cluster.run_containers(1).unwrap();
    let addresses: Vec<Ipv6Addr> = containers.iter().filter_map(Container::address6).collect();
    for (from, to) in [(0, 1), (1, 0)] {
        let command = format!("ping -6 -n -q -c 1 -W 1 {}", addresses[to]);
        wait_for("IPv6", LIMIT, || containers[from].netns().exec(&command).ok()).unwrap_or_else(|error| {
            show_logs(&cluster);
            panic!("{error:#}: {}", cluster.nodes[from].netns().exec("wg show all dump").unwrap())
        });
    }
    assert_all_reach_all(&containers);
    let netns = cluster.nodes[0].netns();
    let endpoints = netns.exec(&format!("wg show {device_v6} endpoints")).unwrap();
    assert_eq!(endpoints.contains("[fd77::"), endpoint_v6, "{endpoints}");
    let routes = netns.ip("-6 route show fc00::/48").unwrap();
    assert!(routes.contains(&format!("dev {device_v6} proto 76")), "{routes}");
    assert_eq!(cluster.nodes[0].subnet_env().unwrap().mtu, 1420);
}

#[test]
#[ignore = "needs a kernel with WireGuard: cargo xtask test --kernels"]
fn dual_stack_has_a_device_for_each_family() {
    dual("", "flannel-wg-v6", true);
}

#[test]
#[ignore = "needs a kernel with WireGuard: cargo xtask test --kernels"]
fn one_device_carries_both_families_over_the_addresses_of_its_mode() {
    dual(r#","Mode":"ipv6""#, DEVICE, true);
    dual(r#","Mode":"auto""#, DEVICE, false);
}
