//! flannel's annotations of a node, to the byte: pure.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use serde_json::Value;

use crate::{config::flag_value, lease::LeaseAttrs};

/// The annotations that matter, by name.
pub(super) type Values = BTreeMap<String, String>;

/// What a backend says of a node in a family.
type Data = Option<Arc<Value>>;

/// The annotations' names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Annotations {
    prefix: String,
}

/// Who keeps the node's annotations: flannel, or an agent like it.
const MANAGED: &str = "kube-subnet-manager";
const TYPE: &str = "backend-type";
const DATA: &str = "backend-data";
const DATA_V6: &str = "backend-v6-data";
const PUBLIC_IP: &str = "public-ip";
const PUBLIC_IPV6: &str = "public-ipv6";
/// Set by people: what is published as the public address instead of the uplink's.
const OVERWRITE: &str = "public-ip-overwrite";
const OVERWRITE_V6: &str = "public-ipv6-overwrite";
/// Set by people: which address, and so which interface, the node uses.
const NODE_PUBLIC_IP: &str = "node-public-ip";
const NODE_PUBLIC_IPV6: &str = "node-public-ipv6";

/// What a node says of itself.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Said {
    /// No agent of an overlay runs there.
    Nothing,
    /// Where and what it is, as far as it can be understood, and what of it cannot: then a family's address is missing.
    Attrs(Box<LeaseAttrs>, Option<String>),
    /// Nothing of it can be understood, for this reason.
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
        let (v4, v6) = (self.read_v4(values), self.read_v6(values));
        let wrong: Vec<String> =
            [v4.as_ref().err(), v6.as_ref().err()].into_iter().flatten().cloned().collect();
        let wrong = (!wrong.is_empty()).then(|| wrong.join("; "));
        let (v4, v6) = (v4.ok().flatten(), v6.ok().flatten());
        if v4.is_none() && v6.is_none() {
            let missing = || format!("annotation {}: missing", self.name(PUBLIC_IP));
            return Said::Wrong(wrong.unwrap_or_else(missing));
        }
        let mut attrs = LeaseAttrs::of_type(self.get(values, TYPE).unwrap_or_default());
        if let Some((public_ip, data)) = v4 {
            (attrs.public_ip, attrs.backend_data) = (Some(public_ip), data);
        }
        if let Some((public_ipv6, data)) = v6 {
            (attrs.public_ipv6, attrs.backend_v6_data) = (Some(public_ipv6), data);
        }
        Said::Attrs(Box::new(attrs), wrong)
    }

    /// `None` where the node has no IPv4. Go's zero value stands for that as well: flannel writes it with host-gw.
    fn read_v4(&self, values: &Values) -> Result<Option<(Ipv4Addr, Data)>, String> {
        let has_v6 = self.get(values, PUBLIC_IPV6).is_some();
        if self.get(values, PUBLIC_IP) == Some("0.0.0.0") && has_v6 {
            return Ok(None);
        }
        let Some(address) = self.address(values, PUBLIC_IP, flag_value::ipv4_address)? else {
            return Ok(None);
        };
        Ok(Some((address, self.data(values, DATA)?)))
    }

    fn read_v6(&self, values: &Values) -> Result<Option<(Ipv6Addr, Data)>, String> {
        let found = self.address(values, PUBLIC_IPV6, flag_value::ipv6_address)?;
        let Some(address) = found else { return Ok(None) };
        Ok(Some((address, self.data(values, DATA_V6)?)))
    }

    fn data(&self, values: &Values, end: &str) -> Result<Data, String> {
        let Some(text) = self.get(values, end).filter(|text| !text.is_empty()) else { return Ok(None) };
        let value = serde_json::from_str::<Value>(text);
        let value = value.map_err(|error| format!("annotation {}: not JSON ({error})", self.name(end)))?;
        Ok(Some(value).filter(|value| !value.is_null()).map(Arc::new))
    }

    /// What the node's annotations must say, of those that we write: flannel's names and values. With vxlan it writes no
    /// family that the node does not have; with other backends those of IPv4 in any case.
    pub(super) fn wanted(&self, attrs: &LeaseAttrs) -> Values {
        let text = |data: &Data| data.as_ref().map_or_else(|| "null".to_owned(), ToString::to_string);
        let mut wanted = vec![(TYPE, attrs.backend_type.to_string()), (MANAGED, "true".to_owned())];
        if *attrs.backend_type != *"vxlan" || attrs.backend_data.is_some() {
            let public_ip = attrs.public_ip.unwrap_or(Ipv4Addr::UNSPECIFIED);
            wanted.extend([(DATA, text(&attrs.backend_data)), (PUBLIC_IP, public_ip.to_string())]);
        }
        // alloc's never says anything of IPv6.
        let says_v6 = attrs.backend_v6_data.is_some() || *attrs.backend_type == *"host-gw";
        if let Some(public_ipv6) = attrs.public_ipv6.filter(|_| says_v6) {
            wanted.extend([(DATA_V6, text(&attrs.backend_v6_data)), (PUBLIC_IPV6, public_ipv6.to_string())]);
        }
        wanted.into_iter().map(|(end, value)| (self.name(end), value)).collect()
    }

    /// Those of a family that the node no longer has: others would still send there.
    pub(super) fn outdated(&self, values: &Values, attrs: &LeaseAttrs) -> Vec<String> {
        let wanted = self.wanted(attrs);
        let of_families = [DATA, PUBLIC_IP, DATA_V6, PUBLIC_IPV6].map(|end| self.name(end));
        of_families
            .into_iter()
            .filter(|name| values.contains_key(name) && !wanted.contains_key(name))
            .collect()
    }

    /// The address that people want published instead of the uplink's.
    pub(super) fn overwrite(&self, values: &Values) -> Result<Option<Ipv4Addr>, String> {
        self.address(values, OVERWRITE, flag_value::ipv4_address)
    }

    /// The same of IPv6.
    pub(super) fn overwrite_v6(&self, values: &Values) -> Result<Option<Ipv6Addr>, String> {
        self.address(values, OVERWRITE_V6, flag_value::ipv6_address)
    }

    /// The address that people want the node to use.
    pub(super) fn node_public_ip(&self, values: &Values) -> Result<Option<Ipv4Addr>, String> {
        self.address(values, NODE_PUBLIC_IP, flag_value::ipv4_address)
    }

    /// The same of IPv6.
    pub(super) fn node_public_ipv6(&self, values: &Values) -> Result<Option<Ipv6Addr>, String> {
        self.address(values, NODE_PUBLIC_IPV6, flag_value::ipv6_address)
    }

    fn address<A>(
        &self,
        values: &Values,
        end: &str,
        parse: impl FnOnce(&str) -> Result<A, String>,
    ) -> Result<Option<A>, String> {
        let Some(text) = self.get(values, end).filter(|text| !text.is_empty()) else { return Ok(None) };
        parse(text).map(Some).map_err(|right| format!("annotation {}: {text:?} {right}", self.name(end)))
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
            assert_eq!(names().read(&annotations), Said::Attrs(Box::new(attrs), None));
        }
    }

    #[test]
    fn those_of_two_families_and_of_ipv6_alone_are_byte_equal_to_flannels_and_read_back() {
        let ipv6 = "fd77::3".parse().unwrap();
        let vtep_v6 = VtepData { vni: 1, vtep_mac: [0x0a, 0, 0, 0, 0, 3] };
        let data = r#"{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}"#;
        let data_v6 = r#"{"VNI":1,"VtepMAC":"0a:00:00:00:00:03"}"#;
        let of = |kind: &str, rest: &[(&str, &str)]| {
            let mut all = values(&[("backend-type", kind), ("kube-subnet-manager", "true")]);
            all.extend(values(rest));
            all
        };
        let v6 = [("backend-v6-data", data_v6), ("public-ipv6", "fd77::3")];
        let null_v6 = [("backend-v6-data", "null"), ("public-ipv6", "fd77::3")];
        for (attrs, annotations) in [
            (
                LeaseAttrs::vxlan(ip(), VTEP).with_v6(ipv6, Some(vtep_v6)),
                of("vxlan", &[&[("backend-data", data), ("public-ip", "192.168.64.3")], &v6[..]].concat()),
            ),
            (LeaseAttrs::of_type("vxlan").with_v6(ipv6, Some(vtep_v6)), of("vxlan", &v6)),
            (
                LeaseAttrs::host_gw(ip()).with_v6(ipv6, None),
                of(
                    "host-gw",
                    &[&[("backend-data", "null"), ("public-ip", "192.168.64.3")], &null_v6[..]].concat(),
                ),
            ),
            (
                LeaseAttrs::of_type("host-gw").with_v6(ipv6, None),
                of(
                    "host-gw",
                    &[&[("backend-data", "null"), ("public-ip", "0.0.0.0")], &null_v6[..]].concat(),
                ),
            ),
        ] {
            assert_eq!(names().wanted(&attrs), annotations);
            assert_eq!(names().read(&annotations), Said::Attrs(Box::new(attrs), None));
        }
        let before = names().wanted(&LeaseAttrs::vxlan(ip(), VTEP).with_v6(ipv6, Some(vtep_v6)));
        let gone: Vec<_> = ["backend-v6-data", "public-ipv6"].map(|end| names().name(end)).into();
        assert_eq!(names().outdated(&before, &LeaseAttrs::vxlan(ip(), VTEP)), gone);
    }

    #[test]
    fn what_is_wrong_in_one_family_leaves_the_other() {
        let managed =
            [("kube-subnet-manager", "true"), ("backend-type", "host-gw"), ("public-ip", "192.168.64.3")];
        let annotations = values(&[&managed[..], &[("public-ipv6", "fe80::3")]].concat());
        let wrong = r#"annotation flannel.alpha.coreos.com/public-ipv6: "fe80::3" must be an IPv6 address that other hosts reach, such as 2001:db8::1"#;
        let attrs = Box::new(LeaseAttrs::host_gw(ip()));
        assert_eq!(names().read(&annotations), Said::Attrs(attrs, Some(wrong.into())));
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
        let annotations = values(&[
            ("public-ip-overwrite", "203.0.113.7"),
            ("node-public-ip", "10.0.0.9"),
            ("public-ipv6-overwrite", "2001:db8::7"),
            ("node-public-ipv6", "fd77::9"),
        ]);
        assert_eq!(names().overwrite_v6(&annotations), Ok(Some("2001:db8::7".parse().unwrap())));
        assert_eq!(names().node_public_ipv6(&annotations), Ok(Some("fd77::9".parse().unwrap())));
        assert_eq!(names().overwrite(&annotations), Ok(Some([203, 0, 113, 7].into())));
        assert_eq!(names().node_public_ip(&annotations), Ok(Some([10, 0, 0, 9].into())));
        assert_eq!(names().overwrite(&values(&[("public-ip-overwrite", "")])), Ok(None));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(ip in ".{0,20}", data in ".{0,60}", kind in ".{0,10}") {
            let annotations = values(&[("kube-subnet-manager", "true"), ("public-ip", &ip), ("backend-data", &data), ("backend-type", &kind)]);
            if let Said::Attrs(attrs, _) = names().read(&annotations) {
                let _ = attrs.vtep();
            }
        }
    }
}
