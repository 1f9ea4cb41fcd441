//! Filter rules on a node, as an operator or a policy engine writes them, in iptables or in nftables.

use anyhow::Result;

use crate::{
    netns::Netns,
    service::{Tool, feed},
};

/// Packets of one direction of a flow, as a rule names them.
#[derive(Clone, Copy, Debug)]
pub enum Matching {
    /// UDP to this port.
    UdpTo(u16),
    /// UDP from this port.
    UdpFrom(u16),
    /// TCP to this port.
    TcpTo(u16),
    /// ICMP echo requests that arrive from the overlay.
    EchoRequestsIn,
}

/// Drops what matches where it is forwarded, from now on, in the IPv4 half or the other.
///
/// # Errors
///
/// Where the tool is missing.
pub fn deny(node: &Netns, tool: Tool, is_ipv4: bool, matching: Matching) -> Result<()> {
    match tool {
        Tool::Iptables | Tool::LegacyIptables => {
            let what = match matching {
                Matching::UdpTo(port) => format!("-p udp --dport {port}"),
                Matching::UdpFrom(port) => format!("-p udp --sport {port}"),
                Matching::TcpTo(port) => format!("-p tcp --dport {port}"),
                Matching::EchoRequestsIn if is_ipv4 => {
                    "-i flannel.1 -p icmp --icmp-type echo-request".to_owned()
                }
                Matching::EchoRequestsIn => "-i flannel-v6.1 -p icmpv6 --icmpv6-type echo-request".to_owned(),
            };
            node.exec(&format!("{} -I FORWARD {what} -j DROP", tool.iptables(is_ipv4, ""))).map(drop)
        }
        Tool::Nft => {
            let what = match matching {
                Matching::UdpTo(port) => format!("udp dport {port}"),
                Matching::UdpFrom(port) => format!("udp sport {port}"),
                Matching::TcpTo(port) => format!("tcp dport {port}"),
                Matching::EchoRequestsIn if is_ipv4 => {
                    "iifname \"flannel.1\" icmp type echo-request".to_owned()
                }
                Matching::EchoRequestsIn => "iifname \"flannel-v6.1\" icmpv6 type echo-request".to_owned(),
            };
            let ip = if is_ipv4 { "ip" } else { "ip6" };
            let table = format!(
                "table {ip} operator {{\nchain forward {{\ntype filter hook forward priority 0;\n}}\n}}\n\
                 add rule {ip} operator forward {what} drop\n"
            );
            feed(node, "nft", &["-f", "-"], &table)
        }
    }
}

/// A firewall with a memory, in the IPv4 half or the other: what is invalid is dropped, what belongs to a known connection
/// passes, TCP and UDP to these ports may begin one, and nothing else is forwarded.
///
/// # Errors
///
/// Where the tool is missing.
pub fn stateful(node: &Netns, tool: Tool, is_ipv4: bool, ports: &[u16]) -> Result<()> {
    let list = |between: &str| ports.iter().map(u16::to_string).collect::<Vec<_>>().join(between);
    match tool {
        Tool::Iptables | Tool::LegacyIptables => {
            let program = tool.iptables(is_ipv4, "-restore");
            let input = format!(
                "*filter\n:FORWARD DROP [0:0]\n-F FORWARD\n-A FORWARD -m conntrack --ctstate INVALID -j DROP\n\
                 -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
                 -A FORWARD -p tcp --syn -m multiport --dports {0} -j ACCEPT\n\
                 -A FORWARD -p udp -m multiport --dports {0} -j ACCEPT\nCOMMIT\n",
                list(",")
            );
            feed(node, &program, &["--noflush"], &input)
        }
        Tool::Nft => {
            let ip = if is_ipv4 { "ip" } else { "ip6" };
            let input = format!(
                "table {ip} firewall {{\nchain forward {{\ntype filter hook forward priority 0; policy drop;\n\
                 ct state invalid drop\nct state established,related accept\n\
                 tcp flags & (syn | ack) == syn tcp dport {{ {0} }} accept\nudp dport {{ {0} }} accept\n}}\n}}\n",
                list(", ")
            );
            feed(node, "nft", &["-f", "-"], &input)
        }
    }
}
