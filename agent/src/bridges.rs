//! Whether the bridges of this host fit its lease: what Docker or a CNI plugin made for another subnet, or for none, is
//! found and explained, because nobody reaches the containers on it.
//!
//! Advice only: a node is ready without it. dockerd waits for the agent in most installations, and could never put
//! right what it is waiting for. Pure: [`crate::reconcile`] reads the kernel.

use std::net::IpAddr;

use ipnet::IpNet;

/// A bridge with its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressedBridge {
    /// Its name.
    pub name: String,
    /// Its addresses of both families, with host bits; none of IPv6's link-local ones.
    pub addresses: Vec<IpNet>,
    /// The largest MTU among the containers' ends of it, in bytes; `None` without containers.
    pub containers_mtu: Option<u32>,
}

/// What containers need on this node.
#[derive(Clone, Debug)]
pub struct Lease {
    /// Of each family that the network has, IPv4 first.
    pub halves: Vec<Half>,
    /// The MTU of containers, in bytes.
    pub mtu: u32,
    /// Pods were found without a bridge, so that no bridge is missed.
    pub routed_pods: bool,
}

/// One family of a lease.
#[derive(Clone, Copy, Debug)]
pub struct Half {
    /// The whole network.
    pub network: IpNet,
    /// The subnet of this node.
    pub subnet: IpNet,
}

/// What is wrong with the bridges, and what to do, one line for each.
#[must_use]
pub fn advice(lease: &Lease, bridges: &[AddressedBridge]) -> Vec<String> {
    let line = |bridge: &AddressedBridge| {
        let of_half = |half: &Half| match half.inside(bridge) {
            Some(address) => too_wide(half, address),
            None => outside_the_lease(lease, half, bridge, bridges),
        };
        let wrong: Vec<String> =
            lease.halves.iter().filter_map(of_half).chain(too_large(lease, bridge)).collect();
        let remedy = || remedy(lease, &bridge.name);
        (!wrong.is_empty()).then(|| format!("{}: {}; {}", bridge.name, wrong.join(", and "), remedy()))
    };
    bridges.iter().filter_map(line).collect()
}

impl Half {
    /// The bridge's address in this node's subnet.
    fn inside(&self, bridge: &AddressedBridge) -> Option<IpNet> {
        bridge.addresses.iter().copied().find(|address| self.subnet.contains(&address.addr()))
    }

    fn is_of_family(&self, address: &IpNet) -> bool {
        address.addr().is_ipv4() == self.subnet.addr().is_ipv4()
    }

    fn family(&self) -> &'static str {
        if self.subnet.addr().is_ipv4() { "IPv4" } else { "IPv6" }
    }

    /// As in subnet.env: the first address after the base is the bridge's.
    fn gateway(&self) -> IpAddr {
        match self.subnet.network() {
            IpAddr::V4(base) => std::net::Ipv4Addr::from(u32::from(base) | 1).into(),
            IpAddr::V6(base) => std::net::Ipv6Addr::from(u128::from(base) | 1).into(),
        }
    }
}

fn too_wide(half: &Half, address: IpNet) -> Option<String> {
    let subnet = half.subnet;
    (address.prefix_len() < subnet.prefix_len()).then(|| {
        format!(
            "it has {address}, which is wider than this node's subnet {subnet}, and its containers take addresses of \
             other nodes"
        )
    })
}

fn too_large(lease: &Lease, bridge: &AddressedBridge) -> Option<String> {
    let mtu = lease.mtu;
    let carries = lease.halves.iter().any(|half| half.inside(bridge).is_some());
    let too_large = bridge.containers_mtu.filter(|containers| carries && *containers > mtu)?;
    Some(format!("its containers have an MTU of {too_large}, and only {mtu} bytes fit into the overlay"))
}

fn outside_the_lease(
    lease: &Lease,
    half: &Half,
    bridge: &AddressedBridge,
    all: &[AddressedBridge],
) -> Option<String> {
    let Half { network, subnet } = half;
    if let Some(address) = bridge.addresses.iter().find(|address| network.contains(&address.addr())) {
        return Some(format!(
            "it has {address}, which is another node's part of {network}; this node's subnet is {subnet}, and \
             containers on it are not reached"
        ));
    }
    // Docker's own default beside a network that does carry the subnet, or beside routed pods, is as it should be.
    let in_use = lease.routed_pods || all.iter().any(|bridge| half.inside(bridge).is_some());
    let expected = match bridge.name.as_str() {
        "cni0" => true,
        "docker0" => !in_use,
        _ => false,
    };
    if !expected {
        return None;
    }
    if let Some(address) = bridge.addresses.iter().find(|address| half.is_of_family(address)) {
        return Some(format!(
            "it has {address}, which is outside of this node's subnet {subnet}, and its containers are not reached from \
             other nodes"
        ));
    }
    // One that carries the other family's subnet is the containers' bridge.
    let carries_other = lease.halves.iter().any(|half| half.inside(bridge).is_some());
    carries_other.then(|| {
        let family = half.family();
        format!(
            "it has no address of this node's {family} subnet {subnet}, and its containers have no {family}"
        )
    })
}

fn remedy(lease: &Lease, bridge: &str) -> String {
    let mtu = lease.mtu;
    let [v4, v6] =
        [true, false].map(|v4| lease.halves.iter().find(|half| half.subnet.addr().is_ipv4() == v4));
    let with_length = |half: &Half| format!("{}/{}", half.gateway(), half.subnet.prefix_len());
    match bridge {
        "docker0" => {
            let bip = v4.map(|half| format!("--bip={} ", with_length(half))).unwrap_or_default();
            let v6 = v6.map(|half| format!("--ipv6 --fixed-cidr-v6={} ", with_length(half)));
            let by = match v6 {
                None => "`loden docker-opts` writes both",
                Some(_) => "`loden docker-opts --ipv6` writes them",
            };
            format!("restart dockerd with {bip}{}--mtu={mtu} ({by} from subnet.env)", v6.unwrap_or_default())
        }
        "cni0" => "move its pods away and delete it (ip link delete cni0): the next pod makes it anew from subnet.env".into(),
        _ => {
            let subnet = |half: &Half| format!("the subnet {}, the gateway {}", half.subnet, half.gateway());
            let subnets: Vec<String> = lease.halves.iter().map(subnet).collect();
            format!("make its network anew with {} and the MTU {mtu}", subnets.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease() -> Lease {
        Lease { halves: vec![half("10.5.0.0/16", "10.5.3.0/24")], mtu: 1450, routed_pods: false }
    }

    fn dual() -> Lease {
        let mut lease = lease();
        lease.halves.push(half("fc00::/48", "fc00:0:0:3::/64"));
        Lease { mtu: 1430, ..lease }
    }

    fn half(network: &str, subnet: &str) -> Half {
        Half { network: network.parse().unwrap(), subnet: subnet.parse().unwrap() }
    }

    fn bridge(name: &str, address: &str) -> AddressedBridge {
        let addresses = vec![address.parse().unwrap()];
        AddressedBridge { name: name.into(), addresses, containers_mtu: None }
    }

    #[test]
    fn a_bridge_that_fits_is_no_matter() {
        let fits = AddressedBridge { containers_mtu: Some(1450), ..bridge("docker0", "10.5.3.1/24") };
        assert!(advice(&lease(), &[fits]).is_empty());
        assert!(advice(&lease(), &[]).is_empty());
        assert!(advice(&lease(), &[bridge("docker0", "10.5.3.129/25")]).is_empty(), "a part of it will do");
    }

    #[test]
    fn dockers_default_is_told_of_only_where_nothing_else_carries_the_subnet() {
        let default = bridge("docker0", "172.17.0.1/16");
        assert_eq!(
            advice(&lease(), std::slice::from_ref(&default)),
            [
                "docker0: it has 172.17.0.1/16, which is outside of this node's subnet 10.5.3.0/24, and its containers are \
              not reached from other nodes; restart dockerd with --bip=10.5.3.1/24 --mtu=1450 (`loden docker-opts` writes \
              both from subnet.env)"
            ]
        );
        assert!(advice(&lease(), &[default.clone(), bridge("br-leased", "10.5.3.1/24")]).is_empty());
        assert!(advice(&Lease { routed_pods: true, ..lease() }, &[default]).is_empty());
        assert!(advice(&lease(), &[bridge("virbr0", "192.168.122.1/24")]).is_empty(), "somebody else's");
    }

    #[test]
    fn another_nodes_subnet_a_wide_one_and_a_large_mtu_are_named() {
        for (name, address, mtu, words) in [
            ("docker0", "10.5.9.1/24", None, "10.5.9.1/24, which is another node's part of 10.5.0.0/16"),
            (
                "br-old",
                "10.5.9.1/24",
                None,
                "with the subnet 10.5.3.0/24, the gateway 10.5.3.1 and the MTU 1450",
            ),
            ("cni0", "10.244.1.1/24", None, "ip link delete cni0"),
            ("docker0", "10.5.3.1/16", None, "10.5.3.1/16, which is wider than"),
            ("docker0", "10.5.3.1/24", Some(1500), "an MTU of 1500, and only 1450 bytes"),
        ] {
            let bridge = AddressedBridge { containers_mtu: mtu, ..bridge(name, address) };
            let advice = advice(&lease(), &[bridge]);
            assert!(advice.len() == 1 && advice[0].contains(words), "{name} {address}: {advice:?}");
            assert!(advice[0].starts_with(&format!("{name}: ")));
        }
    }
    #[test]
    fn ipv6_is_wanted_of_the_bridge_that_carries_the_ipv4_subnet_and_of_no_other() {
        let with = |name: &str, addresses: &[&str]| AddressedBridge {
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
            ..bridge(name, "10.5.3.1/24")
        };
        assert!(advice(&dual(), &[with("docker0", &["10.5.3.1/24", "fc00:0:0:3::1/64"])]).is_empty());
        assert!(advice(&dual(), &[with("br-leased", &["10.5.3.1/24"])]).is_empty(), "as it was made");
        assert!(advice(&lease(), &[with("docker0", &["10.5.3.1/24", "fd00::1/64"])]).is_empty(), "no matter");
        assert_eq!(
            advice(&dual(), &[with("docker0", &["10.5.3.1/24"])]),
            [
                "docker0: it has no address of this node's IPv6 subnet fc00:0:0:3::/64, and its containers have no IPv6; \
              restart dockerd with --bip=10.5.3.1/24 --ipv6 --fixed-cidr-v6=fc00:0:0:3::1/64 --mtu=1430 (`loden \
              docker-opts --ipv6` writes them from subnet.env)"
            ]
        );
        for (addresses, words) in [
            (
                &["10.5.3.1/24", "fc00:0:0:9::1/64"][..],
                "fc00:0:0:9::1/64, which is another node's part of fc00::/48",
            ),
            (
                &["10.5.3.1/24", "fd00::1/64"],
                "fd00::1/64, which is outside of this node's subnet fc00:0:0:3::/64",
            ),
            (&["10.5.3.1/24", "fc00:0:0:3::1/48"], "fc00:0:0:3::1/48, which is wider than"),
            (&["172.17.0.1/16"], "172.17.0.1/16, which is outside of this node's subnet 10.5.3.0/24"),
        ] {
            let advice = advice(&dual(), &[with("docker0", addresses)]);
            assert!(advice.len() == 1 && advice[0].contains(words), "{addresses:?}: {advice:?}");
        }
        let only = Lease { halves: dual().halves.split_off(1), ..dual() };
        let advice = advice(&only, &[with("docker0", &["172.17.0.1/16", "fd00::1/64"])]);
        assert!(advice.len() == 1 && advice[0].contains("with --ipv6 --fixed-cidr-v6="), "{advice:?}");
    }
}
