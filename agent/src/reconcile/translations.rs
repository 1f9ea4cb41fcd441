//! Whether the host translates flows of an endpoint already when it is found.
//!
//! The programs see each translation as it happens. What they have not seen is what happened before: a pod may
//! begin with a service before the agent knows it, and a connection may be older than the programs. So a new
//! endpoint is gated until the host's connection tables have been read.
//!
//! What went into the host before the agent knew the pod was not noted, and looks translated where it comes out: it
//! may have waited in a queue, such as the bridge's. So what is gated when the last of that has come out is looked up again.

use std::{
    collections::{BTreeSet, VecDeque},
    io,
    net::IpAddr,
    time::Duration,
};

use anyhow::Result;
use loden_ebpf::flow::TRANSIT;
use tokio::time::Instant;

use super::{Reconciler, half::Side};
use crate::{
    family::{Family, V4, V6},
    kernel::{
        conntrack::{self, Path},
        ipvs,
    },
};

/// For how long after a pod has become known a packet from before may come out of the host.
const STRAYS: Duration = Duration::from_nanos(TRANSIT + 1_000_000_000);

/// Pods that are looked up again, and when: the earliest first.
pub(super) type Strays = VecDeque<(Instant, IpAddr)>;

/// Those that an earlier agent has found are looked up as if they were new.
pub(super) fn strays(pods: impl Iterator<Item = IpAddr>) -> Strays {
    let until = Instant::now() + STRAYS;
    pods.map(|pod| (until, pod)).collect()
}

impl Reconciler {
    /// Looks the endpoints up of which it is not known yet.
    pub(super) fn prove_endpoints<F: Side>(&mut self) -> Result<()> {
        let proven = self.look_up::<F>()?;
        self.strays.extend(strays(proven.into_iter().map(Into::into)));
        Ok(())
    }

    /// Looks those up again whose time has come, as far as they are gated.
    pub(super) fn look_again(&mut self) -> Result<()> {
        let now = Instant::now();
        let due = self.strays.partition_point(|(until, _)| *until <= now);
        let pods: Vec<IpAddr> = self.strays.drain(..due).map(|(_, pod)| pod).collect();
        self.doubt::<V4>(&pods)?;
        self.doubt::<V6>(&pods)
    }

    fn doubt<F: Side>(&mut self, pods: &[IpAddr]) -> Result<()> {
        let Some(dataplane) = self.dataplane() else { return Ok(()) };
        let half = dataplane.half_mut::<F>();
        let mut any = false;
        for address in pods.iter().filter_map(|pod| F::addr(*pod)) {
            any |= half.doubt_endpoint(address)?;
        }
        if any {
            self.look_up::<F>()?;
        }
        Ok(())
    }

    /// Finds out about the endpoints of which it is not known, and returns them.
    fn look_up<F: Side>(&mut self) -> Result<Vec<F::Addr>> {
        let Some((network, own)) = F::half(&self.node).map(|half| (half.pool.network, half.subnet)) else {
            return Ok(Vec::new());
        };
        let bridges = F::kept(self).bridges.iter();
        let hosts: Vec<F::Addr> =
            bridges.flat_map(|bridge| bridge.addresses.iter().copied()).chain([F::base(own)]).collect();
        let Some(dataplane) = self.dataplane() else { return Ok(Vec::new()) };
        let half = dataplane.half_mut::<F>();
        let unproven = half.unproven_endpoints()?;
        if unproven.is_empty() {
            return Ok(Vec::new());
        }
        // Twice: what began before the gate opened may have come too late for the first look.
        for _ in 0..2 {
            let translated = match translated::<F>() {
                Ok(paths) => translated_pods::<F>(&paths, network, own, &hosts),
                Err(error) => {
                    tracing::warn!("pods stay gated: the connection tables cannot be read: {error}");
                    return Ok(Vec::new());
                }
            };
            for &address in &unproven {
                half.prove_endpoint(address, translated.contains(&address))?;
            }
        }
        Ok(unproven)
    }
}

/// What netfilter and IPVS translate now.
fn translated<F: Family>() -> io::Result<BTreeSet<Path<F>>> {
    let mut paths = conntrack::translated::<F>()?;
    paths.append(&mut ipvs::translated::<F>()?);
    Ok(paths)
}

/// The pods of our own subnet that send such packets to a pod, or get them from one. `hosts` are the addresses of
/// the subnet that are the host's own.
fn translated_pods<F: Family>(
    paths: &BTreeSet<Path<F>>,
    network: F::Net,
    own: F::Net,
    hosts: &[F::Addr],
) -> BTreeSet<F::Addr> {
    let is_pod = |address: &F::Addr| F::contains(network, *address) && !hosts.contains(address);
    let between_pods = paths.iter().filter(|path| is_pod(&path.source) && is_pod(&path.destination));
    between_pods
        .flat_map(|path| [path.source, path.destination])
        .filter(|address| F::contains(own, *address))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::V4;

    #[test]
    fn only_packets_between_pods_count() {
        let paths = |list: &[(&str, &str)]| -> BTreeSet<Path<V4>> {
            let parse = |(source, destination): &(&str, &str)| Path {
                source: source.parse().unwrap(),
                destination: destination.parse().unwrap(),
            };
            list.iter().map(parse).collect()
        };
        let pods = |list: &[(&str, &str)]| -> Vec<String> {
            let (network, own) = ("10.5.0.0/16".parse().unwrap(), "10.5.1.0/24".parse().unwrap());
            let hosts = ["10.5.1.0", "10.5.1.1"].map(|host| host.parse().unwrap());
            translated_pods::<V4>(&paths(list), network, own, &hosts)
                .iter()
                .map(ToString::to_string)
                .collect()
        };
        assert_eq!(pods(&[("10.5.1.2", "10.96.0.1"), ("10.5.2.2", "10.5.1.2")]), ["10.5.1.2"], "a service");
        assert_eq!(pods(&[("10.5.2.2", "192.0.2.1"), ("10.5.1.3", "10.5.2.2")]), ["10.5.1.3"], "a hostPort");
        assert!(
            pods(&[("10.5.1.2", "198.51.100.1"), ("198.51.100.1", "192.0.2.1")]).is_empty(),
            "masquerade"
        );
        let local = [("10.5.1.2", "10.96.0.1"), ("10.5.1.3", "10.5.1.2")];
        assert_eq!(pods(&local), ["10.5.1.2", "10.5.1.3"], "a local backend");
        assert!(pods(&[("10.5.1.2", "10.96.0.1"), ("10.5.1.2", "10.5.1.1")]).is_empty(), "a hairpin");
    }
}
