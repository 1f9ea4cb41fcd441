//! The families that the tests run for, and what else but the packets is another in each.

use std::net::IpAddr;

use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    netns::Netns,
    packet::{Ipv4, Ipv6, Packet},
    traffic::Host,
    underlay::Underlay,
};

/// Makes a test of either family of a function that is generic over it: `NAME::v4` and `NAME::v6`.
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
pub(crate) use each_family;

/// A family's half of a cluster.
pub(crate) trait Family: Packet {
    /// The VXLAN device.
    const DEVICE: &'static str;
    /// Bytes in front of an inner packet.
    const ENCAP_LEN: usize;
    /// Bits of an address.
    const BITS: u8;
    /// The family's tool beside `iptables`.
    const IPTABLES: &'static str;

    /// Nodes and network that have the family.
    fn plan() -> Plan;
    /// The pod's address.
    fn of(pod: &Container) -> Self::Address;
    /// The `host`-th address of the underlay.
    fn on_underlay(underlay: &Underlay, host: u32) -> Self::Address;
    /// The `host`-th address of a further segment between nodes, the `n`-th, and the length of its prefix.
    fn on_segment(n: u8, host: u8) -> (Self::Address, u8);
    /// The address with this host part in the subnet of another one.
    fn in_subnet_of(address: Self::Address, host: u8) -> Self::Address;
    /// Makes a namespace a router.
    fn make_router(netns: &Netns);

    /// The address of the `n`-th node on the underlay.
    fn of_node(cluster: &Cluster, n: usize) -> Self::Address {
        Self::on_underlay(cluster.underlay(), 11 + n as u32)
    }

    /// The pod as one end of a conversation.
    fn host(pod: &Container) -> Host<'_> {
        Host { netns: pod.netns(), address: Self::of(pod).into() }
    }
}

impl Family for Ipv4 {
    const DEVICE: &'static str = "flannel.1";
    const ENCAP_LEN: usize = 50;
    const BITS: u8 = 32;
    const IPTABLES: &'static str = "iptables";

    fn plan() -> Plan {
        Plan { nodes: 2, ..Plan::default() }
    }

    fn of(pod: &Container) -> Self::Address {
        pod.address()
    }

    fn on_underlay(underlay: &Underlay, host: u32) -> Self::Address {
        underlay.address(host).unwrap()
    }

    fn on_segment(n: u8, host: u8) -> (Self::Address, u8) {
        ([192, 168, 64 + n, host].into(), 24)
    }

    fn in_subnet_of(address: Self::Address, host: u8) -> Self::Address {
        let [a, b, c, _] = address.octets();
        [a, b, c, host].into()
    }

    fn make_router(netns: &Netns) {
        netns.exec("sysctl -qw net.ipv4.ip_forward=1").unwrap();
        for interface in ["all", "default", "eth0"] {
            // It leads back into the segment where the packets came from, and must not say so.
            netns.exec(&format!("sysctl -qw net.ipv4.conf.{interface}.send_redirects=0")).unwrap();
        }
    }
}

impl Family for Ipv6 {
    const DEVICE: &'static str = "flannel-v6.1";
    const ENCAP_LEN: usize = 70;
    const BITS: u8 = 128;
    const IPTABLES: &'static str = "ip6tables";

    /// Of both: nodes without IPv4 have rings of their own.
    fn plan() -> Plan {
        Plan { nodes: 2, ..Plan::dual() }
    }

    fn of(pod: &Container) -> Self::Address {
        pod.address6().unwrap()
    }

    fn on_underlay(underlay: &Underlay, host: u32) -> Self::Address {
        underlay.address6(host).unwrap()
    }

    fn on_segment(n: u8, host: u8) -> (Self::Address, u8) {
        ([0xfd65, 0, 0, n.into(), 0, 0, 0, host.into()].into(), 64)
    }

    fn in_subnet_of(address: Self::Address, host: u8) -> Self::Address {
        let [a, b, c, d, ..] = address.segments();
        [a, b, c, d, 0, 0, 0, host.into()].into()
    }

    /// It tells of a better way where it leads back; nodes, being routers, do not listen (RFC 4861, section 8.2).
    fn make_router(netns: &Netns) {
        netns.exec("sysctl -qw net.ipv6.conf.all.forwarding=1").unwrap();
    }
}

/// The address as `ip` takes one that is alone: with the length of the whole.
pub(crate) fn alone<F: Family>(address: F::Address) -> String {
    let address: IpAddr = address.into();
    format!("{address}/{}", F::BITS)
}
