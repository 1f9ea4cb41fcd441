//! Faults around the overlay: ways, bridges, devices, permissions.

use std::{fs, path::Path, time::Duration};

use loden_tests::{
    cluster::{Cluster, PREFIX, Plan},
    node,
};

use crate::ward::{Report, Ward, assert_found};

/// Within this an agent has noticed and repaired: its tick of 30 seconds, and what a busy machine adds.
const HEALED: Duration = Duration::from_secs(45);

/// `loden doctor` through another program, such as one that takes permissions away.
fn examine_through(ward: &Ward, wrapper: &[&str]) -> Report {
    let patient = ward.patient();
    let mut command = patient.netns().command(wrapper[0]);
    command.args(&wrapper[1..]).arg(node::binary().unwrap()).args(["doctor", "--json", "--timeout-ms=300"]);
    command.arg("--run-dir").arg(patient.run_directory()).arg("--bpffs-dir").arg(patient.bpffs());
    Report::read(&command.output().unwrap())
}

fn evidence(report: &Report, check: &str) -> String {
    report.find(check)["evidence"].as_str().unwrap().to_owned()
}

/// On a ward whose patient has an agent, which leaves these as they are.
pub(crate) fn that_a_running_agent_bears(ward: &Ward) {
    let far = ward.cluster.nodes[1].netns();
    let silent = "nft add table ip fw; add chain ip fw in { type filter hook input priority 0 ; }; \
                  add rule ip fw in iifname flannel.1 meta l4proto { tcp , udp } drop";
    far.exec(silent).unwrap();
    let report = Report::of(ward.patient());
    assert_eq!(report.wrong().into_iter().collect::<Vec<_>>(), ["offload"], "{:#?}", report.all);
    assert_eq!(report.find("offload")["outcome"], "unknown");
    assert_eq!(report.status, 2, "nothing is wrong, and something could not be checked");
    far.exec("nft delete table ip fw").unwrap();

    let report = examine_through(ward, &["env", "PATH=/nonexistent"]);
    assert_eq!(report.wrong().into_iter().collect::<Vec<_>>(), ["br-netfilter"], "{:#?}", report.all);
    assert_eq!((&report.find("br-netfilter")["outcome"], report.status), (&"unknown".into(), 2));

    let powerless = ["setpriv", "--inh-caps=-all", "--bounding-set=-sys_admin,-bpf,-perfmon"];
    let report = examine_through(ward, &powerless);
    assert!(evidence(&report, "kernel").contains("do not load"), "{:#?}", report.all);
    assert_eq!(report.status, 1);

    // A peer whose subnet holds an address of this host.
    ward.run("ip address add 10.5.77.1/32 dev lo");
    let key = format!("{PREFIX}/subnets/10.5.77.0-24");
    let value = r#"{"PublicIP":"192.168.64.77","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0a:fe:00:00:00:77"}}"#;
    ward.cluster.etcd().ctl(&["put", &key, value]).unwrap();
    let report = ward
        .wait_for_report("the peer to be refused", HEALED, |report| report.wrong().contains("refused-peer"));
    assert!(evidence(&report, "refused-peer").contains("10.5.77.0/24"), "{:#?}", report.all);
    ward.cluster.etcd().ctl(&["del", &key]).unwrap();
    ward.run("ip address del 10.5.77.1/32 dev lo");
    ward.wait_for_report("the peer to be forgotten", HEALED, |report| report.status == 0);

    ward.run("ip link add cni0 type bridge");
    ward.run("ip link set cni0 up");
    let report = ward.assert_found("ip address add 10.88.0.1/16 dev cni0", "ip link del cni0", &["bridge"]);
    assert!(evidence(&report, "bridge").contains("cni0 has 10.88.0.1, outside of"), "{:#?}", report.all);

    // An agent that cannot keep its promises says so; an address that comes or goes lets it try.
    let file = ward.patient().subnet_file();
    let text = fs::read(&file).unwrap();
    let poke = || {
        ward.run("ip address add 192.0.2.1/32 dev lo");
        ward.run("ip address del 192.0.2.1/32 dev lo");
    };
    let replace = |by: &dyn Fn(&Path)| {
        by(&file);
        poke();
    };
    replace(&|file| {
        fs::remove_file(file).unwrap();
        fs::create_dir_all(file.join("taken")).unwrap();
    });
    let report =
        ward.wait_for_report("the agent not to be ready", HEALED, |report| report.wrong().contains("agent"));
    assert!(evidence(&report, "agent").contains("not ready: "), "{:#?}", report.all);
    replace(&|file| {
        fs::remove_dir_all(file).unwrap();
        fs::write(file, &text).unwrap();
    });
    ward.wait_for_report("the agent to be ready", HEALED, |report| report.status == 0);
}

/// On a ward whose patient has no agent.
pub(crate) fn that_nobody_mends(ward: &Ward) {
    let vtep = ward.cluster.nodes[1].address();
    let closed = format!("unreachable {vtep}/32");
    let report = ward.assert_found(
        &format!("ip route add {closed}"),
        &format!("ip route del {closed}"),
        &["agent", "underlay"],
    );
    assert!(evidence(&report, "underlay").contains("No route to host"), "{:#?}", report.all);

    ward.run("ip link add stray type veth peer name astray");
    ward.run("ip link set stray up");
    ward.run("ip link set astray up");
    ward.run("sysctl -qw net/ipv4/conf/eth0/rp_filter=1");
    let report = ward.assert_found(
        &format!("ip route add {vtep}/32 dev stray"),
        "ip link del stray",
        &["agent", "rp-filter", "underlay"],
    );
    assert!(evidence(&report, "rp-filter").contains("is another interface"), "{:#?}", report.all);
    assert!(evidence(&report, "underlay").contains("does not answer"), "{:#?}", report.all);
    ward.run("sysctl -qw net/ipv4/conf/eth0/rp_filter=0");

    let report = ward.assert_found(
        "ip link set docker0 mtu 1500",
        "ip link set docker0 mtu 1450",
        &["agent", "bridge"],
    );
    assert_eq!(report.find("bridge")["outcome"], "warning");
}

#[test]
fn an_uplink_that_aggregates_nothing_is_found() {
    let mut cluster = Cluster::create(&Plan { nodes: 1, ..Plan::default() }).unwrap();
    let node = &mut cluster.nodes[0];
    // A veth hands over what its other end has aggregated; a device that is none does it itself.
    node.netns().exec("ethtool -K eth0 gro on").unwrap();
    node.netns().ip("link add link eth0 name nic0 type macvlan mode bridge").unwrap();
    let address = node.address();
    node.netns().ip(&format!("address del {address}/24 dev eth0")).unwrap();
    node.netns().ip(&format!("address add {address}/24 dev nic0")).unwrap();
    node.netns().ip("link set nic0 up").unwrap();
    node.start_agent(&["--iface=nic0"]).unwrap();
    let node = &cluster.nodes[0];
    assert_found("a device that aggregates", node, &[]);
    // It is as the device below it is.
    node.netns().exec("ethtool -K eth0 gro off").unwrap();
    let report = assert_found("one that does not", node, &["gro"]);
    assert_eq!(report.find("gro")["outcome"], "warning");
}
