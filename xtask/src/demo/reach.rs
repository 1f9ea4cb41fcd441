//! Every container says hello to every other.

use std::net::Ipv4Addr;

use loden_tests::{
    container::Container,
    traffic::{hello, ping},
};

use crate::progress::Step;

/// Who reached whom.
#[derive(Debug)]
pub(super) struct Matrix {
    pub(super) containers: Vec<Ipv4Addr>,
    /// All ordered pairs in order, each with what went wrong.
    pub(super) pairs: Vec<Pair>,
}

/// One client and one server.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) from: Ipv4Addr,
    pub(super) to: Ipv4Addr,
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
    for client in containers {
        for server in containers.iter().filter(|server| server.address() != client.address()) {
            let (from, to) = (client.address(), server.address());
            step.note(&format!("{from} to {to}"));
            pairs.push(Pair { from, to, failure: failure(client, server) });
        }
    }
    let matrix = Matrix { containers: containers.iter().map(Container::address).collect(), pairs };
    let reached = matrix.pairs.len() - matrix.failures().count();
    step.done(format!("{reached} of {} pairs, source addresses unchanged", matrix.pairs.len()));
    matrix
}

fn failure(client: &Container, server: &Container) -> Option<String> {
    match hello(client.host(), server.host(), None) {
        Err(error) => return Some(format!("TCP: {error:#}")),
        Ok(seen) if seen != client.address() => return Some(format!("TCP: came from {seen}")),
        Ok(_) => {}
    }
    ping(client.netns(), server.address(), 1).err().map(|error| format!("ping: {error:#}"))
}
