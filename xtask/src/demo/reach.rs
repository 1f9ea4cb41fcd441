//! Every container says hello to every other.

use std::net::IpAddr;

use loden_tests::{
    container::Container,
    traffic::{Host, hello, ping},
};

use crate::progress::Step;

/// Who reached whom, of either family.
#[derive(Debug)]
pub(super) struct Matrix {
    pub(super) containers: Vec<IpAddr>,
    /// All ordered pairs of a family in order, each with what went wrong.
    pub(super) pairs: Vec<Pair>,
}

/// One client and one server.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) from: IpAddr,
    pub(super) to: IpAddr,
    pub(super) failure: Option<String>,
}

impl Matrix {
    pub(super) fn failures(&self) -> impl Iterator<Item = &Pair> {
        self.pairs.iter().filter(|pair| pair.failure.is_some())
    }
}

/// Tries all ordered pairs, TCP and ping.
pub(super) fn all(containers: &[Container]) -> Matrix {
    let step = Step::start("every container to every other, TCP and ping");
    let mut pairs = Vec::new();
    let v4: Vec<Host<'_>> = containers.iter().map(Container::host).collect();
    let v6: Vec<Host<'_>> = containers.iter().filter_map(Container::host6).collect();
    for ends in [&v4, &v6] {
        for client in ends {
            for server in ends.iter().filter(|server| server.address != client.address) {
                let (from, to) = (client.address, server.address);
                step.note(&format!("{from} to {to}"));
                pairs.push(Pair { from, to, failure: failure(*client, *server) });
            }
        }
    }
    let addresses = v4.iter().chain(&v6).map(|end| end.address).collect();
    let matrix = Matrix { containers: addresses, pairs };
    let reached = matrix.pairs.len() - matrix.failures().count();
    step.done(format!("{reached} of {} pairs, source addresses unchanged", matrix.pairs.len()));
    matrix
}

fn failure(client: Host<'_>, server: Host<'_>) -> Option<String> {
    match hello(client, server, None) {
        Err(error) => return Some(format!("TCP: {error:#}")),
        Ok(seen) if seen != client.address => return Some(format!("TCP: came from {seen}")),
        Ok(_) => {}
    }
    ping(client.netns, server.address, 1).err().map(|error| format!("ping: {error:#}"))
}
