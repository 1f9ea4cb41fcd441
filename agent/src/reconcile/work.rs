//! How much a pass has to look at, and what an event asks for.

use super::Reconciler;
use crate::kernel::{Change, KernelEvent};

/// The parts of a pass, each with those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Work {
    /// Bridges, endpoints and hooks.
    Containers,
    /// Peers, on the VXLAN device and in the maps.
    Overlay,
    /// Device, addresses, rules, sysctls, files; the maps are read back.
    Everything,
}

impl Reconciler {
    /// What an event asks for; `None` for what does not concern us.
    pub(super) fn work_of(&mut self, event: &KernelEvent) -> Option<Work> {
        let device = self.node.device.index;
        match event {
            KernelEvent::Link(_, link) => {
                let ours = link.index == device || link.index == self.node.uplink.ifindex;
                if ours || link.name == self.node.spec.name {
                    self.ways.clear();
                    return Some(Work::Everything);
                }
                Some(Work::Containers)
            }
            KernelEvent::Address(..) => {
                self.ways.clear();
                Some(Work::Everything)
            }
            // Our own additions come back as events too; they must not make a pass of their own.
            KernelEvent::Route(change, route) => {
                if route.ifindex == Some(device) {
                    return (*change == Change::Deleted).then_some(Work::Overlay);
                }
                self.ways.clear();
                Some(Work::Overlay)
            }
            KernelEvent::Neighbour(change, neighbour) if neighbour.ifindex == device => {
                (*change == Change::Deleted).then_some(Work::Overlay)
            }
            KernelEvent::Neighbour(_, neighbour) => {
                self.node.subnet.contains(&neighbour.address).then_some(Work::Containers)
            }
            KernelEvent::Fdb(change, entry) if entry.ifindex == device => {
                (*change == Change::Deleted).then_some(Work::Overlay)
            }
            KernelEvent::Fdb(..) => Some(Work::Containers),
            KernelEvent::Overrun => {
                self.ways.clear();
                Some(Work::Everything)
            }
        }
    }
}
