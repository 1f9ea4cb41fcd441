//! What somebody deletes or changes comes back, and what changes under the node is followed.

use std::{net::IpAddr, time::Duration};

use loden_tests::{
    cluster::{Cluster, PREFIX},
    container::Container,
    each_family,
    family::Family,
    node::Node,
    process::wait_for,
    traffic::{hello, ping},
};

use crate::assert_bulk_is_fast;

/// How long a repair may take where the kernel tells of the damage: far more than it takes, two seconds at most unless the
/// machine is busy, and far less than the tick.
const TOLD: Duration = Duration::from_secs(10);
/// How long it may take where it does not: the tick, and the time of a pass.
const TICK: Duration = Duration::from_secs(33);

each_family!(
    damage_that_the_kernel_tells_of_is_repaired_long_before_the_tick,
    damage_that_nobody_tells_of_is_repaired_at_the_tick,
    a_peer_that_the_kernel_is_not_given_is_not_in_the_programs_maps_either,
    a_node_that_gets_another_address_keeps_its_subnet_and_is_reached_at_the_new_one,
    a_changed_mtu_of_the_uplink_is_followed,
);

fn start<F: Family>() -> (Cluster, Vec<Container>) {
    let (cluster, containers) = Cluster::start_with_containers(&F::alone(), &["--ip-masq"]).unwrap();
    ping(containers[0].netns(), F::of(&containers[1]), 5).unwrap();
    (cluster, containers)
}

/// Whether containers reach each other by the kernel's path and by the programs'.
fn assert_whole<F: Family>(cluster: &Cluster, containers: &[Container]) {
    let (a, b) = (&containers[0], &containers[1]);
    assert_eq!(hello(F::host(a), F::host(b), None).unwrap(), F::of(a).into());
    assert_bulk_is_fast(&cluster.nodes, a, b);
}

/// What `ip` and friends show of the overlay, without what counts packets or ages, and without what the kernel itself adds
/// when a device goes up, its link-local address and the routes to addresses, and never again.
fn overlay<F: Family>(node: &Node) -> String {
    let show = |line: &str| node.netns().exec(line).unwrap_or_default();
    let (flag, device) = (F::FLAG, F::DEVICE);
    [
        show(&format!("ip -o link show {device}")),
        show(&format!("ip -o {flag} address show {device}")),
        show(&format!("ip {flag} route show dev {device}")),
        show(&format!("ip {flag} neigh show dev {device}")),
        show(&format!("bridge fdb show dev {device}")),
        show(&format!("nft list table {} loden", F::NFT)),
        show(&format!("{} -S FORWARD", F::IPTABLES)),
    ]
    .join("\n")
    .lines()
    .filter(|line| !line.contains("proto kernel") && !line.contains("scope link"))
    // The index of a device that was made anew is another one.
    .map(|line| line.trim_start_matches(|c: char| c.is_ascii_digit() || c == ':').trim().to_owned() + "\n")
    .collect()
}

fn damage_that_the_kernel_tells_of_is_repaired_long_before_the_tick<F: Family>() {
    let (cluster, containers) = start::<F>();
    let node = &cluster.nodes[0];
    let peer = F::subnet(&cluster.nodes[1]);
    let base = peer.network();
    let status = cluster.nodes[1].status().unwrap();
    let mac = status[F::DEVICE_IN_STATUS]["mac"].as_str().unwrap();
    let public = F::of_node(&cluster, 1);
    let (flag, device, nft, iptables) = (F::FLAG, F::DEVICE, F::NFT, F::IPTABLES);
    let whole = overlay::<F>(node);
    for damage in [
        format!("ip {flag} route flush dev {device}"),
        format!("ip route replace {peer} via {base} dev {device} onlink proto static metric 0 mtu 1290"),
        format!("ip route del {peer}"),
        format!("ip neigh del {base} dev {device}"),
        format!("ip neigh replace {base} lladdr 02:00:00:00:00:99 dev {device} nud permanent"),
        format!("bridge fdb del {mac} dev {device} dst {public} self"),
        format!("bridge fdb flush dev {device}"),
        format!("ip {flag} address flush dev {device}"),
        format!("ip link set {device} down"),
        format!("ip link set {device} address 02:00:00:00:00:77"),
        format!("ip link set {device} mtu 1300"),
        // Less than IPv6 can be with: the kernel takes it off the device, with all that it had there.
        format!("ip link set {device} mtu 1200"),
        format!("ip link del {device}"),
        format!("nft flush table {nft} loden"),
        format!("nft delete table {nft} loden"),
        format!("{iptables} -F FORWARD"),
    ] {
        node.netns().exec(&damage).unwrap_or_else(|error| panic!("{damage}: {error:#}"));
        wait_for("the repair", TOLD, || (overlay::<F>(node) == whole).then_some(())).unwrap_or_else(
            |error| {
                let now = overlay::<F>(node);
                panic!("{damage}: {error:#}; whole:\n{whole}\nnow:\n{now}\n{}", node.log())
            },
        );
    }
    wait_for("readiness", TOLD, || (node.status().ok()?["ready"] == true).then_some(())).unwrap();
    assert_whole::<F>(&cluster, &containers);
}

fn damage_that_nobody_tells_of_is_repaired_at_the_tick<F: Family>() {
    let (cluster, containers) = start::<F>();
    let node = &cluster.nodes[0];
    let pins = node.bpffs().join("v1");
    let links: Vec<_> =
        std::fs::read_dir(pins.join("links")).unwrap().map(|link| link.unwrap().path()).collect();
    assert!(links.len() >= 5, "{links:?}");
    for link in &links {
        std::fs::remove_file(link).unwrap();
    }
    let map = pins.join(format!("{}PEERS", F::MAPS)).display().to_string();
    forget_all(node, &map);
    let forwarding = if F::IS_IPV4 { "net.ipv4.ip_forward" } else { "net.ipv6.conf.all.forwarding" };
    node.netns().exec(&format!("sysctl -q -w {forwarding}=0")).unwrap();
    let is_back = || {
        let forward = node.netns().exec(&format!("sysctl -n {forwarding}")).unwrap();
        (links.iter().all(|link| link.exists()) && forward.trim() == "1").then_some(())
    };
    wait_for("links and sysctl", TICK, is_back).unwrap();
    assert_whole::<F>(&cluster, &containers);
}

/// Keys and values of those entries of a map that are not empty.
fn entries(node: &Node, map: &str) -> Vec<[Vec<String>; 2]> {
    let entries = node.netns().exec(&format!("bpftool -j map dump pinned {map}")).unwrap();
    let entries: Vec<serde_json::Value> = serde_json::from_str(&entries).unwrap();
    let bytes = |entry: &serde_json::Value, part: &str| -> Vec<String> {
        let bytes = entry[part].as_array().unwrap();
        bytes.iter().map(|byte| byte.as_str().unwrap().to_owned()).collect()
    };
    let entries = entries.iter().map(|entry| ["key", "value"].map(|part| bytes(entry, part)));
    entries.filter(|[_, value]| value.iter().any(|byte| byte != "0x00")).collect()
}

/// Makes every peer in a map one that nobody knows.
fn forget_all(node: &Node, map: &str) {
    let entries = entries(node, map);
    assert!(!entries.is_empty(), "nobody is known");
    for [key, value] in entries {
        let zeros = vec!["0"; value.len()].join(" ");
        let key = key.join(" ");
        node.netns().exec(&format!("bpftool map update pinned {map} key {key} value {zeros}")).unwrap();
    }
}

fn a_peer_that_the_kernel_is_not_given_is_not_in_the_programs_maps_either<F: Family>() {
    let cluster = Cluster::start(&F::alone(), &[]).unwrap();
    let node = &cluster.nodes[0];
    let key = |wider: u8| {
        let subnet = if F::IS_IPV4 { "10.5.252.0-24" } else { "0.0.0.0-0&fc00:0:0:fffc::-64" };
        let (start, len) = subnet.rsplit_once('-').unwrap();
        format!("{PREFIX}/subnets/{start}-{}", len.parse::<u8>().unwrap() - wider)
    };
    let put = |key: &str, host: u32| {
        let public: IpAddr = F::on_underlay(cluster.underlay(), host).into();
        let (name, data) =
            if F::IS_IPV4 { ("PublicIP", "BackendData") } else { ("PublicIPv6", "BackendV6Data") };
        let value = format!(
            r#"{{"{name}":"{public}","BackendType":"vxlan","{data}":{{"VNI":1,"VtepMAC":"0a:fe:00:00:00:{host}"}}}}"#
        );
        cluster.etcd().ctl(&["put", key, &value]).unwrap();
    };
    let map = |name: &str| {
        let pin = node.bpffs().join("v1").join(format!("{}{name}", F::MAPS));
        entries(node, &pin.display().to_string())
    };
    let settles = |refused: usize, slots: usize, vteps: usize| {
        let is = || {
            let told = node.status().unwrap()["refused"].as_array().unwrap().len();
            let known = map("VTEPS").len();
            // Of IPv6 it has a slot for each of 65 536, which takes seconds to read.
            let held = if (told, known) == (refused, vteps) { map("PEERS").len() } else { 0 };
            (told, held, known)
        };
        wait_for("the maps", TOLD, || (is() == (refused, slots, vteps)).then_some(())).unwrap_or_else(
            |error| panic!("{error:#}: wanted {:?}, there is {:?}", (refused, slots, vteps), is()),
        );
    };
    settles(0, 1, 1);
    put(&key(0), 31);
    settles(0, 2, 2);
    // Of two subnets with one base the wider is served.
    put(&key(1), 32);
    settles(1, 3, 2);
    let mac = ["0x0a", "0xfe", "0x00", "0x00", "0x00", "0x32"];
    let of_the_wider = map("PEERS").iter().filter(|[_, value]| value.windows(6).any(|it| it == mac)).count();
    assert_eq!(of_the_wider, 2);
    cluster.etcd().ctl(&["del", &key(1)]).unwrap();
    settles(0, 2, 2);
}

fn a_node_that_gets_another_address_keeps_its_subnet_and_is_reached_at_the_new_one<F: Family>() {
    let (cluster, containers) = start::<F>();
    let (node, flag) = (&cluster.nodes[0], F::FLAG);
    let subnet = F::subnet(node);
    let new: IpAddr = F::on_underlay(cluster.underlay(), 99).into();
    let (old, length) = (F::of_node(&cluster, 0), if F::IS_IPV4 { 24 } else { 64 });
    node.netns().ip(&format!("address del {old}/{length} dev eth0")).unwrap();
    let nodad = if F::IS_IPV4 { "" } else { "nodad" };
    node.netns().ip(&format!("address add {new}/{length} dev eth0 {nodad}")).unwrap();
    node.netns().ip(&format!("{flag} route replace default dev eth0")).unwrap();
    wait_for("the lease at the new address", Duration::from_secs(10), || {
        let leases = cluster.leases().ok()?;
        leases
            .iter()
            .any(|(key, value)| {
                key.contains(&subnet.network().to_string()) && value.contains(&format!("\"{new}\""))
            })
            .then_some(())
    })
    .unwrap();
    wait_for("readiness", Duration::from_secs(10), || (node.status().ok()?["ready"] == true).then_some(()))
        .unwrap();
    assert_eq!(F::subnet(node), subnet);
    wait_for("the peer to know", Duration::from_secs(5), || {
        let peers = cluster.nodes[1].status().ok()?["peers"].to_string();
        peers.contains(&format!("\"{new}\"")).then_some(())
    })
    .unwrap();
    wait_for("the peer's kernel to know", Duration::from_secs(5), || {
        let fdb = cluster.nodes[1].netns().exec(&format!("bridge fdb show dev {}", F::DEVICE)).ok()?;
        fdb.contains(&format!("dst {new} ")).then_some(())
    })
    .unwrap();
    assert_whole::<F>(&cluster, &containers);
}

fn a_changed_mtu_of_the_uplink_is_followed<F: Family>() {
    let (cluster, containers) = start::<F>();
    let node = &cluster.nodes[0];
    let mtu = 1400 - F::ENCAP_LEN as u32;
    node.netns().ip("link set eth0 mtu 1400").unwrap();
    wait_for("the pods' new MTU", TOLD, || (node.subnet_env().ok()?.mtu == mtu).then_some(())).unwrap();
    let link = node.netns().ip(&format!("link show {}", F::DEVICE)).unwrap();
    assert!(link.contains(&format!("mtu {mtu} ")), "{link}");
    hello(F::host(&containers[0]), F::host(&containers[1]), None).unwrap();
}
