//! Pods on a bridge believe the whole subnet to be on their link: the bridge answers for those that are not, so that they
//! reach routed pods of their own node.

use std::{collections::BTreeSet, net::Ipv6Addr};

use anyhow::Result;

use super::{Reconciler, Work};
use crate::{
    endpoints::Routed,
    family::V6,
    kernel::{Address, Link, LinkKind, sysctl},
};

impl Reconciler {
    /// By proxy ARP, which needs no entry for each.
    pub(super) fn answer_arp_for_routed(&mut self, links: &[Link], routed: &[Routed]) {
        if routed.is_empty() {
            return;
        }
        let bridges =
            links.iter().filter(|link| self.v4.bridges.iter().any(|bridge| bridge.index == link.index));
        let answer = |link: &Link| sysctl::set(&format!("net/ipv4/conf/{}/proxy_arp", link.name), "1");
        let errors: Vec<String> =
            bridges.filter_map(|link| answer(link).err()).map(|error| error.to_string()).collect();
        self.fail(Work::Containers, errors);
    }

    /// By proxies of neighbour discovery: those of pods that have gone go too, as somebody on the bridge may have the
    /// address next.
    pub(super) async fn answer_nd_for_routed(&self, links: &[Link], routed: &[Routed]) -> Result<()> {
        let Some(subnet) = self.node.v6.as_ref().map(|v6| v6.subnet) else { return Ok(()) };
        let mut bridges = links.iter().filter(|link| link.kind == LinkKind::Bridge).peekable();
        if bridges.peek().is_none() {
            return Ok(());
        }
        let wanted: BTreeSet<Ipv6Addr> = routed
            .iter()
            .filter_map(|pod| pod.addresses.get::<V6>())
            .filter(|address| subnet.contains(address))
            .collect();
        let addresses: Vec<Address<V6>> = self.kernel.addresses_of().await?;
        for bridge in bridges {
            if !addresses.iter().any(|a| a.ifindex == bridge.index && subnet.contains(&a.address)) {
                continue;
            }
            if !wanted.is_empty() {
                sysctl::set(&format!("net/ipv6/conf/{}/proxy_ndp", bridge.name), "1")?;
            }
            let there = self.kernel.answered_for(bridge.index).await?;
            for address in wanted.difference(&there) {
                self.kernel.answer_for(bridge.index, *address).await?;
            }
            for address in there.difference(&wanted) {
                self.kernel.stop_answering_for(bridge.index, *address).await?;
            }
        }
        Ok(())
    }
}
