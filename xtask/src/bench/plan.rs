//! What is to be measured, and in which pieces.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::{MEASURED_CPU, OTHER_CPU, mode::Mode, work::Work};

/// The addresses of the traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Family {
    /// IPv4, in nodes without IPv6
    #[value(name = "4")]
    V4,
    /// IPv6, in nodes with both
    #[value(name = "6")]
    V6,
}

impl Family {
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

/// Where the ends of the traffic run, and what the wire is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Variant {
    /// Both ends on one CPU: the cost of the way and nothing else
    OneCpu,
    /// Each end on a CPU of its own
    TwoCpus,
    /// Both ends on one CPU, a wire of MTU-sized packets (no TSO, no tunnel GSO) with GRO behind it
    Segmented,
}

impl Variant {
    pub(super) fn client_cpu(self) -> usize {
        if self == Self::TwoCpus { OTHER_CPU } else { MEASURED_CPU }
    }

    pub(super) fn server_cpu(self) -> usize {
        MEASURED_CPU
    }

    /// The CPUs whose time counts, as the client's command line takes them.
    pub(super) fn cpus(self) -> String {
        if self == Self::TwoCpus { format!("{OTHER_CPU},{MEASURED_CPU}") } else { MEASURED_CPU.to_string() }
    }

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::OneCpu => "both ends on one CPU",
            Self::TwoCpus => "each end on a CPU of its own",
            Self::Segmented => "both ends on one CPU, MTU-sized packets on the wire, GRO behind it",
        }
    }
}

/// A piece of what the documents show, in a few minutes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Part {
    /// Every way for packets; the work that has goals
    Main,
    /// Many flows, small writes, datagrams, latency
    More,
    /// No service, 1 000 and 5 000 in the nodes' rules; no conntrack for outer packets
    Services,
    /// Each end on a CPU of its own
    TwoCpus,
    /// IPv6
    Ipv6,
    /// MTU-sized packets on the wire
    Segmented,
}

/// Work that is done together: every kind in every mode.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) family: Family,
    pub(super) variant: Variant,
    pub(super) modes: Vec<Mode>,
    pub(super) works: Vec<Work>,
}

impl Block {
    /// Leaves out the modes that do not know the family.
    pub(super) fn new(family: Family, variant: Variant, modes: &[Mode], works: &[Work]) -> Self {
        let modes = modes.iter().copied().filter(|mode| family == Family::V4 || mode.has_ipv6()).collect();
        Self { family, variant, modes, works: works.to_vec() }
    }
}

impl Part {
    pub(super) fn block(self) -> Block {
        use Mode::{CiliumLike, Direct, Flannel, Host, HostGw, HostRules, Kernel, Open, Redirect, Strict};
        use Work::{TcpCrr, TcpRr, TcpRr16, TcpStream, TcpStream4, UdpRr, VipTcpCrr, VipTcpRr};
        let one_cpu = |modes: &[Mode], works: &[Work]| Block::new(Family::V4, Variant::OneCpu, modes, works);
        match self {
            Self::Main => one_cpu(
                &[Host, HostRules, Redirect, Direct, Open, Strict, Kernel, Flannel, HostGw, CiliumLike],
                &[TcpRr, TcpCrr, UdpRr, TcpStream, VipTcpRr, VipTcpCrr],
            ),
            Self::More => one_cpu(
                &[Host, Open, Strict, Kernel, Flannel, CiliumLike],
                &[
                    TcpRr16,
                    Work::UdpRr16,
                    TcpStream4,
                    Work::SmallWrites,
                    Work::Udp64,
                    Work::Udp1400,
                    Work::UdpPaced,
                    Work::Latency,
                ],
            ),
            Self::Services => one_cpu(
                &[
                    Open,
                    Strict,
                    Mode::StrictNotrack,
                    Flannel,
                    Mode::Flannel0,
                    Mode::Flannel1000,
                    Mode::Flannel5000,
                    Mode::Open5000,
                    Mode::Strict5000,
                ],
                &[TcpRr, TcpCrr, VipTcpCrr],
            ),
            Self::TwoCpus => Block::new(
                Family::V4,
                Variant::TwoCpus,
                &[Host, Open, Strict, Kernel, Flannel],
                &[TcpRr, TcpRr16, TcpCrr, UdpRr, TcpStream, TcpStream4, Work::Udp64, Work::Latency],
            ),
            Self::Ipv6 => Block::new(
                Family::V6,
                Variant::OneCpu,
                &[Host, Direct, Open, Strict, Kernel, Flannel],
                &[TcpRr, TcpCrr, UdpRr, TcpStream],
            ),
            Self::Segmented => Block::new(
                Family::V4,
                Variant::Segmented,
                &[Host, Direct, Open, Strict, Kernel, Flannel, CiliumLike],
                &[TcpRr, TcpStream, TcpStream4, Work::SmallWrites],
            ),
        }
    }
}

/// The short run: a pair of IPv6 beside what the goals are about.
pub(super) fn quick() -> Vec<Block> {
    let modes = [Mode::Host, Mode::Redirect, Mode::Direct, Mode::Open, Mode::Strict, Mode::Flannel];
    let works = [Work::TcpRr, Work::TcpCrr, Work::UdpRr, Work::TcpStream, Work::VipTcpCrr];
    vec![
        Block::new(Family::V4, Variant::OneCpu, &modes, &works),
        Block::new(
            Family::V6,
            Variant::OneCpu,
            &[Mode::Open, Mode::Flannel],
            &[Work::TcpRr, Work::TcpStream],
        ),
    ]
}

/// What the programs' own run times are told of.
pub(super) fn programs() -> Vec<Block> {
    let works = [Work::TcpRr, Work::TcpCrr, Work::UdpRr];
    let block = |family, modes: &[Mode]| Block::new(family, Variant::OneCpu, modes, &works);
    vec![
        block(Family::V4, &[Mode::Direct, Mode::Open, Mode::Strict]),
        block(Family::V6, &[Mode::Direct, Mode::Open, Mode::Strict]),
    ]
}
