//! `loden doctor`: nothing to say of a healthy cluster, and each fault, made in a real one, found by its name.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::TcpListener,
    path::PathBuf,
    thread,
    time::Duration,
};

use loden_tests::{
    cluster::{Cluster, PREFIX, Plan},
    flannel::FlannelNode,
    netns::Netns,
    node::Node,
    process::wait_for,
    traffic::ping,
};
use serde_json::Value;

/// What a report says, but for what is well.
struct Report {
    status: i32,
    all: Vec<Value>,
}

impl Report {
    fn of(node: &Node) -> Self {
        let output = node.loden_output(&["doctor", "--json", "--timeout-ms=300"]).unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let all = serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("{error}: {text}{}", String::from_utf8_lossy(&output.stderr)));
        Self { status: output.status.code().unwrap(), all }
    }

    fn wrong(&self) -> BTreeSet<&str> {
        let wrong = self.all.iter().filter(|finding| finding["outcome"] != "ok");
        wrong.map(|finding| finding["check"].as_str().unwrap()).collect()
    }

    fn find(&self, check: &str) -> &Value {
        self.all.iter().find(|finding| finding["check"] == check && finding["outcome"] != "ok").unwrap()
    }
}

/// Looks, and wants these findings and no others.
fn assert_found(what: &str, node: &Node, expected: &[&str]) -> Report {
    let report = Report::of(node);
    let wrong: BTreeSet<&str> = report.wrong();
    assert_eq!(wrong, expected.iter().copied().collect(), "{what}: {:#?}", report.all);
    assert_eq!(report.status, i32::from(!expected.is_empty()), "{what}");
    report
}

/// Two Loden nodes with a container each, and a flannel node.
struct Ward {
    cluster: Cluster,
    flannel: FlannelNode,
    _containers: Vec<loden_tests::container::Container>,
}

impl Ward {
    fn open() -> Self {
        let mut cluster = Cluster::start(&Plan { nodes: 2, ..Plan::default() }, &[]).unwrap();
        let netns = Netns::create("flannel").unwrap();
        let address = cluster.underlay().plug(&netns, 31).unwrap();
        let flannel =
            FlannelNode::create(netns, address, "10.5.231.0/24".parse().unwrap(), cluster.etcd()).unwrap();
        for node in &cluster.nodes {
            let status = node.status().unwrap();
            let mac = status["device"]["mac"].as_str().unwrap();
            flannel.add_peer(node.subnet_env().unwrap().subnet, node.address(), mac, false).unwrap();
            wait_for("the route to the flannel node", Duration::from_secs(10), || {
                node.has_route(flannel.subnet()).unwrap().then_some(())
            })
            .unwrap();
        }
        let containers = cluster.run_containers(1).unwrap();
        ping(containers[0].netns(), containers[1].address(), 3).unwrap();
        // The patient is examined more often than a host would bear: it answers one closed port a second.
        for netns in [cluster.nodes[1].netns(), flannel.netns()] {
            netns.exec("sysctl -qw net.ipv4.icmp_ratelimit=0").unwrap();
        }
        let node = &cluster.nodes[0];
        wait_for("both peers in what an agent leaves behind", Duration::from_secs(10), || {
            let text = fs::read_to_string(node.run_directory().join("facts.json")).ok()?;
            let facts: Value = serde_json::from_str(&text).ok()?;
            (facts["v4"]["overlay"]["peers"].as_object()?.len() == 2).then_some(())
        })
        .unwrap();
        wait_for("the programs at the container's veth", Duration::from_secs(10), || {
            let hooks: Vec<String> = links(node).iter().map(|path| path.display().to_string()).collect();
            hooks.iter().any(|path| path.contains("to_pod")).then_some(())
        })
        .unwrap();
        Self { cluster, flannel, _containers: containers }
    }

    fn patient(&self) -> &Node {
        &self.cluster.nodes[0]
    }

    fn run(&self, line: &str) -> String {
        self.patient().netns().exec(line).unwrap()
    }

    /// A fault that one command line makes and another one takes back.
    fn assert_found(&self, make: &str, undo: &str, expected: &[&str]) -> Report {
        self.run(make);
        let report = assert_found(make, self.patient(), expected);
        self.run(undo);
        report
    }
}

fn links(node: &Node) -> Vec<PathBuf> {
    let entries = fs::read_dir(node.bpffs().join("v1/links")).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn faults_beside_a_running_agent_are_found_by_name() {
    let mut ward = Ward::open();
    let healthy = assert_found("a healthy cluster", ward.patient(), &[]);
    for check in ["underlay", "overlay", "offload"] {
        let peers = healthy.all.iter().filter(|finding| finding["check"] == check).count();
        assert_eq!(peers, 2, "each peer is asked, the flannel node too: {check} {:#?}", healthy.all);
    }

    // At the far end, and here: rules that drop the tunnel.
    let drop_vxlan = "nft add table ip fw; add chain ip fw in { type filter hook input priority 0 ; }; add rule ip fw in udp dport 8472 drop";
    let far = ward.cluster.nodes[1].netns();
    far.exec(drop_vxlan).unwrap();
    let report = assert_found("VXLAN dropped at the far end", ward.patient(), &["vxlan"]);
    assert_eq!(report.all.iter().filter(|finding| finding["check"] == "vxlan").count(), 1, "only that peer");
    assert!(
        report.find("vxlan")["subject"]
            .as_str()
            .unwrap()
            .contains(&ward.cluster.nodes[1].address().to_string())
    );
    far.exec("nft delete table ip fw").unwrap();
    let report = ward.assert_found(drop_vxlan, "nft delete table ip fw", &["vxlan"]);
    assert!(
        report.find("vxlan")["evidence"].as_str().unwrap().contains("udp dport 8472 drop"),
        "{:#?}",
        report.all
    );

    // A link in between that carries less.
    let underlay = ward.cluster.underlay().netns();
    underlay.ip("link set port12 mtu 1400").unwrap();
    let report = assert_found("a small link on the way", ward.patient(), &["underlay-mtu"]);
    let evidence = report.find("underlay-mtu")["evidence"].as_str().unwrap();
    let size: u16 = evidence.split(' ').next().unwrap().parse().unwrap();
    // A bridge lets the length of a VLAN tag more pass.
    assert!((1400..=1404).contains(&size), "{evidence}");
    underlay.ip("link set port12 mtu 1500").unwrap();

    ward.assert_found(
        "sysctl -qw net/ipv4/conf/flannel.1/rp_filter=1",
        "sysctl -qw net/ipv4/conf/flannel.1/rp_filter=0",
        &["rp-filter"],
    );
    ward.assert_found(
        "ip route add 10.5.128.0/17 dev eth0",
        "ip route del 10.5.128.0/17 dev eth0",
        &["overlapping-route"],
    );
    ward.run("iptables -t nat -N KUBE-SERVICES");
    ward.assert_found(
        "sysctl -qw net.bridge.bridge-nf-call-iptables=0",
        "sysctl -qw net.bridge.bridge-nf-call-iptables=1",
        &["br-netfilter"],
    );
    ward.run("iptables -t nat -X KUBE-SERVICES");

    // A device that gets checksums wrong: they are computed by software here, after this rule has spoilt them.
    ward.run("ethtool -K eth0 tx off");
    let spoil = "nft add table ip nic; add chain ip nic out { type filter hook postrouting priority 300 ; }; \
                 add rule ip nic out udp dport 8472 @th,312,8 17 @th,448,16 != 0 @th,448,16 set 0xdead";
    ward.assert_found(spoil, "nft delete table ip nic", &["checksum"]);
    ward.run("ethtool -K eth0 tx on");
    // One that loses what it should cut.
    let lose = "nft add table ip nic; add chain ip nic out { type filter hook postrouting priority 300 ; }; \
                add rule ip nic out udp dport 8472 meta length > 2000 drop";
    ward.assert_found(lose, "nft delete table ip nic", &["segmentation"]);

    // A second subnet for the address of a node.
    let clone = format!("{PREFIX}/subnets/10.5.250.0-24");
    let value = format!(
        r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"0a:fe:00:00:00:99"}}}}"#,
        ward.flannel.address()
    );
    ward.cluster.etcd().ctl(&["put", &clone, &value]).unwrap();
    let routed = || ward.patient().has_route("10.5.250.0/24".parse::<ipnet::Ipv4Net>().unwrap()).unwrap();
    wait_for("the clone's route", Duration::from_secs(10), || routed().then_some(())).unwrap();
    let report = assert_found("two subnets of one address", ward.patient(), &["public-ip", "vxlan"]);
    assert!(
        report.find("public-ip")["evidence"].as_str().unwrap().contains(&ward.flannel.address().to_string())
    );
    ward.cluster.etcd().ctl(&["del", &clone]).unwrap();
    wait_for("the clone to go", Duration::from_secs(10), || (!routed()).then_some(())).unwrap();

    // Last, since containers lose their gateway.
    let gateway = ward.patient().subnet_env().unwrap().subnet;
    ward.run(&format!("ip address del {gateway} dev docker0"));
    ward.assert_found(
        "ip address add 172.17.0.1/16 dev docker0",
        "ip address del 172.17.0.1/16 dev docker0",
        &["bridge"],
    );
    ward.run(&format!("ip address add {gateway} dev docker0"));

    ward.cluster.etcd_mut().kill();
    let report = assert_found("etcd away", ward.patient(), &["etcd", "lease"]);
    assert_eq!(report.find("lease")["outcome"], "unknown");
}

#[test]
fn faults_of_a_node_without_an_agent_are_found_by_name_and_gone_when_it_is_back() {
    let mut ward = Ward::open();
    ward.cluster.nodes[0].kill_agent();
    assert_found("no agent", ward.patient(), &["agent"]);

    let far = &ward.cluster.nodes[1];
    let (subnet, mac) =
        (far.subnet_env().unwrap().subnet.trunc(), far.status().unwrap()["device"]["mac"].clone());
    let (base, mac, vtep) = (subnet.network(), mac.as_str().unwrap(), far.address());
    ward.assert_found(
        &format!("bridge fdb replace {mac} dev flannel.1 dst 192.168.64.99 self permanent"),
        &format!("bridge fdb replace {mac} dev flannel.1 dst {vtep} self permanent"),
        &["agent", "fdb", "vxlan"],
    );
    ward.assert_found(
        &format!("ip neigh replace {base} lladdr 02:00:00:00:00:99 dev flannel.1 nud permanent"),
        &format!("ip neigh replace {base} lladdr {mac} dev flannel.1 nud permanent"),
        &["agent", "neighbour", "vxlan"],
    );
    ward.assert_found(
        &format!("ip route del {subnet}"),
        &format!("ip route add {subnet} via {base} dev flannel.1 onlink proto 76"),
        &["agent", "route", "vxlan"],
    );
    ward.assert_found(
        "ip link set flannel.1 mtu 1400",
        "ip link set flannel.1 mtu 1450",
        &["agent", "device", "overlay-mtu"],
    );
    let liberal = "sysctl -qw net.netfilter.nf_conntrack_tcp_be_liberal";
    ward.assert_found(&format!("{liberal}=0"), &format!("{liberal}=1"), &["agent", "be-liberal"]);
    let forward = "sysctl -qw net.ipv4.ip_forward";
    ward.assert_found(&format!("{forward}=0"), &format!("{forward}=1"), &["agent", "ip-forward"]);

    let pins = ward.patient().bpffs().join("v1");
    let (flows, away) = (pins.join("FLOWS"), pins.join("AWAY"));
    fs::rename(&flows, &away).unwrap();
    let report = assert_found("a map without its pin", ward.patient(), &["agent", "pins"]);
    assert!(report.find("pins")["evidence"].as_str().unwrap().contains("FLOWS"));
    fs::rename(&away, &flows).unwrap();

    let facts = ward.patient().run_directory().join("facts.json");
    let (before, mut changed): (String, Value) = {
        let text = fs::read_to_string(&facts).unwrap();
        (text.clone(), serde_json::from_str(&text).unwrap())
    };
    // An endpoint that is healthy and lives in the past.
    let listener = ward.patient().netns().run(|| TcpListener::bind("127.0.0.1:0").unwrap());
    changed["etcd"]["endpoints"] = serde_json::json!([format!("http://{}", listener.local_addr().unwrap())]);
    fs::write(&facts, changed.to_string()).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 1024]).unwrap();
            stream
                .write_all(
                    b"HTTP/1.0 200 OK\r\nDate: Mon, 01 Jan 2024 00:00:00 GMT\r\n\r\n{\"health\":\"true\"}",
                )
                .unwrap();
            // Whoever comes for the leases is refused from here on.
            drop((stream, listener));
        });
        let report =
            assert_found("a clock that is years ahead", ward.patient(), &["agent", "clock", "lease"]);
        assert!(report.find("clock")["evidence"].as_str().unwrap().contains("ahead of"));
    });
    fs::write(&facts, before).unwrap();

    let from_pod =
        links(ward.patient()).into_iter().find(|path| path.display().to_string().contains("from_pod"));
    fs::remove_file(from_pod.unwrap()).unwrap();
    let report = assert_found("a detached program", ward.patient(), &["agent", "programs"]);
    assert!(
        report.find("programs")["evidence"].as_str().unwrap().contains("from_pod at veth1"),
        "{:#?}",
        report.all
    );

    ward.cluster.nodes[0].start_agent(&[]).unwrap();
    wait_for("all to be well again", Duration::from_secs(10), || {
        (Report::of(ward.patient()).status == 0).then_some(())
    })
    .unwrap();
}

#[test]
fn where_no_agent_has_ever_run_it_says_so_and_ends_with_2() {
    let cluster = Cluster::create(&Plan { nodes: 1, ..Plan::default() }).unwrap();
    let output = cluster.nodes[0].loden_output(&["doctor"]).unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("no agent answers") && error.contains("facts.json"), "{error}");
}
