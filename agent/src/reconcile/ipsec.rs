//! IPsec policies of this host, which the programs would pass by: of what they send nobody asks XFRM. A peer whose packets
//! a policy may be for is left to the kernel.

use ipnet::IpNet;

use super::{Reconciler, half::Side};
use crate::{
    dataplane::{PeerPath, Way},
    kernel::xfrm::{self, Policy},
    lease::Lease,
};

/// Number of UDP (IANA).
const UDP: u8 = 17;

/// Packets that go to a peer.
#[derive(Clone, Copy)]
struct Packets {
    source: IpNet,
    destination: IpNet,
    /// The port of VXLAN, where they are in a tunnel; without one, they are of any protocol.
    tunnel: Option<u16>,
}

/// Which of the packets a policy is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Share {
    None,
    Some,
    All,
}

/// Whether one of these policies, the one that counts first in front, wants something of some of the packets.
fn want(policies: &[Policy], packets: &Packets) -> bool {
    for policy in policies {
        match (share(policy, packets), policy.exempts) {
            (Share::None, _) | (Share::Some, true) => {}
            (Share::All, true) => return false,
            (Share::Some | Share::All, false) => return true,
        }
    }
    false
}

fn share(policy: &Policy, packets: &Packets) -> Share {
    let net = |policy: &IpNet, packets: &IpNet| match (policy.contains(packets), packets.contains(policy)) {
        (true, _) => Share::All,
        (false, true) => Share::Some,
        (false, false) => Share::None,
    };
    let protocol = match (policy.protocol, packets.tunnel) {
        (0, _) | (UDP, Some(_)) => Share::All,
        (_, Some(_)) => Share::None,
        (_, None) => Share::Some,
    };
    let port = match (policy.destination_port, packets.tunnel) {
        ((_, 0), _) => Share::All,
        ((port, mask), Some(tunnel)) if port & mask == tunnel & mask => Share::All,
        (_, Some(_)) => Share::None,
        (_, None) => Share::Some,
    };
    let rest = policy.source_port.1 == 0 && policy.ifindex == 0;
    let parts = [
        net(&policy.source, &packets.source),
        net(&policy.destination, &packets.destination),
        protocol,
        port,
        if rest { Share::All } else { Share::Some },
    ];
    if parts.contains(&Share::None) {
        Share::None
    } else if parts.contains(&Share::Some) {
        Share::Some
    } else {
        Share::All
    }
}

impl Reconciler {
    /// Reads the policies anew; says whether they are others than before. What cannot be read is as it was.
    pub(super) fn read_policies(&mut self) -> bool {
        match xfrm::policies() {
            Ok(policies) if policies == self.policies => false,
            Ok(policies) => {
                tracing::info!(
                    policies = policies.len(),
                    "this host has other IPsec policies for what it sends"
                );
                self.policies = policies;
                true
            }
            Err(error) => {
                tracing::warn!("the host's IPsec policies: {error}");
                false
            }
        }
    }

    /// Takes the fast path from a peer where a policy is for what goes there.
    pub(super) fn respect_policies<F: Side>(&self, mut path: PeerPath<F>) -> PeerPath<F> {
        if self.is_protected(&path) {
            path.underlay = None;
        }
        path
    }

    /// Whether a policy is for what goes to a peer: for what the host puts into the tunnel or sends on, or for the tunnel
    /// itself. What WireGuard's device sends is the kernel's anyway.
    fn is_protected<F: Side>(&self, path: &PeerPath<F>) -> bool {
        if self.policies.is_empty() {
            return false;
        }
        let Some(half) = F::half(&self.node) else { return false };
        let pods = Packets { source: half.subnet.into(), destination: path.subnet.into(), tunnel: None };
        let own = F::address(&self.node.uplink);
        let alone = |address: F::Addr| IpNet::from(address.into());
        let tunnel = half.overlay.as_ref().filter(|_| path.way == Way::Encapsulated).zip(own);
        let outer = tunnel.map(|(overlay, own)| Packets {
            source: alone(own),
            destination: alone(path.vtep),
            tunnel: Some(overlay.vxlan.port),
        });
        [Some(pods), outer].iter().flatten().any(|packets| want(&self.policies, packets))
    }

    /// The subnets of a family that are left to the kernel for it.
    pub(super) fn protected<'a, F: Side>(&self, leases: impl Iterator<Item = &'a Lease>) -> Vec<F::Net> {
        if self.policies.is_empty() {
            return Vec::new();
        }
        let paths = leases.filter_map(|lease| {
            let subnet = lease.key.half::<F>()?;
            Some(self.wanted_path::<F>(lease, subnet).ok()?.1)
        });
        paths.filter(|path| self.is_protected(path)).map(|path| path.subnet).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(source: &str, destination: &str) -> Policy {
        Policy {
            priority: 100,
            exempts: false,
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            protocol: 0,
            source_port: (0, 0),
            destination_port: (0, 0),
            ifindex: 0,
        }
    }

    fn packets(source: &str, destination: &str, tunnel: Option<u16>) -> Packets {
        Packets { source: source.parse().unwrap(), destination: destination.parse().unwrap(), tunnel }
    }

    #[test]
    fn a_policy_between_the_nodes_is_for_the_tunnel() {
        let outer = packets("192.0.2.1/32", "192.0.2.2/32", Some(8472));
        let host = policy("192.0.2.1/32", "192.0.2.2/32");
        let with = |change: fn(&mut Policy)| {
            let mut policy = host;
            change(&mut policy);
            want(&[policy], &outer)
        };
        assert!(with(|_| ()));
        assert!(with(|it| it.protocol = UDP));
        assert!(with(|it| it.destination_port = (8472, 0xffff)));
        assert!(with(|it| it.source_port = (500, 0xffff)), "the tunnel has many");
        assert!(with(|it| it.destination = "192.0.2.0/24".parse().unwrap()));
        assert!(!with(|it| it.protocol = 6));
        assert!(!with(|it| it.destination_port = (4789, 0xffff)));
        assert!(!with(|it| it.destination = "192.0.2.3/32".parse().unwrap()));
        assert!(!with(|it| it.source = "192.0.2.9/32".parse().unwrap()));
        assert!(!want(&[], &outer));
    }

    #[test]
    fn a_policy_for_some_pods_is_for_their_peer() {
        let pods = packets("10.5.1.0/24", "10.5.2.0/24", None);
        assert!(want(&[policy("0.0.0.0/0", "10.5.2.7/32")], &pods));
        assert!(want(&[Policy { protocol: 6, ..policy("10.5.0.0/16", "10.5.0.0/16") }], &pods));
        assert!(!want(&[policy("0.0.0.0/0", "10.5.3.0/24")], &pods));
        assert!(!want(&[policy("::/0", "::/0")], &pods));
    }

    /// As strongSwan has it for a host that sends all but what stays on the link to a gateway.
    #[test]
    fn what_a_policy_in_front_exempts_whole_is_exempt() {
        let outer = packets("192.0.2.1/32", "192.0.2.2/32", Some(8472));
        let all = policy("0.0.0.0/0", "0.0.0.0/0");
        let link = Policy { exempts: true, priority: 50, ..policy("192.0.2.0/24", "192.0.2.0/24") };
        assert!(!want(&[link, all], &outer));
        assert!(want(&[all, Policy { priority: 200, ..link }], &outer));
        let ssh = Policy { source_port: (22, 0xffff), ..link };
        assert!(want(&[ssh, all], &outer));
    }
}
