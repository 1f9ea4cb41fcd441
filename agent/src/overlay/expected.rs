//! Which of the kernel's events are nothing but the echo of what was programmed.

use std::collections::BTreeMap;

use super::{
    Actual, Desired, Plan,
    delta::mac,
    plan::{Target, own_fdb, own_neighbour, own_route, plan_to, target},
};
use crate::{
    family::{Family, V4, V6},
    kernel::{Change, FdbEntry, Ipv6Event, KernelEvent, Neighbour, NeighbourState, Route},
};

/// What the last plan was made for, kept to judge events by: every change that a plan makes comes back as an
/// event, and must not be a reason for another pass; a change by somebody else must.
#[derive(Debug, PartialEq)]
pub struct Expected<F: Family = V4> {
    pub(super) desired: Desired<F>,
    pub(super) target: Target<F>,
    /// How many peers have a MAC address.
    pub(super) macs: BTreeMap<[u8; 6], u32>,
}

impl Expected {
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
            KernelEvent::Link(..)
            | KernelEvent::Address(..)
            | KernelEvent::Queueing
            | KernelEvent::Rule
            | KernelEvent::Ipv6(_) => false,
        }
    }
}

impl Expected<V6> {
    /// The same, of the IPv6 half.
    #[must_use]
    pub fn is_contradicted_by(&self, event: &KernelEvent) -> bool {
        match event {
            KernelEvent::Ipv6(Ipv6Event::Route(change, route)) => self.route(*change, route),
            KernelEvent::Ipv6(Ipv6Event::Neighbour(change, neighbour)) => self.neighbour(*change, neighbour),
            KernelEvent::Ipv6(Ipv6Event::Fdb(change, entry)) => self.fdb(*change, entry),
            KernelEvent::Overrun => true,
            _ => false,
        }
    }
}

impl<F: Family> Expected<F> {
    /// What a plan for this leads to; to keep once it is carried out.
    #[must_use]
    pub fn of(desired: Desired<F>) -> Self {
        let target = target(&desired);
        let mut macs = BTreeMap::new();
        for mac in desired.peers.values().copied().filter_map(mac) {
            *macs.entry(mac).or_default() += 1;
        }
        Self { desired, target, macs }
    }

    /// The actual state where all of it was carried out and nothing has changed since.
    #[must_use]
    pub fn actual(&self) -> Actual<F> {
        let (device, target) = (self.desired.device, &self.target);
        let neighbour = |(&address, &mac): (&F::Addr, &[u8; 6])| Neighbour {
            ifindex: device,
            address,
            mac: Some(mac),
            state: NeighbourState::Permanent,
        };
        let entry = |(&mac, &dst): (&[u8; 6], &F::Addr)| FdbEntry {
            ifindex: device,
            mac,
            dst: Some(dst),
            master: None,
            own: true,
            permanent: true,
            fixed: false,
            ext_learned: false,
            vlan: None,
        };
        Actual {
            routes: target.routes.values().cloned().collect(),
            neighbours: target.neighbours.iter().map(neighbour).collect(),
            fdb: target.fdb.iter().map(entry).collect(),
        }
    }

    /// The steps there from what the kernel has.
    #[must_use]
    pub fn plan(&self, actual: &Actual<F>) -> Plan<F> {
        plan_to(&self.desired, &self.target, actual)
    }

    /// Whether the kernel gets no route to this peer's subnet, as its lease is wrong or contradicts another.
    #[must_use]
    pub fn refuses(&self, subnet: F::Net) -> bool {
        self.target.refused.contains_key(&subnet)
    }

    /// What the plan was for.
    #[must_use]
    pub fn desired(&self) -> &Desired<F> {
        &self.desired
    }

    fn route(&self, change: Change, route: &Route<F>) -> bool {
        let wanted = self.target.routes.get(&route.dst);
        match change {
            Change::Deleted => wanted == Some(route),
            Change::New if wanted == Some(route) => false,
            // With the key of a wanted route: it has taken its place.
            Change::New => {
                let in_place = |wanted: &Route<F>| {
                    (wanted.metric, wanted.tos, wanted.table) == (route.metric, route.tos, route.table)
                };
                wanted.is_some_and(in_place) || own_route(&self.desired, route)
            }
        }
    }

    fn neighbour(&self, change: Change, neighbour: &Neighbour<F>) -> bool {
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

    fn fdb(&self, change: Change, entry: &FdbEntry<F>) -> bool {
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
