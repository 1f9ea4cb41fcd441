//! CHECK, GC, STATUS, VERSION and errors.

use loden_tests::{
    cni::{Runtime, routed},
    netns::Netns,
};
use serde_json::{Value, json};

use crate::{assert_known, assert_nothing_is_left, routed_cluster};

#[test]
fn check_finds_each_damage_by_its_name() {
    let (mut cluster, runtimes) = routed_cluster(1, &[]);
    // It would put back some of what is damaged.
    cluster.nodes[0].kill_agent();
    let (node, runtime) = (&cluster.nodes[0], &runtimes[0]);
    let mut nth = 0;
    let mut damaged = |damage: &dyn Fn(&Netns, &Netns, &str, &str)| -> Value {
        nth += 1;
        let pod = runtime.add(&format!("p{nth}")).unwrap();
        let healthy = runtime.check(&pod).unwrap();
        assert!(healthy.success, "{healthy:?}");
        let (veth, address) = (pod.veth().to_owned(), pod.address.to_string());
        damage(node.netns(), &pod.netns, &veth, &address);
        let answer = runtime.check(&pod).unwrap();
        assert_eq!(answer.error().unwrap().0, 102, "{answer:?}");
        let text = format!("{} {}", answer.output["msg"], answer.output["details"]).replace(&veth, "VETH");
        runtime.remove(pod).unwrap();
        text.replace(&address, "ADDRESS").into()
    };
    let mut assert_found = |what: &str, damage: &dyn Fn(&Netns, &Netns, &str, &str)| {
        let found = damaged(damage);
        assert!(found.as_str().unwrap().contains(what), "{what}: {found}");
    };
    assert_found("the veth VETH on the host is gone", &|host, _, veth, _| {
        host.ip(&format!("link del {veth}")).unwrap();
    });
    assert_found("VETH is down", &|host, _, veth, _| {
        drop(host.ip(&format!("link set {veth} down")).unwrap())
    });
    assert_found("the alias of VETH does not tell", &|host, _, veth, _| {
        host.ip(&format!("link set {veth} alias mine")).unwrap();
    });
    assert_found("the route to ADDRESS/32 by VETH is gone", &|host, _, _, address| {
        host.ip(&format!("route del {address}")).unwrap();
    });
    assert_found("the permanent neighbour ADDRESS on VETH is gone", &|host, _, veth, address| {
        host.ip(&format!("neigh del {address} dev {veth}")).unwrap();
    });
    assert_found("the address ADDRESS/32 is gone from eth0", &|_, pod, _, address| {
        pod.ip(&format!("address del {address}/32 dev eth0")).unwrap();
    });
    assert_found("the route to 0.0.0.0/0 by eth0 is gone", &|_, pod, _, _| {
        pod.ip("route del default").unwrap();
    });
    assert_found("the neighbour 169.254.1.1 on eth0 is 02:00:00:00:00:99", &|_, pod, _, _| {
        pod.ip("neigh replace 169.254.1.1 lladdr 02:00:00:00:00:99 dev eth0 nud permanent").unwrap();
    });
    assert_found("the MAC of eth0 is 02:00:00:00:00:98", &|_, pod, _, _| {
        pod.ip("link set eth0 address 02:00:00:00:00:98").unwrap();
    });
    cluster.nodes[0].start_agent(&[]).unwrap();
    assert_nothing_is_left(&cluster.nodes[0], runtime);
}

#[test]
fn check_finds_what_is_missing_of_the_fast_path() {
    let (mut cluster, runtimes) = routed_cluster(1, &[]);
    let pod = runtimes[0].add("a").unwrap();
    // The agent would put it back.
    cluster.nodes[0].kill_agent();
    assert!(runtimes[0].check(&pod).unwrap().success);
    let links = cluster.nodes[0].bpffs().join("v1/links");
    let pins: Vec<_> = std::fs::read_dir(links).unwrap().map(|pin| pin.unwrap().path()).collect();
    let pin = pins.iter().find(|pin| pin.to_string_lossy().contains("/to_pod-")).unwrap();
    std::fs::remove_file(pin).unwrap();
    let (code, message) = runtimes[0].check(&pod).unwrap().error().unwrap();
    assert_eq!((code, message), (102, format!("the program to_pod is gone from {}", pod.veth())));
}

#[test]
fn gc_takes_off_whom_the_runtime_does_not_know_and_nobody_else() {
    let (cluster, runtimes) = routed_cluster(1, &[]);
    let (node, runtime) = (&cluster.nodes[0], &runtimes[0]);
    let other = Runtime::new(node, routed(node, "other", &[])).unwrap();
    let [kept, stale] = ["kept", "stale"].map(|id| runtime.add(id).unwrap());
    let mut conf = runtime.first();
    conf["cniVersion"] = "1.1.0".into();
    conf["cni.dev/valid-attachments"] = json!([{ "containerID": "kept", "ifname": "eth0" }]);
    // A network of another name keeps its pods; host-local would give it the same addresses, so it has none.
    let mut others = other.first();
    others["cniVersion"] = "1.1.0".into();
    others["cni.dev/valid-attachments"] = json!([]);
    other.call("GC", "", None, &others).unwrap().well().unwrap();
    assert!(runtime.check(&kept).unwrap().success && runtime.check(&stale).unwrap().success);

    runtime.call("GC", "", None, &conf).unwrap().well().unwrap();
    assert!(runtime.check(&kept).unwrap().success);
    stale.netns.ip("link show eth0").unwrap_err();
    assert_eq!(runtime.given_out(), [kept.address.to_string()]);
    assert_known(node, kept.address);
    runtime.remove(kept).unwrap();
    assert_nothing_is_left(node, runtime);
}

#[test]
fn status_says_whether_pods_can_be_attached() {
    let (cluster, runtimes) = routed_cluster(1, &[]);
    let (node, runtime) = (&cluster.nodes[0], &runtimes[0]);
    let mut conf = runtime.first();
    conf["cniVersion"] = "1.1.0".into();
    let status = |conf: &Value| runtime.call("STATUS", "", None, conf).unwrap();
    assert!(status(&conf).success);
    let mut nobody = conf.clone();
    nobody["ipam"]["type"] = "nobody".into();
    let (code, message) = status(&nobody).error().unwrap();
    assert_eq!((code, message.as_str()), (50, "\"ipam.type\": there is no plugin \"nobody\""));
    node.netns().exec("sysctl -q -w net.ipv4.ip_forward=0").unwrap();
    assert_eq!(status(&conf).error().unwrap().0, 51);
    node.netns().exec("sysctl -q -w net.ipv4.ip_forward=1").unwrap();
    std::fs::remove_file(node.subnet_file()).unwrap();
    assert_eq!(status(&conf).error().unwrap().0, 50);
    let netns = Netns::create("p-early").unwrap();
    let (code, message) = runtime.call("ADD", "early", Some(&netns), &conf).unwrap().error().unwrap();
    assert_eq!(code, 11, "{message}");
    assert!(message.contains("subnet.env does not exist"), "{message}");
}

#[test]
fn versions_and_errors_are_the_specifications() {
    let (_cluster, runtimes) = routed_cluster(1, &[]);
    let runtime = &runtimes[0];
    let told = runtime.call("VERSION", "", None, &json!({ "cniVersion": "1.0.0" })).unwrap().well().unwrap();
    assert_eq!(told["supportedVersions"], json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
    let netns = Netns::create("p-errors").unwrap();
    for (conf, code) in [
        (json!("no object"), 6),
        (json!({ "cniVersion": "9.0.0", "name": "n", "type": "loden-cni" }), 1),
        (json!({ "cniVersion": "1.0.0", "type": "loden-cni" }), 7),
    ] {
        let answer = runtime.call("ADD", "c", Some(&netns), &conf).unwrap();
        assert_eq!(answer.error().unwrap().0, code, "{answer:?}");
    }
    let mut conf = runtime.first();
    conf["cniVersion"] = "0.3.1".into();
    let answer = runtime.call("ADD", "c", Some(&netns), &conf).unwrap().well().unwrap();
    assert_eq!((&answer["cniVersion"], &answer["ips"][0]["version"]), (&json!("0.3.1"), &json!("4")));
    runtime.call("DEL", "c", Some(&netns), &conf).unwrap().well().unwrap();
    let pod = Netns::create("p-none").unwrap();
    let mut wrong = runtime.first();
    wrong["mtu"] = json!(12);
    let (code, message) = runtime.call("ADD", "c", Some(&pod), &wrong).unwrap().error().unwrap();
    assert_eq!((code, message.as_str()), (7, "\"mtu\": 12 must be a number of bytes of 68 to 65535, or 0"));
}
