//! The value of a lease: flannel's `LeaseAttrs` JSON.
//!
//! Written as Go's `encoding/json` writes the struct: fields in its order, `PublicIPv6` always there (`null`),
//! the others only where they are set, no blanks.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use serde::{Serialize, Serializer};
use serde_json::{Value, json};
use thiserror::Error;

use crate::{
    family::{Family, V6},
    network::{DEFAULT_VNI, Object, ObjectError, excerpt, quoted},
    wireguard::PublicKey,
};

/// Where a node is and how to reach it. It has a public address of one family at least. Clones share what is long.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LeaseAttrs {
    /// The address that peers send to (of the VTEP, with vxlan). Also the node's identity. Go's zero value,
    /// `0.0.0.0`, says that there is none.
    #[serde(rename = "PublicIP", serialize_with = "zero_for_none")]
    pub public_ip: Option<Ipv4Addr>,
    /// The same for IPv6; the identity of a node that has no other.
    #[serde(rename = "PublicIPv6")]
    pub public_ipv6: Option<Ipv6Addr>,
    /// `vxlan`, `host-gw`, or another that flannel knows; empty for alloc.
    #[serde(rename = "BackendType", serialize_with = "text", skip_serializing_if = "str::is_empty")]
    pub backend_type: Arc<str>,
    /// What peers need besides the address; its shape depends on the backend.
    #[serde(rename = "BackendData", serialize_with = "data", skip_serializing_if = "Option::is_none")]
    pub backend_data: Option<Arc<Value>>,
    /// The same for IPv6.
    #[serde(rename = "BackendV6Data", serialize_with = "data", skip_serializing_if = "Option::is_none")]
    pub backend_v6_data: Option<Arc<Value>>,
}

/// `BackendData` of the vxlan backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VtepData {
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// The VTEP's MAC address: inner destination of what is sent to the node.
    pub vtep_mac: [u8; 6],
}

/// `BackendData` of the wireguard backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireguardData {
    /// The node's key.
    pub public_key: PublicKey,
    /// UDP port of the node's device; `None` in leases of old flannels.
    pub port: Option<u16>,
}

/// What is wrong with a lease's value.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0}")]
pub struct AttrsError(String);

impl From<ObjectError> for AttrsError {
    fn from(error: ObjectError) -> Self {
        Self(error.to_string())
    }
}

impl LeaseAttrs {
    /// A lease of the vxlan backend.
    #[must_use]
    pub fn vxlan(public_ip: Ipv4Addr, vtep: VtepData) -> Self {
        Self::of_type("vxlan").with_v4(public_ip, Some(vtep))
    }

    /// A lease of the host-gw backend.
    #[must_use]
    pub fn host_gw(public_ip: Ipv4Addr) -> Self {
        Self::of_type("host-gw").with_v4(public_ip, None)
    }

    /// A lease of the alloc backend.
    #[must_use]
    pub fn alloc(public_ip: Ipv4Addr) -> Self {
        Self::of_type("").with_v4(public_ip, None)
    }

    /// A lease of a backend, still without an address.
    #[must_use]
    pub fn of_type(backend_type: &str) -> Self {
        let backend_type = backend_type.into();
        Self { public_ip: None, public_ipv6: None, backend_type, backend_data: None, backend_v6_data: None }
    }

    /// The same with the IPv4 half; the vxlan backend has a VTEP.
    #[must_use]
    pub fn with_v4(self, public_ip: Ipv4Addr, vtep: Option<VtepData>) -> Self {
        let backend_data = vtep.map(|vtep| Arc::new(vtep.to_value()));
        Self { public_ip: Some(public_ip), backend_data, ..self }
    }

    /// The same with the IPv6 half; the vxlan backend has a VTEP of its own there.
    #[must_use]
    pub fn with_v6(self, public_ipv6: Ipv6Addr, vtep: Option<VtepData>) -> Self {
        let backend_v6_data = vtep.map(|vtep| Arc::new(vtep.to_value()));
        Self { public_ipv6: Some(public_ipv6), backend_v6_data, ..self }
    }

    /// The same with key and port of the wireguard backend, in the halves that have an address.
    #[must_use]
    pub fn with_wireguard(self, v4: WireguardData, v6: WireguardData) -> Self {
        let backend_data = self.public_ip.map(|_| Arc::new(v4.to_value()));
        let backend_v6_data = self.public_ipv6.map(|_| Arc::new(v6.to_value()));
        Self { backend_data, backend_v6_data, ..self }
    }

    /// What tells the node from others: its public address, IPv4 where it has one.
    #[must_use]
    pub fn identity(&self) -> Option<IpAddr> {
        self.public_ip.map(IpAddr::V4).or(self.public_ipv6.map(IpAddr::V6))
    }

    /// Whether both are of one node. Where one of them knows no IPv4 address, the IPv6 address tells: a network may
    /// have changed its families in between.
    #[must_use]
    pub fn is_of_node_of(&self, other: &Self) -> bool {
        match (self.public_ip, other.public_ip) {
            (Some(ours), Some(theirs)) => ours == theirs,
            _ => self.public_ipv6.is_some() && self.public_ipv6 == other.public_ipv6,
        }
    }

    /// The public address of a family.
    #[must_use]
    pub fn public<F: Family>(&self) -> Option<F::Addr> {
        [self.public_ip.map(IpAddr::V4), self.public_ipv6.map(IpAddr::V6)]
            .into_iter()
            .flatten()
            .find_map(F::addr)
    }

    /// The JSON text, equal to flannel's for the same lease.
    #[must_use]
    pub fn to_json(&self) -> String {
        // Strings, numbers and maps with string keys only: none of them can fail.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Reads a value from etcd, of any backend.
    ///
    /// # Errors
    ///
    /// Where it is no JSON object, where there is no public address or one that no host has, and where another field
    /// is not of its type.
    pub fn parse(value: &[u8]) -> Result<Self, AttrsError> {
        let text = std::str::from_utf8(value).map_err(|_| AttrsError("not UTF-8".into()))?;
        let object = Object::parse(text)?;
        let backend_type = object.string("BackendType")?.unwrap_or_default().into();
        let public_ipv6 = public_ipv6(&object)?;
        Ok(Self {
            public_ip: public_ip(&object, public_ipv6)?,
            public_ipv6,
            backend_type,
            backend_data: object.value("BackendData").cloned().map(Arc::new),
            backend_v6_data: object.value("BackendV6Data").cloned().map(Arc::new),
        })
    }

    /// The VTEP of a vxlan lease.
    ///
    /// # Errors
    ///
    /// Where the lease is of another backend, or its data is missing or wrong.
    pub fn vtep(&self) -> Result<VtepData, AttrsError> {
        self.vtep_of("BackendData", "BackendData.", self.backend_data.as_deref())
    }

    /// The VTEP of the IPv6 half of a vxlan lease.
    ///
    /// # Errors
    ///
    /// As [`Self::vtep`].
    pub fn vtep_v6(&self) -> Result<VtepData, AttrsError> {
        self.vtep_of("BackendV6Data", "BackendV6Data.", self.backend_v6_data.as_deref())
    }

    /// The VTEP of a family.
    ///
    /// # Errors
    ///
    /// As [`Self::vtep`].
    pub fn vtep_of_family<F: Family>(&self) -> Result<VtepData, AttrsError> {
        if F::BITS == V6::BITS { self.vtep_v6() } else { self.vtep() }
    }

    /// Key and port of a family of a wireguard lease.
    ///
    /// # Errors
    ///
    /// As [`Self::vtep`].
    pub fn wireguard<F: Family>(&self) -> Result<WireguardData, AttrsError> {
        let (key, path, data) = if F::BITS == V6::BITS {
            ("BackendV6Data", "BackendV6Data.", self.backend_v6_data.as_deref())
        } else {
            ("BackendData", "BackendData.", self.backend_data.as_deref())
        };
        WireguardData::read(path, &self.data_of("wireguard", key, path, data)?)
    }

    fn vtep_of(&self, key: &str, path: &'static str, data: Option<&Value>) -> Result<VtepData, AttrsError> {
        let as_written = data.filter(|_| *self.backend_type == *"vxlan").and_then(VtepData::read_as_written);
        as_written.map_or_else(|| VtepData::read(path, &self.data_of("vxlan", key, path, data)?), Ok)
    }

    fn data_of(
        &self,
        backend_type: &str,
        key: &str,
        path: &'static str,
        data: Option<&Value>,
    ) -> Result<Object, AttrsError> {
        if *self.backend_type != *backend_type {
            let found = quoted(&self.backend_type);
            return Err(AttrsError(format!("BackendType is {found}, not {backend_type:?}")));
        }
        match data {
            Some(Value::Object(data)) => Ok(Object::new(path, data.clone())),
            Some(other) => Err(AttrsError(format!("{key} must be an object, not {}", excerpt(other)))),
            None => Err(AttrsError(format!("{key} is missing"))),
        }
    }
}

impl WireguardData {
    fn to_value(self) -> Value {
        match self.port {
            Some(port) => json!({ "PublicKey": self.public_key.to_string(), "Port": port }),
            None => json!({ "PublicKey": self.public_key.to_string() }),
        }
    }

    fn read(path: &str, object: &Object) -> Result<Self, AttrsError> {
        let port = object.unsigned("Port", u16::MAX.into())?.and_then(|port| u16::try_from(port).ok());
        let text =
            object.string("PublicKey")?.ok_or_else(|| AttrsError(format!("{path}PublicKey is missing")))?;
        let public_key = text
            .parse()
            .map_err(|error| AttrsError(format!("{path}PublicKey {} is {error}", quoted(text))))?;
        Ok(Self { public_key, port: port.filter(|port| *port != 0) })
    }
}

impl VtepData {
    fn to_value(self) -> Value {
        let [a, b, c, d, e, f] = self.vtep_mac;
        json!({ "VNI": self.vni, "VtepMAC": format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}") })
    }

    /// Reads what is spelt as all write it, without a copy: there may be 65 000 of them.
    fn read_as_written(data: &Value) -> Option<Self> {
        let data = data.as_object().filter(|data| data.len() == 2)?;
        let vni = data.get("VNI")?.as_u64().filter(|vni| *vni < 1 << 24)?;
        let vtep_mac = parse_mac(data.get("VtepMAC")?.as_str()?)?;
        Some(Self { vni: u32::try_from(vni).ok()?, vtep_mac })
    }

    fn read(path: &str, object: &Object) -> Result<Self, AttrsError> {
        // Leases of old flannels have no VNI.
        let vni = object.unsigned("VNI", (1 << 24) - 1)?.and_then(|vni| u32::try_from(vni).ok());
        let text =
            object.string("VtepMAC")?.ok_or_else(|| AttrsError(format!("{path}VtepMAC is missing")))?;
        let vtep_mac = parse_mac(text).ok_or_else(|| {
            AttrsError(format!(
                "{path}VtepMAC {} is no MAC address of one device such as \"c6:d2:32:6f:8f:44\"",
                quoted(text)
            ))
        })?;
        Ok(Self { vni: vni.unwrap_or(DEFAULT_VNI), vtep_mac })
    }
}

/// It may be missing, or Go's zero value, where the node has the other.
fn public_ip(object: &Object, public_ipv6: Option<Ipv6Addr>) -> Result<Option<Ipv4Addr>, AttrsError> {
    let Some(text) = object.string("PublicIP")? else {
        return match public_ipv6 {
            Some(_) => Ok(None),
            None => Err(AttrsError("PublicIP is missing, and PublicIPv6 too".into())),
        };
    };
    match text.parse::<Ipv4Addr>() {
        Ok(ip) if ip.is_unspecified() && public_ipv6.is_some() => Ok(None),
        Ok(ip) if !ip.is_unspecified() && !ip.is_multicast() && !ip.is_broadcast() => Ok(Some(ip)),
        _ => Err(AttrsError(format!("PublicIP {} is not the IPv4 address of a host", quoted(text)))),
    }
}

fn zero_for_none<S: Serializer>(ip: &Option<Ipv4Addr>, serializer: S) -> Result<S::Ok, S::Error> {
    ip.unwrap_or(Ipv4Addr::UNSPECIFIED).serialize(serializer)
}

fn text<S: Serializer>(text: &str, serializer: S) -> Result<S::Ok, S::Error> {
    text.serialize(serializer)
}

fn data<S: Serializer>(data: &Option<Arc<Value>>, serializer: S) -> Result<S::Ok, S::Error> {
    data.as_deref().serialize(serializer)
}

fn public_ipv6(object: &Object) -> Result<Option<Ipv6Addr>, AttrsError> {
    let Some(text) = object.string("PublicIPv6")? else { return Ok(None) };
    match text.parse() {
        Ok(ip) if V6::is_host(ip) => Ok(Some(ip)),
        Ok(_) => Err(AttrsError(format!("PublicIPv6 {} is not the IPv6 address of a host", quoted(text)))),
        Err(_) => Err(AttrsError(format!("PublicIPv6 {} is not an IPv6 address", quoted(text)))),
    }
}

/// Six octets in two hexadecimal digits each, parted by colons or hyphens; neither zero nor a group address.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut octets = text.split(if text.contains('-') { '-' } else { ':' });
    for byte in &mut mac {
        let octet = octets.next().filter(|octet| octet.len() == 2 && octet.is_ascii())?;
        *byte = u8::from_str_radix(octet, 16).ok()?;
    }
    (octets.next().is_none() && mac != [0; 6] && mac[0] & 1 == 0).then_some(mac)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::family::V4;

    const VTEP: VtepData = VtepData { vni: 1, vtep_mac: [0xc6, 0xd2, 0x32, 0x6f, 0x8f, 0x44] };
    /// Verbatim from flannel's Documentation/reservations.md.
    const VXLAN: &str = r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#;
    const DUAL: &str = r#"{"PublicIP":"192.168.64.3","PublicIPv6":"fd00::3","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"},"BackendV6Data":{"VNI":1,"VtepMAC":"0a:d2:32:6f:8f:45"}}"#;

    fn ip() -> Ipv4Addr {
        Ipv4Addr::new(192, 168, 64, 3)
    }

    #[test]
    fn ours_are_byte_equal_to_flannels() {
        assert_eq!(LeaseAttrs::vxlan(ip(), VTEP).to_json(), VXLAN);
        assert_eq!(
            LeaseAttrs::host_gw(ip()).to_json(),
            r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"host-gw"}"#
        );
        assert_eq!(LeaseAttrs::alloc(ip()).to_json(), r#"{"PublicIP":"192.168.64.3","PublicIPv6":null}"#);
    }

    /// As flannel v0.28 writes them: single stack, and dual stack, where both devices have one key.
    const WIREGUARD: &str = r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"wireguard","BackendData":{"PublicKey":"hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=","Port":51820}}"#;
    const WIREGUARD_DUAL: &str = r#"{"PublicIP":"192.168.64.3","PublicIPv6":"fd00::3","BackendType":"wireguard","BackendData":{"PublicKey":"hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=","Port":51820},"BackendV6Data":{"PublicKey":"hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=","Port":51821}}"#;

    #[test]
    fn wireguards_are_byte_equal_to_flannels_and_read_again() {
        let public_key = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=".parse().unwrap();
        let data = |port| WireguardData { public_key, port: Some(port) };
        let single = LeaseAttrs::of_type("wireguard").with_v4(ip(), None);
        let dual = single.clone().with_v6("fd00::3".parse().unwrap(), None);
        assert_eq!(single.with_wireguard(data(51820), data(51821)).to_json(), WIREGUARD);
        assert_eq!(dual.with_wireguard(data(51820), data(51821)).to_json(), WIREGUARD_DUAL);
        let read = LeaseAttrs::parse(WIREGUARD_DUAL.as_bytes()).unwrap();
        assert_eq!((read.wireguard::<V4>(), read.wireguard::<V6>()), (Ok(data(51820)), Ok(data(51821))));
        assert!(read.vtep().unwrap_err().to_string().contains(r#"BackendType is "wireguard", not "vxlan""#));
    }

    #[test]
    fn a_wireguard_lease_of_an_old_flannel_has_no_port() {
        let json = r#"{"PublicIP":"192.168.64.3","BackendType":"wireguard","BackendData":{"PublicKey":"hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo="}}"#;
        assert_eq!(LeaseAttrs::parse(json.as_bytes()).unwrap().wireguard::<V4>().unwrap().port, None);
        let json = json.replace("hSDw", "hS");
        let error = LeaseAttrs::parse(json.as_bytes()).unwrap().wireguard::<V4>().unwrap_err().to_string();
        assert!(
            error.contains("BackendData.PublicKey \"hSCYk") && error.contains("is not 32 bytes"),
            "{error}"
        );
    }

    #[test]
    fn flannels_of_every_backend_are_read_and_written_back_to_the_byte() {
        for json in [
            VXLAN,
            DUAL,
            r#"{"PublicIP":"192.168.64.3","PublicIPv6":"fd00::3","BackendType":"host-gw"}"#,
            r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"wireguard","BackendData":{"PublicKey":"bm90IGEga2V5","Port":51820}}"#,
            r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"extension","BackendData":"a\nb"}"#,
        ] {
            assert_eq!(LeaseAttrs::parse(json.as_bytes()).unwrap().to_json(), json);
        }
        let dual = LeaseAttrs::parse(DUAL.as_bytes()).unwrap();
        assert_eq!((dual.vtep().unwrap(), dual.public_ipv6), (VTEP, Some("fd00::3".parse().unwrap())));
        let vtep_v6 = VtepData { vni: 1, vtep_mac: [0x0a, 0xd2, 0x32, 0x6f, 0x8f, 0x45] };
        assert_eq!(dual.vtep_v6().unwrap(), vtep_v6);
        let ours = LeaseAttrs::vxlan(ip(), VTEP).with_v6("fd00::3".parse().unwrap(), Some(vtep_v6));
        assert_eq!(ours.to_json(), DUAL);
        let half = LeaseAttrs::vxlan(ip(), VTEP).vtep_v6().unwrap_err();
        assert_eq!(half.to_string(), "BackendV6Data is missing");
    }

    /// As flannel's own code puts it together for IPv6 alone, where its API asks for that (Kubernetes).
    const V6_ONLY: &str = r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd00::3","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#;

    #[test]
    fn ipv6_alone_has_gos_zero_value_for_a_public_ip() {
        let attrs = LeaseAttrs::of_type("vxlan").with_v6("fd00::3".parse().unwrap(), Some(VTEP));
        assert_eq!(attrs.to_json(), V6_ONLY);
        assert_eq!(LeaseAttrs::parse(V6_ONLY.as_bytes()).unwrap(), attrs);
        assert_eq!(attrs.identity(), Some("fd00::3".parse().unwrap()));
        assert_eq!((attrs.public::<V4>(), attrs.public::<V6>()), (None, attrs.public_ipv6));
        assert_eq!((attrs.vtep_of_family::<V6>(), attrs.vtep_of_family::<V4>().is_err()), (Ok(VTEP), true));
        let reservation = LeaseAttrs::parse(br#"{"PublicIPv6":"fd00::3"}"#).unwrap();
        assert!(reservation.is_of_node_of(&attrs));
        for wrong in ["::", "ff02::1", "::1"] {
            let json = format!(r#"{{"PublicIP":"0.0.0.0","PublicIPv6":"{wrong}"}}"#);
            let error = LeaseAttrs::parse(json.as_bytes()).unwrap_err().to_string();
            assert_eq!(error, format!("PublicIPv6 {wrong:?} is not the IPv6 address of a host"));
        }
    }

    #[test]
    fn a_node_is_known_by_its_ipv4_address_and_without_one_by_its_ipv6_address() {
        let of = |json: &str| LeaseAttrs::parse(json.as_bytes()).unwrap();
        let (v4, dual, v6) = (of(VXLAN), of(DUAL), of(V6_ONLY));
        assert!(v4.is_of_node_of(&dual) && dual.is_of_node_of(&v6) && v6.is_of_node_of(&dual));
        assert!(!v4.is_of_node_of(&v6), "nothing tells");
        let other = LeaseAttrs { public_ip: Some([192, 168, 64, 4].into()), ..dual.clone() };
        assert!(!other.is_of_node_of(&dual), "one IPv6 address does not make one node of two");
    }

    #[test]
    fn a_vtep_is_read_in_gos_other_spellings() {
        let json = r#" {"publicip":"192.168.64.3","backendtype":"vxlan","BACKENDDATA":{"vtepmac":"C6-D2-32-6F-8F-44"}} "#;
        assert_eq!(LeaseAttrs::parse(json.as_bytes()).unwrap().vtep().unwrap(), VTEP);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let parse = |json: &str| LeaseAttrs::parse(json.as_bytes()).and_then(|attrs| attrs.vtep());
        for (json, says) in [
            ("garbage", "not JSON"),
            ("null", "must be a JSON object, not null"),
            ("{}", "PublicIP is missing"),
            (r#"{"PublicIP":"host"}"#, r#"PublicIP "host" is not the IPv4 address of a host"#),
            (r#"{"PublicIP":"0.0.0.0"}"#, "is not the IPv4 address of a host"),
            (
                r#"{"PublicIP":"1.2.3.4","PublicIPv6":"1.2.3.4"}"#,
                r#"PublicIPv6 "1.2.3.4" is not an IPv6 address"#,
            ),
            (r#"{"PublicIP":"1.2.3.4","BackendType":5}"#, "BackendType must be a string, not 5"),
            (r#"{"PublicIP":"1.2.3.4"}"#, r#"BackendType is "", not "vxlan""#),
            (r#"{"PublicIP":"1.2.3.4","BackendType":"vxlan"}"#, "BackendData is missing"),
            (
                r#"{"PublicIP":"1.2.3.4","BackendType":"vxlan","BackendData":"x"}"#,
                "BackendData must be an object",
            ),
            (
                r#"{"PublicIP":"1.2.3.4","BackendType":"vxlan","BackendData":{"VNI":1}}"#,
                "BackendData.VtepMAC is missing",
            ),
            (
                r#"{"PublicIP":"1.2.3.4","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"ff:ff:ff:ff:ff:ff"}}"#,
                r#"BackendData.VtepMAC "ff:ff:ff:ff:ff:ff" is no MAC address"#,
            ),
            (
                r#"{"PublicIP":"1.2.3.4","BackendType":"vxlan","BackendData":{"VNI":16777216,"VtepMAC":"02:00:00:00:00:01"}}"#,
                "BackendData.VNI must be a whole number of 0 to 16777215, not 16777216",
            ),
        ] {
            let error = parse(json).unwrap_err().to_string();
            assert!(error.contains(says), "{json}: {error:?} does not say {says:?}");
        }
    }

    proptest! {
        #[test]
        fn any_vtep_survives_the_way_there_and_back(ip in 1_u32..0xe000_0000, vni in 0_u32..1 << 24, mac in any::<[u8; 6]>()) {
            let mut vtep_mac = mac;
            vtep_mac[0] = mac[0] & !1 | 2;
            let attrs = LeaseAttrs::vxlan(ip.into(), VtepData { vni, vtep_mac });
            let back = LeaseAttrs::parse(attrs.to_json().as_bytes()).unwrap();
            prop_assert_eq!(back.vtep().unwrap(), VtepData { vni, vtep_mac });
            prop_assert_eq!(back, attrs);
        }

        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = LeaseAttrs::parse(&bytes);
        }
    }
}
