//! The subnets of one family that nodes may hold.

use super::{ConfigError, Object, quoted};
use crate::family::{Family, V4};

/// Where subnets are cut from, how long their prefixes are, and the first and the last that may be picked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool<F: Family = V4> {
    /// The prefix that all subnets of the cluster are cut from, host bits cleared.
    pub network: F::Net,
    /// Prefix length of a node's subnet, in bits; at least two more than the network's, at most two less than the
    /// family has.
    pub subnet_len: u8,
    /// Base address of the first subnet that may be picked.
    pub subnet_min: F::Addr,
    /// Base address of the last subnet that may be picked.
    pub subnet_max: F::Addr,
}

/// What flannel calls the keys of a family, and takes where they are not given (`pkg/subnet/config.go`).
struct Rules {
    network: &'static str,
    subnet_len: &'static str,
    subnet_min: &'static str,
    subnet_max: &'static str,
    /// What flannel takes where the network is big enough.
    usual_subnet_len: u8,
    example: &'static str,
}

impl Rules {
    fn of<F: Family>() -> Self {
        if F::BITS == 32 {
            Self {
                network: "Network",
                subnet_len: "SubnetLen",
                subnet_min: "SubnetMin",
                subnet_max: "SubnetMax",
                usual_subnet_len: 24,
                example: "10.5.0.0/16",
            }
        } else {
            Self {
                network: "IPv6Network",
                subnet_len: "IPv6SubnetLen",
                subnet_min: "IPv6SubnetMin",
                subnet_max: "IPv6SubnetMax",
                usual_subnet_len: 64,
                example: "fc00::/48",
            }
        }
    }
}

impl<F: Family> Pool<F> {
    /// Whether a node may hold this subnet: right length, and between the bounds.
    #[must_use]
    pub fn allows(&self, subnet: F::Net) -> bool {
        F::prefix_len(subnet) == self.subnet_len
            && subnet == F::trunc(subnet)
            && self.subnet_min <= F::base(subnet)
            && F::base(subnet) <= self.subnet_max
    }

    /// The keys in which `other` differs so that a running agent cannot follow without a restart.
    pub(super) fn differs_in(&self, other: &Self) -> Vec<&'static str> {
        let rules = Rules::of::<F>();
        let network = (self.network != other.network).then_some(rules.network);
        let subnet_len = (self.subnet_len != other.subnet_len).then_some(rules.subnet_len);
        network.into_iter().chain(subnet_len).collect()
    }

    /// How many addresses a subnet has, at least four: the prefix has two bits at least.
    pub(crate) fn subnet_size(&self) -> u128 {
        1 << (F::BITS - self.subnet_len)
    }

    /// All subnets of this length that a network has.
    pub(super) fn whole(network: F::Net, subnet_len: u8) -> Self {
        let first = F::base(network);
        let host_bits = u32::from(F::BITS - F::prefix_len(network));
        let last = F::number(first) + u128::MAX.checked_shr(128 - host_bits).unwrap_or(0);
        let size = u128::MAX.checked_shr(128 - u32::from(F::BITS - subnet_len)).unwrap_or(0);
        let subnet_max = F::of_number(last - size).unwrap_or(first);
        Self { network, subnet_len, subnet_min: first, subnet_max }
    }

    /// Reads the family's keys.
    pub(super) fn read(object: &Object) -> Result<Self, ConfigError> {
        let rules = Rules::of::<F>();
        let network = network::<F>(object, &rules)?;
        let subnet_len = subnet_len::<F>(object, &rules, network)?;
        let whole = Self::whole(network, subnet_len);
        // The first subnet is left out, as flannel leaves it.
        let second = F::of_number(F::number(whole.subnet_min) + whole.subnet_size());
        let subnet_min = whole.bound(object, rules.subnet_min, &rules)?;
        let subnet_max = whole.bound(object, rules.subnet_max, &rules)?;
        let subnet_min = subnet_min.or(second).unwrap_or(whole.subnet_max);
        let subnet_max = subnet_max.unwrap_or(whole.subnet_max);
        if subnet_min > subnet_max {
            return Err(ConfigError(format!(
                "{} {subnet_min} is above {} {subnet_max}: no subnet is left between them",
                rules.subnet_min, rules.subnet_max
            )));
        }
        Ok(Self { subnet_min, subnet_max, ..whole })
    }

    fn bound(
        &self,
        object: &Object,
        key: &'static str,
        rules: &Rules,
    ) -> Result<Option<F::Addr>, ConfigError> {
        let Some(text) = object.string(key)? else { return Ok(None) };
        let network = self.network;
        let size = self.subnet_size();
        let address: F::Addr = text.parse().map_err(|_| {
            let second = F::of_number(F::number(F::base(network)) + size).unwrap_or(F::UNSPECIFIED);
            ConfigError(format!(r#"{key} {} is not an {} address such as "{second}""#, quoted(text), F::NAME))
        })?;
        let inside = F::contains(network, address);
        // Go's zero value, which flannel takes for "not set".
        if address == F::UNSPECIFIED && !inside {
            return Ok(None);
        }
        if !inside {
            return Err(ConfigError(format!("{key} {address} is outside of {} {network}", rules.network)));
        }
        let number = F::number(address);
        if number % size != 0 {
            let base = F::of_number(number - number % size).unwrap_or(F::UNSPECIFIED);
            return Err(ConfigError(format!(
                "{key} {address} is not the base address of a /{}: the one it lies in starts at {base}",
                self.subnet_len
            )));
        }
        Ok(Some(address))
    }
}

fn network<F: Family>(object: &Object, rules: &Rules) -> Result<F::Net, ConfigError> {
    let (key, example) = (rules.network, rules.example);
    let Some(text) = object.string(key)? else {
        return Err(ConfigError(format!(
            r#"{key} is missing: it must be an {} prefix such as "{example}""#,
            F::NAME
        )));
    };
    let network: F::Net = text.parse().map_err(|_| {
        ConfigError(format!(r#"{key} {} is not an {} prefix such as "{example}""#, quoted(text), F::NAME))
    })?;
    // Below it there are no four subnets of four addresses each.
    let longest = F::BITS - 4;
    if F::prefix_len(network) > longest {
        return Err(ConfigError(format!(
            "{key} {network} is too small: the longest useful prefix is /{longest}"
        )));
    }
    Ok(F::trunc(network))
}

fn subnet_len<F: Family>(object: &Object, rules: &Rules, network: F::Net) -> Result<u8, ConfigError> {
    let shortest = F::prefix_len(network) + 2;
    let longest = F::BITS - 2;
    let usual = rules.usual_subnet_len;
    let len = match object.unsigned(rules.subnet_len, u64::MAX)? {
        None | Some(0) if shortest <= usual => return Ok(usual),
        None | Some(0) => return Ok(shortest),
        Some(len) => len,
    };
    let fits = u8::try_from(len).ok().filter(|len| (shortest..=longest).contains(len));
    fits.ok_or_else(|| {
        ConfigError(format!(
            "{} {len} is out of bounds: {shortest} to {longest} (at least four subnets in {} {network}, at least two hosts in each)",
            rules.subnet_len, rules.network
        ))
    })
}

#[cfg(test)]
mod tests {
    use crate::network::NetworkConfig;

    fn v6(keys: &str) -> Result<(String, u8, String, String), String> {
        let json = format!(r#"{{"Network":"10.5.0.0/16","EnableIPv6":true{keys}}}"#);
        let pool = NetworkConfig::parse(&json).map_err(|error| error.to_string())?.v6.unwrap();
        let (min, max) = (pool.subnet_min.to_string(), pool.subnet_max.to_string());
        Ok((pool.network.to_string(), pool.subnet_len, min, max))
    }

    #[test]
    fn ipv6_gets_flannels_defaults() {
        for (network, len, min, max) in [
            ("fc00::/48", 64, "fc00:0:0:1::", "fc00:0:0:ffff::"),
            ("fc00::/62", 64, "fc00:0:0:1::", "fc00:0:0:3::"),
            ("fc00::/63", 65, "fc00::8000:0:0:0", "fc00:0:0:1:8000::"),
            ("fc00::/124", 126, "fc00::4", "fc00::c"),
            ("::/0", 64, "0:0:0:1::", "ffff:ffff:ffff:ffff::"),
        ] {
            let expected = (network.to_owned(), len, min.to_owned(), max.to_owned());
            assert_eq!(v6(&format!(r#","IPv6Network":"{network}""#)), Ok(expected));
        }
        assert_eq!(NetworkConfig::parse(r#"{"Network":"10.5.0.0/16","IPv6Network":"x"}"#).unwrap().v6, None);
    }

    #[test]
    fn an_ipv6_error_names_the_key_the_value_and_the_bound() {
        for (keys, says) in [
            ("", "IPv6Network is missing: it must be an IPv6 prefix such as"),
            (r#","IPv6Network":"10.0.0.0/8""#, r#"IPv6Network "10.0.0.0/8" is not an IPv6 prefix"#),
            (
                r#","IPv6Network":"fc00::/125""#,
                "IPv6Network fc00::/125 is too small: the longest useful prefix is /124",
            ),
            (
                r#","IPv6Network":"fc00::/48","IPv6SubnetLen":49"#,
                "IPv6SubnetLen 49 is out of bounds: 50 to 126",
            ),
            (
                r#","IPv6Network":"fc00::/48","IPv6SubnetMin":"10.5.1.0""#,
                "is not an IPv6 address such as \"fc00:0:0:1::\"",
            ),
            (
                r#","IPv6Network":"fc00::/48","IPv6SubnetMin":"fd00::""#,
                "IPv6SubnetMin fd00:: is outside of IPv6Network fc00::/48",
            ),
            (
                r#","IPv6Network":"fc00::/48","IPv6SubnetMax":"fc00:0:0:5::1""#,
                "the one it lies in starts at fc00:0:0:5::",
            ),
        ] {
            let error = v6(keys).unwrap_err();
            assert!(error.contains(says), "{keys}: {error:?} does not say {says:?}");
        }
    }
}
