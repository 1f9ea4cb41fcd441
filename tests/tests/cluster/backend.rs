//! Another backend, or another VNI, in the network config: agents that are started again keep their subnets, the containers
//! go on, and nothing of the earlier device is left.

use std::{net::IpAddr, time::Duration};

use ipnet::IpNet;
use loden_tests::{
    cluster::{Cluster, PREFIX, Plan},
    each_plan,
    node::Node,
    process::wait_for,
};

use crate::{assert_all_reach_all, wait_for_all_to_answer};

const LIMIT: Duration = Duration::from_secs(10);
const VXLAN: &str = r#""Type":"vxlan""#;
const VNI_2: &str = r#""Type":"vxlan","VNI":2"#;
const HOST_GW: &str = r#""Type":"host-gw""#;
/// A device of a flannel that runs beside, for a network of its own.
const FLANNELS: &str = "flannel.7";

each_plan!(a_backend_or_vni_that_changes_costs_no_subnet_and_leaves_no_device);

fn a_backend_or_vni_that_changes_costs_no_subnet_and_leaves_no_device(plan: &Plan) {
    let (mut cluster, containers) = Cluster::start_with_containers(plan, &[]).unwrap();
    let subnets = |cluster: &Cluster| -> Vec<Vec<IpNet>> {
        cluster.nodes.iter().map(|node| node.subnet_env().unwrap().subnets()).collect()
    };
    let before = subnets(&cluster);
    let vtep = format!("link add {FLANNELS} type vxlan id 7 dev eth0 dstport 8472 nolearning");
    cluster.nodes[0].netns().ip(&vtep).unwrap();
    cluster.nodes[0].netns().ip(&format!("address add 10.99.3.0/32 dev {FLANNELS}")).unwrap();
    wire_a_pod_without_a_bridge(&cluster.nodes[0], &before[0]);
    for (backend, vni) in
        [(HOST_GW, None), (VXLAN, Some(1)), (VNI_2, Some(2)), (HOST_GW, None), (VNI_2, Some(2))]
    {
        let config = plan.config.replace(VXLAN, backend);
        cluster.etcd().ctl(&["put", &format!("{PREFIX}/config"), &config]).unwrap();
        for node in &mut cluster.nodes {
            assert!(node.stop_agent().unwrap().success());
            node.start_agent(&[]).unwrap();
        }
        assert_eq!(subnets(&cluster), before, "{backend}\n{}", cluster.nodes[0].log());
        assert_eq!(cluster.leases().unwrap().len(), 2, "{backend}");
        let wanted = |family: &str| vni.map(|vni| format!("flannel{family}.{vni}"));
        let (v4, v6) = (wanted("").filter(|_| plan.ipv4), wanted("-v6").filter(|_| plan.underlay6.is_some()));
        for (n, node) in cluster.nodes.iter().enumerate() {
            let beside = (n == 0).then(|| FLANNELS.to_owned());
            let mut wanted: Vec<_> = v4.iter().chain(&v6).cloned().chain(beside).collect();
            wanted.sort();
            wait_for("the devices of this network and no others", LIMIT, || {
                (overlay_devices(node) == wanted).then_some(())
            })
            .unwrap_or_else(|error| {
                panic!("{backend}: {error:#}: {:?}\n{}", overlay_devices(node), node.log())
            });
        }
        cluster.wait_for_routes().unwrap();
        wait_for_all_to_answer(&containers);
        assert_all_reach_all(&containers);
    }
    let node = &mut cluster.nodes[0];
    node.stop_agent().unwrap();
    let file = node.subnet_file().display().to_string();
    node.loden(&["cleanup", "--subnet-file", &file]).unwrap();
    assert_eq!(overlay_devices(node), [FLANNELS], "what nobody here has made stays");
}

/// As the CNI plugin `ptp` does: the gateway's address on the host's end, and a route to the pod.
fn wire_a_pod_without_a_bridge(node: &Node, subnets: &[IpNet]) {
    let ip = |line: String| node.netns().ip(&line).unwrap();
    ip("link add ptp0 type veth peer name ptp1".into());
    ip("link set ptp0 up".into());
    ip("link set ptp1 up".into());
    for subnet in subnets {
        let (flag, length) = if subnet.addr().is_ipv4() { ("-4", 32) } else { ("-6", 128) };
        let host = |host: u8| match subnet.network() {
            IpAddr::V4(base) => IpAddr::from((u32::from(base) + u32::from(host)).to_be_bytes()),
            IpAddr::V6(base) => IpAddr::from((u128::from(base) + u128::from(host)).to_be_bytes()),
        };
        ip(format!("{flag} address add {}/{length} dev ptp0", host(1)));
        ip(format!("{flag} route add {}/{length} dev ptp0", host(200)));
    }
}

/// Names of the links that flannel or an agent may have made, in order.
fn overlay_devices(node: &Node) -> Vec<String> {
    let links = node.netns().ip("-o link").unwrap();
    let names = links.lines().filter_map(|line| line.split([':', '@']).nth(1));
    let mut names: Vec<_> =
        names.map(str::trim).filter(|name| name.starts_with("flannel")).map(str::to_owned).collect();
    names.sort();
    names
}
