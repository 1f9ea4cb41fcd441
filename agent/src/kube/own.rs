//! This node: its subnet, what its annotations should say, and its condition.

use std::net::{Ipv4Addr, Ipv6Addr};

use jiff::Timestamp;
use serde_json::{Value, json};
use tracing::warn;

use super::{
    Annotations, Api, KubeError,
    annotations::{Said, Values},
    inside,
    node::Node,
    nodes::Cidr,
};
use crate::{
    family::{V4, V6},
    lease::{Lease, LeaseAttrs, LeaseKey},
    network::NetworkConfig,
};

/// This node as the API knew it at the start.
#[derive(Clone, Debug)]
pub struct OwnNode {
    /// Its name.
    pub name: String,
    /// Its podCIDRs of the families that the network has.
    pub key: LeaseKey,
    /// All its podCIDRs.
    pub given: LeaseKey,
    /// The address that people want it to use, by annotation; it overrules `--public-ip`.
    pub public_ip: Option<Ipv4Addr>,
    /// The same of IPv6; it overrules `--public-ipv6`.
    pub public_ipv6: Option<Ipv6Addr>,
    /// The MAC address that peers know of its VTEP, by annotation: it should outlive a reboot.
    pub vtep_mac: Option<[u8; 6]>,
    /// The same of its VTEP with an IPv6 underlay.
    pub vtep_mac_v6: Option<[u8; 6]>,
    pub(super) node: Node,
}

impl Api {
    /// Reads this node.
    ///
    /// # Errors
    ///
    /// Where there is none of that name, it has no podCIDR yet (see [`KubeError::may_pass`]), or one outside of the
    /// network.
    pub async fn own_node(&self, name: &str, network: &NetworkConfig) -> Result<OwnNode, KubeError> {
        let node = self.node(name).await?;
        let cidr = node.spec.as_ref().map_or(Cidr::Unassigned, Cidr::from);
        let (key, given) = own_subnets(name, &cidr, network)?;
        let values = &node.metadata.annotations;
        let (vtep_mac, vtep_mac_v6) = match self.annotations.read(values) {
            Said::Attrs(attrs, _) => (attrs.vtep().ok(), attrs.vtep_v6().ok()),
            Said::Nothing | Said::Wrong(_) => (None, None),
        };
        Ok(OwnNode {
            name: name.to_owned(),
            key,
            given,
            public_ip: told(self.annotations.node_public_ip(values)),
            public_ipv6: told(self.annotations.node_public_ipv6(values)),
            vtep_mac: vtep_mac.map(|vtep| vtep.vtep_mac),
            vtep_mac_v6: vtep_mac_v6.map(|vtep| vtep.vtep_mac),
            node,
        })
    }

    /// Writes this node's annotations, as far as they do not say the same already: from then on it has its lease.
    ///
    /// # Errors
    ///
    /// Where the API is away or refuses.
    pub async fn publish(&self, own: &mut OwnNode, attrs: &LeaseAttrs) -> Result<Lease, KubeError> {
        let (attrs, wrong) = published(&self.annotations, &own.node.metadata.annotations, attrs);
        if let Some(reason) = wrong {
            warn!("{reason}");
        }
        if let Some(patch) = annotations_patch(&self.annotations, &own.node.metadata.annotations, &attrs) {
            own.node = self.patch(WRITE_ANNOTATIONS, &own.name, &patch).await?;
        }
        Ok(lease(own.key, attrs))
    }
}

pub(super) const WRITE_ANNOTATIONS: &str = "write the node's annotations";
pub(super) const SET_CONDITION: &str = "set the node's condition NetworkUnavailable";

/// What people set, where it can be used.
fn told<A>(found: Result<Option<A>, String>) -> Option<A> {
    found.unwrap_or_else(|reason| {
        warn!("{reason}; going on without it");
        None
    })
}

pub(super) fn lease(key: LeaseKey, attrs: LeaseAttrs) -> Lease {
    Lease { key, attrs, etcd_lease: None, mod_revision: 0 }
}

/// The subnets of this node that are of the network's families, and all that it was given.
pub(super) fn own_subnets(
    name: &str,
    cidr: &Cidr,
    network: &NetworkConfig,
) -> Result<(LeaseKey, LeaseKey), KubeError> {
    let refuse = |reason: &str, awaited| {
        Err(KubeError::PodCidr { node: name.to_owned(), reason: reason.to_owned(), awaited })
    };
    let given = match cidr {
        Cidr::Are(given) => *given,
        Cidr::Wrong(reason) => return refuse(reason, false),
        Cidr::Unknown | Cidr::Unassigned => {
            return refuse(
                "it has no podCIDR yet: kube-controller-manager must run with --allocate-node-cidrs and --cluster-cidr, or something else must set spec.podCIDR",
                true,
            );
        }
    };
    let v4 = network.v4.zip(given.subnet);
    let v6 = network.v6.zip(given.subnet_v6);
    let key = LeaseKey {
        subnet: v4.map(|(pool, subnet)| inside::<V4>(pool.network, subnet, name)).transpose()?,
        subnet_v6: v6.map(|(pool, subnet)| inside::<V6>(pool.network, subnet, name)).transpose()?,
    };
    if key.subnet.is_none() && key.subnet_v6.is_none() {
        let (given, networks) = (given.subnets(), network.networks());
        return refuse(
            &format!(
                "its podCIDR {given} is of another family than the network {networks}: EnableIPv4, EnableIPv6 and the networks in net-conf.json must fit the cluster CIDR (--cluster-cidr of kube-controller-manager)"
            ),
            false,
        );
    }
    Ok((key, given))
}

/// What is published: our addresses, unless people want others in their place; and what is wrong with those.
pub(super) fn published(
    names: &Annotations,
    values: &Values,
    attrs: &LeaseAttrs,
) -> (LeaseAttrs, Option<String>) {
    let mut published = attrs.clone();
    let mut wrong = Vec::new();
    if let Some(ours) = attrs.public_ip {
        match names.overwrite(values) {
            Ok(overwrite) => published.public_ip = Some(overwrite.unwrap_or(ours)),
            Err(reason) => wrong.push(format!("{reason}; {ours} is published")),
        }
    }
    if let Some(ours) = attrs.public_ipv6 {
        match names.overwrite_v6(values) {
            Ok(overwrite) => published.public_ipv6 = Some(overwrite.unwrap_or(ours)),
            Err(reason) => wrong.push(format!("{reason}; {ours} is published")),
        }
    }
    (published, (!wrong.is_empty()).then(|| wrong.join("; ")))
}

/// The strategic merge patch that makes the annotations say what they should; `None` where they do.
pub(super) fn annotations_patch(names: &Annotations, values: &Values, attrs: &LeaseAttrs) -> Option<Value> {
    let mut wanted = names.wanted(attrs);
    wanted.retain(|name, value| values.get(name) != Some(value));
    let set = wanted.into_iter().map(|(name, value)| (name, Value::String(value)));
    let removed = names.outdated(values, attrs).into_iter().map(|name| (name, Value::Null));
    let patch: serde_json::Map<String, Value> = set.chain(removed).collect();
    (!patch.is_empty()).then(|| json!({ "metadata": { "annotations": patch } }))
}

/// The strategic merge patch that sets the condition, as flannel does: conditions are merged by their type.
pub(super) fn condition_patch(now: Timestamp) -> Value {
    // Go's metav1.Time: whole seconds, UTC.
    let now = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    json!({ "status": { "conditions": [{
        "type": "NetworkUnavailable",
        "status": "False",
        "lastHeartbeatTime": now,
        "lastTransitionTime": now,
        "reason": "FlannelIsUp",
        "message": "Flannel is running on this node",
    }]}})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::VtepData;

    const PREFIX: &str = "flannel.alpha.coreos.com/";

    fn attrs() -> LeaseAttrs {
        LeaseAttrs::vxlan([192, 168, 64, 3].into(), VtepData { vni: 1, vtep_mac: [2, 0, 0, 0, 0, 3] })
    }

    #[test]
    fn the_patches_are_flannels_to_the_byte() {
        let names = Annotations::new(PREFIX);
        let mut values = Values::from([(format!("{PREFIX}backend-type"), "vxlan".to_owned())]);
        let patch = annotations_patch(&names, &values, &attrs()).unwrap();
        assert_eq!(
            patch.to_string(),
            concat!(
                r#"{"metadata":{"annotations":{"flannel.alpha.coreos.com/backend-data":"{\"VNI\":1,\"VtepMAC\":\"02:00:00:00:00:03\"}","#,
                r#""flannel.alpha.coreos.com/kube-subnet-manager":"true","flannel.alpha.coreos.com/public-ip":"192.168.64.3"}}}"#
            )
        );
        values.extend(names.wanted(&attrs()));
        assert_eq!(annotations_patch(&names, &values, &attrs()), None);

        let now = "2026-08-14T09:08:07.654321Z".parse().unwrap();
        assert_eq!(
            condition_patch(now).to_string(),
            concat!(
                r#"{"status":{"conditions":[{"type":"NetworkUnavailable","status":"False","lastHeartbeatTime":"2026-08-14T09:08:07Z","#,
                r#""lastTransitionTime":"2026-08-14T09:08:07Z","reason":"FlannelIsUp","message":"Flannel is running on this node"}]}}"#
            )
        );
    }

    #[test]
    fn an_overwrite_replaces_the_public_ip_and_a_wrong_one_does_not() {
        let names = Annotations::new(PREFIX);
        let with = |value: &str| Values::from([(format!("{PREFIX}public-ip-overwrite"), value.to_owned())]);
        assert_eq!(
            published(&names, &with("203.0.113.7"), &attrs()).0.public_ip,
            Some(Ipv4Addr::new(203, 0, 113, 7))
        );
        let (same, wrong) = published(&names, &with("nonsense"), &attrs());
        assert_eq!(same, attrs());
        assert!(wrong.unwrap().ends_with("; 192.168.64.3 is published"));
        let v6 = Values::from([(format!("{PREFIX}public-ipv6-overwrite"), "2001:db8::7".to_owned())]);
        let dual = attrs().with_v6("fd77::3".parse().unwrap(), None);
        let public = |attrs: &LeaseAttrs| published(&names, &v6, attrs).0.public_ipv6;
        assert_eq!((public(&dual), public(&attrs())), (Some("2001:db8::7".parse().unwrap()), None));
    }

    #[test]
    fn a_subnet_that_cannot_be_used_is_told_with_what_would_be_right() {
        let network = NetworkConfig::parse(r#"{"Network":"10.244.0.0/16"}"#).unwrap();
        let of = |cidr: Cidr| own_subnets("n1", &cidr, &network);
        let are = |key: &str| Cidr::Are(key.parse().unwrap());
        assert_eq!(of(are("10.244.7.0-24")).unwrap().0.to_string(), "10.244.7.0-24");
        let (key, given) = of(are("10.244.7.0-24&fd00:0:0:7::-64")).unwrap();
        assert_eq!(
            (key.subnets(), given.subnets()),
            ("10.244.7.0/24".into(), "10.244.7.0/24 and fd00:0:0:7::/64".into())
        );
        for (cidr, says, awaited) in [
            (Cidr::Unassigned, "no podCIDR yet: kube-controller-manager", true),
            (are("10.9.7.0-24"), "podCIDR 10.9.7.0/24 is outside of the network 10.244.0.0/16", false),
            (are("10.244.0.0-31"), "no room for pods", false),
            (
                are("0.0.0.0-0&fd00:0:0:7::-64"),
                "its podCIDR fd00:0:0:7::/64 is of another family than the network 10.244.0.0/16",
                false,
            ),
            (Cidr::Wrong("nonsense".into()), "nonsense", false),
        ] {
            let error = of(cidr).unwrap_err();
            assert!(
                error.to_string().contains(says) && error.to_string().contains(r#"node "n1""#),
                "{error}"
            );
            assert_eq!(error.may_pass(), awaited);
        }
    }
}
