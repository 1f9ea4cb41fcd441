//! The rules of a node: flannel's, and kube-proxy's for some services.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Result;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use loden_tests::{
    netns::Netns,
    service::{Front, Tool, feed, publish},
};

use super::{host, host6};

/// Where services have their addresses.
const SERVICES: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 96, 0, 0), 16);
/// The same of IPv6.
const SERVICES6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 0), 112);

/// What flanneld writes with `--ip-masq`, in its order (flannel 0.28, pkg/trafficmngr/iptables), for the network of
/// either family.
pub(super) fn flannel(node: &Netns, network: IpNet, own: IpNet) -> Result<()> {
    let own = own.trunc();
    let (restore, multicast) = match network {
        IpNet::V4(_) => ("iptables-restore", "224.0.0.0/4"),
        IpNet::V6(_) => ("ip6tables-restore", "ff00::/8"),
    };
    // Its rules have comments, which the kernel goes through too.
    let [masq, forward] =
        ["masq", "forward"].map(|what| format!(r#"-m comment --comment "flanneld {what}""#));
    let input = format!(
        "*nat\n:FLANNEL-POSTRTG - [0:0]\n-A POSTROUTING {masq} -j FLANNEL-POSTRTG\n\
         -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 {masq} -j RETURN\n\
         -A FLANNEL-POSTRTG -s {own} -d {network} {masq} -j RETURN\n\
         -A FLANNEL-POSTRTG -s {network} -d {own} {masq} -j RETURN\n\
         -A FLANNEL-POSTRTG ! -s {network} -d {own} {masq} -j RETURN\n\
         -A FLANNEL-POSTRTG -s {network} ! -d {multicast} {masq} -j MASQUERADE --random-fully\n\
         -A FLANNEL-POSTRTG ! -s {network} -d {network} {masq} -j MASQUERADE --random-fully\nCOMMIT\n\
         *filter\n:FLANNEL-FWD - [0:0]\n-A FORWARD {forward} -j FLANNEL-FWD\n\
         -A FLANNEL-FWD -s {network} {forward} -j ACCEPT\n-A FLANNEL-FWD -d {network} {forward} -j ACCEPT\nCOMMIT\n"
    );
    feed(node, restore, &["--noflush"], &input)
}

/// What kube-proxy writes for `count` services of others, and for one at `service` with these backends, a port each,
/// in the middle of them.
pub(super) fn kube_proxy(
    node: &Netns,
    count: u16,
    service: IpAddr,
    backend: IpAddr,
    ports: &[u16],
) -> Result<()> {
    let other = |n: u16| match service {
        IpAddr::V4(_) => Front::new(
            SocketAddr::from((host(SERVICES, 256 + u32::from(n)), 80)),
            &[SocketAddr::from((Ipv4Addr::new(10, 5, 255, 254), 8080))],
        ),
        IpAddr::V6(_) => Front::new(
            SocketAddr::from((host6(SERVICES6, 256 + u32::from(n)), 80)),
            &[SocketAddr::from((Ipv6Addr::new(0xfc00, 0, 0, 0xffff, 0, 0, 0, 0xfe), 8080))],
        ),
    };
    let ours = |port: &u16| Front::new(SocketAddr::new(service, *port), &[SocketAddr::new(backend, *port)]);
    let fronts: Vec<Front> = (0..count / 2)
        .map(other)
        .chain(ports.iter().map(ours))
        .chain((count / 2..count).map(other))
        .collect();
    publish(node, Tool::Iptables, &fronts)?;
    let filter = "*filter\n:KUBE-FORWARD - [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-FIREWALL - [0:0]\n\
         -A INPUT -m conntrack --ctstate NEW -j KUBE-SERVICES\n-A INPUT -j KUBE-FIREWALL\n\
         -A FORWARD -j KUBE-FORWARD\n-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES\n\
         -A OUTPUT -m conntrack --ctstate NEW -j KUBE-SERVICES\n-A OUTPUT -j KUBE-FIREWALL\n\
         -A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP\n\
         -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
         -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n\
         -A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\nCOMMIT\n";
    let restore = if service.is_ipv4() { "iptables-restore" } else { "ip6tables-restore" };
    feed(node, restore, &["--noflush"], filter)
}
