//! The ways for packets that are compared.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A way for packets between two nodes. Each has two nodes of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Mode {
    /// Sockets in nodes without any rule: the limit
    Host,
    /// Sockets in nodes with the same rules as those below: what a process of the host, or a pod in its network, gets
    HostRules,
    /// Programs that redirect and do nothing else: what none can be faster than for pods behind a veth
    Redirect,
    /// Loden without encapsulation (host-gw, open gate)
    Direct,
    /// Loden, `--gate=open`
    Open,
    /// Loden, `--gate=strict`
    Strict,
    /// Loden, `--datapath=kernel`
    Kernel,
    /// flannel: VXLAN, bridge, iptables
    Flannel,
    /// flannel without any service
    #[value(name = "flannel-0")]
    Flannel0,
    /// flannel with 1 000 services
    #[value(name = "flannel-1000")]
    Flannel1000,
    /// flannel with 5 000 services
    #[value(name = "flannel-5000")]
    Flannel5000,
    /// Loden open with 5 000 services
    #[value(name = "open-5000")]
    Open5000,
    /// Loden strict with 5 000 services
    #[value(name = "strict-5000")]
    Strict5000,
    /// Loden strict, and no conntrack for the outer packets
    StrictNotrack,
    /// flannel's host-gw: routes, bridge, iptables, no encapsulation
    HostGw,
    /// VXLAN by the kernel's device, eBPF from the pod to it and from it to the pod: Cilium's tunnel mode without its
    /// connection tracking and policy
    CiliumLike,
}

/// What a mode's nodes are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// No pods: the sockets are in the nodes.
    Sockets,
    /// Loden's agent with these flags and this backend.
    Loden { backend: &'static str, flags: &'static [&'static str] },
    /// Made by hand as flanneld makes it.
    Flannel,
    /// Made by hand as flanneld's host-gw backend makes it.
    Routes,
    /// Programs that only the bench has, which redirect.
    Redirect,
    /// Programs that only the bench has, around a VXLAN device of the kernel's.
    Tunnel,
}

impl Mode {
    /// Its name on the command line, in tables and in JSON.
    pub(super) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    pub(super) fn kind(self) -> Kind {
        let loden = |backend, flags| Kind::Loden { backend, flags };
        match self {
            Self::Host | Self::HostRules => Kind::Sockets,
            Self::Direct => loden("host-gw", &["--datapath=ebpf", "--gate=open"]),
            Self::Open | Self::Open5000 => loden("vxlan", &["--datapath=ebpf", "--gate=open"]),
            Self::Strict | Self::Strict5000 => loden("vxlan", &["--datapath=ebpf", "--gate=strict"]),
            Self::StrictNotrack => {
                loden("vxlan", &["--datapath=ebpf", "--gate=strict", "--notrack-underlay"])
            }
            Self::Kernel => loden("vxlan", &["--datapath=kernel"]),
            Self::Flannel | Self::Flannel0 | Self::Flannel1000 | Self::Flannel5000 => Kind::Flannel,
            Self::HostGw => Kind::Routes,
            Self::Redirect => Kind::Redirect,
            Self::CiliumLike => Kind::Tunnel,
        }
    }

    /// Services that its nodes know besides the one that the work goes through; with 0 there is not even that one.
    /// `None`: the nodes have no rules.
    pub(super) fn services(self) -> Option<u16> {
        match self {
            Self::Host => None,
            Self::Flannel0 => Some(0),
            Self::Flannel1000 => Some(1000),
            Self::Flannel5000 | Self::Open5000 | Self::Strict5000 => Some(5000),
            _ => Some(10),
        }
    }

    /// Whether packets of the work must take the fast path.
    pub(super) fn is_fast(self) -> bool {
        self.is_strict() || matches!(self, Self::Direct | Self::Open | Self::Open5000)
    }

    /// Whether flows must qualify first.
    pub(super) fn is_strict(self) -> bool {
        matches!(self, Self::Strict | Self::Strict5000 | Self::StrictNotrack)
    }

    /// Whether it carries IPv6 as well.
    pub(super) fn has_ipv6(self) -> bool {
        !matches!(self, Self::Redirect | Self::CiliumLike)
    }
}
