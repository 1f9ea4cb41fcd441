//! The agent's configuration, checked: what [`crate::cli`] has parsed, with the rules that span several flags.
//!
//! Making a [`Config`] touches nothing: no file is opened, no name is looked up.

pub mod etcd;
pub mod flag_value;
pub mod kube;

use std::convert::Infallible;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;
use regex::Regex;

pub use etcd::EtcdConfig;
pub use kube::KubeConfig;

use crate::cli::{AgentArgs, UplinkArgs};

/// Everything the agent is told by its flags and environment.
#[derive(Debug, Clone)]
pub struct Config {
    /// How etcd is reached and where our keys are in it.
    pub etcd: EtcdConfig,
    /// How the Kubernetes API is reached, where leases come from there and not from etcd.
    pub kube: Option<KubeConfig>,
    /// Which interface carries the overlay.
    pub uplink: UplinkChoice,
    /// The contract file, `subnet.env`.
    pub subnet_file: PathBuf,
    /// How long the lease outlives the agent; whole seconds.
    pub lease_ttl: Duration,
    /// flannel's renewal margin; whole minutes, and at most half of `lease_ttl`.
    pub renew_margin: Duration,
    /// Give the lease back when the agent is asked to stop.
    pub release_lease: bool,
    /// Where this node's WireGuard key is kept.
    pub wireguard_key_file: PathBuf,
    /// Masquerade packets that leave the overlay network.
    pub ip_masq: bool,
    /// Let masquerading choose source ports at random.
    pub ip_masq_fully_random: bool,
    /// Accept forwarded packets of the overlay network in the host's firewall.
    pub forward_rules: bool,
    /// Where `/healthz` and `/readyz` are served.
    pub healthz: Option<SocketAddr>,
    /// How packets travel.
    pub datapath: Datapath,
    /// Which flows may skip the host's firewall.
    pub gate: Gate,
    /// Whether and how the guard runs on the uplink.
    pub xdp: Xdp,
    /// What happens to a packet whose inner source is not in its peer's subnet.
    pub source_check: SourceCheck,
    /// Have the containers' bridge ask for room for the overlay's headers.
    pub pod_headroom: bool,
    /// Keep conntrack from the VXLAN packets between the nodes.
    pub notrack_underlay: bool,
    /// Have the programs tell of every packet.
    pub bpf_log: bool,
    /// Directory of the control socket; absolute.
    pub run_dir: PathBuf,
    /// Directory of the pinned programs and maps; absolute, on a BPF file system.
    pub bpffs_dir: PathBuf,
    /// Where Prometheus metrics are served.
    pub metrics_addr: Option<SocketAddr>,
    /// Most peers, and most endpoints, that have metrics of their own.
    pub metrics_max_each: usize,
    /// Where the web page is served: loopback.
    pub web_addr: Option<SocketAddr>,
    /// What is logged, and how.
    pub log: LogConfig,
    /// What the operator should know about these settings, a line each; to be logged once logging works.
    pub warnings: Vec<String>,
}

impl Config {
    /// Checks flags against each other.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if flags contradict each other, or ask for something that is not provided.
    pub fn from_args(args: AgentArgs) -> Result<Self, ConfigError> {
        let mut warnings = Vec::new();
        let kube = KubeConfig::from_args(args.kube, &mut warnings);
        let ignored = args.flannel_only.without_effect();
        if !ignored.is_empty() {
            warnings
                .push(format!("accepted for flannel's sake and without effect here: {}", ignored.join(", ")));
        }
        if kube.is_some() && args.subnet_lease_release {
            warnings.push("--subnet-lease-release=true is without effect with --kube-subnet-mgr: the subnet is the node's podCIDR".into());
        }
        let lease_ttl = args.subnet_lease_ttl;
        Ok(Self {
            etcd: EtcdConfig::from_args(args.etcd, &mut warnings)?,
            kube,
            uplink: UplinkChoice::from_args(args.uplink)?,
            subnet_file: args.subnet_file,
            lease_ttl,
            renew_margin: renew_margin(args.subnet_lease_renew_margin, lease_ttl, &mut warnings),
            release_lease: args.subnet_lease_release,
            wireguard_key_file: args.wireguard_key_file,
            ip_masq: args.ip_masq,
            ip_masq_fully_random: !args.ip_masq_fully_random_disable,
            forward_rules: args.iptables_forward_rules,
            healthz: (args.healthz_port != 0).then(|| SocketAddr::new(args.healthz_ip, args.healthz_port)),
            datapath: args.datapath,
            gate: args.gate,
            xdp: args.xdp,
            source_check: args.source_check,
            pod_headroom: args.pod_headroom,
            notrack_underlay: args.notrack_underlay,
            bpf_log: args.bpf_log,
            run_dir: args.run_dir,
            bpffs_dir: args.bpffs_dir,
            metrics_addr: args.metrics_addr,
            metrics_max_each: args.metrics_max_each,
            web_addr: args.web_addr.map(loopback).transpose()?,
            log: LogConfig { format: args.log_format, verbosity: args.verbosity, directives: args.log },
            warnings,
        })
    }
}

/// The web page shows the cluster to whoever asks, and nobody has to say who they are.
fn loopback(address: SocketAddr) -> Result<SocketAddr, ConfigError> {
    if address.ip().is_loopback() {
        return Ok(address);
    }
    let right = "must be a loopback address, such as 127.0.0.1:8080; reach it from elsewhere through ssh -L";
    Err(ConfigError::new("web-addr", address, right))
}

/// flannel's default for `--subnet-lease-renew-margin`, in minutes.
const DEFAULT_RENEW_MARGIN: u16 = 60;

/// flannel's margin is meant for its fixed TTL of 24 h; with a shorter one it must leave time in which not to renew.
fn renew_margin(minutes: u16, lease_ttl: Duration, warnings: &mut Vec<String>) -> Duration {
    let asked = Duration::from_secs(u64::from(minutes) * 60);
    let most = lease_ttl / 2;
    if asked > most && minutes != DEFAULT_RENEW_MARGIN {
        warnings.push(format!(
            "--subnet-lease-renew-margin={minutes} (minutes) is more than half of --subnet-lease-ttl; \
             {}s is used",
            most.as_secs()
        ));
    }
    asked.min(most)
}

/// Which interface carries the overlay; see [`crate::uplink::choose`] for the order.
#[derive(Debug, Clone, Default)]
pub struct UplinkChoice {
    /// Names or addresses, the first that is there.
    pub ifaces: Vec<String>,
    /// Matched against addresses, then names.
    pub iface_regex: Vec<Regex>,
    /// The interface by which this address is reached.
    pub can_reach: Option<IpAddr>,
    /// The address that other nodes are told.
    pub public_ip: Option<Ipv4Addr>,
    /// The same of IPv6, in a network that has it.
    pub public_ipv6: Option<Ipv6Addr>,
}

impl UplinkChoice {
    fn from_args(args: UplinkArgs) -> Result<Self, ConfigError> {
        for iface in &args.iface {
            let is_name = iface.len() < 16 && !iface.contains(|c: char| c.is_whitespace() || c == '/');
            if !is_name && iface.parse::<Ipv6Addr>().is_err() {
                let right = "must be an interface's name (1 to 15 characters) or address, such as eth1";
                return Err(ConfigError::new("iface", iface, right));
            }
        }
        Ok(Self {
            ifaces: args.iface,
            iface_regex: args.iface_regex,
            can_reach: args.iface_can_reach,
            public_ip: args.public_ip,
            public_ipv6: args.public_ipv6,
        })
    }
}

/// How packets travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Datapath {
    /// eBPF where the kernel can load the programs, else the kernel alone.
    Auto,
    /// eBPF in front of the kernel; not starting otherwise.
    Ebpf,
    /// The kernel alone.
    Kernel,
}

/// Which flows may skip the host's firewall.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Gate {
    /// Those that the host has passed unchanged, both ways.
    Strict,
    /// All but those that the host rewrites.
    Open,
}

/// How the guard runs on the uplink.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Xdp {
    /// Native where the driver has it, never on veth; else off.
    Auto,
    /// In the driver.
    Native,
    /// In the kernel's generic hook.
    Generic,
    /// Not at all.
    Off,
}

/// What happens to a packet whose inner source is not in its peer's subnet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SourceCheck {
    /// It is dropped and counted.
    Drop,
    /// It is left to the kernel and counted.
    Pass,
}

/// What is logged, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    pub format: LogFormat,
    /// klog's `-v`.
    pub verbosity: i32,
    /// `tracing` directives, which overrule the verbosity.
    pub directives: Option<String>,
}

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Text for people.
    Human,
    /// A JSON object a line.
    Json,
}

/// A string that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The string itself, to be handed to whom it is for.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

impl FromStr for Secret {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}

/// Flags that contradict each other or ask for what is not provided.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("--{flag}={value} {reason}")]
pub struct ConfigError {
    /// The flag, without dashes.
    pub flag: &'static str,
    /// Its value.
    pub value: String,
    /// What is wrong and what would be right, as the sentence that flag and value begin.
    pub reason: String,
}

impl ConfigError {
    fn new(flag: &'static str, value: impl fmt::Display, reason: impl fmt::Display) -> Self {
        Self { flag, value: value.to_string(), reason: reason.to_string() }
    }
}

#[cfg(test)]
mod tests;
