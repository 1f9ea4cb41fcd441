//! Flows that the host translated to the tuple of a connection which a pod has past it.
//!
//! Through the open gate the host does not know that connection, so its NAT takes the tuple for free. The programs drop such
//! a flow's first packet. Here the host is told of the connection, so that the packet gets another tuple when it is sent
//! again: after a second in TCP, in UDP when the sender likes.

use std::collections::BTreeSet;

use loden_ebpf::abi::FlowKey;

use super::{Reconciler, half::Side};
use crate::{
    family::{V4, V6},
    kernel::conntrack::{self, Taken, Tuple},
};

/// As many as one call may tell of: whoever is left out is told of again. Each costs the kernel three small requests.
const MOST: usize = 256;

impl Reconciler {
    /// Takes the records of the ring: flows of either family, sender first.
    pub(super) fn give_tuples(&mut self, records: &[Vec<u8>]) {
        let distinct: BTreeSet<&Vec<u8>> = records.iter().collect();
        for record in distinct.into_iter().take(MOST) {
            if let Some(flow) = FlowKey::from_record(record) {
                self.give_tuple::<V4>(&flow);
            } else if let Some(flow) = FlowKey::from_record(record) {
                self.give_tuple::<V6>(&flow);
            }
        }
    }

    fn give_tuple<F: Side>(&mut self, flow: &FlowKey<F::Octets>) {
        let Some(tuple) = tuple::<F>(flow) else { return };
        let what = format!("{:?} to {:?}", tuple.source, tuple.destination);
        match conntrack::give(&tuple) {
            Ok(Taken::Given) => tracing::debug!("told the host of a pod's connection from {what}"),
            Ok(Taken::Free) => {}
            Ok(Taken::Kept) => self.keep_translated::<F>(flow, &tuple),
            Err(error) => {
                tracing::warn!("the host cannot be told of a pod's connection from {what}: {error}")
            }
        }
    }

    /// The flow was there before the pod's connection, which then got another tuple; the programs have forgotten it.
    fn keep_translated<F: Side>(&mut self, flow: &FlowKey<F::Octets>, tuple: &Tuple<F>) {
        let Some(subnet) = F::half(&self.node).map(|half| half.subnet) else { return };
        let local_first = if F::contains(subnet, tuple.source.0) { *flow } else { flow.reversed() };
        let Some(dataplane) = self.dataplane() else { return };
        if let Err(error) = dataplane.half_mut::<F>().note_translated(&local_first) {
            tracing::warn!("{error}");
        }
    }
}

fn tuple<F: Side>(flow: &FlowKey<F::Octets>) -> Option<Tuple<F>> {
    let FlowKey { local, remote, local_port, remote_port, protocol } = *flow;
    Some(Tuple {
        protocol: u8::try_from(protocol).ok()?,
        source: (F::of_octets(local), u16::from_be_bytes(local_port)),
        destination: (F::of_octets(remote), u16::from_be_bytes(remote_port)),
    })
}
