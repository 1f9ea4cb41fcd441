//! A cluster to be examined, and what the doctor says of it.

use std::{collections::BTreeSet, fs, path::PathBuf, process::Output, time::Duration};

use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    flannel::{FlannelNode, Half},
    netns::Netns,
    node::Node,
    process::wait_for,
    traffic::ping,
};
use serde_json::Value;

/// What a report says, but for what is well.
pub(crate) struct Report {
    pub(crate) status: i32,
    pub(crate) all: Vec<Value>,
}

impl Report {
    pub(crate) fn of(node: &Node) -> Self {
        let output = node.loden_output(&["doctor", "--json", "--timeout-ms=300"]).unwrap();
        Self::read(&output)
    }

    /// What a command has printed.
    pub(crate) fn read(output: &Output) -> Self {
        let text = String::from_utf8_lossy(&output.stdout);
        let all = serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("{error}: {text}{}", String::from_utf8_lossy(&output.stderr)));
        Self { status: output.status.code().unwrap(), all }
    }

    pub(crate) fn wrong(&self) -> BTreeSet<&str> {
        let wrong = self.all.iter().filter(|finding| finding["outcome"] != "ok");
        wrong.map(|finding| finding["check"].as_str().unwrap()).collect()
    }

    pub(crate) fn find(&self, check: &str) -> &Value {
        self.all.iter().find(|finding| finding["check"] == check && finding["outcome"] != "ok").unwrap()
    }
}

/// Looks, and wants these findings and no others.
pub(crate) fn assert_found(what: &str, node: &Node, expected: &[&str]) -> Report {
    let report = Report::of(node);
    let wrong: BTreeSet<&str> = report.wrong();
    assert_eq!(wrong, expected.iter().copied().collect(), "{what}: {:#?}", report.all);
    assert_eq!(report.status, i32::from(!expected.is_empty()), "{what}");
    report
}

/// Two Loden nodes with a container each, and maybe a flannel node.
pub(crate) struct Ward {
    pub(crate) cluster: Cluster,
    flannel: Option<FlannelNode>,
    _containers: Vec<Container>,
}

impl Ward {
    pub(crate) fn open() -> Self {
        // Leases are picked at random: none of these is one that the tests write.
        let config = r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.60.0"}"#.to_owned();
        let mut cluster = Cluster::start(&Plan { nodes: 2, config, ..Plan::default() }, &[]).unwrap();
        let netns = Netns::create("flannel").unwrap();
        let address = cluster.underlay().plug(&netns, 31).unwrap();
        let half = Half::new(address.into(), "10.5.231.0/24".parse().unwrap());
        let flannel = FlannelNode::create(netns, vec![half], cluster.etcd()).unwrap();
        for node in &cluster.nodes {
            let (status, subnet) = (node.status().unwrap(), node.subnet_env().unwrap().subnet());
            let mac = status["device"]["mac"].as_str().unwrap().to_owned();
            let peer = Half { address: node.address().into(), subnet: subnet.trunc().into(), mac };
            flannel.add_peer(&[peer], false).unwrap();
            wait_for("the route to the flannel node", Duration::from_secs(10), || {
                node.has_route(flannel.halves()[0].subnet).unwrap().then_some(())
            })
            .unwrap();
        }
        let containers = cluster.run_containers(1).unwrap();
        flannel.netns().exec("sysctl -qw net.ipv4.icmp_ratelimit=0").unwrap();
        Self { cluster, flannel: Some(flannel), _containers: containers }.admit(&["v4"], 2)
    }

    /// Two Loden nodes, by a plan that has IPv6. Only where there is IPv4 as well are there containers.
    pub(crate) fn of_ipv6(plan: &Plan) -> Self {
        let plan = Plan { nodes: 2, ..plan.clone() };
        let families = if plan.ipv4 { &["v4", "v6"][..] } else { &["v6"] };
        if !plan.ipv4 {
            let mut cluster = Cluster::create(&plan).unwrap();
            for node in &mut cluster.nodes {
                node.start_agent(&[]).unwrap();
            }
            return Self { cluster, flannel: None, _containers: Vec::new() }.admit(families, 1);
        }
        let mut cluster = Cluster::start(&plan, &[]).unwrap();
        let containers = cluster.run_containers(1).unwrap();
        Self { cluster, flannel: None, _containers: containers }.admit(families, 1)
    }

    /// Waits until there is nothing to be said of it, and the agent has written down so many peers of these families.
    fn admit(self, families: &[&str], peers: usize) -> Self {
        let containers = &self._containers;
        for address in containers.get(1).into_iter().flat_map(Container::addresses) {
            let answers = || ping(containers[0].netns(), address, 1).ok();
            wait_for("the container to answer", Duration::from_secs(20), answers).unwrap();
        }
        // The patient is examined more often than a host would bear: it answers one closed port a second.
        for name in ["net.ipv4.icmp_ratelimit", "net.ipv6.icmp.ratelimit"] {
            self.cluster.nodes[1].netns().exec(&format!("sysctl -qw {name}=0")).unwrap();
        }
        let node = &self.cluster.nodes[0];
        for family in families {
            wait_for("every peer in what an agent leaves behind", Duration::from_secs(20), || {
                let text = fs::read_to_string(node.run_directory().join("facts.json")).ok()?;
                let facts: Value = serde_json::from_str(&text).ok()?;
                (facts[family]["overlay"]["peers"].as_object()?.len() == peers).then_some(())
            })
            .unwrap();
        }
        wait_for("the programs at the container's veth", Duration::from_secs(20), || {
            let hooks: Vec<String> = links(node).iter().map(|path| path.display().to_string()).collect();
            (containers.is_empty() || hooks.iter().any(|path| path.contains("to_pod"))).then_some(())
        })
        .unwrap();
        self
    }

    pub(crate) fn flannel(&self) -> &FlannelNode {
        self.flannel.as_ref().unwrap()
    }

    pub(crate) fn patient(&self) -> &Node {
        &self.cluster.nodes[0]
    }

    pub(crate) fn run(&self, line: &str) -> String {
        self.patient().netns().exec(line).unwrap()
    }

    /// Looks until a report is as wanted, which is then the answer, and shows the last one where none is.
    pub(crate) fn wait_for_report(
        &self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&Report) -> bool,
    ) -> Report {
        let mut last = Vec::new();
        let report = wait_for(what, limit, || {
            let report = Report::of(self.patient());
            last.clone_from(&report.all);
            wanted(&report).then_some(report)
        });
        report.unwrap_or_else(|error| {
            last.retain(|finding| finding["outcome"] != "ok");
            panic!("{error}, and the last report: {last:#?}")
        })
    }

    /// A fault that one command line makes and another one takes back.
    pub(crate) fn assert_found(&self, make: &str, undo: &str, expected: &[&str]) -> Report {
        self.run(make);
        let report = assert_found(make, self.patient(), expected);
        self.run(undo);
        report
    }
}

pub(crate) fn links(node: &Node) -> Vec<PathBuf> {
    let entries = fs::read_dir(node.bpffs().join("v1/links")).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}
