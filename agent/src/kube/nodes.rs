//! What is known of all nodes, and which of them are peers: pure.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use tracing::warn;

use super::{
    Annotations,
    annotations::Said,
    node::{Node, Spec},
};
use crate::{
    family::{Family, V4, V6},
    lease::{Lease, LeaseKey},
    registry::Halves,
};

/// All nodes, by name.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    nodes: BTreeMap<String, Known>,
}

/// What is kept of a node.
#[derive(Debug)]
struct Known {
    uid: String,
    /// Kubernetes 1.35 promises that newer ones are larger numbers; all that keep their state in etcd have always been.
    version: Option<u64>,
    cidr: Cidr,
    said: Said,
}

/// What is known of a node's podCIDRs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Cidr {
    /// Nothing yet: only metadata were seen.
    Unknown,
    /// The node has not been given one.
    Unassigned,
    /// Once given they never change as long as the node's uid is the same.
    Are(LeaseKey),
    /// They are none that can be used, for this reason.
    Wrong(String),
}

impl From<&Spec> for Cidr {
    fn from(spec: &Spec) -> Self {
        match spec.subnets() {
            Ok(Some(subnets)) => Self::Are(subnets),
            Ok(None) => Self::Unassigned,
            Err(reason) => Self::Wrong(reason),
        }
    }
}

/// Which nodes are peers.
pub(super) struct PeerRules<'a> {
    /// The name of this node.
    pub(super) own: &'a str,
    pub(super) halves: Halves<'a>,
}

impl Nodes {
    /// Takes in a node, whole or metadata alone; says whether that changes anything. `None`: it is older than what is
    /// known.
    pub(super) fn take(&mut self, node: &Node, names: &Annotations) -> Option<bool> {
        let metadata = &node.metadata;
        let version = metadata.resource_version.parse().ok();
        let before = self.nodes.get(&metadata.name).filter(|known| known.uid == metadata.uid);
        if let Some(known) = before
            && known.version.zip(version).is_some_and(|(known, this)| known > this)
        {
            // The watch is still at what was before something that we fetched or wrote.
            return None;
        }
        let cidr = match (&node.spec, before.map(|known| &known.cidr)) {
            (Some(spec), _) => spec.into(),
            (None, Some(known @ (Cidr::Are(_) | Cidr::Wrong(_)))) => known.clone(),
            (None, Some(Cidr::Unknown | Cidr::Unassigned) | None) => Cidr::Unknown,
        };
        let said = names.read(&metadata.annotations);
        let changed = before.is_none_or(|known| known.cidr != cidr || known.said != said);
        let known = Known { uid: metadata.uid.clone(), version, cidr, said };
        self.nodes.insert(metadata.name.clone(), known);
        Some(changed)
    }

    /// Takes a node out; says whether it was known.
    pub(super) fn remove(&mut self, name: &str) -> bool {
        self.nodes.remove(name).is_some()
    }

    /// The uid and the podCIDR of a node.
    pub(super) fn get(&self, name: &str) -> Option<(&str, &Cidr)> {
        self.nodes.get(name).map(|known| (known.uid.as_str(), &known.cidr))
    }

    /// The nodes whose podCIDR matters and has to be asked for.
    pub(super) fn unknown(&self, own: &str) -> Vec<String> {
        let matters = |(name, known): &(&String, &Known)| {
            known.cidr == Cidr::Unknown && (known.said != Said::Nothing || *name == own)
        };
        self.nodes.iter().filter(matters).map(|(name, _)| name.clone()).collect()
    }

    /// The peers' leases, with those halves that this node can use.
    pub(super) fn peers(&self, rules: &PeerRules<'_>, told: &mut Told) -> BTreeMap<LeaseKey, Lease> {
        let mut peers = BTreeMap::new();
        let mut taken = BTreeSet::new();
        for (name, known) in self.nodes.iter().filter(|(name, _)| *name != rules.own) {
            let (lease, mut wrong) = known.lease(rules);
            let lease = lease.and_then(|lease| {
                let key = free::<V4>(Some(lease.key), &mut taken, &mut wrong);
                let key = free::<V6>(key, &mut taken, &mut wrong)?;
                Some(Lease { key, ..lease })
            });
            told.of(name, &wrong);
            peers.extend(lease.map(|lease| (lease.key, lease)));
        }
        told.forget_all_but(&self.nodes);
        peers
    }
}

/// Leaves a half out that another node has as well.
fn free<F: Family>(
    key: Option<LeaseKey>,
    taken: &mut BTreeSet<IpNet>,
    wrong: &mut Vec<String>,
) -> Option<LeaseKey> {
    let Some(subnet) = key?.half::<F>() else { return key };
    if taken.insert(subnet.into()) {
        return key;
    }
    wrong.push(format!("another node has its podCIDR {subnet} as well"));
    key?.without::<F>()
}

impl Known {
    /// The lease, as far as it is one, and what is wrong with the rest.
    fn lease(&self, rules: &PeerRules<'_>) -> (Option<Lease>, Vec<String>) {
        let (attrs, mut wrong) = match &self.said {
            Said::Nothing => return (None, Vec::new()),
            Said::Wrong(reason) => return (None, vec![reason.clone()]),
            Said::Attrs(attrs, wrong) => (attrs, wrong.iter().cloned().collect::<Vec<_>>()),
        };
        let given = match &self.cidr {
            Cidr::Unknown => return (None, Vec::new()),
            Cidr::Unassigned => return (None, vec!["it has no podCIDR yet".into()]),
            Cidr::Wrong(reason) => return (None, vec![reason.clone()]),
            Cidr::Are(given) => *given,
        };
        let (key, refused) = rules.halves.of(given, attrs);
        wrong.extend(refused);
        let attrs = attrs.as_ref().clone();
        (key.map(|key| Lease { key, attrs, etcd_lease: None, mod_revision: 0 }), wrong)
    }
}

/// Nodes that were warned of already: each once, until something else is wrong with it.
#[derive(Debug, Default)]
pub(super) struct Told(BTreeMap<String, String>);

impl Told {
    fn of(&mut self, node: &str, wrong: &[String]) {
        let reason = wrong.join("; ");
        if reason.is_empty() {
            self.0.remove(node);
        } else if self.0.get(node) != Some(&reason) {
            warn!(node, reason, "a node is left out");
            self.0.insert(node.to_owned(), reason);
        }
    }

    fn forget_all_but(&mut self, nodes: &BTreeMap<String, Known>) {
        self.0.retain(|name, _| nodes.contains_key(name));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::network::{Backend, Vxlan};

    const PREFIX: &str = "flannel.alpha.coreos.com/";

    fn names() -> Annotations {
        Annotations::new(PREFIX)
    }

    fn node(name: &str, uid: &str, version: u64, cidr: Option<&str>, mac: &str) -> Node {
        let mut node = json!({
            "metadata": { "name": name, "uid": uid, "resourceVersion": version.to_string(), "annotations": {
                format!("{PREFIX}kube-subnet-manager"): "true", format!("{PREFIX}public-ip"): "10.0.0.2",
                format!("{PREFIX}backend-type"): "vxlan",
                format!("{PREFIX}backend-data"): format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#),
            }},
        });
        if let Some(cidr) = cidr {
            node["spec"] = if cidr.is_empty() { json!({}) } else { json!({ "podCIDR": cidr }) };
        }
        serde_json::from_value(node).unwrap()
    }

    const MAC: &str = "02:00:00:00:00:02";

    fn peers(nodes: &Nodes, told: &mut Told) -> BTreeMap<LeaseKey, Lease> {
        let backend = Backend::Vxlan(Vxlan::default());
        let halves = Halves {
            own: "10.244.1.0-24".parse().unwrap(),
            backend: &backend,
            networks: vec!["10.244.0.0/16".parse().unwrap()],
            networks_v6: vec![],
        };
        nodes.peers(&PeerRules { own: "n1", halves }, told)
    }

    fn subnets(nodes: &Nodes) -> Vec<String> {
        peers(nodes, &mut Told::default()).keys().map(LeaseKey::subnets).collect()
    }

    #[test]
    fn metadata_keep_the_pod_cidr_that_was_learned_and_a_new_uid_forgets_it() {
        let mut nodes = Nodes::default();
        assert_eq!(nodes.take(&node("n2", "u", 5, Some("10.244.2.0/24"), MAC), &names()), Some(true));
        assert_eq!(nodes.take(&node("n2", "u", 6, None, MAC), &names()), Some(false), "a heartbeat");
        assert_eq!(nodes.take(&node("n2", "u", 7, None, "02:00:00:00:00:03"), &names()), Some(true));
        assert_eq!((subnets(&nodes), nodes.unknown("n1").len()), (vec!["10.244.2.0/24".to_owned()], 0));
        assert_eq!(nodes.take(&node("n2", "other", 8, None, MAC), &names()), Some(true));
        assert_eq!((subnets(&nodes), nodes.unknown("n1")), (vec![], vec!["n2".to_owned()]));
    }

    #[test]
    fn an_event_from_before_what_was_fetched_is_not_taken() {
        let mut nodes = Nodes::default();
        nodes.take(&node("n2", "u", 9, Some("10.244.2.0/24"), MAC), &names());
        assert_eq!(nodes.take(&node("n2", "u", 8, None, "02:00:00:00:00:99"), &names()), None);
        let lease = &peers(&nodes, &mut Told::default())[&"10.244.2.0-24".parse().unwrap()];
        assert_eq!(lease.attrs.vtep().unwrap().vtep_mac[5], 2);
    }

    #[test]
    fn a_pod_cidr_that_was_not_given_yet_is_asked_for_again_when_something_happens() {
        let mut nodes = Nodes::default();
        nodes.take(&node("n2", "u", 1, Some(""), MAC), &names());
        assert_eq!(nodes.unknown("n1").len(), 0);
        nodes.take(&node("n2", "u", 2, None, MAC), &names());
        assert_eq!(nodes.unknown("n1"), ["n2"]);
        let plain: Node = serde_json::from_value(json!({ "metadata": { "name": "n1" } })).unwrap();
        nodes.take(&plain, &names());
        assert_eq!(nodes.unknown("n1"), ["n1", "n2"], "our own matters whatever it says");
        assert_eq!(nodes.unknown("n9"), ["n2"], "others' only where an agent runs");
    }

    #[test]
    fn who_is_no_peer_is_told_of_once_with_the_reason() {
        let mut nodes = Nodes::default();
        for (name, cidr) in [
            ("n1", "10.244.1.0/24"),
            ("n2", "10.244.2.0/24"),
            ("n3", "10.244.2.0/24"),
            ("n4", "10.9.0.0/24"),
            ("n5", "10.244.1.128/25"),
            ("n6", ""),
            ("n7", "x"),
        ] {
            nodes.take(&node(name, "u", 1, Some(cidr), MAC), &names());
        }
        nodes.take(&node("n8", "u", 1, Some("10.244.8.0/24"), "nonsense"), &names());
        let mut told = Told::default();
        assert_eq!(peers(&nodes, &mut told).len(), 1);
        let reasons: Vec<_> = told.0.iter().map(|(name, reason)| format!("{name} {reason}")).collect();
        assert_eq!(
            reasons,
            [
                "n3 another node has its podCIDR 10.244.2.0/24 as well",
                "n4 its subnet 10.9.0.0/24 is outside of the network 10.244.0.0/16",
                "n5 its subnet 10.244.1.128/25 overlaps this node's 10.244.1.0/24",
                "n6 it has no podCIDR yet",
                r#"n7 podCIDR "x" is no subnet such as 10.244.1.0/24"#,
                r#"n8 BackendData.VtepMAC "nonsense" is no MAC address of one device such as "c6:d2:32:6f:8f:44""#,
            ]
        );
        assert!(nodes.remove("n4") && !nodes.remove("n4"));
        peers(&nodes, &mut told);
        assert!(!told.0.contains_key("n4"));
    }
}
