//! Faults of what is written somewhere: records in etcd, and the agent's own file. Nobody mends them while no agent runs.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpListener,
    thread,
};

use loden_tests::cluster::PREFIX;
use serde_json::Value;

use crate::ward::{Ward, assert_found};

/// On a ward without agents.
pub(crate) fn faults(ward: &Ward) {
    of_the_own_record(ward);
    of_others(ward);
    of_endpoints(ward);
    of_what_the_agent_left(ward);
}

fn evidence(report: &crate::ward::Report, check: &str) -> String {
    report.find(check)["evidence"].as_str().unwrap().to_owned()
}

fn of_the_own_record(ward: &Ward) {
    let etcd = ward.cluster.etcd();
    let own = ward.patient().address().to_string();
    let leases = ward.cluster.leases().unwrap();
    let (key, value) = leases.iter().find(|(_, value)| value.contains(&own)).unwrap();
    etcd.ctl(&["del", key]).unwrap();
    let report = assert_found("no record", ward.patient(), &["agent", "lease"]);
    assert!(evidence(&report, "lease").contains("etcd has no record of"));

    etcd.ctl(&["put", key, &value.replace(&own, "192.168.64.250")]).unwrap();
    let report = assert_found("another's record", ward.patient(), &["agent", "lease"]);
    assert!(evidence(&report, "lease").contains("is the subnet of 192.168.64.250 in etcd"));

    let mut changed: Value = serde_json::from_str(value).unwrap();
    changed["BackendData"]["VtepMAC"] = "0a:fe:00:00:00:98".into();
    etcd.ctl(&["put", key, &changed.to_string()]).unwrap();
    let report = assert_found("another MAC", ward.patient(), &["agent", "lease"]);
    assert!(evidence(&report, "lease").contains("etcd says that our VTEP has 0a:fe:00:00:00:98"));
    etcd.ctl(&["put", key, value]).unwrap();
}

fn of_others(ward: &Ward) {
    let etcd = ward.cluster.etcd();
    let own = ward.patient().address().to_string();
    let key = format!("{PREFIX}/subnets/10.5.251.0-24");
    let record = |address: &str, mac: &str| {
        let value = format!(
            r#"{{"PublicIP":"{address}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
        );
        etcd.ctl(&["put", &key, &value]).unwrap();
    };
    record(&own, "0a:fe:00:00:00:97");
    let report = assert_found("two subnets of our address", ward.patient(), &["agent", "public-ip"]);
    assert!(evidence(&report, "public-ip").contains("has 10.5.251.0/24 in etcd and"));

    let far = ward.cluster.nodes[1].address().to_string();
    let leases = ward.cluster.leases().unwrap();
    let (_, value) = leases.iter().find(|(_, value)| value.contains(&far)).unwrap();
    let far =
        serde_json::from_str::<Value>(value).unwrap()["BackendData"]["VtepMAC"].as_str().unwrap().to_owned();
    record("192.168.64.251", &far);
    let report = assert_found("one MAC of two nodes", ward.patient(), &["agent", "public-ip"]);
    assert!(evidence(&report, "public-ip").contains(&format!("VTEP MAC {far} is that of")));
    etcd.ctl(&["del", &key]).unwrap();
}

fn of_endpoints(ward: &Ward) {
    let good = ward.cluster.etcd().endpoint();
    let with = |endpoints: Value, expected: &[&str], what: &str| {
        let examine = || assert_found(what, ward.patient(), expected);
        with_facts(ward, |facts| facts["etcd"]["endpoints"] = endpoints, examine)
    };
    // Nobody listens at port 9 of a namespace of ours.
    let report = with(
        serde_json::json!([good, "http://127.0.0.1:9"]),
        &["agent", "etcd"],
        "one of two endpoints does not answer",
    );
    assert_eq!(report.find("etcd")["outcome"], "warning");
    assert!(evidence(&report, "etcd").contains("http://127.0.0.1:9"));

    let listener = ward.patient().netns().run(|| TcpListener::bind("127.0.0.1:0").unwrap());
    let sick = format!("http://{}", listener.local_addr().unwrap());
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 1024]).unwrap();
            let answer =
                b"HTTP/1.0 503 Service Unavailable\r\n\r\n{\"health\":\"false\",\"reason\":\"NO LEADER\"}";
            stream.write_all(answer).unwrap();
            // Whoever comes for the leases is refused from here on.
            drop((stream, listener));
        });
        let report = with(serde_json::json!([sick]), &["agent", "etcd", "lease"], "etcd is not healthy");
        assert!(evidence(&report, "etcd").contains("is not healthy"), "{:#?}", report.all);
    });
}

fn of_what_the_agent_left(ward: &Ward) {
    let lost = |facts: &mut Value| facts["lost"] = "192.168.64.99 has it".into();
    let report = with_facts(ward, lost, || assert_found("a lost lease", ward.patient(), &["agent", "lease"]));
    assert!(evidence(&report, "lease").contains("is lost: 192.168.64.99 has it"));

    let without_programs = |facts: &mut Value| {
        facts["programs"] = Value::Null;
        facts["kernel_alone"] = "no eBPF: there is no TCX".into();
    };
    let report = with_facts(ward, without_programs, || {
        assert_found("a kernel that loads nothing", ward.patient(), &["agent", "kernel"])
    });
    assert!(evidence(&report, "kernel").contains("no eBPF: there is no TCX"));
}

/// Examines with another file than the agent has left.
fn with_facts<T>(ward: &Ward, change: impl FnOnce(&mut Value), examine: impl FnOnce() -> T) -> T {
    let path = ward.patient().run_directory().join("facts.json");
    let before = fs::read_to_string(&path).unwrap();
    let mut facts = serde_json::from_str(&before).unwrap();
    change(&mut facts);
    fs::write(&path, facts.to_string()).unwrap();
    let found = examine();
    fs::write(&path, before).unwrap();
    found
}
