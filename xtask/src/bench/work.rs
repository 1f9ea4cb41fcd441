//! What is done in each mode, and in what it is measured.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::generator::Tally;

/// Most flows that a kind of work has.
pub(super) const FLOWS_MAX: u16 = 16;

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Work {
    /// One byte each way on a TCP connection
    TcpRr,
    /// The same on 16 connections at once
    TcpRr16,
    /// A TCP connection for each byte each way
    TcpCrr,
    /// A datagram of one byte each way
    UdpRr,
    /// The same on 16 pairs of sockets at once
    UdpRr16,
    /// Bulk TCP, writes of 128 KiB
    TcpStream,
    /// The same on 4 connections at once
    TcpStream4,
    /// TCP, writes of 128 bytes, each sent at once
    SmallWrites,
    /// Datagrams of 64 bytes, 64 of them under way
    Udp64,
    /// Datagrams of 1 400 bytes, 64 of them under way
    Udp1400,
    /// Datagrams of 64 bytes at 50 000 a second: CPU time
    UdpPaced,
    /// TCP_RR, each transaction timed
    Latency,
    /// TCP_RR through a service's address
    VipTcpRr,
    /// TCP_CRR through a service's address
    VipTcpCrr,
}

/// One figure of a kind of work.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Metric {
    pub(super) name: &'static str,
    pub(super) unit: &'static str,
    /// Whether less is better.
    pub(super) is_cost: bool,
}

impl Work {
    /// What is counted: the name of one unit.
    pub(super) fn unit(self) -> &'static str {
        match self {
            Self::TcpStream | Self::TcpStream4 | Self::SmallWrites => "kB",
            Self::Udp64 | Self::Udp1400 | Self::UdpPaced => "datagram",
            _ => "transaction",
        }
    }

    /// Whether it goes through a service's address: only pods on a node with services can do that.
    pub(super) fn is_through_service(self) -> bool {
        matches!(self, Self::VipTcpRr | Self::VipTcpCrr)
    }

    /// Its figures, in order.
    pub(super) fn metrics(self) -> &'static [Metric] {
        const fn rate(name: &'static str, unit: &'static str) -> Metric {
            Metric { name, unit, is_cost: false }
        }
        const fn cost(name: &'static str, unit: &'static str) -> Metric {
            Metric { name, unit, is_cost: true }
        }
        match self {
            Self::TcpRr => const { &[rate("TCP_RR", "1/s")] },
            Self::TcpRr16 => const { &[rate("TCP_RR, 16 flows", "1/s")] },
            Self::TcpCrr => const { &[rate("TCP_CRR", "1/s")] },
            Self::UdpRr => const { &[rate("UDP_RR", "1/s")] },
            Self::UdpRr16 => const { &[rate("UDP_RR, 16 flows", "1/s")] },
            Self::TcpStream => const { &[rate("TCP stream", "MB/s")] },
            Self::TcpStream4 => const { &[rate("TCP stream, 4 flows", "MB/s")] },
            Self::SmallWrites => const { &[rate("TCP, 128-byte writes", "MB/s")] },
            Self::Udp64 => const { &[rate("UDP, 64 bytes", "1/s")] },
            Self::Udp1400 => const { &[rate("UDP, 1400 bytes", "1/s")] },
            Self::UdpPaced => const { &[cost("UDP at 50 000/s, CPU", "us/packet")] },
            Self::Latency => {
                const {
                    &[
                        cost("TCP_RR latency, p50", "us"),
                        cost("TCP_RR latency, p99", "us"),
                        cost("TCP_RR latency, p99.9", "us"),
                    ]
                }
            }
            Self::VipTcpRr => const { &[rate("TCP_RR by service", "1/s")] },
            Self::VipTcpCrr => const { &[rate("TCP_CRR by service", "1/s")] },
        }
    }

    /// The values of its metrics.
    pub(super) fn values(self, tally: &Tally) -> Vec<f64> {
        // Exact below 2^53.
        let rate = tally.units as f64 / tally.seconds;
        match self {
            Self::TcpStream | Self::TcpStream4 | Self::SmallWrites => vec![rate / 1e6],
            Self::UdpPaced => vec![tally.busy * 1e6 / tally.units as f64],
            Self::Latency => tally.latency.map_or_else(Vec::new, |latency| latency.to_vec()),
            _ => vec![rate],
        }
    }

    /// CPU time of one unit, in microseconds.
    pub(super) fn cpu_micros(self, tally: &Tally) -> f64 {
        let units = match self {
            Self::TcpStream | Self::TcpStream4 | Self::SmallWrites => tally.units as f64 / 1e3,
            _ => tally.units as f64,
        };
        tally.busy * 1e6 / units
    }
}
