//! How much a pass has to look at, and what an event asks for.

use super::Reconciler;
use crate::kernel::{Change, KernelEvent, POD_ROUTE_PROTOCOL, ROUTE_PROTOCOL};

/// The parts of a pass, each with those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Work {
    /// Bridges, endpoints and hooks.
    Containers,
    /// Peers, by what has changed among them: what was programmed for the others is still there.
    Peers,
    /// Peers, on the VXLAN device and in the maps; the kernel is read back.
    Overlay,
    /// Device, addresses, rules, sysctls, files; the maps are read back.
    Everything,
}

impl Reconciler {
    /// Another link, address, route or rule may mean another way to a VTEP.
    pub(super) fn forget_ways(&mut self, event: &KernelEvent) {
        let ways = self.v4.ways.len() + self.v6.ways.len();
        tracing::debug!(?event, ways, "the ways to the peers are looked up again");
        self.v4.forget_ways();
        self.v6.forget_ways();
    }

    /// What an event asks for; `None` for what does not concern us.
    pub(super) fn work_of(&mut self, event: &KernelEvent) -> Option<Work> {
        let device = self.node.device();
        match event {
            KernelEvent::Link(change, link) => {
                if *change == Change::Deleted {
                    self.forget_veth(link.index);
                }
                let ours = link.index == device || link.index == self.node.uplink.ifindex;
                if ours || self.node.device_names().any(|name| link.name == name) {
                    if link.index != device {
                        // No way to a VTEP leads through the overlay itself.
                        self.forget_ways(event);
                    }
                    return Some(Work::Everything);
                }
                // The kernel does not tell of the routes that end with their link.
                if self.v4.leads_over(link.index) || self.v6.leads_over(link.index) {
                    self.forget_ways(event);
                    return Some(Work::Overlay);
                }
                Some(Work::Containers)
            }
            KernelEvent::Address(_, address) => {
                if address.ifindex != device {
                    self.forget_ways(event);
                }
                Some(Work::Everything)
            }
            KernelEvent::Route(..) | KernelEvent::Neighbour(..) | KernelEvent::Fdb(..)
                if self.v4.expected.as_ref().is_some_and(|expected| expected.is_contradicted_by(event)) =>
            {
                Some(Work::Overlay)
            }
            KernelEvent::Queueing => Some(Work::Containers),
            // Another table may lead to a VTEP now.
            KernelEvent::Rule => {
                self.forget_ways(event);
                Some(Work::Overlay)
            }
            // To a pod of this node; its veth tells the rest.
            KernelEvent::Route(_, route) if route.protocol == POD_ROUTE_PROTOCOL => Some(Work::Containers),
            // Another default route may mean another uplink.
            KernelEvent::Route(_, route) if route.dst.prefix_len() == 0 => {
                self.forget_ways(event);
                Some(Work::Everything)
            }
            // Another route may lead to a VTEP now; one on our device or of ours leads to pods.
            KernelEvent::Route(_, route) => {
                let ours = route.protocol == ROUTE_PROTOCOL || route.ifindex == Some(device);
                (!ours).then(|| {
                    self.forget_ways(event);
                    Work::Overlay
                })
            }
            KernelEvent::Neighbour(_, neighbour) => {
                let in_subnet =
                    self.node.v4.as_ref().is_some_and(|v4| v4.subnet.contains(&neighbour.address));
                let a_pods = neighbour.ifindex != device && in_subnet;
                a_pods.then_some(Work::Containers)
            }
            KernelEvent::Fdb(_, entry) => (entry.ifindex != device).then_some(Work::Containers),
            KernelEvent::Ipv6(_) => self.work_of_ipv6(event),
            KernelEvent::Overrun => {
                self.forget_ways(event);
                Some(Work::Everything)
            }
        }
    }
}
