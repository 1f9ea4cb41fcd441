//! `loden doctor` where there is IPv6: its device and entries, and what a host may have against it, beside IPv4 and alone.

use std::time::Duration;

use loden_tests::cluster::Plan;

use crate::{
    overlay::{self, Overlay},
    ward::{Ward, assert_found},
};

/// How long an agent may take to mend a node, or to say that it has.
const LIMIT: Duration = Duration::from_secs(40);

#[test]
fn faults_of_ipv6_beside_ipv4_are_found_by_name() {
    faults(&Plan::dual());
}

#[test]
fn faults_of_a_network_without_ipv4_are_found_by_name() {
    faults(&Plan::ipv6_only());
}

fn faults(plan: &Plan) {
    let mut ward = Ward::of_ipv6(plan);
    let healthy = assert_found("a healthy cluster", ward.patient(), &[]);
    let families = if plan.ipv4 { 2 } else { 1 };
    for check in ["underlay", "overlay", "offload", "device", "route", "neighbour", "fdb"] {
        let all: Vec<_> = healthy.all.iter().filter(|finding| finding["check"] == check).collect();
        assert_eq!(all.len(), families, "each family is looked at once: {check} {all:#?}");
    }
    beside_an_agent(&ward);
    ward.cluster.nodes[0].kill_agent();
    assert_found("no agent", ward.patient(), &["agent"]);
    overlay::faults(&ward, &Overlay::of_ipv6(&ward));
    of_sysctls(&ward);
    of_the_device(&ward);
    ward.cluster.nodes[0].start_agent(&[]).unwrap();
    ward.wait_for_report("all to be well again", LIMIT, |report| report.status == 0);
    // Nor is the kernel's own way as good as the programs', whichever family they would be of.
    ward.cluster.nodes[0].stop_agent().unwrap();
    ward.cluster.nodes[0].start_agent(&["--datapath=kernel"]).unwrap();
    ward.wait_for_report("nothing against a kernel that was asked for", LIMIT, |report| report.status == 0);
}

/// What an agent leaves as it is.
fn beside_an_agent(ward: &Ward) {
    let drop_vxlan = "nft add table ip6 fw; add chain ip6 fw in { type filter hook input priority 0 ; }; add rule ip6 fw in udp dport 8472 drop";
    let report = ward.assert_found(drop_vxlan, "nft delete table ip6 fw", &["vxlan"]);
    let evidence = report.find("vxlan")["evidence"].as_str().unwrap();
    assert!(evidence.contains("udp dport 8472 drop"), "{evidence}");
    assert!(report.find("vxlan")["subject"].as_str().unwrap().contains("fd77:"), "{:#?}", report.all);

    ward.assert_found(
        "ip route add fc00:0:0:f000::/52 dev eth0",
        "ip route del fc00:0:0:f000::/52 dev eth0",
        &["overlapping-route"],
    );

    let services = "nft add table ip6 nat; add chain ip6 nat KUBE-SERVICES";
    ward.run(services);
    let bridged = "sysctl -qw net.bridge.bridge-nf-call-ip6tables";
    let report = ward.assert_found(&format!("{bridged}=0"), &format!("{bridged}=1"), &["br-netfilter"]);
    assert_eq!(report.find("br-netfilter")["subject"], "IPv6");
    ward.run("nft delete table ip6 nat");

    // firewalld's, by default.
    let strict = "nft add table inet firewalld; add chain inet firewalld pre { type filter hook prerouting priority -140 ; }; \
                  add rule inet firewalld pre meta nfproto ipv6 fib saddr . mark . iif oif missing drop";
    let report = ward.assert_found(strict, "nft delete table inet firewalld", &["rp-filter"]);
    assert_eq!(report.find("rp-filter")["subject"], "IPv6");

    let underlay = ward.cluster.underlay().netns();
    underlay.ip("link set port12 mtu 1400").unwrap();
    let report = assert_found("a small link on the way", ward.patient(), &["underlay-mtu"]);
    assert!(report.find("underlay-mtu")["remedy"].as_str().unwrap().contains("140"), "{:#?}", report.all);
    underlay.ip("link set port12 mtu 1500").unwrap();
}

/// Nobody mends them while no agent runs.
fn of_sysctls(ward: &Ward) {
    let forward = "sysctl -qw net.ipv6.conf.all.forwarding";
    // It sets every interface, too, and with it how each listens to routers: eth0 is as the agent has left it.
    let report =
        ward.assert_found(&format!("{forward}=0"), &format!("{forward}=1"), &["agent", "ip-forward"]);
    assert_eq!(report.find("ip-forward")["subject"], "IPv6");

    ward.run("ip route add default via fd77::1 dev eth0 proto ra metric 512");
    ward.assert_found(
        "sysctl -qw net/ipv6/conf/eth0/accept_ra=1",
        "sysctl -qw net/ipv6/conf/eth0/accept_ra=2",
        &["accept-ra", "agent"],
    );
    ward.run("ip route del default via fd77::1 dev eth0 proto ra metric 512");
    let report = ward.assert_found(
        "sysctl -qw net/ipv6/conf/flannel-v6.1/accept_ra=2",
        "sysctl -qw net/ipv6/conf/flannel-v6.1/accept_ra=0",
        &["accept-ra", "agent"],
    );
    assert_eq!(report.find("accept-ra")["outcome"], "warning");
}

/// Last: with IPv6 its entries go, and only an agent brings them back.
fn of_the_device(ward: &Ward) {
    ward.run("sysctl -qw net/ipv6/conf/flannel-v6.1/disable_ipv6=1");
    let off = assert_found(
        "a device without IPv6",
        ward.patient(),
        &["agent", "device", "disable-ipv6", "neighbour", "route", "vxlan"],
    );
    assert_eq!(off.find("disable-ipv6")["outcome"], "fault");
    ward.run("sysctl -qw net/ipv6/conf/flannel-v6.1/disable_ipv6=0");
    ward.run("ip link del flannel-v6.1");
    let gone = assert_found("no device", ward.patient(), &["agent", "device", "route", "vxlan"]);
    assert_eq!(gone.find("device")["evidence"], "there is no flannel-v6.1", "{:#?}", gone.all);
    assert_eq!(gone.find("device")["subject"], "IPv6");
}
