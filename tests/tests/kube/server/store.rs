//! What the double knows: nodes, versions, history, watchers, and how it is to misbehave.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use serde_json::{Value, json};

use super::watch::{Cut, Watcher};

/// A request that came in.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// Path and query.
    pub(crate) uri: String,
    pub(crate) accept: String,
    pub(crate) content_type: String,
    pub(crate) body: String,
}

/// How the double misbehaves until told otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Every request is refused with this status.
    Status(u16),
    /// Requests whose method and path begin so are refused with this status.
    Of(&'static str, u16),
    /// Nothing is answered, and watches fall silent.
    Frozen,
    /// Watches come a few bytes at a time.
    Slow,
    /// A version that is too old is refused with HTTP's own 410 instead of an event.
    GoneByStatus,
}

/// What happened to a node.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) version: u64,
    pub(super) kind: &'static str,
    pub(super) node: Arc<Value>,
}

#[derive(Default)]
pub(crate) struct Store {
    nodes: BTreeMap<String, Arc<Value>>,
    /// Pods by `namespace/name`.
    pub(super) pods: BTreeMap<String, Value>,
    pub(super) version: u64,
    /// The oldest version from which a watch can go on.
    pub(super) oldest: u64,
    pub(super) history: VecDeque<Change>,
    pub(super) watchers: Vec<Watcher>,
    pub(super) watchers_made: u64,
    /// Listings under way, by the version that they show.
    pub(super) snapshots: BTreeMap<u64, Arc<Vec<Arc<Value>>>>,
    /// Who may ask at all.
    pub(crate) token: Option<String>,
    pub(crate) fault: Option<Fault>,
    pub(crate) requests: Vec<Request>,
    uids: u64,
}

impl Store {
    /// Registers a node as a kubelet and kube-controller-manager do.
    pub(crate) fn add_node(&mut self, name: &str, pod_cidr: Option<&str>) {
        self.uids += 1;
        let mut node = json!({
            "kind": "Node", "apiVersion": "v1",
            "metadata": {
                "name": name, "uid": format!("uid-{}", self.uids), "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": { "kubernetes.io/hostname": name, "kubernetes.io/os": "linux" },
                "annotations": { "node.alpha.kubernetes.io/ttl": "0" },
                "managedFields": [{ "manager": "kubelet", "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1",
                    "fieldsV1": { "f:status": {} } }],
            },
            "spec": { "taints": [{ "key": "node.kubernetes.io/network-unavailable", "effect": "NoSchedule" }] },
            "status": {
                "conditions": [
                    { "type": "Ready", "status": "False", "reason": "KubeletNotReady", "message": "cni plugin not initialized" },
                    { "type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated", "message": "Node created without a route" },
                ],
                "nodeInfo": { "kernelVersion": "6.18.0", "osImage": "Debian" },
            },
        });
        if let Some(cidr) = pod_cidr {
            // One of each family in a dual-stack cluster, the first of them in the older field as well.
            let cidrs: Vec<&str> = cidr.split(',').collect();
            node["spec"]["podCIDR"] = json!(cidrs[0]);
            node["spec"]["podCIDRs"] = json!(cidrs);
        }
        self.write("ADDED", node);
    }

    pub(crate) fn add_pod(&mut self, namespace: &str, name: &str, node: &str) {
        let pod = json!({ "kind": "Pod", "apiVersion": "v1", "metadata": { "name": name, "namespace": namespace },
            "spec": { "nodeName": node } });
        self.pods.insert(format!("{namespace}/{name}"), pod);
    }

    /// Fills each node's status as long-lived ones are: images and addresses, some 15 kB.
    pub(crate) fn fatten(&mut self, name: &str) {
        let image = |n: u32| {
            json!({ "names": [format!("registry.example/some/application-{n}@sha256:{:064x}", n),
                format!("registry.example/some/application-{n}:v1.{n}.0")], "sizeBytes": 100_000_000 + n })
        };
        self.change(name, |node| node["status"]["images"] = (0..50).map(image).collect());
    }

    pub(crate) fn change(&mut self, name: &str, change: impl FnOnce(&mut Value)) {
        let mut node = self.node(name).unwrap_or_else(|| panic!("no node {name}"));
        change(&mut node);
        self.write("MODIFIED", node);
    }

    /// Sets or takes away an annotation under flannel's usual prefix.
    pub(crate) fn annotate(&mut self, name: &str, end: &str, value: Option<&str>) {
        let key = format!("flannel.alpha.coreos.com/{end}");
        self.change(name, |node| {
            let annotations = node["metadata"]["annotations"].as_object_mut().unwrap();
            match value {
                Some(value) => drop(annotations.insert(key, json!(value))),
                None => drop(annotations.remove(&key)),
            }
        });
    }

    /// A node as flanneld with vxlan leaves it.
    pub(crate) fn annotate_as_flannel(&mut self, name: &str, public_ip: &str, mac: &str) {
        for (end, value) in [
            ("backend-data", format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#).as_str()),
            ("backend-type", "vxlan"),
            ("kube-subnet-manager", "true"),
            ("public-ip", public_ip),
        ] {
            self.annotate(name, end, Some(value));
        }
    }

    /// What flanneld adds to that of IPv6.
    pub(crate) fn annotate_ipv6_as_flannel(&mut self, name: &str, public_ipv6: &str, mac: &str) {
        self.annotate(name, "backend-v6-data", Some(&format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#)));
        self.annotate(name, "public-ipv6", Some(public_ipv6));
    }

    pub(crate) fn delete_node(&mut self, name: &str) {
        let mut node = self.node(name).unwrap_or_else(|| panic!("no node {name}"));
        self.version += 1;
        node["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.nodes.remove(name);
        self.tell("DELETED", Arc::new(node));
    }

    pub(super) fn write(&mut self, kind: &'static str, mut node: Value) -> Arc<Value> {
        self.version += 1;
        node["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let node = Arc::new(node);
        self.nodes.insert(node["metadata"]["name"].as_str().unwrap().to_owned(), Arc::clone(&node));
        self.tell(kind, Arc::clone(&node));
        node
    }

    fn tell(&mut self, kind: &'static str, node: Arc<Value>) {
        let change = Change { version: self.version, kind, node };
        self.history.push_back(change.clone());
        if self.fault != Some(Fault::Frozen) {
            self.watchers.retain(|watcher| watcher.tell(&change));
        }
    }

    /// Forgets what was before now: older watches and listings cannot go on.
    pub(crate) fn compact(&mut self) {
        self.oldest = self.version + 1;
        self.history.clear();
        self.snapshots.clear();
        self.version += 1;
    }

    /// Goes on as if a backup from this version had been restored: versions count on from there.
    pub(crate) fn restore(&mut self, version: u64) {
        self.version = version;
        self.history.clear();
        self.snapshots.clear();
    }

    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// Sends a bookmark to everybody who wants them.
    pub(crate) fn bookmark(&mut self) {
        let version = self.version;
        self.watchers.retain(|watcher| watcher.bookmark(version));
    }

    /// Ends all watches, in one way or another.
    pub(crate) fn cut(&mut self, cut: Cut) {
        for watcher in self.watchers.drain(..) {
            watcher.cut(cut);
        }
    }

    pub(super) fn forget_watchers(&mut self) {
        self.watchers.clear();
    }

    pub(crate) fn node(&self, name: &str) -> Option<Value> {
        self.nodes.get(name).map(|node| node.as_ref().clone())
    }

    /// The node's condition of this type.
    pub(crate) fn condition(&self, name: &str, kind: &str) -> Option<Value> {
        let conditions = self.node(name)?["status"]["conditions"].clone();
        conditions.as_array()?.iter().find(|condition| condition["type"] == kind).cloned()
    }

    /// All nodes, or the one that a field selector names.
    pub(super) fn select(&self, only: Option<&str>) -> Vec<Arc<Value>> {
        self.nodes
            .iter()
            .filter(|(name, _)| only.is_none_or(|only| only == *name))
            .map(|(_, node)| Arc::clone(node))
            .collect()
    }

    /// The requests whose method and path begin so.
    pub(crate) fn asked(&self, start: &str) -> Vec<Request> {
        let asked = |request: &&Request| format!("{} {}", request.method, request.uri).starts_with(start);
        self.requests.iter().filter(asked).cloned().collect()
    }

    /// The listings so far, counted by their first pages.
    pub(crate) fn listings(&self) -> usize {
        let first =
            |request: &&Request| !request.uri.contains("watch=true") && !request.uri.contains("continue=");
        self.asked("GET /api/v1/nodes?").iter().filter(first).count()
    }

    /// The watches so far.
    pub(crate) fn watches(&self) -> Vec<Request> {
        self.asked("GET /api/v1/nodes?")
            .into_iter()
            .filter(|request| request.uri.contains("watch=true"))
            .collect()
    }
}
