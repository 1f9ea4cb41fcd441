//! flannel's annotations of a node, to the byte: pure.

use std::{collections::BTreeMap, net::Ipv4Addr};

use crate::{config::flag_value, lease::LeaseAttrs};

/// The annotations that matter, by name.
pub(super) type Values = BTreeMap<String, String>;

/// The annotations' names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Annotations {
    prefix: String,
}

/// Who keeps the node's annotations: flannel, or an agent like it.
const MANAGED: &str = "kube-subnet-manager";
const TYPE: &str = "backend-type";
const DATA: &str = "backend-data";
const PUBLIC_IP: &str = "public-ip";
/// Set by people: what is published as the public address instead of the uplink's.
const OVERWRITE: &str = "public-ip-overwrite";
/// Set by people: which address, and so which interface, the node uses.
const NODE_PUBLIC_IP: &str = "node-public-ip";

/// What a node says of itself.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Said {
    /// No agent of an overlay runs there.
    Nothing,
    /// Where and what it is.
    Attrs(Box<LeaseAttrs>),
    /// It cannot be understood, for this reason.
    Wrong(String),
}

impl Annotations {
    /// Names that begin with a prefix that [`annotation_prefix`](crate::config::kube::annotation_prefix) has completed.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    fn name(&self, end: &str) -> String {
        format!("{}{end}", self.prefix)
    }

    fn get<'a>(&self, values: &'a Values, end: &str) -> Option<&'a str> {
        values.get(&self.name(end)).map(String::as_str)
    }

    /// Drops all others: there may be many, and large ones.
    pub(super) fn keep_ours(&self, values: &mut Values) {
        values.retain(|name, _| name.starts_with(&self.prefix));
    }

    /// Reads what a node says.
    pub(super) fn read(&self, values: &Values) -> Said {
        if self.get(values, MANAGED) != Some("true") {
            return Said::Nothing;
        }
        let wrong =
            |end: &str, reason: String| Said::Wrong(format!("annotation {}: {reason}", self.name(end)));
        let public_ip = match self.get(values, PUBLIC_IP) {
            None => return wrong(PUBLIC_IP, "missing".into()),
            Some(text) => match flag_value::ipv4_address(text) {
                Ok(address) => address,
                Err(right) => return wrong(PUBLIC_IP, format!("{text:?} {right}")),
            },
        };
        let backend_data = match self.get(values, DATA).filter(|text| !text.is_empty()) {
            None => None,
            Some(text) => match serde_json::from_str::<serde_json::Value>(text) {
                Ok(value) => Some(value).filter(|value| !value.is_null()),
                Err(error) => return wrong(DATA, format!("not JSON ({error})")),
            },
        };
        Said::Attrs(Box::new(LeaseAttrs {
            public_ip,
            public_ipv6: None,
            backend_type: self.get(values, TYPE).unwrap_or_default().to_owned(),
            backend_data,
            backend_v6_data: None,
        }))
    }

    /// What the node's annotations must say, of those that we write: flannel's names and values.
    pub(super) fn wanted(&self, attrs: &LeaseAttrs) -> Values {
        let data = attrs.backend_data.as_ref().map_or_else(|| "null".to_owned(), ToString::to_string);
        [
            (DATA, data),
            (TYPE, attrs.backend_type.clone()),
            (MANAGED, "true".to_owned()),
            (PUBLIC_IP, attrs.public_ip.to_string()),
        ]
        .map(|(end, value)| (self.name(end), value))
        .into()
    }

    /// The address that people want published instead of the uplink's.
    pub(super) fn overwrite(&self, values: &Values) -> Result<Option<Ipv4Addr>, String> {
        self.address(values, OVERWRITE)
    }

    /// The address that people want the node to use.
    pub(super) fn node_public_ip(&self, values: &Values) -> Result<Option<Ipv4Addr>, String> {
        self.address(values, NODE_PUBLIC_IP)
    }

    fn address(&self, values: &Values, end: &str) -> Result<Option<Ipv4Addr>, String> {
        let Some(text) = self.get(values, end).filter(|text| !text.is_empty()) else { return Ok(None) };
        flag_value::ipv4_address(text)
            .map(Some)
            .map_err(|right| format!("annotation {}: {text:?} {right}", self.name(end)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::lease::VtepData;

    const VTEP: VtepData = VtepData { vni: 1, vtep_mac: [0x12, 0xc6, 0x65, 0x89, 0xb4, 0xe3] };

    fn names() -> Annotations {
        Annotations::new("flannel.alpha.coreos.com/")
    }

    fn values(pairs: &[(&str, &str)]) -> Values {
        pairs
            .iter()
            .map(|(end, value)| (format!("flannel.alpha.coreos.com/{end}"), (*value).to_owned()))
            .collect()
    }

    fn ip() -> Ipv4Addr {
        [192, 168, 64, 3].into()
    }

    /// Each as flanneld leaves it on a node.
    fn flannels() -> [(LeaseAttrs, Values); 3] {
        let of = |kind, data| {
            values(&[
                ("backend-data", data),
                ("backend-type", kind),
                ("kube-subnet-manager", "true"),
                ("public-ip", "192.168.64.3"),
            ])
        };
        [
            (LeaseAttrs::vxlan(ip(), VTEP), of("vxlan", r#"{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}"#)),
            (LeaseAttrs::host_gw(ip()), of("host-gw", "null")),
            (LeaseAttrs::alloc(ip()), of("", "null")),
        ]
    }

    #[test]
    fn ours_are_byte_equal_to_flannels_and_read_back() {
        for (attrs, annotations) in flannels() {
            assert_eq!(names().wanted(&attrs), annotations);
            assert_eq!(names().read(&annotations), Said::Attrs(Box::new(attrs)));
        }
    }

    #[test]
    fn a_node_without_an_overlay_says_nothing() {
        for annotations in [values(&[]), values(&[("kube-subnet-manager", "false"), ("public-ip", "x")])] {
            assert_eq!(names().read(&annotations), Said::Nothing);
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let managed = ("kube-subnet-manager", "true");
        for (annotations, says) in [
            (values(&[managed]), "annotation flannel.alpha.coreos.com/public-ip: missing"),
            (values(&[managed, ("public-ip", "host")]), r#"public-ip: "host" must be an IPv4 address"#),
            (values(&[managed, ("public-ip", "0.0.0.0")]), "must be the IPv4 address of a host"),
            (values(&[managed, ("public-ip", "1.2.3.4"), ("backend-data", "{")]), "backend-data: not JSON"),
        ] {
            match names().read(&annotations) {
                Said::Wrong(reason) => assert!(reason.contains(says), "{reason:?} does not say {says:?}"),
                other => panic!("{other:?}"),
            }
        }
        let overwrite = names().overwrite(&values(&[("public-ip-overwrite", "::1")])).unwrap_err();
        assert!(overwrite.contains(r#"public-ip-overwrite: "::1" must be"#), "{overwrite}");
    }

    #[test]
    fn what_people_set_is_read() {
        let annotations = values(&[("public-ip-overwrite", "203.0.113.7"), ("node-public-ip", "10.0.0.9")]);
        assert_eq!(names().overwrite(&annotations), Ok(Some([203, 0, 113, 7].into())));
        assert_eq!(names().node_public_ip(&annotations), Ok(Some([10, 0, 0, 9].into())));
        assert_eq!(names().overwrite(&values(&[("public-ip-overwrite", "")])), Ok(None));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(ip in ".{0,20}", data in ".{0,60}", kind in ".{0,10}") {
            let annotations = values(&[("kube-subnet-manager", "true"), ("public-ip", &ip), ("backend-data", &data), ("backend-type", &kind)]);
            if let Said::Attrs(attrs) = names().read(&annotations) {
                let _ = attrs.vtep();
            }
        }
    }
}
