//! Services as kube-proxy's mode `ipvs` makes them: their addresses on a dummy device, so that packets for them are the
//! node's own, and IPVS, which sends these on to a backend. Needs a kernel with ip_vs.

use std::net::SocketAddr;

use anyhow::Result;

use crate::{netns::Netns, service::Front};

/// The device that has the services' addresses.
const DEVICE: &str = "kube-ipvs0";
/// ipvsadm's names of TCP and UDP.
const PROTOCOLS: [&str; 2] = ["-t", "-u"];

/// Makes these, all of one family, services of a node. A pod that reaches itself by one is masqueraded, as kube-proxy does
/// by an ipset of such pairs; others are not.
///
/// # Errors
///
/// Where ipvsadm is missing, or the kernel has no ip_vs.
pub fn publish(node: &Netns, fronts: &[Front]) -> Result<()> {
    if node.ip(&format!("link show {DEVICE}")).is_err() {
        node.ip(&format!("link add {DEVICE} type dummy"))?;
        node.ip(&format!("link set {DEVICE} up"))?;
    }
    // As kube-proxy sets it: what IPVS translates is in netfilter's table as well.
    node.exec("sysctl -qw net.ipv4.vs.conntrack=1")?;
    for Front { address, backends, .. } in fronts {
        let (nodad, bits) = if address.is_ipv4() { ("", 32) } else { (" nodad", 128) };
        node.ip(&format!("address replace {}/{bits} dev {DEVICE}{nodad}", address.ip()))?;
        for protocol in PROTOCOLS {
            node.exec(&format!("ipvsadm --add-service {protocol} {address} -s rr"))?;
            for backend in backends {
                node.exec(&format!("ipvsadm --add-server {protocol} {address} -r {backend} --masquerading"))?;
            }
        }
        backends.iter().try_for_each(|backend| masquerade_itself(node, *backend))?;
    }
    Ok(())
}

fn masquerade_itself(node: &Netns, backend: SocketAddr) -> Result<()> {
    let (iptables, pod) = (if backend.is_ipv4() { "iptables" } else { "ip6tables" }, backend.ip());
    let rule = format!("POSTROUTING -s {pod} -d {pod} -j MASQUERADE");
    if node.exec(&format!("{iptables} -t nat -C {rule}")).is_err() {
        node.exec(&format!("{iptables} -t nat -A {rule}"))?;
    }
    Ok(())
}
