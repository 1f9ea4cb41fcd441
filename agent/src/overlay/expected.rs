//! Which of the kernel's events are nothing but the echo of what was programmed.

use super::{
    Desired,
    plan::{Target, own_fdb, own_neighbour, own_route, target},
};
use crate::kernel::{Change, FdbEntry, KernelEvent, Neighbour, Route};

/// What the last plan was made for, kept to judge events by: every change that a plan makes comes back as an
/// event, and must not be a reason for another pass; a change by somebody else must.
#[derive(Debug)]
pub struct Expected {
    desired: Desired,
    target: Target,
}

impl Expected {
    /// After a plan for this was carried out.
    #[must_use]
    pub fn of(desired: Desired) -> Self {
        let target = target(&desired);
        Self { desired, target }
    }

    /// Whether an event tells of something that a new plan would put right: of an object on the VXLAN device,
    /// or of a route of ours, that is not what it ought to be. Events of links and addresses are not judged
    /// here and are never a contradiction; an overrun always is.
    #[must_use]
    pub fn is_contradicted_by(&self, event: &KernelEvent) -> bool {
        match event {
            KernelEvent::Route(change, route) => self.route(*change, route),
            KernelEvent::Neighbour(change, neighbour) => self.neighbour(*change, neighbour),
            KernelEvent::Fdb(change, entry) => self.fdb(*change, entry),
            KernelEvent::Overrun => true,
            KernelEvent::Link(..) | KernelEvent::Address(..) => false,
        }
    }

    fn route(&self, change: Change, route: &Route) -> bool {
        let wanted = self.target.routes.get(&route.dst);
        match change {
            Change::Deleted => wanted == Some(route),
            Change::New if wanted == Some(route) => false,
            // With the key of a wanted route: it has taken its place.
            Change::New => {
                let in_place = |wanted: &Route| {
                    (wanted.metric, wanted.tos, wanted.table) == (route.metric, route.tos, route.table)
                };
                wanted.is_some_and(in_place) || own_route(&self.desired, route)
            }
        }
    }

    fn neighbour(&self, change: Change, neighbour: &Neighbour) -> bool {
        if neighbour.ifindex != self.desired.device {
            return false;
        }
        let wanted = self.target.neighbours.get(&neighbour.address).copied();
        let found = own_neighbour(&self.desired, neighbour).map(|(_, mac)| mac);
        match change {
            Change::Deleted => wanted.is_some(),
            Change::New => wanted != found,
        }
    }

    fn fdb(&self, change: Change, entry: &FdbEntry) -> bool {
        if entry.ifindex != self.desired.device {
            return false;
        }
        let wanted = self.target.fdb.get(&entry.mac).copied();
        let found = own_fdb(&self.desired, entry).map(|(_, dst)| dst);
        match change {
            Change::Deleted => wanted.is_some(),
            Change::New => wanted != found,
        }
    }
}
