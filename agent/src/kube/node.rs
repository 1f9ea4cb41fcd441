//! A node as the API tells of it, cut down to what matters while it is being read.

use ipnet::IpNet;
use serde::Deserialize;

use super::annotations::Values;
use crate::lease::LeaseKey;

/// A whole node, or its metadata alone: then `spec` is `None`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) metadata: Metadata,
    #[serde(default)]
    pub(super) spec: Option<Spec>,
}

/// What all objects have.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub(super) struct Metadata {
    #[serde(default)]
    pub(super) name: String,
    /// Another one under the same name is another node.
    #[serde(default)]
    pub(super) uid: String,
    #[serde(default)]
    pub(super) resource_version: String,
    #[serde(default, deserialize_with = "null_is_none")]
    pub(super) annotations: Values,
}

/// Where the subnet is.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
pub(super) struct Spec {
    #[serde(rename = "podCIDR", default)]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs", default)]
    pod_cidrs: Option<Vec<String>>,
}

/// A page of a listing.
#[derive(Debug, Deserialize)]
pub(super) struct Page {
    pub(super) metadata: PageMetadata,
    #[serde(default, deserialize_with = "null_is_none")]
    pub(super) items: Vec<Node>,
}

/// Which state the page shows, and where it goes on.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PageMetadata {
    #[serde(default)]
    pub(super) resource_version: String,
    #[serde(default, rename = "continue")]
    pub(super) more: Option<String>,
}

fn null_is_none<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl Spec {
    /// The subnets; `None`: the node has not been given any yet. `podCIDRs` counts before `podCIDR`, as with flannel.
    ///
    /// # Errors
    ///
    /// Where there is something else than one subnet of each family.
    pub(super) fn subnets(&self) -> Result<Option<LeaseKey>, String> {
        let given: Vec<&str> = match self.pod_cidrs.as_deref() {
            Some(cidrs @ [_, ..]) => cidrs.iter().map(String::as_str).collect(),
            _ => self.pod_cidr.iter().map(String::as_str).filter(|cidr| !cidr.is_empty()).collect(),
        };
        let (mut subnet, mut subnet_v6) = (None, None);
        for cidr in &given {
            let twice = match cidr.parse() {
                Ok(IpNet::V4(v4)) => subnet.replace(v4.trunc()).is_some(),
                Ok(IpNet::V6(v6)) => subnet_v6.replace(v6.trunc()).is_some(),
                Err(_) => {
                    return Err(format!("podCIDR {:?} is no subnet such as 10.244.1.0/24", excerpt(cidr)));
                }
            };
            if twice {
                return Err(format!(
                    "podCIDRs {} are more than one of each family",
                    excerpt(&given.join(", "))
                ));
            }
        }
        Ok((!given.is_empty()).then_some(LeaseKey { subnet, subnet_v6 }))
    }
}

fn excerpt(text: &str) -> String {
    text.chars().take(60).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: &str) -> Result<Option<String>, String> {
        let node: Node = serde_json::from_str(&format!(r#"{{"metadata":{{}},"spec":{json}}}"#)).unwrap();
        Ok(node.spec.unwrap().subnets()?.map(|key| key.subnets()))
    }

    #[test]
    fn the_subnets_are_those_of_pod_cidrs_or_else_pod_cidr() {
        let are = |subnets: &str| Ok(Some(subnets.to_owned()));
        assert_eq!(spec("{}"), Ok(None));
        assert_eq!(spec(r#"{"podCIDR":"","podCIDRs":null}"#), Ok(None));
        assert_eq!(spec(r#"{"podCIDR":"10.244.1.0/24"}"#), are("10.244.1.0/24"));
        assert_eq!(spec(r#"{"podCIDR":"fd00:0:0:1::/64"}"#), are("fd00:0:0:1::/64"));
        assert_eq!(spec(r#"{"podCIDR":"10.9.9.0/24","podCIDRs":["10.244.1.0/24"]}"#), are("10.244.1.0/24"));
        assert_eq!(spec(r#"{"podCIDRs":["fd00::/64","10.244.1.7/24"]}"#), are("10.244.1.0/24 and fd00::/64"));
        assert_eq!(spec(r#"{"podCIDRs":["fd00::/64"]}"#), are("fd00::/64"));
    }

    #[test]
    fn what_is_no_subnet_is_refused_by_name() {
        for (json, says) in [
            (r#"{"podCIDR":"10.244.1.0"}"#, r#"podCIDR "10.244.1.0" is no subnet"#),
            (r#"{"podCIDRs":["10.1.0.0/24","10.2.0.0/24"]}"#, "more than one of each family"),
            (r#"{"podCIDRs":["10.1.0.0/24","fd00::/64","fd01::/64"]}"#, "more than one of each family"),
        ] {
            let error = spec(json).unwrap_err();
            assert!(error.contains(says), "{json}: {error:?} does not say {says:?}");
        }
    }

    #[test]
    fn a_node_is_read_whole_or_as_metadata_and_the_rest_is_skipped() {
        let whole = r#"{"kind":"Node","apiVersion":"v1","metadata":{"name":"n1","uid":"u","resourceVersion":"7","labels":{"a":"b"},
            "annotations":{"x/y":"z"},"managedFields":[{"manager":"m","fieldsV1":{"f:a":{}}}]},
            "spec":{"podCIDR":"10.244.1.0/24","taints":[]},"status":{"images":[{"names":["a"],"sizeBytes":1}]}}"#;
        let node: Node = serde_json::from_str(whole).unwrap();
        assert_eq!((node.metadata.name.as_str(), node.metadata.resource_version.as_str()), ("n1", "7"));
        assert_eq!(node.metadata.annotations["x/y"], "z");
        let partial = r#"{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1","metadata":{"name":"n1","annotations":null}}"#;
        assert_eq!(serde_json::from_str::<Node>(partial).unwrap().spec, None);
        let page: Page =
            serde_json::from_str(r#"{"metadata":{"resourceVersion":"9","continue":"c"},"items":null}"#)
                .unwrap();
        assert_eq!((page.items.len(), page.metadata.more.as_deref()), (0, Some("c")));
    }
}
