//! Whether the bridges of this host fit its lease: what Docker or a CNI plugin made for another subnet, or for none, is
//! found and explained, because nobody reaches the containers on it.
//!
//! Advice only: a node is ready without it. dockerd waits for the agent in most installations, and could never put
//! right what it is waiting for. Pure: [`crate::reconcile`] reads the kernel.

use ipnet::Ipv4Net;

/// A bridge with its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressedBridge {
    /// Its name.
    pub name: String,
    /// Its addresses, with host bits.
    pub addresses: Vec<Ipv4Net>,
    /// The largest MTU among the containers' ends of it, in bytes; `None` without containers.
    pub containers_mtu: Option<u32>,
}

/// What containers need on this node.
#[derive(Clone, Copy, Debug)]
pub struct Lease {
    /// The whole network.
    pub network: Ipv4Net,
    /// The subnet of this node.
    pub subnet: Ipv4Net,
    /// The MTU of containers, in bytes.
    pub mtu: u32,
    /// Pods were found without a bridge, so that no bridge is missed.
    pub routed_pods: bool,
}

/// What is wrong with the bridges, and what to do, one line each.
#[must_use]
pub fn advice(lease: &Lease, bridges: &[AddressedBridge]) -> Vec<String> {
    let inside =
        |bridge: &&AddressedBridge| bridge.addresses.iter().any(|a| lease.subnet.contains(&a.addr()));
    let in_use = lease.routed_pods || bridges.iter().any(|bridge| inside(&bridge));
    let mut advice = Vec::new();
    for bridge in bridges {
        let found = match bridge.addresses.iter().find(|address| lease.subnet.contains(&address.addr())) {
            Some(address) => inside_the_lease(lease, bridge, *address),
            None => outside_the_lease(lease, bridge, in_use),
        };
        advice
            .extend(found.map(|wrong| format!("{}: {wrong}; {}", bridge.name, remedy(lease, &bridge.name))));
    }
    advice
}

fn inside_the_lease(lease: &Lease, bridge: &AddressedBridge, address: Ipv4Net) -> Option<String> {
    let Lease { subnet, mtu, .. } = lease;
    if address.prefix_len() < subnet.prefix_len() {
        return Some(format!(
            "it has {address}, which is wider than this node's subnet {subnet}, and its containers take addresses of \
             other nodes"
        ));
    }
    let too_large = bridge.containers_mtu.filter(|containers| containers > mtu)?;
    Some(format!("its containers have an MTU of {too_large}, and only {mtu} bytes fit into the overlay"))
}

fn outside_the_lease(lease: &Lease, bridge: &AddressedBridge, in_use: bool) -> Option<String> {
    let Lease { network, subnet, .. } = lease;
    if let Some(address) = bridge.addresses.iter().find(|address| network.contains(&address.addr())) {
        return Some(format!(
            "it has {address}, which is another node's part of {network}; this node's subnet is {subnet}, and \
             containers on it are not reached"
        ));
    }
    // Docker's own default beside a network that does carry the subnet, or beside routed pods, is as it should be.
    let expected = match bridge.name.as_str() {
        "cni0" => true,
        "docker0" => !in_use,
        _ => false,
    };
    let address = bridge.addresses.first().filter(|_| expected)?;
    Some(format!(
        "it has {address}, which is outside of this node's subnet {subnet}, and its containers are not reached from \
         other nodes"
    ))
}

fn remedy(lease: &Lease, bridge: &str) -> String {
    let Lease { subnet, mtu, .. } = lease;
    // As in subnet.env: the first address is the bridge's.
    let gateway = subnet.hosts().next().unwrap_or_else(|| subnet.network());
    let length = subnet.prefix_len();
    match bridge {
        "docker0" => format!(
            "restart dockerd with --bip={gateway}/{length} --mtu={mtu} (`loden docker-opts` writes both from subnet.env)"
        ),
        "cni0" => "move its pods away and delete it (ip link delete cni0): the next pod makes it anew from subnet.env".into(),
        _ => format!("make its network anew with the subnet {subnet}, the gateway {gateway} and the MTU {mtu}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease() -> Lease {
        Lease {
            network: "10.5.0.0/16".parse().unwrap(),
            subnet: "10.5.3.0/24".parse().unwrap(),
            mtu: 1450,
            routed_pods: false,
        }
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
}
