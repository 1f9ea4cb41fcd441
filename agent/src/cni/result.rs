//! What ADD answers, in the layout of each version, and what CHECK reads back of it.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use serde_json::{Map, Value, json};

use super::{
    addresses::Addresses,
    error::{CniError, Result, code},
    record::parse_mac,
    request::{Attachment, Conf, version_at},
};
use crate::kernel::mac_text;

/// The pods' way out: an address that is the same in every pod, on no interface, and known to the pod by a
/// permanent neighbour entry. Link-local (RFC 3927), so that it is never routed.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The same of IPv6 (RFC 4291, 2.5.6).
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// A routed pod as it was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Name of the host's end.
    pub host: String,
    /// Its MAC.
    pub host_mac: [u8; 6],
    /// MAC of the pod's interface.
    pub mac: [u8; 6],
    /// The pod's addresses.
    pub addresses: Addresses,
    /// MTU of both ends, in bytes.
    pub mtu: u32,
}

impl Attached {
    /// The answer to ADD: this pod, behind what earlier plugins of the chain answered. `dns` is what the address
    /// plugin said of it.
    ///
    /// # Errors
    ///
    /// Code 7 where `prevResult` is not a result.
    pub fn answer(
        &self,
        conf: &Conf,
        attachment: &Attachment,
        netns: &Path,
        dns: Option<Value>,
    ) -> Result<Value> {
        let mut result = conf.previous()?.cloned().unwrap_or_default();
        result.insert("cniVersion".into(), conf.version.into());
        let interfaces = list(&mut result, "interfaces")?;
        let pod_at = interfaces.len() + 1;
        let mut host = json!({ "name": self.host, "mac": mac_text(self.host_mac) });
        let mut pod = json!({
            "name": attachment.interface, "mac": mac_text(self.mac), "sandbox": netns.display().to_string(),
        });
        if version_at(conf.version) >= version_at("1.1.0") {
            host["mtu"] = self.mtu.into();
            pod["mtu"] = self.mtu.into();
        }
        interfaces.extend([host, pod]);
        for address in self.addresses.iter() {
            let (length, gateway, all, version) = match address {
                IpAddr::V4(_) => (32, IpAddr::from(GATEWAY), "0.0.0.0/0", "4"),
                IpAddr::V6(_) => (128, GATEWAY_V6.into(), "::/0", "6"),
            };
            let mut ip =
                json!({ "address": format!("{address}/{length}"), "gateway": gateway, "interface": pod_at });
            if !conf.is_modern() {
                ip["version"] = version.into();
            }
            list(&mut result, "ips")?.push(ip);
            list(&mut result, "routes")?.push(json!({ "dst": all, "gw": gateway }));
        }
        // What the configuration says of names counts before what the address plugin says.
        let dns = conf.object("dns")?.cloned().map(Value::Object).or(dns);
        if let Some(dns) = dns.filter(|dns| dns.as_object().is_some_and(|dns| !dns.is_empty())) {
            result.insert("dns".into(), dns);
        } else {
            result.entry("dns").or_insert_with(|| json!({}));
        }
        Ok(Value::Object(result))
    }

    /// Reads this plugin's part of an earlier answer.
    ///
    /// # Errors
    ///
    /// Code 7 where it is not there.
    pub fn from_previous(previous: &Map<String, Value>, attachment: &Attachment) -> Result<Self> {
        let missing =
            |what: &str| CniError::new(code::BAD_CONFIG, format_args!("\"prevResult\" has no {what}"));
        let empty = Vec::new();
        let interfaces = previous.get("interfaces").and_then(Value::as_array).unwrap_or(&empty);
        let is_pod = |item: &&Value| {
            item["name"] == attachment.interface.as_str()
                && item["sandbox"].as_str().is_some_and(|sandbox| !sandbox.is_empty())
        };
        let mac = |item: &Value| item["mac"].as_str().and_then(parse_mac);
        let at = interfaces
            .iter()
            .position(|item| is_pod(&item))
            .ok_or_else(|| missing(&format!("interface {} of the container", attachment.interface)))?;
        let host = at.checked_sub(1).and_then(|at| interfaces.get(at));
        let host = host.ok_or_else(|| missing("interface on the host before the container's"))?;
        let ips = previous.get("ips").and_then(Value::as_array).unwrap_or(&empty);
        let of_pod = ips
            .iter()
            .filter(|ip| ip["interface"].as_u64().and_then(|i| usize::try_from(i).ok()) == Some(at));
        let addresses: Vec<IpAddr> = of_pod.filter_map(address).collect();
        Ok(Self {
            host: host["name"].as_str().unwrap_or_default().to_owned(),
            host_mac: mac(host).ok_or_else(|| missing("MAC of the interface on the host"))?,
            mac: mac(&interfaces[at]).ok_or_else(|| missing("MAC of the container's interface"))?,
            addresses: Addresses::of(&addresses)
                .ok_or_else(|| missing("one address of a family of the container's interface"))?,
            mtu: 0,
        })
    }
}

/// The list at a key of a result; made where there is none.
fn list<'a>(result: &'a mut Map<String, Value>, key: &str) -> Result<&'a mut Vec<Value>> {
    let value = result.entry(key).or_insert(Value::Null);
    if value.is_null() {
        *value = Value::Array(Vec::new());
    }
    value.as_array_mut().ok_or_else(|| {
        CniError::new(code::BAD_CONFIG, format_args!("\"prevResult\": its \"{key}\" must be a list"))
    })
}

/// The address of an item of `ips`, which has its prefix length behind.
fn address(ip: &Value) -> Option<IpAddr> {
    ip["address"].as_str()?.split_once('/')?.0.parse().ok()
}

/// The addresses that an address plugin gave, and what it says of names.
///
/// # Errors
///
/// Code 7 where it gave none, or several of a family.
pub fn allocated(answer: Option<&Value>, plugin: &str) -> Result<(Addresses, Option<Value>)> {
    let wrong =
        |why: String| CniError::new(code::BAD_CONFIG, format_args!("\"ipam\": the plugin {plugin} {why}"));
    let ips = answer.and_then(|answer| answer["ips"].as_array()).map(Vec::as_slice).unwrap_or_default();
    let each = |ip: &Value| {
        address(ip).ok_or_else(|| wrong(format!("gave {ip}; an address and prefix length is wanted")))
    };
    let all: Vec<IpAddr> = ips.iter().map(each).collect::<Result<_>>()?;
    let addresses = Addresses::of(&all).ok_or_else(|| {
        let shown: Vec<String> = all.iter().map(ToString::to_string).collect();
        wrong(format!("gave {} addresses ({}); one of each family is wanted", all.len(), shown.join(", ")))
    })?;
    let dns = answer.and_then(|answer| answer.get("dns")).cloned();
    Ok((addresses, dns))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cni::request::Command;

    fn attached() -> Attached {
        Attached {
            host: "pod1".into(),
            host_mac: [2, 0, 0, 0, 0, 1],
            mac: [2, 0, 0, 0, 0, 2],
            addresses: "10.5.1.2".parse().unwrap(),
            mtu: 1450,
        }
    }

    fn attachment() -> Attachment {
        Attachment { container: "c".into(), interface: "eth0".into() }
    }

    fn answer(conf: &str) -> Value {
        let conf = Conf::parse(conf.as_bytes(), Command::Add).unwrap();
        attached().answer(&conf, &attachment(), Path::new("/run/netns/p"), None).unwrap()
    }

    #[test]
    fn each_version_gets_its_own_layout() {
        let of =
            |version: &str| answer(&format!(r#"{{"cniVersion":"{version}","name":"n","type":"loden-cni"}}"#));
        assert_eq!(
            of("1.0.0"),
            json!({
                "cniVersion": "1.0.0",
                "interfaces": [
                    { "name": "pod1", "mac": "02:00:00:00:00:01" },
                    { "name": "eth0", "mac": "02:00:00:00:00:02", "sandbox": "/run/netns/p" },
                ],
                "ips": [{ "address": "10.5.1.2/32", "gateway": "169.254.1.1", "interface": 1 }],
                "routes": [{ "dst": "0.0.0.0/0", "gw": "169.254.1.1" }],
                "dns": {},
            })
        );
        let conf = r#"{"cniVersion":"0.3.1","name":"n","type":"loden-cni"}"#;
        let conf = Conf::parse(conf.as_bytes(), Command::Add).unwrap();
        let both = Attached { addresses: "10.5.1.2,fc00:0:0:1::2".parse().unwrap(), ..attached() };
        let answer = both.answer(&conf, &attachment(), Path::new("/run/netns/p"), None).unwrap();
        assert_eq!(
            answer["ips"],
            json!([
                { "address": "10.5.1.2/32", "gateway": "169.254.1.1", "interface": 1, "version": "4" },
                { "address": "fc00:0:0:1::2/128", "gateway": "fe80::1", "interface": 1, "version": "6" },
            ])
        );
        assert_eq!(answer["routes"][1], json!({ "dst": "::/0", "gw": "fe80::1" }));
        let read = Attached::from_previous(answer.as_object().unwrap(), &attachment()).unwrap();
        assert_eq!(read.addresses, both.addresses);
        assert_eq!(of("1.1.0")["interfaces"][1]["mtu"], 1450);
    }

    #[test]
    fn what_came_before_stays_in_front_and_indices_count_on() {
        let conf = r#"{"cniVersion":"1.0.0","name":"n","type":"loden-cni","prevResult":{"cniVersion":"1.0.0",
            "interfaces":[{"name":"lo","sandbox":"/run/netns/p"}],"ips":[{"address":"127.0.0.1/8","interface":0}],
            "dns":{"nameservers":["10.96.0.10"]}}}"#;
        let answer = answer(conf);
        assert_eq!(answer["interfaces"][0]["name"], "lo");
        assert_eq!(answer["ips"][1]["interface"], 2);
        assert_eq!(answer["dns"]["nameservers"][0], "10.96.0.10");
        let read = Attached::from_previous(answer.as_object().unwrap(), &attachment()).unwrap();
        assert_eq!(read, Attached { mtu: 0, ..attached() });
    }

    #[test]
    fn an_answer_of_somebody_else_is_told_apart() {
        let error = |previous: Value| {
            Attached::from_previous(previous.as_object().unwrap(), &attachment()).unwrap_err().msg
        };
        assert_eq!(error(json!({})), "\"prevResult\" has no interface eth0 of the container");
        let pod = json!({ "name": "eth0", "sandbox": "/x", "mac": "02:00:00:00:00:02" });
        assert!(error(json!({ "interfaces": [pod] })).contains("interface on the host"));
        let host = json!({ "name": "h", "mac": "02:00:00:00:00:01" });
        assert!(error(json!({ "interfaces": [host, pod], "ips": [] })).contains("address of a family"));
    }

    #[test]
    fn one_address_of_each_family_is_wanted_of_the_address_plugin() {
        let ips = |ips: Value| allocated(Some(&json!({ "ips": ips })), "host-local");
        let given = |list: Value| ips(list).unwrap().0.to_string();
        assert_eq!(given(json!([{ "address": "10.5.1.9/24" }])), "10.5.1.9");
        assert_eq!(given(json!([{ "address": "fc00::2/64" }])), "fc00::2");
        assert_eq!(
            given(json!([{ "address": "10.5.1.9/24" }, { "address": "fc00::2/64" }])),
            "10.5.1.9,fc00::2"
        );
        for (wrong, why) in [
            (json!([]), "gave 0 addresses"),
            (json!([{ "address": "fc00::2" }]), "gave {\"address\":\"fc00::2\"}"),
            (json!([{ "address": "10.5.1.9/24" }, { "address": "10.5.1.10/24" }]), "gave 2 addresses"),
        ] {
            let error = ips(wrong).unwrap_err();
            assert!(error.msg.contains(why), "{error}");
        }
    }
}
