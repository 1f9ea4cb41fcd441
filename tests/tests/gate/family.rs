//! The family in which a test runs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    traffic::Host,
};

/// One of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

use Family::{V4, V6};

impl Family {
    pub(crate) fn is_ipv4(self) -> bool {
        self == V4
    }

    /// So many nodes of the family; those of IPv6 have IPv4 beside it, as dual-stack nodes do.
    pub(crate) fn plan(self, nodes: u32) -> Plan {
        match self {
            V4 => Plan { nodes, ..Plan::default() },
            V6 => Plan { nodes, ..Plan::dual() },
        }
    }

    /// The same without encapsulation.
    pub(crate) fn host_gw(self, nodes: u32) -> Plan {
        let plan = self.plan(nodes);
        Plan { config: plan.config.replace("vxlan", "host-gw"), ..plan }
    }

    pub(crate) fn host(self, container: &Container) -> Host<'_> {
        match self {
            V4 => container.host(),
            V6 => container.host6().expect("containers of dual-stack nodes have both addresses"),
        }
    }

    pub(crate) fn address(self, container: &Container) -> IpAddr {
        self.host(container).address
    }

    /// The n-th node's own address.
    pub(crate) fn node(self, cluster: &Cluster, n: u32) -> IpAddr {
        match self {
            V4 => cluster.nodes[n as usize].address().into(),
            V6 => cluster.node_address6(n).expect("dual-stack nodes have both addresses").into(),
        }
    }

    /// The n-th ClusterIP, outside of the cluster's network.
    pub(crate) fn vip(self, n: u8) -> IpAddr {
        match self {
            V4 => Ipv4Addr::new(10, 96, 0, n).into(),
            V6 => Ipv6Addr::new(0xfd10, 0x96, 0, 0, 0, 0, 0, n.into()).into(),
        }
    }
}

/// Makes a test for each family of a function.
macro_rules! in_both_families {
    ($($test:ident)+) => {
        mod ipv4 {
            $(#[test] fn $test() { super::$test(crate::family::Family::V4); })+
        }
        mod ipv6 {
            $(#[test] fn $test() { super::$test(crate::family::Family::V6); })+
        }
    };
}

/// Makes a test for each gate and family of a function, or for IPv4 alone.
macro_rules! under_both_gates {
    (IPv4: $($test:ident)+) => {
        mod strict {
            $(#[test] fn $test() { super::$test(crate::STRICT, crate::family::Family::V4); })+
        }
        mod open {
            $(#[test] fn $test() { super::$test(crate::OPEN, crate::family::Family::V4); })+
        }
    };
    ($($test:ident)+) => {
        mod strict {
            mod ipv4 {
                $(#[test] fn $test() { super::super::$test(crate::STRICT, crate::family::Family::V4); })+
            }
            mod ipv6 {
                $(#[test] fn $test() { super::super::$test(crate::STRICT, crate::family::Family::V6); })+
            }
        }
        mod open {
            mod ipv4 {
                $(#[test] fn $test() { super::super::$test(crate::OPEN, crate::family::Family::V4); })+
            }
            mod ipv6 {
                $(#[test] fn $test() { super::super::$test(crate::OPEN, crate::family::Family::V6); })+
            }
        }
    };
}
pub(crate) use {in_both_families, under_both_gates};
