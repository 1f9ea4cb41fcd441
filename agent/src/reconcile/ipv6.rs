//! What is IPv6's alone: its sysctls and its events.

use anyhow::Result;

use super::{Reconciler, Work};
use crate::kernel::{Ipv6Event, KernelEvent, POD_ROUTE_PROTOCOL, ROUTE_PROTOCOL, TABLE_LOCAL, sysctl};

impl Reconciler {
    /// Forwarding; a host that forwards no longer takes its default route from router advertisements unless it is
    /// told to (`accept_ra=2`, ip-sysctl of the kernel), and must not lose it because of us.
    pub(super) fn set_ipv6_sysctls(&mut self) -> Result<bool> {
        let accept_ra = format!("net/ipv6/conf/{}/accept_ra", self.node.uplink.name);
        let mut changed = false;
        if sysctl::get(&accept_ra).is_ok_and(|value| value.trim() == "1") {
            changed |= self.set_sysctl(&accept_ra, "2")?;
        }
        changed |= self.set_sysctl("net.ipv6.conf.all.forwarding", "1")?;
        Ok(changed)
    }

    /// What an event of IPv6 asks for.
    pub(super) fn work_of_ipv6(&mut self, event: &KernelEvent) -> Option<Work> {
        let device = self.node.v6.as_ref()?.device();
        let KernelEvent::Ipv6(of_ipv6) = event else { return None };
        if self.v6.expected.as_ref().is_some_and(|expected| expected.is_contradicted_by(event)) {
            return Some(Work::Overlay);
        }
        match of_ipv6 {
            Ipv6Event::Address(_, address) => {
                let is_ours = [device, self.node.uplink.ifindex].contains(&address.ifindex);
                // Every link gives itself one, each container's too, and no subnet or way has to do with it.
                let counts = is_ours || !address.address.is_unicast_link_local();
                if counts && address.ifindex != device {
                    self.forget_ways(event);
                }
                counts.then_some(Work::Everything)
            }
            // To a pod of this node; its veth tells the rest.
            Ipv6Event::Route(_, route) if route.protocol == POD_ROUTE_PROTOCOL => Some(Work::Containers),
            // Another default route may mean another uplink.
            Ipv6Event::Route(_, route) if route.dst.prefix_len() == 0 => {
                self.forget_ways(event);
                Some(Work::Everything)
            }
            Ipv6Event::Route(_, route) => {
                let ours = route.protocol == ROUTE_PROTOCOL || route.ifindex == Some(device);
                // Another route may lead to a VTEP now, or make it a neighbour.
                (!ours && route.table != TABLE_LOCAL).then(|| {
                    self.forget_ways(event);
                    Work::Overlay
                })
            }
            Ipv6Event::Neighbour(_, neighbour) => {
                let in_subnet =
                    self.node.v6.as_ref().is_some_and(|v6| v6.subnet.contains(&neighbour.address));
                (neighbour.ifindex != device && in_subnet).then_some(Work::Containers)
            }
            Ipv6Event::Fdb(..) => None,
        }
    }
}
