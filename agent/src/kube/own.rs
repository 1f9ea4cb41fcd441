//! This node: its subnet, what its annotations should say, and its condition.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
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
    lease::{Lease, LeaseAttrs, LeaseKey},
    network::NetworkConfig,
};

/// This node as the API knew it at the start.
#[derive(Clone, Debug)]
pub struct OwnNode {
    /// Its name.
    pub name: String,
    /// Its podCIDR.
    pub subnet: Ipv4Net,
    /// The address that people want it to use, by annotation; it overrules `--public-ip`.
    pub public_ip: Option<Ipv4Addr>,
    /// The MAC address that peers know of its VTEP, by annotation: it should outlive a reboot.
    pub vtep_mac: Option<[u8; 6]>,
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
        let subnet = own_subnet(name, &cidr, network)?;
        let values = &node.metadata.annotations;
        let public_ip = self.annotations.node_public_ip(values).unwrap_or_else(|reason| {
            warn!("{reason}; going on without it");
            None
        });
        let vtep_mac = match self.annotations.read(values) {
            Said::Attrs(attrs) => attrs.vtep().ok().map(|vtep| vtep.vtep_mac),
            Said::Nothing | Said::Wrong(_) => None,
        };
        Ok(OwnNode { name: name.to_owned(), subnet, public_ip, vtep_mac, node })
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
        Ok(lease(own.subnet, attrs))
    }
}

pub(super) const WRITE_ANNOTATIONS: &str = "write the node's annotations";
pub(super) const SET_CONDITION: &str = "set the node's condition NetworkUnavailable";

pub(super) fn lease(subnet: Ipv4Net, attrs: LeaseAttrs) -> Lease {
    Lease { subnet, key: LeaseKey::v4(subnet), attrs, etcd_lease: None, mod_revision: 0 }
}

/// The subnet of this node.
pub(super) fn own_subnet(name: &str, cidr: &Cidr, network: &NetworkConfig) -> Result<Ipv4Net, KubeError> {
    let refuse = |reason: &str, awaited| {
        Err(KubeError::PodCidr { node: name.to_owned(), reason: reason.to_owned(), awaited })
    };
    match cidr {
        Cidr::Is(subnet) => inside(network.network, *subnet, name),
        Cidr::Wrong(reason) => refuse(reason, false),
        Cidr::Unknown | Cidr::Unassigned => refuse(
            "it has no podCIDR yet: kube-controller-manager must run with --allocate-node-cidrs and --cluster-cidr, or something else must set spec.podCIDR",
            true,
        ),
    }
}

/// What is published: our address, unless people want another in its place; and what is wrong with that one.
pub(super) fn published(
    names: &Annotations,
    values: &Values,
    attrs: &LeaseAttrs,
) -> (LeaseAttrs, Option<String>) {
    match names.overwrite(values) {
        Ok(None) => (attrs.clone(), None),
        Ok(Some(public_ip)) => (LeaseAttrs { public_ip, ..attrs.clone() }, None),
        Err(reason) => (attrs.clone(), Some(format!("{reason}; {} is published", attrs.public_ip))),
    }
}

/// The strategic merge patch that makes the annotations say what they should; `None` where they do.
pub(super) fn annotations_patch(names: &Annotations, values: &Values, attrs: &LeaseAttrs) -> Option<Value> {
    let mut wanted = names.wanted(attrs);
    wanted.retain(|name, value| values.get(name) != Some(value));
    (!wanted.is_empty()).then(|| json!({ "metadata": { "annotations": wanted } }))
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
            Ipv4Addr::new(203, 0, 113, 7)
        );
        let (same, wrong) = published(&names, &with("nonsense"), &attrs());
        assert_eq!(same, attrs());
        assert!(wrong.unwrap().ends_with("; 192.168.64.3 is published"));
    }

    #[test]
    fn a_subnet_that_cannot_be_used_is_told_with_what_would_be_right() {
        let network = NetworkConfig::parse(r#"{"Network":"10.244.0.0/16"}"#).unwrap();
        let of = |cidr: Cidr| own_subnet("n1", &cidr, &network);
        assert_eq!(of(Cidr::Is("10.244.7.0/24".parse().unwrap())).unwrap().to_string(), "10.244.7.0/24");
        for (cidr, says, awaited) in [
            (Cidr::Unassigned, "no podCIDR yet: kube-controller-manager", true),
            (
                Cidr::Is("10.9.7.0/24".parse().unwrap()),
                "podCIDR 10.9.7.0/24 is outside of the network 10.244.0.0/16",
                false,
            ),
            (Cidr::Is("10.244.0.0/31".parse().unwrap()), "no room for pods", false),
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
