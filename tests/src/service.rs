//! Services as kube-proxy and the portmap plugin make them: destination NAT on a node, in iptables or in nftables.
//!
//! Who needs masquerading is marked with 0x4000, as kube-proxy does, and masqueraded behind everything else: a
//! pod that reaches itself through a service, and whoever calls a front that says so (a NodePort).

use std::{
    io::Write as _,
    net::{IpAddr, SocketAddr},
    process::Stdio,
};

use anyhow::{Context as _, Result, ensure};

use crate::netns::Netns;

/// What the rules are written with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// iptables, on top of nf_tables.
    Iptables,
    /// The iptables from before nf_tables, whose changes nobody is told of.
    LegacyIptables,
    /// nft.
    Nft,
}

/// One port of a service, for TCP and for UDP.
#[derive(Clone, Debug)]
pub struct Front {
    /// What clients connect to.
    pub address: SocketAddr,
    /// Who answers, in the same family; each connection gets one of them at random.
    pub backends: Vec<SocketAddr>,
    /// Every client's address is replaced by the node's (NodePort), not only that of a backend itself.
    pub masquerade: bool,
}

impl Front {
    /// A ClusterIP.
    #[must_use]
    pub fn new(address: SocketAddr, backends: &[SocketAddr]) -> Self {
        Self { address, backends: backends.to_vec(), masquerade: false }
    }

    /// The same, with every client masqueraded.
    #[must_use]
    pub fn masqueraded(self) -> Self {
        Self { masquerade: true, ..self }
    }
}

/// Makes these, all of one family, the services of a node. Once per node, tool and family: iptables would keep the earlier
/// ones.
///
/// # Errors
///
/// Where the tool is missing or refuses the rules.
pub fn publish(node: &Netns, tool: Tool, fronts: &[Front]) -> Result<()> {
    let is_ipv4 = fronts.iter().all(|front| front.address.is_ipv4());
    match tool {
        Tool::Iptables | Tool::LegacyIptables => {
            feed(node, &tool.iptables(is_ipv4, "-restore"), &["--noflush"], &iptables(fronts))
        }
        Tool::Nft => feed(node, "nft", &["-f", "-"], &nft(fronts, is_ipv4)),
    }
}

impl Tool {
    /// The name of a program of iptables, such as `ip6tables-restore`.
    pub(crate) fn iptables(self, is_ipv4: bool, end: &str) -> String {
        let family = if is_ipv4 { "ip" } else { "ip6" };
        let legacy = if self == Self::LegacyIptables { "-legacy" } else { "" };
        format!("{family}tables{legacy}{end}")
    }
}

/// Runs a program inside a namespace with this standard input.
///
/// # Errors
///
/// Where it cannot be started or fails; the error holds what it was given and what it printed.
pub fn feed(netns: &Netns, program: &str, args: &[&str], input: &str) -> Result<()> {
    let mut command = netns.command(program);
    command.args(args).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("{program} cannot be started"))?;
    child.stdin.take().context("stdin is a pipe")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} says {stderr} to:\n{input}");
    Ok(())
}

const PROTOCOLS: [&str; 2] = ["tcp", "udp"];

fn iptables(fronts: &[Front]) -> String {
    let mut chains = String::new();
    let mut rules = String::new();
    for (n, front) in fronts.iter().enumerate() {
        let Front { address, backends, masquerade } = front;
        chains += &format!(":KUBE-SVC-{n} - [0:0]\n");
        for protocol in PROTOCOLS {
            rules += &format!(
                "-A KUBE-SERVICES -d {} -p {protocol} --dport {} -j KUBE-SVC-{n}\n",
                address.ip(),
                address.port()
            );
        }
        if *masquerade {
            rules += &format!("-A KUBE-SVC-{n} -j KUBE-MARK-MASQ\n");
        }
        for (m, backend) in backends.iter().enumerate() {
            let left = backends.len() - m;
            let chance = if left > 1 {
                format!("-m statistic --mode random --probability {} ", 1.0 / left as f64)
            } else {
                String::new()
            };
            chains += &format!(":KUBE-SEP-{n}-{m} - [0:0]\n");
            rules += &format!("-A KUBE-SVC-{n} {chance}-j KUBE-SEP-{n}-{m}\n");
            rules += &format!("-A KUBE-SEP-{n}-{m} -s {} -j KUBE-MARK-MASQ\n", backend.ip());
            for protocol in PROTOCOLS {
                rules += &format!("-A KUBE-SEP-{n}-{m} -p {protocol} -j DNAT --to-destination {backend}\n");
            }
        }
    }
    format!(
        "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-POSTROUTING - [0:0]\n{chains}\
         -A PREROUTING -j KUBE-SERVICES\n-A OUTPUT -j KUBE-SERVICES\n-I POSTROUTING -j KUBE-POSTROUTING\n\
         -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n\
         -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0\n\
         -A KUBE-POSTROUTING -j MASQUERADE --random-fully\n{rules}COMMIT\n"
    )
}

fn nft(fronts: &[Front], is_ipv4: bool) -> String {
    let ip = if is_ipv4 { "ip" } else { "ip6" };
    let mut services = String::new();
    let mut chains = String::new();
    for (n, front) in fronts.iter().enumerate() {
        let Front { address, backends, masquerade } = front;
        let (front, port) = (address.ip(), address.port());
        services +=
            &format!("{ip} daddr {front} meta l4proto {{ tcp, udp }} th dport {port} goto service-{n}\n");
        let mark = if *masquerade { "meta mark set meta mark or 0x4000" } else { "" };
        let choice: Vec<String> =
            (0..backends.len()).map(|m| format!("{m} : goto endpoint-{n}-{m}")).collect();
        chains += &format!(
            "chain service-{n} {{\n{mark}\nnumgen random mod {} vmap {{ {} }}\n}}\n",
            backends.len(),
            choice.join(", ")
        );
        for (m, backend) in backends.iter().enumerate() {
            chains += &format!(
                "chain endpoint-{n}-{m} {{\n{ip} saddr {} meta mark set meta mark or 0x4000\n\
                 meta l4proto {{ tcp, udp }} dnat to {backend}\n}}\n",
                backend.ip()
            );
        }
    }
    format!(
        "table {ip} kube-proxy {{\n{chains}chain services {{\n{services}}}\n\
         chain prerouting {{ type nat hook prerouting priority dstnat; jump services; }}\n\
         chain output {{ type nat hook output priority -100; jump services; }}\n\
         chain postrouting {{ type nat hook postrouting priority srcnat - 1; \
         meta mark & 0x4000 == 0x4000 masquerade fully-random; }}\n}}\n"
    )
}

/// An address with a port.
#[must_use]
pub fn at(address: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}
