//! The network config: the JSON that an operator keeps at `<prefix>/config` for the whole cluster.
//!
//! Read as flannel reads it (`pkg/subnet/config.go`): keys match in any case, unknown keys are ignored, a key
//! that comes twice counts once, with its last value. Defaults and bounds are flannel's, with one exception: no
//! `Backend` means vxlan, as flannel's documentation promises (its code takes udp). What flannel finds out late
//! or never, such as a `SubnetMin` above `SubnetMax`, is refused here with the key, the value and the bound.

mod backend;
mod object;
mod pool;
mod wireguard;

use thiserror::Error;

pub(crate) use self::object::{Object, ObjectError, excerpt, quoted};
pub use self::{
    backend::{Backend, DEFAULT_PORT, DEFAULT_VNI, Vxlan},
    pool::Pool,
    wireguard::{Mode, Wireguard},
};
use crate::{
    family::{Family, V4, V6},
    lease::LeaseKey,
    uplink::Families,
};

/// The validated network config. At least one of the families is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Where IPv4 subnets are cut from; `None` with `EnableIPv4: false`.
    pub v4: Option<Pool<V4>>,
    /// Where IPv6 subnets are cut from; `None` without `EnableIPv6: true`.
    pub v6: Option<Pool<V6>>,
    /// How packets travel between nodes.
    pub backend: Backend,
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

    /// Takes the lengths of subnets from those that this node was given.
    pub fn take_subnet_len(&mut self, key: LeaseKey) {
        let v4 = self.v4.zip(key.subnet);
        self.v4 = v4.map(|(pool, subnet)| Pool::whole(pool.network, subnet.prefix_len())).or(self.v4);
        let v6 = self.v6.zip(key.subnet_v6);
        self.v6 = v6.map(|(pool, subnet)| Pool::whole(pool.network, subnet.prefix_len())).or(self.v6);
    }

    /// Leaves out the families of which this node was given no subnet.
    pub fn keep_families(&mut self, given: LeaseKey) {
        self.v4 = self.v4.filter(|_| given.subnet.is_some());
        self.v6 = self.v6.filter(|_| given.subnet_v6.is_some());
    }

    fn read(object: &Object) -> Result<Self, ConfigError> {
        let ipv4 = object.bool("EnableIPv4")?.unwrap_or(true);
        let ipv6 = object.bool("EnableIPv6")?.unwrap_or(false);
        if !ipv4 && !ipv6 {
            return Err(ConfigError(
                "EnableIPv4 is false and EnableIPv6 is not true: one of them must be true".into(),
            ));
        }
        let v4 = if ipv4 { Some(Pool::read(object)?) } else { None };
        let v6 = if ipv6 { Some(Pool::read(object)?) } else { None };
        let config = Self { v4, v6, backend: Backend::read(object)? };
        if let Backend::Wireguard(wireguard) = &config.backend {
            wireguard.check(config.families())?;
        }
        Ok(config)
    }

    /// Which families there are.
    #[must_use]
    pub fn families(&self) -> Families {
        Families { v4: self.v4.is_some(), v6: self.v6.is_some() }
    }

    /// All networks, for people: `10.5.0.0/16 and fc00::/48`.
    #[must_use]
    pub fn networks(&self) -> String {
        let v4 = self.v4.map(|pool| pool.network.to_string());
        let v6 = self.v6.map(|pool| pool.network.to_string());
        v4.into_iter().chain(v6).collect::<Vec<_>>().join(" and ")
    }

    /// The keys in which `other` differs so that a running agent cannot follow without a restart.
    #[must_use]
    pub fn differs_in(&self, other: &Self) -> Vec<&'static str> {
        let v4 = differs("EnableIPv4", self.v4.as_ref(), other.v4.as_ref());
        let v6 = differs("EnableIPv6", self.v6.as_ref(), other.v6.as_ref());
        let mut keys: Vec<_> = v4.into_iter().chain(v6).collect();
        if self.backend != other.backend {
            keys.push("Backend");
        }
        keys
    }
}

fn differs<F: Family>(
    enable: &'static str,
    ours: Option<&Pool<F>>,
    theirs: Option<&Pool<F>>,
) -> Vec<&'static str> {
    match (ours, theirs) {
        (Some(ours), Some(theirs)) => ours.differs_in(theirs),
        (None, None) => Vec::new(),
        _ => vec![enable],
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use ipnet::Ipv4Net;

    use super::*;

    fn parse(json: &str) -> NetworkConfig {
        NetworkConfig::parse(json).unwrap()
    }

    fn error(json: &str) -> String {
        NetworkConfig::parse(json).unwrap_err().to_string()
    }

    fn ranges(network: &str) -> (u8, String, String) {
        let config = parse(&format!(r#"{{"Network":"{network}"}}"#)).v4.unwrap();
        (config.subnet_len, config.subnet_min.to_string(), config.subnet_max.to_string())
    }

    #[test]
    fn a_network_alone_gets_flannels_defaults_and_vxlan() {
        let config = parse(r#"{"Network": "192.168.0.0/16"}"#);
        assert_eq!(config.v4.unwrap().network, "192.168.0.0/16".parse().unwrap());
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
        let pool = config.v4.unwrap();
        assert_eq!(pool.network, "10.0.0.0/8".parse().unwrap());
        assert_eq!((pool.subnet_len, pool.subnet_min), (20, Ipv4Addr::new(10, 10, 0, 0)));
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
            (
                r#"{"Network":"10.5.0.0/16","EnableIPv4":false}"#,
                "EnableIPv4 is false and EnableIPv6 is not true: one of them must be true",
            ),
            (r#"{"EnableIPv4":false,"EnableIPv6":true}"#, "IPv6Network is missing"),
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
        config.take_subnet_len("10.244.3.0-25".parse().unwrap());
        let pool = config.v4.unwrap();
        assert!(
            pool.allows("10.244.0.0/25".parse().unwrap())
                && pool.allows("10.244.255.128/25".parse().unwrap())
        );
        assert!(NetworkConfig::parse_for_given_subnets(r#"{"Network":7}"#).is_err());
    }

    #[test]
    fn ipv6_alone_needs_no_ipv4_key() {
        let config =
            parse(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","Network":"nonsense"}"#);
        assert_eq!(config.v4, None);
        assert_eq!(config.networks(), "fc00::/48");
        let dual = parse(r#"{"EnableIPv6":true,"IPv6Network":"fc00::/48","Network":"10.5.0.0/16"}"#);
        assert_eq!(dual.networks(), "10.5.0.0/16 and fc00::/48");
        assert_eq!(config.differs_in(&dual), ["EnableIPv4"]);
        assert_eq!(dual.differs_in(&parse(r#"{"Network":"10.5.0.0/16"}"#)), ["EnableIPv6"]);
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
                let config = config.v4.unwrap();
                for base in [config.subnet_min, config.subnet_max] {
                    let subnet = Ipv4Net::new(base, config.subnet_len).unwrap();
                    proptest::prop_assert!(config.network.contains(&subnet));
                    proptest::prop_assert!(config.allows(subnet));
                }
            }
        }
    }
}
