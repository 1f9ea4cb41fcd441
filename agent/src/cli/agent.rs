//! The flags of `loden agent`: flannel's, with flannel's names and defaults, and our own.
//!
//! Each value is checked by its parser, so that an error names the flag or the variable that it came in.
//! Rules that span several flags are in [`crate::config`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use regex::Regex;

use crate::config::etcd::Endpoint;
use crate::config::flag_value::{self, boolean};
use crate::config::{Datapath, Gate, LogFormat, Secret, SourceCheck, Xdp};

/// The flags of `loden agent`.
#[derive(Debug, Clone, clap::Args)]
pub struct AgentArgs {
    #[command(flatten)]
    pub etcd: EtcdArgs,

    #[command(flatten)]
    pub kube: KubeArgs,

    #[command(flatten)]
    pub uplink: UplinkArgs,

    /// File to write the subnet, MTU and masquerade setting to, for dockerd and CNI plugins
    #[arg(long, value_name = "FILE", default_value = "/run/flannel/subnet.env", value_parser = flag_value::file)]
    pub subnet_file: PathBuf,

    /// Minutes before a lease runs out by which it is renewed (1 to 1439)
    #[arg(long, value_name = "MINUTES", default_value_t = 60, value_parser = clap::value_parser!(u16).range(1..=1439))]
    pub subnet_lease_renew_margin: u16,

    /// Masquerade packets that leave the overlay network
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false",
          value_parser = boolean, value_name = "BOOL")]
    pub ip_masq: bool,

    /// Let masquerading keep source ports where it can, instead of choosing them at random
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false",
          value_parser = boolean, value_name = "BOOL")]
    pub ip_masq_fully_random_disable: bool,

    /// Accept forwarded packets of the overlay network in the host's firewall
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "true",
          value_parser = boolean, value_name = "BOOL")]
    pub iptables_forward_rules: bool,

    /// Address to serve /healthz and /readyz on
    #[arg(long, value_name = "IP", default_value = "0.0.0.0", value_parser = flag_value::ip_address)]
    pub healthz_ip: IpAddr,

    /// Port to serve /healthz and /readyz on; 0 serves neither
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    pub healthz_port: u16,

    #[command(flatten)]
    pub flannel_only: FlannelOnlyArgs,

    /// Log more: 0 tells state changes, 1 to 4 adds debugging, 5 and up traces
    #[arg(short = 'v', long = "v", value_name = "LEVEL", default_value_t = 0, allow_negative_numbers = true)]
    pub verbosity: i32,

    /// How packets travel: eBPF in front of the kernel, the kernel alone, or eBPF where the kernel can load it
    #[arg(long, value_enum, default_value_t = Datapath::Auto, help_heading = LODEN)]
    pub datapath: Datapath,

    /// Which flows may skip the host's firewall: those that it has passed before (strict), or all (open)
    #[arg(long, value_enum, default_value_t = Gate::Strict, help_heading = LODEN)]
    pub gate: Gate,

    /// Drop VXLAN from strangers in the uplink's driver (native) or before the stack (generic)
    #[arg(long, value_enum, default_value_t = Xdp::Off, help_heading = LODEN)]
    pub xdp: Xdp,

    /// What happens to a packet of a peer whose inner source is not in that peer's subnet
    #[arg(long, value_enum, default_value_t = SourceCheck::Drop, help_heading = LODEN)]
    pub source_check: SourceCheck,

    /// Have the containers' bridge ask for room for the overlay's headers in front of what they send, by a port that is
    /// never up: datagrams need not be copied to be encapsulated
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "true",
          value_parser = flag_value::boolean, value_name = "BOOL", help_heading = LODEN)]
    pub pod_headroom: bool,

    /// Keep conntrack from the VXLAN packets between the nodes: cheaper connections with the strict gate. Not where the
    /// host's firewall lets VXLAN in or out by connection state (ctstate)
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false",
          value_parser = flag_value::boolean, value_name = "BOOL", help_heading = LODEN)]
    pub notrack_underlay: bool,

    /// Have the programs tell of every packet in the log; for a look at little traffic
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false",
          value_parser = flag_value::boolean, value_name = "BOOL", help_heading = LODEN)]
    pub bpf_log: bool,

    /// Directory of the control socket
    #[arg(long, value_name = "DIR", default_value = "/run/loden", value_parser = flag_value::directory,
          help_heading = LODEN)]
    pub run_dir: PathBuf,

    /// Directory, on a BPF file system, of the pinned programs and maps
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/loden", value_parser = flag_value::directory,
          help_heading = LODEN)]
    pub bpffs_dir: PathBuf,

    /// File with this node's WireGuard key, for the backend wireguard; also taken from WIREGUARD_KEY_FILE
    #[arg(long, value_name = "FILE", default_value = crate::wireguard::key_file::DEFAULT,
          value_parser = flag_value::file, help_heading = LODEN)]
    pub wireguard_key_file: PathBuf,

    /// Address and port to serve Prometheus metrics on
    #[arg(long, value_name = "IP:PORT", value_parser = flag_value::socket_address, help_heading = LODEN)]
    pub metrics_addr: Option<SocketAddr>,

    /// Most peers, and most endpoints, that have metrics of their own; the others are summed up
    #[arg(long, value_name = "N", default_value_t = 500, help_heading = LODEN)]
    pub metrics_max_each: usize,

    /// Loopback address and port to serve the web page on
    #[arg(long, value_name = "IP:PORT", value_parser = flag_value::socket_address, help_heading = LODEN)]
    pub web_addr: Option<SocketAddr>,

    /// How long the subnet stays this node's after the agent has last been heard of
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = flag_value::lease_ttl,
          help_heading = LODEN)]
    pub subnet_lease_ttl: Duration,

    /// Give the subnet back when the agent is asked to stop, instead of keeping it for the next start
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false",
          value_parser = flag_value::boolean, value_name = "BOOL", help_heading = LODEN)]
    pub subnet_lease_release: bool,

    /// What to log, as directives such as `info,loden_agent=debug`; overrules --v
    #[arg(long, value_name = "DIRECTIVES", value_parser = flag_value::log_directives, help_heading = LODEN)]
    pub log: Option<String>,

    /// How a log line looks
    #[arg(long, value_enum, default_value_t = LogFormat::Human, help_heading = LODEN)]
    pub log_format: LogFormat,
}

/// The heading, in the help, of the flags that flannel does not have.
pub(super) const LODEN: &str = "Loden's own";

/// Where etcd is and how to be let in.
#[derive(Debug, Clone, clap::Args)]
pub struct EtcdArgs {
    /// etcd's client endpoints, separated by commas
    #[arg(
        long,
        value_name = "URLS",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:4001,http://127.0.0.1:2379"
    )]
    pub etcd_endpoints: Vec<Endpoint>,

    /// The key in etcd under which the network's configuration and leases are
    #[arg(long, value_name = "KEY", default_value = "/coreos.com/network",
          value_parser = crate::config::etcd::prefix)]
    pub etcd_prefix: String,

    /// File with the private key of --etcd-certfile
    #[arg(long, value_name = "FILE", value_parser = flag_value::file)]
    pub etcd_keyfile: Option<PathBuf>,

    /// File with the certificate that the agent shows etcd
    #[arg(long, value_name = "FILE", value_parser = flag_value::file)]
    pub etcd_certfile: Option<PathBuf>,

    /// File with the certificate authority that must have signed etcd's certificate
    #[arg(long, value_name = "FILE", value_parser = flag_value::file)]
    pub etcd_cafile: Option<PathBuf>,

    /// etcd user
    #[arg(long, value_name = "NAME")]
    pub etcd_username: Option<String>,

    /// etcd user's password; better given as FLANNELD_ETCD_PASSWORD, which `ps` does not show
    #[arg(long, value_name = "PASSWORD")]
    pub etcd_password: Option<Secret>,
}

/// The Kubernetes API as the place of leases.
#[derive(Debug, Clone, clap::Args)]
pub struct KubeArgs {
    /// Take leases from the Kubernetes API (the node's podCIDR) instead of etcd
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false",
          value_parser = boolean, value_name = "BOOL", help_heading = KUBERNETES)]
    pub kube_subnet_mgr: bool,

    /// The API server; default: that of --kubeconfig-file, or the one that runs this pod
    #[arg(long, value_name = "URL", value_parser = crate::config::kube::api_url, help_heading = KUBERNETES)]
    pub kube_api_url: Option<String>,

    /// File with the API server's address and credentials, where the agent is no pod
    #[arg(long, value_name = "FILE", value_parser = flag_value::file, help_heading = KUBERNETES)]
    pub kubeconfig_file: Option<PathBuf>,

    /// What the names of the node's annotations begin with
    #[arg(long, value_name = "PREFIX", default_value = Self::ANNOTATION_PREFIX,
          value_parser = crate::config::kube::annotation_prefix, help_heading = KUBERNETES)]
    pub kube_annotation_prefix: String,

    /// File with the network's configuration
    #[arg(long, value_name = "FILE", default_value = Self::NET_CONFIG_PATH, value_parser = flag_value::file,
          help_heading = KUBERNETES)]
    pub net_config_path: PathBuf,

    /// Set the node's condition NetworkUnavailable to False once packets are carried
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "true",
          value_parser = boolean, value_name = "BOOL", help_heading = KUBERNETES)]
    pub set_node_network_unavailable: bool,
}

/// The heading, in the help, of what only counts with --kube-subnet-mgr.
const KUBERNETES: &str = "Kubernetes";

impl KubeArgs {
    pub(crate) const ANNOTATION_PREFIX: &str = "flannel.alpha.coreos.com";
    pub(crate) const NET_CONFIG_PATH: &str = "/etc/kube-flannel/net-conf.json";
}

/// Which interface carries the overlay.
#[derive(Debug, Clone, clap::Args)]
pub struct UplinkArgs {
    /// Interface (name or address) that carries the overlay; may be repeated, the first that is there is taken
    #[arg(long, value_name = "NAME|IP")]
    pub iface: Vec<String>,

    /// Take the first interface whose address or name matches, if no --iface does; may be repeated
    #[arg(long, value_name = "REGEX", value_parser = flag_value::regex)]
    pub iface_regex: Vec<Regex>,

    /// Take the interface by which this address is reached, if no --iface or --iface-regex matches
    #[arg(long, value_name = "IP", value_parser = flag_value::host_address)]
    pub iface_can_reach: Option<IpAddr>,

    /// Address that other nodes reach this one by, if it is not the interface's own
    #[arg(long, value_name = "IP", value_parser = flag_value::ipv4_address)]
    pub public_ip: Option<Ipv4Addr>,

    /// The same of IPv6, in a network that has it
    #[arg(long, value_name = "IP", value_parser = flag_value::ipv6_address)]
    pub public_ipv6: Option<Ipv6Addr>,
}

/// Flags of flannel that Loden knows and does not act on.
#[derive(Debug, Clone, clap::Args)]
pub struct FlannelOnlyArgs {
    #[arg(long, hide = true, default_value_t = Self::IPTABLES_RESYNC)]
    pub iptables_resync: i64,
    #[arg(long, hide = true, action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", value_parser = boolean)]
    pub ip_blackhole_route: bool,
    #[arg(long, hide = true)]
    pub vmodule: Option<String>,
    #[arg(long = "log_backtrace_at", hide = true)]
    pub log_backtrace_at: Option<String>,
}

impl FlannelOnlyArgs {
    const IPTABLES_RESYNC: i64 = 5;

    /// The flags that are set to something other than flannel's default and have no effect here.
    #[must_use]
    pub fn without_effect(&self) -> Vec<&'static str> {
        let set = [
            (self.iptables_resync != Self::IPTABLES_RESYNC, "--iptables-resync"),
            (self.ip_blackhole_route, "--ip-blackhole-route"),
            (self.vmodule.is_some(), "--vmodule"),
            (self.log_backtrace_at.as_deref().is_some_and(|at| at != ":0"), "--log_backtrace_at"),
        ];
        set.into_iter().filter(|(set, _)| *set).map(|(_, flag)| flag).collect()
    }
}
