//! What a transaction costs, by the way that it takes.
//!
//! In an emulated guest times mean nothing, but with `cargo xtask test --kernels … --instructions` its clock goes by
//! instructions: then a time is how many of them both ends and everything between took.

use std::{net::IpAddr, time::Duration};

use loden_tests::{
    counters::Share,
    node::Node,
    traffic::{
        Host,
        transactions::{self, Kind},
    },
};

use super::{plan, shortcut::pair};

/// What the shortcut must cost at most, as part of the kernel's way: below that gain it would not be worth its code.
const WORTH: f64 = 0.95;

/// Whether the clock goes by instructions.
fn counts_instructions() -> bool {
    std::env::var_os("LODEN_INSTRUCTIONS").is_some()
}

/// Nanoseconds of a transaction: the median of some rounds, where it means something.
fn cost(kind: Kind, client: Host<'_>, server: Host<'_>) -> f64 {
    let round = || {
        let rate = transactions::run(kind, client, server, Duration::from_millis(200)).unwrap();
        1e9 / rate.per_second()
    };
    let mut rounds: Vec<f64> = (0..if counts_instructions() { 5 } else { 1 }).map(|_| round()).collect();
    rounds.sort_by(f64::total_cmp);
    rounds[rounds.len() / 2]
}

/// A node itself, by its address on the WireGuard device.
fn host(node: &Node) -> Host<'_> {
    Host { netns: node.netns(), address: IpAddr::V4(node.subnet_env().unwrap().subnet().network()) }
}

#[test]
#[ignore = "needs a kernel with WireGuard: cargo xtask test --kernels"]
fn a_transaction_costs_less_by_the_shortcut() {
    const KINDS: [Kind; 3] = [Kind::TcpRr, Kind::UdpRr, Kind::TcpCrr];
    // With the rules that a flannel node has.
    let ways = [
        ("kernel", ["--ip-masq", "--datapath=kernel"]),
        ("strict", ["--ip-masq", "--gate=strict"]),
        ("open", ["--ip-masq", "--gate=open"]),
    ];
    let mut by_kernel = Vec::new();
    for (way, args) in ways {
        let (cluster, containers) = pair(&plan(""), &args);
        let (a, b) = (&containers[0], &containers[1]);
        for (at, kind) in KINDS.into_iter().enumerate() {
            let measured =
                |way: &str, cost: f64| println!("\nguest: measured {kind:?}, {way} = {cost:.0} ns");
            if way == "kernel" {
                measured("host", cost(kind, host(&cluster.nodes[0]), host(&cluster.nodes[1])));
                by_kernel.push(cost(kind, a.host(), b.host()));
                measured(way, by_kernel[at]);
                continue;
            }
            let (cost, share) =
                Share::during(&cluster.nodes, &[a, b], || Ok(cost(kind, a.host(), b.host()))).unwrap();
            measured(way, cost);
            if kind == Kind::TcpCrr && way == "strict" {
                // Most of its packets begin or end a connection: they are the host's.
                continue;
            }
            assert!(share.smaller() >= 0.9, "{kind:?}, {way}: {share:?}");
            if counts_instructions() {
                assert!(cost <= WORTH * by_kernel[at], "{kind:?}, {way}: {cost} of {}", by_kernel[at]);
            }
        }
    }
}
