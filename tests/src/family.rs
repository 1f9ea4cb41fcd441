//! The family that a test runs for, and what else but the packets is another in each.
//!
//! A test that is generic over it is one source and two tests, `NAME::v4` and `NAME::v6`: see
//! [`each_family!`](crate::each_family).

use std::net::IpAddr;

use ipnet::IpNet;

use crate::{
    cluster::{Cluster, Plan},
    container::Container,
    netns::Netns,
    node::Node,
    packet::{Ipv4, Ipv6, Packet},
    traffic::Host,
    underlay::Underlay,
};

/// Makes a test of either family of a function that is generic over it: `NAME::v4` and `NAME::v6`.
#[macro_export]
macro_rules! each_family {
    ($($name:ident),+ $(,)?) => {
        $(mod $name {
            #[test]
            fn v4() {
                super::$name::<loden_tests::packet::Ipv4>();
            }

            #[test]
            fn v6() {
                super::$name::<loden_tests::packet::Ipv6>();
            }
        })+
    };
}

/// Makes tests of a function that takes a plan: `NAME::v4` and `NAME::v6` on nodes that have that family and no other,
/// and `NAME::dual` on nodes of both, where each family is to do the same at the same time.
#[macro_export]
macro_rules! each_plan {
    ($($name:ident),+ $(,)?) => {
        $(mod $name {
            #[test]
            fn v4() {
                super::$name(&loden_tests::cluster::Plan { nodes: 2, ..loden_tests::cluster::Plan::default() });
            }

            #[test]
            fn v6() {
                super::$name(&loden_tests::cluster::Plan { nodes: 2, ..loden_tests::cluster::Plan::ipv6_only() });
            }

            #[test]
            fn dual() {
                super::$name(&loden_tests::cluster::Plan { nodes: 2, ..loden_tests::cluster::Plan::dual() });
            }
        })+
    };
}

/// A family's half of a cluster.
pub trait Family: Packet {
    /// Which one it is.
    const IS_IPV4: bool;
    /// The VXLAN device.
    const DEVICE: &'static str;
    /// Bytes in front of an inner packet.
    const ENCAP_LEN: usize;
    /// Bits of an address.
    const BITS: u8;
    /// The flag by which `ip` knows the family.
    const FLAG: &'static str;
    /// The family's name in nft.
    const NFT: &'static str;
    /// The family's tool beside `iptables`.
    const IPTABLES: &'static str;
    /// What the family's maps have in front of their names.
    const MAPS: &'static str;
    /// What the status calls the VXLAN device.
    const DEVICE_IN_STATUS: &'static str;

    /// Two nodes that have the family; those of IPv6 have IPv4 beside it, as dual-stack nodes do.
    fn plan() -> Plan;
    /// Two nodes that have the family and no other.
    fn alone() -> Plan;
    /// The pod's address.
    fn of(pod: &Container) -> Self::Address;
    /// The `host`-th address of the underlay.
    fn on_underlay(underlay: &Underlay, host: u32) -> Self::Address;
    /// The `host`-th address of a further segment between nodes, the `n`-th, and the length of its prefix.
    fn on_segment(n: u8, host: u8) -> (Self::Address, u8);
    /// The address with this host part in the subnet of another one.
    fn in_subnet_of(address: Self::Address, host: u8) -> Self::Address;
    /// The `n`-th ClusterIP, outside of the cluster's network.
    fn vip(n: u8) -> IpAddr;
    /// Makes a namespace a router.
    fn make_router(netns: &Netns);

    /// The address of the `n`-th node on the underlay.
    fn of_node(cluster: &Cluster, n: usize) -> Self::Address {
        Self::on_underlay(cluster.underlay(), cluster.host_of_node(n))
    }

    /// The pod as one end of a conversation.
    fn host(pod: &Container) -> Host<'_> {
        Host { netns: pod.netns(), address: Self::of(pod).into() }
    }

    /// The node's subnet, without host bits.
    ///
    /// # Panics
    ///
    /// Where it has none of the family.
    fn subnet(node: &Node) -> IpNet {
        let subnets = node.subnet_env().expect("subnet.env").subnets();
        let own = |subnet: &IpNet| subnet.max_prefix_len() == Self::BITS;
        subnets.into_iter().find(own).expect("a subnet of the family")
    }

    /// The address as `ip` shows and takes one that is alone: with the length of the whole.
    fn as_prefix(address: Self::Address) -> String {
        let address: IpAddr = address.into();
        format!("{address}/{}", Self::BITS)
    }
}

impl Family for Ipv4 {
    const IS_IPV4: bool = true;
    const DEVICE: &'static str = "flannel.1";
    const ENCAP_LEN: usize = 50;
    const BITS: u8 = 32;
    const FLAG: &'static str = "-4";
    const NFT: &'static str = "ip";
    const IPTABLES: &'static str = "iptables";
    const MAPS: &'static str = "";
    const DEVICE_IN_STATUS: &'static str = "device";

    fn plan() -> Plan {
        Self::alone()
    }

    fn alone() -> Plan {
        Plan { nodes: 2, ..Plan::default() }
    }

    fn of(pod: &Container) -> Self::Address {
        pod.address()
    }

    fn on_underlay(underlay: &Underlay, host: u32) -> Self::Address {
        underlay.address(host).expect("an underlay of so many addresses")
    }

    fn on_segment(n: u8, host: u8) -> (Self::Address, u8) {
        ([192, 168, 64 + n, host].into(), 24)
    }

    fn in_subnet_of(address: Self::Address, host: u8) -> Self::Address {
        let [a, b, c, _] = address.octets();
        [a, b, c, host].into()
    }

    fn vip(n: u8) -> IpAddr {
        [10, 96, 0, n].into()
    }

    fn make_router(netns: &Netns) {
        sysctl(netns, "net.ipv4.ip_forward=1");
        for interface in ["all", "default", "eth0"] {
            // It leads back into the segment where the packets came from, and must not say so.
            sysctl(netns, &format!("net.ipv4.conf.{interface}.send_redirects=0"));
        }
    }
}

impl Family for Ipv6 {
    const IS_IPV4: bool = false;
    const DEVICE: &'static str = "flannel-v6.1";
    const ENCAP_LEN: usize = 70;
    const BITS: u8 = 128;
    const FLAG: &'static str = "-6";
    const NFT: &'static str = "ip6";
    const IPTABLES: &'static str = "ip6tables";
    const MAPS: &'static str = "V6_";
    const DEVICE_IN_STATUS: &'static str = "device_v6";

    fn plan() -> Plan {
        Plan { nodes: 2, ..Plan::dual() }
    }

    fn alone() -> Plan {
        Plan { nodes: 2, ..Plan::ipv6_only() }
    }

    fn of(pod: &Container) -> Self::Address {
        pod.address6().expect("a container with an IPv6 address")
    }

    fn on_underlay(underlay: &Underlay, host: u32) -> Self::Address {
        underlay.address6(host).expect("an underlay of IPv6")
    }

    fn on_segment(n: u8, host: u8) -> (Self::Address, u8) {
        ([0xfd65, 0, 0, n.into(), 0, 0, 0, host.into()].into(), 64)
    }

    fn in_subnet_of(address: Self::Address, host: u8) -> Self::Address {
        let [a, b, c, d, ..] = address.segments();
        [a, b, c, d, 0, 0, 0, host.into()].into()
    }

    fn vip(n: u8) -> IpAddr {
        [0xfd10, 0x96, 0, 0, 0, 0, 0, n.into()].into()
    }

    /// It tells of a better way where it leads back; nodes, being routers, do not listen (RFC 4861, section 8.2).
    fn make_router(netns: &Netns) {
        sysctl(netns, "net.ipv6.conf.all.forwarding=1");
    }
}

fn sysctl(netns: &Netns, setting: &str) {
    netns.exec(&format!("sysctl -qw {setting}")).expect(setting);
}
