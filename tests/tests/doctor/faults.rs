//! `loden doctor`: nothing to say of a healthy cluster, and each fault, made in a real one, found by its name.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpListener,
    thread,
    time::Duration,
};

use loden_tests::{
    cluster::{Cluster, PREFIX, Plan},
    process::wait_for,
};
use serde_json::Value;

use crate::{
    overlay::{self, Overlay},
    records, surroundings,
    ward::{Report, Ward, assert_found, links},
};

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

    // As Docker 28 keeps other hosts from a container.
    let pod = ward.patient().subnet_env().unwrap().subnet().hosts().nth(9).unwrap();
    ward.assert_found(
        &format!("iptables -t raw -A PREROUTING -d {pod} ! -i docker0 -j DROP"),
        &format!("iptables -t raw -D PREROUTING -d {pod} ! -i docker0 -j DROP"),
        &["direct-access"],
    );

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
        ward.flannel().halves()[0].address
    );
    ward.cluster.etcd().ctl(&["put", &clone, &value]).unwrap();
    let routed = || ward.patient().has_route("10.5.250.0/24".parse::<ipnet::Ipv4Net>().unwrap()).unwrap();
    wait_for("the clone's route", Duration::from_secs(10), || routed().then_some(())).unwrap();
    let report = assert_found("two subnets of one address", ward.patient(), &["public-ip", "vxlan"]);
    assert!(
        report.find("public-ip")["evidence"]
            .as_str()
            .unwrap()
            .contains(&ward.flannel().halves()[0].address.to_string())
    );
    ward.cluster.etcd().ctl(&["del", &clone]).unwrap();
    wait_for("the clone to go", Duration::from_secs(10), || (!routed()).then_some(())).unwrap();

    surroundings::that_a_running_agent_bears(&ward);

    // Last, since containers lose their gateway.
    let gateway = ward.patient().subnet_env().unwrap().subnet();
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

    overlay::faults(&ward, &Overlay::of_ipv4(&ward));
    let liberal = "sysctl -qw net.netfilter.nf_conntrack_tcp_be_liberal";
    ward.assert_found(&format!("{liberal}=0"), &format!("{liberal}=1"), &["agent", "be-liberal"]);
    let forward = "sysctl -qw net.ipv4.ip_forward";
    ward.assert_found(&format!("{forward}=0"), &format!("{forward}=1"), &["agent", "ip-forward"]);

    surroundings::that_nobody_mends(&ward);
    // Its kernel stays as it is, whatever is done to the records of others.
    ward.cluster.nodes[1].kill_agent();
    records::faults(&ward);

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
    // The kernel detaches it some time after its pin has gone.
    let report = ward.wait_for_report("the program to be gone", Duration::from_secs(20), |report| {
        report.wrong().contains("programs")
    });
    assert_eq!(report.wrong().into_iter().collect::<Vec<_>>(), ["agent", "programs"], "{:#?}", report.all);
    assert!(
        report.find("programs")["evidence"].as_str().unwrap().contains("from_pod at veth1"),
        "{:#?}",
        report.all
    );

    // The kernel forgets the neighbours with the address.
    ward.run("ip link set flannel.1 address 02:00:00:00:00:98");
    let report = Report::of(ward.patient());
    let evidence = report.find("device")["evidence"].as_str().unwrap();
    assert!(evidence.contains("its MAC is 02:00:00:00:00:98, the lease says "), "{evidence}");

    ward.run("ip link set flannel.1 down");
    let report = Report::of(ward.patient());
    assert!(report.find("device")["evidence"].as_str().unwrap().contains("it is down"));

    ward.run("ip link del flannel.1");
    let report = Report::of(ward.patient());
    assert_eq!(report.find("device")["evidence"], "there is no flannel.1", "{:#?}", report.all);
    assert_eq!(report.status, 1);
    for (kind, says) in [
        ("bridge", "it is no VXLAN device"),
        ("vxlan id 2 dstport 8473 local 192.168.64.99 dev eth0", "it has VNI 2 on port 8473"),
    ] {
        ward.run(&format!("ip link add flannel.1 type {kind}"));
        let report = Report::of(ward.patient());
        assert!(report.find("device")["evidence"].as_str().unwrap().contains(says), "{:#?}", report.all);
        ward.run("ip link del flannel.1");
    }

    for node in &mut ward.cluster.nodes {
        node.start_agent(&[]).unwrap();
    }
    wait_for("all to be well again", Duration::from_secs(45), || {
        (Report::of(ward.patient()).status == 0).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {:?}", Report::of(ward.patient()).wrong()));
}

#[test]
fn where_no_agent_has_ever_run_it_says_so_and_ends_with_2() {
    let cluster = Cluster::create(&Plan { nodes: 1, ..Plan::default() }).unwrap();
    let output = cluster.nodes[0].loden_output(&["doctor"]).unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("no agent answers") && error.contains("facts.json"), "{error}");
}
