//! Two families, one of which changes: nothing of the other does, and it loses no packet.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use loden_tests::{
    cluster::{Cluster, PREFIX, Plan},
    container::Container,
    netns::Netns,
    node::Node,
    process::wait_for,
};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(10);

/// Two nodes of both families, with a container on each.
fn start() -> (Cluster, Vec<Container>) {
    let mut cluster = Cluster::start(&Plan { nodes: 2, ..Plan::dual() }, &["--ip-masq"]).unwrap();
    let containers = cluster.run_containers(1).unwrap();
    for (node, other) in [(0, 1), (1, 0)] {
        let subnet = cluster.nodes[other].subnet_env().unwrap().subnet6.unwrap();
        let there = || cluster.nodes[node].has_route(subnet).unwrap().then_some(());
        wait_for("the peer's IPv6 route", LIMIT, there).unwrap();
    }
    for address in containers[1].addresses() {
        wait_for("the first answer", LIMIT, || reaches(&containers[0], &address.to_string()).then_some(()))
            .unwrap();
    }
    (cluster, containers)
}

fn reaches(from: &Container, to: &str) -> bool {
    from.netns().exec(&format!("ping -n -q -c 1 -W 1 {to}")).is_ok()
}

/// Echoes that go on until they are counted, fifty a second.
struct Echoes(Child);

impl Echoes {
    fn between(from: &Container, to: &str) -> Self {
        let mut command = from.netns().command("ping");
        Self(command.args(["-n", "-q", "-i", "0.02", to]).stdout(Stdio::piped()).spawn().unwrap())
    }

    /// Ends them, and says how many were sent and how many came back.
    fn count(self) -> (u32, u32) {
        let id = self.0.id().to_string();
        // Some go on when all is done, and the last one must have had the time to come back; ping counts on SIGINT.
        thread::sleep(Duration::from_millis(800));
        assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
        let output = String::from_utf8(self.0.wait_with_output().unwrap().stdout).unwrap();
        let line = output
            .lines()
            .find(|line| line.contains("packets transmitted"))
            .unwrap_or_else(|| panic!("{output}"));
        let number = |words: &str| -> u32 {
            let end = line.find(words).unwrap();
            line[..end].trim_end().rsplit([' ', ',']).next().unwrap().parse().unwrap()
        };
        (number("packets transmitted"), number("received"))
    }

    fn assert_none_lost(self) {
        let (sent, received) = self.count();
        // One may be under way when it ends.
        assert!(sent >= 20 && sent - received <= 1, "{received} of {sent} came back");
    }
}

fn interfaces(node: &Node, device: &str) -> Value {
    let text = node.netns().ip(&format!("-j -d link show dev {device}")).unwrap();
    let links: Value = serde_json::from_str(&text).unwrap();
    serde_json::json!([links[0]["ifindex"], links[0]["address"], links[0]["linkinfo"]["info_data"]["local"]])
}

#[test]
fn another_address_of_the_uplink_in_one_family_is_followed_in_that_one_alone() {
    let (cluster, containers) = start();
    let (node, other) = (&cluster.nodes[0], &cluster.nodes[1]);
    let (v4, v6) = (containers[1].address().to_string(), containers[1].address6().unwrap().to_string());
    let published = || -> Value {
        let leases = cluster.leases().unwrap();
        let subnet = node.subnet_env().unwrap().subnet().network().to_string();
        let (_, value) = leases.iter().find(|(key, _)| key.contains(&format!("/{subnet}-"))).unwrap();
        serde_json::from_str(value).unwrap()
    };
    let fdb = |device: &str| other.netns().exec(&format!("bridge fdb show dev {device}")).unwrap();

    let (device, value) = (interfaces(node, "flannel.1"), published());
    let echoes = Echoes::between(&containers[0], &v4);
    node.netns().ip("-6 address add fd77::aa/64 dev eth0 nodad").unwrap();
    node.netns().ip("-6 address delete fd77::b/64 dev eth0").unwrap();
    wait_for("the other's FDB to have the new IPv6 address", LIMIT, || {
        fdb("flannel-v6.1").contains("fd77::aa").then_some(())
    })
    .unwrap();
    wait_for("IPv6 by the new address", LIMIT, || reaches(&containers[0], &v6).then_some(())).unwrap();
    echoes.assert_none_lost();
    assert_eq!(interfaces(node, "flannel.1"), device, "IPv4's device is as it was");
    let now = published();
    assert_eq!((&now["PublicIP"], &now["BackendData"]), (&value["PublicIP"], &value["BackendData"]));
    assert_eq!((&now["PublicIPv6"], &now["BackendV6Data"]), (&"fd77::aa".into(), &value["BackendV6Data"]));

    let device = interfaces(node, "flannel-v6.1");
    let echoes = Echoes::between(&containers[0], &v6);
    node.netns().ip("address delete 192.168.64.11/24 dev eth0").unwrap();
    node.netns().ip("address add 192.168.64.170/24 dev eth0").unwrap();
    node.netns().ip("route add default via 192.168.64.1").unwrap();
    wait_for("the other's FDB to have the new IPv4 address", LIMIT, || {
        fdb("flannel.1").contains("192.168.64.170").then_some(())
    })
    .unwrap();
    wait_for("IPv4 by the new address", LIMIT, || reaches(&containers[0], &v4).then_some(())).unwrap();
    echoes.assert_none_lost();
    assert_eq!(interfaces(node, "flannel-v6.1"), device, "IPv6's device is as it was");
    assert_eq!(published()["PublicIPv6"], "fd77::aa");

    // One family without an address at all: it is told of, and the other goes on.
    let echoes = Echoes::between(&containers[0], &v4);
    node.netns().ip("-6 address delete fd77::aa/64 dev eth0").unwrap();
    wait_for("the node to say so", LIMIT, || {
        let status = node.status().unwrap();
        status["not_ready"]["datapath"].as_str().unwrap_or("").contains("no IPv6 address").then_some(())
    })
    .unwrap();
    echoes.assert_none_lost();
    node.netns().ip("-6 address add fd77::bb/64 dev eth0 nodad").unwrap();
    wait_for("IPv6 to be back", LIMIT, || reaches(&containers[0], &v6).then_some(())).unwrap();
}

#[test]
fn what_changes_of_a_peer_in_one_family_touches_nothing_of_the_other() {
    let (cluster, _containers) = start();
    let node = &cluster.nodes[0];
    let key = format!("{PREFIX}/subnets/10.5.254.0-24&fc00:0:0:fffe::-64");
    let vtep = |mac: &str| format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#);
    let put = |v4: (&str, &str), v6: (&str, &str)| {
        let value = format!(
            r#"{{"PublicIP":"{}","PublicIPv6":"{}","BackendType":"vxlan","BackendData":{},"BackendV6Data":{}}}"#,
            v4.0, v6.0, v4.1, v6.1
        );
        cluster.etcd().ctl(&["put", &key, &value]).unwrap();
    };
    let state = |device: &str, family: &str| {
        let run = |line: String| node.netns().exec(&line).unwrap();
        let routes = run(format!("ip {family} route show dev {device} proto 76"));
        let fdb = run(format!("bridge fdb show dev {device}"));
        format!("{routes}{}{fdb}", run(format!("ip {family} neigh show dev {device} nud permanent")))
    };
    let (v4, v6) = (|| state("flannel.1", "-4"), || state("flannel-v6.1", "-6"));
    let (mac4, mac6) = (vtep("0a:fe:00:00:04:1f"), vtep("0a:fe:00:00:06:1f"));
    put(("192.168.64.31", &mac4), ("fd77::31", &mac6));
    wait_for("both halves of the peer", LIMIT, || {
        (v4().contains("192.168.64.31") && v6().contains("dst fd77::31")).then_some(())
    })
    .unwrap();

    // Whatever the kernel is told of the other family's device is seen here. That it is seen, a route shows which is
    // nobody's: it is told of before the work and after it.
    let watch = |family: &str, work: &dyn Fn()| {
        let (device, control) = match family {
            "-4" => ("flannel.1", "203.0.113.0/24"),
            _ => ("flannel-v6.1", "2001:db8:77::/64"),
        };
        let mut command = node.netns().command("ip");
        command.args([family, "monitor", "route", "neigh"]).stdout(Stdio::piped());
        let mut monitor = command.spawn().unwrap();
        let (tell, told) = mpsc::channel();
        let output = BufReader::new(monitor.stdout.take().unwrap());
        let reader =
            thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| tell.send(line)));
        let mut lines: Vec<String> = Vec::new();
        let mut hear_control = || {
            wait_for("the monitor to tell of the control", LIMIT, || {
                for verb in ["add", "del"] {
                    node.netns().ip(&format!("{family} route {verb} {control} dev {device}")).unwrap();
                }
                thread::sleep(Duration::from_millis(100));
                let before = lines.len();
                lines.extend(told.try_iter());
                lines[before..].iter().any(|line| line.contains(control)).then_some(())
            })
            .unwrap();
        };
        hear_control();
        work();
        thread::sleep(Duration::from_millis(500));
        hear_control();
        monitor.kill().unwrap();
        monitor.wait().unwrap();
        let _ = reader.join().unwrap();
        let of_device = |line: &String| line.contains(&format!("dev {device} ")) && !line.contains(control);
        lines.into_iter().chain(told.try_iter()).filter(of_device).collect::<Vec<_>>()
    };
    let before = v4();
    let told = watch("-4", &|| {
        put(("192.168.64.31", &mac4), ("fd77::32", &vtep("0a:fe:00:00:06:20")));
        wait_for("the peer's new IPv6 half", LIMIT, || {
            let v6 = v6();
            let there = v6.contains("0a:fe:00:00:06:20 dst fd77::32") && !v6.contains("06:1f");
            there.then_some(())
        })
        .unwrap();
    });
    assert_eq!((told, v4()), (vec![], before));
    let before = v6();
    let told = watch("-6", &|| {
        put(("192.168.64.32", &vtep("0a:fe:00:00:04:20")), ("fd77::32", &vtep("0a:fe:00:00:06:20")));
        wait_for("the peer's new IPv4 half", LIMIT, || {
            v4().contains("0a:fe:00:00:04:20 dst 192.168.64.32").then_some(())
        })
        .unwrap();
    });
    assert_eq!((told, v6()), (vec![], before));
    let before = v4();
    put(("192.168.64.32", &vtep("0a:fe:00:00:04:20")), ("fd77::32", r#"{"VNI":1}"#));
    wait_for("a broken half to be left out", LIMIT, || (!v6().contains("fffe")).then_some(())).unwrap();
    assert_eq!(v4(), before, "and the other to stay");
}

#[test]
fn a_config_that_changes_its_families_leaves_nothing_of_the_one_that_is_gone() {
    let mut cluster = Cluster::create(&Plan { nodes: 1, ..Plan::dual() }).unwrap();
    let configs = [Plan::default(), Plan::dual(), Plan::ipv6_only(), Plan::default()].map(|plan| plan.config);
    let mut before: Option<(String, String)> = None;
    for (n, config) in configs.iter().enumerate() {
        cluster.etcd().ctl(&["put", &format!("{PREFIX}/config"), config]).unwrap();
        let node = &mut cluster.nodes[0];
        if n > 0 {
            node.stop_agent().unwrap();
        }
        node.start_agent(&["--ip-masq"]).unwrap();
        let node = &cluster.nodes[0];
        let text = std::fs::read_to_string(node.subnet_file()).unwrap();
        let line = |key: &str| {
            let found = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
            found.unwrap_or_default().to_owned()
        };
        let (v4, v6) = (line("FLANNEL_SUBNET"), line("FLANNEL_IPV6_SUBNET"));
        assert_eq!((v4.is_empty(), v6.is_empty()), (n == 2, n == 0 || n == 3), "{text}");
        assert_eq!(line("FLANNEL_MTU"), if v6.is_empty() { "1450" } else { "1430" });
        if let Some((v4_before, v6_before)) = &before {
            assert!(v4.is_empty() || v4_before.is_empty() || v4 == *v4_before, "IPv4's subnet stays");
            assert!(v6.is_empty() || v6_before.is_empty() || v6 == *v6_before, "IPv6's subnet stays");
        }
        wait_for("nothing of a family that is gone", LIMIT, || {
            (remains(node.netns(), "flannel.1", "ip", "iptables") != v4.is_empty()
                && remains(node.netns(), "flannel-v6.1", "ip6", "ip6tables") != v6.is_empty())
            .then_some(())
        })
        .unwrap_or_else(|error| panic!("{config}: {error:#}\n{}", node.log()));
        before = Some((v4, v6));
    }
    let leases: Vec<String> = cluster.leases().unwrap().into_iter().map(|(key, _)| key).collect();
    assert!(leases.iter().any(|key| key.ends_with(".0-24")), "{leases:?}");
}

/// Whether anything that is made for a family is there.
fn remains(netns: &Netns, device: &str, table: &str, iptables: &str) -> bool {
    let run = |line: &str| netns.exec(line).unwrap();
    let device = run("ip -o link").contains(&format!(" {device}: "));
    let table = run("nft list tables").lines().any(|line| line == format!("table {table} loden"));
    let chain = run(&format!("{iptables} -S")).contains("LODEN-FWD");
    device || table || chain
}
