//! The network config: the JSON that an operator keeps at `<prefix>/config` for the whole cluster.
//!
//! Read as flannel reads it (`pkg/subnet/config.go`): keys match in any case, unknown keys are ignored, a key
//! that comes twice counts once, with its last value. Defaults and bounds are flannel's, with one exception: no
//! `Backend` means vxlan, as flannel's documentation promises (its code takes udp). What flannel finds out late
//! or never, such as a `SubnetMin` above `SubnetMax`, is refused here with the key, the value and the bound.

mod backend;
mod object;
mod pool;

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use thiserror::Error;

pub(crate) use self::object::{Object, ObjectError, excerpt, quoted};
pub use self::{
    backend::{Backend, DEFAULT_PORT, DEFAULT_VNI, Vxlan},
    pool::Pool,
};
use crate::family::{V4, V6};

/// The validated network config.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    /// The prefix that all subnets of the cluster are cut from, host bits cleared.
    pub network: Ipv4Net,
    /// Prefix length of a node's subnet, in bits; at least two more than the network's, at most 30.
    pub subnet_len: u8,
    /// Base address of the first subnet that may be picked.
    pub subnet_min: Ipv4Addr,
    /// Base address of the last subnet that may be picked.
    pub subnet_max: Ipv4Addr,
    /// How packets travel between nodes.
    pub backend: Backend,
    /// The IPv6 half of a dual-stack cluster.
    pub v6: Option<Pool<V6>>,
}

/// Why a network config is refused. The text names the key, its value and what would be right.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("network config: {0}")]
pub struct ConfigError(pub(crate) String);

impl From<ObjectError> for ConfigError {
    fn from(error: ObjectError) -> Self {
        Self(error.to_string())
    }
}

impl NetworkConfig {
    /// Parses and validates the JSON text.
    ///
    /// # Errors
    ///
    /// On anything that flannel would refuse or silently misread; see [`ConfigError`].
    pub fn parse(json: &str) -> Result<Self, ConfigError> {
        Self::read(&Object::parse(json)?)
    }

    /// Parses the JSON text of a cluster whose nodes are given their subnets: `SubnetLen`, `SubnetMin` and
    /// `SubnetMax` are not looked at, as flannel does not look at them then.
    ///
    /// # Errors
    ///
    /// As [`Self::parse`].
    pub fn parse_for_given_subnets(json: &str) -> Result<Self, ConfigError> {
        let mut object = Object::parse(json)?;
        object.forget(&[
            "SubnetLen",
            "SubnetMin",
            "SubnetMax",
            "IPv6SubnetLen",
            "IPv6SubnetMin",
            "IPv6SubnetMax",
        ]);
        Self::read(&object)
    }

    /// Takes the length of subnets from the one that this node was given.
    pub fn take_subnet_len(&mut self, subnet: Ipv4Net) {
        self.subnet_len = subnet.prefix_len();
        self.subnet_min = self.network.network();
        self.subnet_max = self.network.broadcast() & subnet.netmask();
    }

    fn read(object: &Object) -> Result<Self, ConfigError> {
        if !object.bool("EnableIPv4")?.unwrap_or(true) {
            return Err(ConfigError(
                "EnableIPv4 is false, but this agent needs IPv4: leave the key out or set it to true".into(),
            ));
        }
        let Pool { network, subnet_len, subnet_min, subnet_max } = Pool::<V4>::read(object)?;
        let ipv6 = object.bool("EnableIPv6")?.unwrap_or(false);
        let v6 = if ipv6 { Some(Pool::read(object)?) } else { None };
        let backend = Backend::read(object)?;
        Ok(Self { network, subnet_len, subnet_min, subnet_max, backend, v6 })
    }

    /// The IPv4 subnets.
    #[must_use]
    pub fn v4(&self) -> Pool<V4> {
        let Self { network, subnet_len, subnet_min, subnet_max, .. } = *self;
        Pool { network, subnet_len, subnet_min, subnet_max }
    }

    /// Whether a node may hold this subnet: right length, and between the bounds.
    #[must_use]
    pub fn allows(&self, subnet: Ipv4Net) -> bool {
        self.v4().allows(subnet)
    }

    /// The keys in which `other` differs so that a running agent cannot follow without a restart.
    #[must_use]
    pub fn differs_in(&self, other: &Self) -> Vec<&'static str> {
        let mut keys = Vec::new();
        if self.network != other.network {
            keys.push("Network");
        }
        if self.subnet_len != other.subnet_len {
            keys.push("SubnetLen");
        }
        let of_v6 = |config: &Self| config.v6.map(|pool| (pool.network, pool.subnet_len));
        if self.v6.is_some() != other.v6.is_some() {
            keys.push("EnableIPv6");
        } else if of_v6(self).map(|(network, _)| network) != of_v6(other).map(|(network, _)| network) {
            keys.push("IPv6Network");
        } else if of_v6(self) != of_v6(other) {
            keys.push("IPv6SubnetLen");
        }
        if self.backend != other.backend {
            keys.push("Backend");
        }
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> NetworkConfig {
        NetworkConfig::parse(json).unwrap()
    }

    fn error(json: &str) -> String {
        NetworkConfig::parse(json).unwrap_err().to_string()
    }

    fn ranges(network: &str) -> (u8, String, String) {
        let config = parse(&format!(r#"{{"Network":"{network}"}}"#));
        (config.subnet_len, config.subnet_min.to_string(), config.subnet_max.to_string())
    }

    #[test]
    fn a_network_alone_gets_flannels_defaults_and_vxlan() {
        let config = parse(r#"{"Network": "192.168.0.0/16"}"#);
        assert_eq!(config.network, "192.168.0.0/16".parse().unwrap());
        assert_eq!(config.backend, Backend::Vxlan(Vxlan::default()));
        assert_eq!(config.v6, None);
        for (network, len, min, max) in [
            ("10.5.0.0/16", 24, "10.5.1.0", "10.5.255.0"),
            ("10.5.0.0/22", 24, "10.5.1.0", "10.5.3.0"),
            ("10.5.0.0/23", 25, "10.5.0.128", "10.5.1.128"),
            ("10.5.0.0/24", 26, "10.5.0.64", "10.5.0.192"),
            ("10.5.0.0/28", 30, "10.5.0.4", "10.5.0.12"),
            ("10.0.0.0/8", 24, "10.0.1.0", "10.255.255.0"),
            ("0.0.0.0/0", 24, "0.0.1.0", "255.255.255.0"),
            ("255.255.255.240/28", 30, "255.255.255.244", "255.255.255.252"),
        ] {
            assert_eq!(ranges(network), (len, min.into(), max.into()), "{network}");
        }
    }

    #[test]
    fn keys_match_in_any_case_unknown_keys_are_ignored_and_the_last_of_two_counts() {
        let config = parse(
            r#"{"network":"10.0.0.0/8","SUBNETLEN":20,"subnetMin":"10.10.0.0","SubnetMax":"10.99.0.0","note":{"a":[1]},
                "network":"10.9.9.9/8","backend":{"type":"VXLAN","vni":2,"port":4789,"directrouting":true,"Speed":9}}"#,
        );
        assert_eq!(config.network, "10.0.0.0/8".parse().unwrap());
        assert_eq!((config.subnet_len, config.subnet_min), (20, Ipv4Addr::new(10, 10, 0, 0)));
        let Backend::Vxlan(vxlan) = config.backend else { panic!("{:?}", config.backend) };
        assert_eq!((vxlan.vni, vxlan.port, vxlan.direct_routing), (2, 4789, true));
    }

    #[test]
    fn zero_values_of_go_mean_not_set() {
        let config = parse(
            r#"{"Network":"10.5.0.0/16","SubnetLen":0,"SubnetMin":"0.0.0.0","SubnetMax":null,"EnableIPv4":null,"Backend":null}"#,
        );
        assert_eq!(config, parse(r#"{"Network":"10.5.0.0/16"}"#));
    }

    #[test]
    fn an_error_names_the_key_the_value_and_the_bound() {
        for (json, says) in [
            ("", "not JSON"),
            ("[]", "must be a JSON object"),
            ("{}", "Network is missing"),
            (r#"{"Network":7}"#, "Network must be a string, not 7"),
            (r#"{"Network":"10.5.0.0"}"#, r#"Network "10.5.0.0" is not an IPv4 prefix"#),
            (r#"{"Network":"fc00::/48"}"#, r#"Network "fc00::/48" is not an IPv4 prefix"#),
            (
                r#"{"Network":"10.5.0.0/29"}"#,
                "Network 10.5.0.0/29 is too small: the longest useful prefix is /28",
            ),
            (r#"{"Network":"10.5.0.0/16","SubnetLen":17}"#, "SubnetLen 17 is out of bounds: 18 to 30"),
            (r#"{"Network":"10.5.0.0/16","SubnetLen":31}"#, "SubnetLen 31 is out of bounds: 18 to 30"),
            (r#"{"Network":"10.5.0.0/16","SubnetLen":300}"#, "SubnetLen 300 is out of bounds"),
            (r#"{"Network":"10.5.0.0/16","SubnetLen":-1}"#, "SubnetLen must be a whole number"),
            (r#"{"Network":"10.5.0.0/16","SubnetLen":"24"}"#, r#"SubnetLen must be a whole number"#),
            (r#"{"Network":"10.5.0.0/16","SubnetMin":"x"}"#, r#"SubnetMin "x" is not an IPv4 address"#),
            (
                r#"{"Network":"10.5.0.0/16","SubnetMin":"10.6.0.0"}"#,
                "SubnetMin 10.6.0.0 is outside of Network 10.5.0.0/16",
            ),
            (r#"{"Network":"10.5.0.0/16","SubnetMax":"10.5.9.7"}"#, "the one it lies in starts at 10.5.9.0"),
            (
                r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.9.0","SubnetMax":"10.5.8.0"}"#,
                "SubnetMin 10.5.9.0 is above SubnetMax 10.5.8.0",
            ),
            (r#"{"Network":"10.5.0.0/16","EnableIPv4":false}"#, "EnableIPv4 is false"),
            (
                r#"{"Network":"10.5.0.0/16","EnableIPv4":"yes"}"#,
                r#"EnableIPv4 must be true or false, not "yes""#,
            ),
        ] {
            let error = error(json);
            assert!(error.contains(says), "{json}: {error:?} does not say {says:?}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }

    #[test]
    fn given_subnets_bring_their_own_length() {
        let json = r#"{"Network":"10.244.0.0/16","SubnetLen":12,"SubnetMin":"1.2.3.4","subnetmax":"x"}"#;
        assert!(NetworkConfig::parse(json).is_err());
        let mut config = NetworkConfig::parse_for_given_subnets(json).unwrap();
        config.take_subnet_len("10.244.3.0/25".parse().unwrap());
        assert!(
            config.allows("10.244.0.0/25".parse().unwrap())
                && config.allows("10.244.255.128/25".parse().unwrap())
        );
        assert!(NetworkConfig::parse_for_given_subnets(r#"{"Network":7}"#).is_err());
    }

    #[test]
    fn only_what_binds_the_running_node_asks_for_a_restart() {
        let old = parse(r#"{"Network":"10.5.0.0/16"}"#);
        let bounds = parse(r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.100.0"}"#);
        assert!(old.differs_in(&bounds).is_empty());
        let new = parse(r#"{"Network":"10.6.0.0/16","SubnetLen":25,"Backend":{"Type":"host-gw"}}"#);
        assert_eq!(old.differs_in(&new), ["Network", "SubnetLen", "Backend"]);
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,80}") {
            let _ = NetworkConfig::parse(&text);
        }

        #[test]
        fn a_parsed_config_keeps_its_subnets_inside_its_network(
            bits in proptest::prelude::any::<u32>(), len in 0_u8..=32, subnet_len in 0_u8..=33,
        ) {
            let json = format!(r#"{{"Network":"{}/{len}","SubnetLen":{subnet_len}}}"#, Ipv4Addr::from(bits));
            if let Ok(config) = NetworkConfig::parse(&json) {
                for base in [config.subnet_min, config.subnet_max] {
                    let subnet = Ipv4Net::new(base, config.subnet_len).unwrap();
                    proptest::prop_assert!(config.network.contains(&subnet));
                    proptest::prop_assert!(config.allows(subnet));
                }
            }
        }
    }
}
