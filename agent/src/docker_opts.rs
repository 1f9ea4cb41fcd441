//! `loden docker-opts`: dockerd's options from `subnet.env`, as flannel's `mk-docker-opts.sh` writes them.
//!
//! Same options, same output, with the script's peculiarities that unit files may rely on: without a `subnet.env` an
//! empty `DOCKER_OPTS=""` is written and all is well; variables called `DOCKER_OPT_*` are added to the options; options
//! that are already in `DOCKER_OPTS` stay in front; and the file is written before the look for a route that
//! already leads to the subnet elsewhere. Unlike the script, nothing is executed: values are taken as they are; and
//! with `--ipv6` dockerd gets the IPv6 subnet too, of which the script knows nothing.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::cli::words::split_line;
use crate::config::flag_value;
use crate::durable_file;
use crate::subnet_file::{self, SubnetFileError};

/// The options of `mk-docker-opts.sh`.
#[derive(Debug, Clone, clap::Args)]
pub struct DockerOptsArgs {
    /// subnet.env to read
    #[arg(short = 'f', value_name = "FILE", default_value = "/run/flannel/subnet.env", value_parser = flag_value::file)]
    pub subnet_file: PathBuf,

    /// File to write for dockerd
    #[arg(short = 'd', value_name = "FILE", default_value = "/run/docker_opts.env", value_parser = flag_value::file)]
    pub docker_file: PathBuf,

    /// Write each option as a variable of its own, such as DOCKER_OPT_MTU; with neither -i nor -c, both are written
    #[arg(short = 'i')]
    pub individual: bool,

    /// Write all options as one variable
    #[arg(short = 'c')]
    pub combined: bool,

    /// Name of the variable for all options
    #[arg(short = 'k', value_name = "NAME", default_value = "DOCKER_OPTS", value_parser = variable_name)]
    pub combined_key: String,

    /// Leave --ip-masq out
    #[arg(short = 'm')]
    pub no_ip_masq: bool,

    /// Add what gives containers addresses of the IPv6 subnet too, where subnet.env has one: --ipv6, --fixed-cidr-v6
    #[arg(long)]
    pub ipv6: bool,

    /// The script ignores words that are no options
    #[arg(hide = true)]
    pub ignored: Vec<String>,
}

/// Environment variables, or those of a file.
pub type Variables = BTreeMap<String, String>;

/// The process's environment, without what is not UTF-8.
#[must_use]
pub fn process_variables() -> Variables {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

/// Writes the file.
///
/// # Errors
///
/// [`DockerOptsError`]; the file is untouched, but for [`DockerOptsError::RouteInTheWay`].
pub fn run(args: &DockerOptsArgs, environment: Variables) -> Result<(), DockerOptsError> {
    let mut variables = environment;
    if let Some(content) = subnet_file::read(&args.subnet_file)? {
        variables.extend(assignments(&content));
    }
    let content = render(args, &variables)?;
    write(&args.docker_file, content.as_bytes())
        .map_err(|source| SubnetFileError::Write { path: args.docker_file.clone(), source })?;
    if let Some(subnet) = subnet(&variables)? {
        refuse_foreign_route(subnet.into(), Path::new("/proc/net/route"), route)?;
    }
    match subnet6(&variables)?.filter(|_| args.ipv6) {
        Some(subnet) => refuse_foreign_route(subnet.into(), Path::new("/proc/net/ipv6_route"), route6),
        None => Ok(()),
    }
}

/// Writes through what is no regular file, as the script's `>` does: `-d /dev/stdout` prints.
fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(there) if !there.is_file() => fs::write(path, content),
        _ => durable_file::replace(path, content, subnet_file::MODE),
    }
}

/// The file's content.
fn render(args: &DockerOptsArgs, variables: &Variables) -> Result<String, DockerOptsError> {
    let value = |name: &str| variables.get(name).filter(|value| !value.is_empty());
    let mut options: BTreeMap<&str, String> = variables
        .iter()
        .filter(|(name, _)| name.starts_with("DOCKER_OPT_"))
        .map(|(name, value)| (name.as_str(), value.clone()))
        .collect();
    if let Some(subnet) = value("FLANNEL_SUBNET").filter(|_| subnet(variables).is_ok()) {
        options.insert("DOCKER_OPT_BIP", format!("--bip={subnet}"));
    } else {
        subnet(variables)?;
    }
    if let Some(subnet) = subnet6(variables)?.filter(|_| args.ipv6) {
        options.insert("DOCKER_OPT_IPV6", "--ipv6".to_owned());
        options.insert("DOCKER_OPT_FIXED_CIDR_V6", format!("--fixed-cidr-v6={subnet}"));
    }
    if let Some(mtu) = value("FLANNEL_MTU") {
        let mtu: u16 = mtu.parse().map_err(|_| invalid("FLANNEL_MTU", mtu, "an MTU, such as 1450"))?;
        options.insert("DOCKER_OPT_MTU", format!("--mtu={mtu}"));
    }
    if let Some(ip_masq) = value("FLANNEL_IPMASQ").filter(|_| !args.no_ip_masq) {
        // Exactly one of the two masquerades.
        let docker_masquerades = match ip_masq.as_str() {
            "true" => false,
            "false" => true,
            _ => return Err(invalid("FLANNEL_IPMASQ", ip_masq, "true or false")),
        };
        options.insert("DOCKER_OPT_IPMASQ", format!("--ip-masq={docker_masquerades}"));
    }

    let both = !args.individual && !args.combined;
    let mut content = String::new();
    let mut combined = value(&args.combined_key).map(|before| format!("{before} ")).unwrap_or_default();
    for (name, option) in &options {
        if option.chars().any(char::is_control) {
            return Err(invalid(name, option, "one line"));
        }
        if args.individual || both {
            content.push_str(&format!("{name}=\"{option}\"\n"));
        }
        combined.push_str(&format!(" {option}"));
    }
    if args.combined || both {
        if combined.chars().any(char::is_control) {
            return Err(invalid(&args.combined_key, &combined, "one line"));
        }
        content.push_str(&format!("{}=\"{combined}\"\n", args.combined_key));
    }
    Ok(content)
}

fn subnet(variables: &Variables) -> Result<Option<Ipv4Net>, DockerOptsError> {
    let Some(text) = variables.get("FLANNEL_SUBNET").filter(|text| !text.is_empty()) else { return Ok(None) };
    let right = "an IPv4 address and prefix length, such as 10.5.72.1/24";
    text.parse().map(Some).map_err(|_| invalid("FLANNEL_SUBNET", text, right))
}

fn subnet6(variables: &Variables) -> Result<Option<Ipv6Net>, DockerOptsError> {
    let name = "FLANNEL_IPV6_SUBNET";
    let Some(text) = variables.get(name).filter(|text| !text.is_empty()) else { return Ok(None) };
    let right = "an IPv6 address and prefix length, such as fc00:0:0:1::1/64";
    text.parse().map(Some).map_err(|_| invalid(name, text, right))
}

/// The assignments among the lines of a file, quotes taken off.
fn assignments(content: &str) -> Variables {
    let assignment = |line: &str| {
        let line = line.trim();
        let (name, value) = line.strip_prefix("export ").unwrap_or(line).split_once('=')?;
        let value = split_line(value).ok()?.into_iter().next().unwrap_or_default();
        Some((variable_name(name).ok()?, value))
    };
    content.lines().filter_map(assignment).collect()
}

/// Refuses if the main routing table already has the subnet behind a gateway: containers of this host would then answer
/// to another host's address.
fn refuse_foreign_route(
    subnet: IpNet,
    table: &Path,
    route: fn(&str) -> Option<(IpNet, IpAddr)>,
) -> Result<(), DockerOptsError> {
    let table =
        fs::read_to_string(table).map_err(|source| SubnetFileError::Read { path: table.into(), source })?;
    match table.lines().filter_map(route).find(|(net, _)| *net == subnet.trunc()) {
        Some((net, gateway)) => Err(DockerOptsError::RouteInTheWay { net, gateway }),
        None => Ok(()),
    }
}

/// Destination and gateway of a line of `/proc/net/route` (addresses in hexadecimal, bytes in network order read as a
/// native integer); `None` if the route has no gateway, and for the heading.
fn route(line: &str) -> Option<(IpNet, IpAddr)> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let address =
        |field: usize| Some(Ipv4Addr::from(u32::from_str_radix(fields.get(field)?, 16).ok()?.to_ne_bytes()));
    let (destination, gateway, mask) = (address(1)?, address(2)?, address(7)?);
    let net = Ipv4Net::with_netmask(destination, mask).ok()?;
    (!gateway.is_unspecified()).then_some((net.into(), gateway.into()))
}

/// The same of a line of `/proc/net/ipv6_route` (addresses as 32 hexadecimal digits, lengths as two).
fn route6(line: &str) -> Option<(IpNet, IpAddr)> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let address = |field: usize| Some(Ipv6Addr::from(u128::from_str_radix(fields.get(field)?, 16).ok()?));
    let (destination, gateway) = (address(0)?, address(4)?);
    let net = Ipv6Net::new(destination, u8::from_str_radix(fields.get(1)?, 16).ok()?).ok()?;
    (!gateway.is_unspecified()).then_some((net.into(), gateway.into()))
}

/// A shell's variable name.
fn variable_name(text: &str) -> Result<String, String> {
    let first_is_right = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    if first_is_right && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        Ok(text.to_owned())
    } else {
        Err("must be the name of a variable, such as DOCKER_NETWORK_OPTIONS".into())
    }
}

fn invalid(name: &str, value: &str, right: &'static str) -> DockerOptsError {
    DockerOptsError::Value { name: name.into(), value: value.chars().take(200).collect(), right }
}

/// The options cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum DockerOptsError {
    #[error("{name}={value} must be {right}")]
    Value { name: String, value: String, right: &'static str },
    #[error("the routing table already leads to {net} via {gateway}: another node seems to have this subnet")]
    RouteInTheWay { net: IpNet, gateway: IpAddr },
    #[error(transparent)]
    File(#[from] SubnetFileError),
}

#[cfg(test)]
mod tests;
