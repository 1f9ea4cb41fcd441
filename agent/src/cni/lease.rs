//! What `subnet.env` promises: the node's lease, as the plugins read it.

use std::{
    path::{Path, PathBuf},
    str::FromStr,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{
    error::{CniError, Result, code},
    request::excerpt,
};
use crate::subnet_file;

/// The content of `subnet.env`. At least one family is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The file that it was read from.
    pub file: PathBuf,
    /// The overlay networks; flannel once wrote several, with commas between.
    pub networks: Vec<IpNet>,
    /// This node's IPv4 subnet, without host bits.
    pub subnet: Option<Ipv4Net>,
    /// This node's IPv6 subnet, without host bits.
    pub subnet6: Option<Ipv6Net>,
    /// MTU of containers, in bytes.
    pub mtu: u32,
    /// The agent masquerades, so nobody else must.
    pub ip_masq: bool,
}

impl Lease {
    /// Reads the file.
    ///
    /// # Errors
    ///
    /// Code 11 where there is none (the agent writes it once it has a lease), 5 where it cannot be read, 7 where a
    /// line is missing or wrong; the message has file, key and value.
    pub fn read(file: &Path) -> Result<Self> {
        let content = subnet_file::read(file).map_err(|error| CniError::new(code::IO, error))?;
        let content = content.ok_or_else(|| {
            CniError::new(code::TRY_AGAIN, format_args!("\"subnetFile\": {} does not exist", file.display()))
                .details("the agent writes it once it holds a lease; is it running, and ready?")
        })?;
        Self::parse(file, &content)
    }

    /// This node's subnets, IPv4's first.
    pub fn subnets(&self) -> impl Iterator<Item = IpNet> + use<> {
        self.subnet.map(IpNet::from).into_iter().chain(self.subnet6.map(IpNet::from))
    }

    fn parse(file: &Path, content: &str) -> Result<Self> {
        let entry = |key: &str| subnet_file::entry(content, key);
        let wrong = |key: &str, value: &str, wanted: &str| {
            let file = file.display();
            CniError::new(code::BAD_CONFIG, format_args!("{file}: {key}={} {wanted}", excerpt(value)))
        };
        let networks = |key: &str, wanted: &str| -> Result<Vec<IpNet>> {
            let parse = |part: &str| part.trim().parse().map_err(|_| wrong(key, part, wanted));
            entry(key).map_or(Ok(Vec::new()), |value| value.split(',').map(parse).collect())
        };
        const V4: &str = "must be an IPv4 prefix, such as 10.5.0.0/16";
        const V6: &str = "must be an IPv6 prefix, such as fc00::/48";
        let mut all = networks("FLANNEL_NETWORK", V4)?;
        all.extend(networks("FLANNEL_IPV6_NETWORK", V6)?);
        let lease = Self {
            file: file.to_owned(),
            networks: all.iter().map(IpNet::trunc).collect(),
            subnet: prefix(entry("FLANNEL_SUBNET"))
                .map_err(|value| wrong("FLANNEL_SUBNET", value, V4))?
                .map(|net: Ipv4Net| net.trunc()),
            subnet6: prefix(entry("FLANNEL_IPV6_SUBNET"))
                .map_err(|value| wrong("FLANNEL_IPV6_SUBNET", value, V6))?
                .map(|net: Ipv6Net| net.trunc()),
            mtu: entry("FLANNEL_MTU")
                .map(|value| {
                    value.parse().map_err(|_| wrong("FLANNEL_MTU", value, "must be a number of bytes"))
                })
                .transpose()?
                .unwrap_or(0),
            ip_masq: entry("FLANNEL_IPMASQ") == Some("true"),
        };
        let mut missing = Vec::new();
        missing.extend(lease.networks.is_empty().then_some("FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK"));
        missing.extend(
            (lease.subnet.is_none() && lease.subnet6.is_none())
                .then_some("FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET"),
        );
        missing.extend(entry("FLANNEL_MTU").is_none().then_some("FLANNEL_MTU"));
        missing.extend(entry("FLANNEL_IPMASQ").is_none().then_some("FLANNEL_IPMASQ"));
        if missing.is_empty() {
            return Ok(lease);
        }
        // flannel's own words.
        let missing = missing.join(", ");
        Err(CniError::new(code::BAD_CONFIG, format_args!("{} is missing {missing}", file.display())))
    }
}

/// A prefix, or the text that is none.
fn prefix<N: FromStr>(value: Option<&str>) -> Result<Option<N>, &str> {
    value.map(|value| value.parse().map_err(|_| value)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "/run/flannel/subnet.env";

    fn parse(content: &str) -> Result<Lease> {
        Lease::parse(Path::new(FILE), content)
    }

    #[test]
    fn what_the_agent_writes_is_read() {
        let lease = parse(
            "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
        )
        .unwrap();
        assert_eq!(lease.networks, ["10.5.0.0/16".parse::<IpNet>().unwrap()]);
        assert_eq!(lease.subnet, Some("10.5.72.0/24".parse().unwrap()));
        assert_eq!((lease.mtu, lease.ip_masq), (1450, true));
    }

    #[test]
    fn both_families_and_several_networks_are_read() {
        let lease = parse(
            "FLANNEL_NETWORK=10.5.0.0/16,10.9.0.0/16\nFLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_IPV6_NETWORK=fc00::/48\n\
             FLANNEL_IPV6_SUBNET=fc00:0:0:1::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n",
        )
        .unwrap();
        assert_eq!(lease.networks.len(), 3);
        assert_eq!(lease.subnet6, Some("fc00:0:0:1::/64".parse().unwrap()));
        assert!(!lease.ip_masq);
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let message = |content: &str| parse(content).unwrap_err().msg;
        assert_eq!(
            message("FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_MTU=1450\n"),
            format!("{FILE} is missing FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET, FLANNEL_IPMASQ")
        );
        let wrong = message("FLANNEL_SUBNET=10.5.72.1/33\n");
        assert_eq!(
            wrong,
            format!("{FILE}: FLANNEL_SUBNET=\"10.5.72.1/33\" must be an IPv4 prefix, such as 10.5.0.0/16")
        );
        assert!(message("FLANNEL_MTU=many\n").contains("FLANNEL_MTU=\"many\" must be a number"));
    }

    #[test]
    fn an_absent_file_will_be_there_later() {
        let error = Lease::read(Path::new("/nonexistent/subnet.env")).unwrap_err();
        assert_eq!(error.code, code::TRY_AGAIN);
        assert_eq!(error.msg, "\"subnetFile\": /nonexistent/subnet.env does not exist");
    }
}
