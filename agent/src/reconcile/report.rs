//! What the loop says about the node: [`Status`], from what it knows and what the kernel counts.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, Instant, SystemTime},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use loden_ebpf::abi;
use serde_json::Value;

use super::{Overlay, Path, Reconciler, Wireguard};
use crate::{
    control::Request,
    dataplane::{Counted, Dataplane, Mapped, slow_reasons},
    family::{V4, V6},
    lease::LeaseKey,
    registry::{Cluster, Own},
    status::document::{
        Amount, Device, Endpoint, Etcd, Lease, Map, Peer, Program, Reconcile, Status, Traffic, Uplink, Ways,
    },
};

/// How many of many peers are named.
const NAMED: usize = 4;

impl Reconciler {
    pub(super) fn answer(&mut self, request: Request) -> Value {
        match request {
            Request::Status => {
                let now = Instant::now();
                self.note_activity(now);
                serde_json::to_value(self.status(now))
                    .unwrap_or_else(|error| Value::String(error.to_string()))
            }
            Request::Facts => {
                serde_json::to_value(self.facts()).unwrap_or_else(|error| Value::String(error.to_string()))
            }
        }
    }

    /// Looks who was heard of since the last look.
    pub(super) fn note_activity(&mut self, now: Instant) {
        let cluster = self.cluster();
        let (v4, v6) = (self.peer_traffic::<V4>(), self.peer_traffic::<V6>());
        let received = |traffic: abi::Traffic| traffic.received_fast.packets + traffic.received_slow.packets;
        let peers = cluster.peers.keys().map(|key| (*key, both(key, &v4, &v6).map_or(0, received)));
        self.peer_activity.note(peers, now);
        let sent = |traffic: &abi::EndpointTraffic| {
            traffic.traffic.sent_fast.packets + traffic.traffic.sent_slow.packets
        };
        let (v4, v6) = (self.endpoint_traffic::<V4>(), self.endpoint_traffic::<V6>());
        let v4 = v4.each.iter().map(|(address, traffic)| (IpAddr::V4(*address), sent(traffic)));
        let v6 = v6.each.iter().map(|(address, traffic)| (IpAddr::V6(*address), sent(traffic)));
        self.endpoint_activity.note(v4.chain(v6), now);
    }

    fn peer_traffic<F: Mapped>(&self) -> Counted<F::Net, abi::Traffic> {
        let Path::Ebpf(dataplane) = &self.path else { return Counted::default() };
        dataplane.half::<F>().peer_traffic().unwrap_or_default()
    }

    fn endpoint_traffic<F: Mapped>(&self) -> Counted<F::Addr, abi::EndpointTraffic> {
        let Path::Ebpf(dataplane) = &self.path else { return Counted::default() };
        dataplane.half::<F>().endpoint_traffic().unwrap_or_default()
    }

    fn status(&self, now: Instant) -> Status {
        let cluster = self.cluster();
        let not_ready: BTreeMap<String, String> =
            self.readiness.missing().into_iter().map(|(name, reason)| (name.to_owned(), reason)).collect();
        let uplink = &self.node.uplink;
        let network_v6 = self.node.network.v6.map(|pool| pool.network);
        let mut status = Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            timestamp: SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0.0, |d| d.as_secs_f64()),
            ready: not_ready.is_empty(),
            not_ready,
            lease: self.lease(&cluster, now),
            network: first(self.node.network.v4.map(|pool| pool.network), network_v6),
            network_v6: network_v6.map(|network| network.to_string()),
            uplink: Uplink {
                interface: uplink.name.clone(),
                address: first(uplink.address, uplink.address_v6),
                address_v6: uplink.address_v6.map(|address| address.to_string()),
                public_ip: first(uplink.public_ip, uplink.public_ipv6),
                public_ipv6: uplink.public_ipv6.map(|address| address.to_string()),
                mtu: uplink.mtu,
            },
            backend: self.node.network.backend.lease_type().to_owned(),
            device: self.node.overlay().map(device),
            device_v6: self.node.overlay_v6().map(device),
            wireguard: self.node.wireguard.as_ref().map(Wireguard::report).unwrap_or_default(),
            pod_mtu: self.node.pod_mtu(),
            datapath: self.path.name().to_owned(),
            gate: format!("{:?}", self.node.config.gate).to_lowercase(),
            refused: self.v4.refused.iter().chain(&self.v6.refused).cloned().collect(),
            advice: self.advice.iter().cloned().chain(self.left_to_ipsec(&cluster)).collect(),
            etcd: self.etcd(&cluster, now),
            reconcile: self.tally.clone(),
            passes: self.tally.runs,
            repairs: self.repairs,
            kernel_requests: self.kernel.requests(),
            ..Status::default()
        };
        match &self.path {
            Path::Kernel(reason) => {
                status.datapath_reason = Some(reason.clone());
                self.report_peers(&mut status, &cluster, None, now);
            }
            Path::Ebpf(dataplane) => {
                self.report_peers(&mut status, &cluster, Some(dataplane), now);
                self.report_endpoints::<V4>(&mut status, dataplane, now);
                self.report_endpoints::<V6>(&mut status, dataplane, now);
                count(&mut status, dataplane);
            }
        }
        status
    }

    /// Which peers an IPsec policy keeps from the fast path, if any.
    fn left_to_ipsec(&self, cluster: &Cluster) -> Option<String> {
        let v4 = self.protected::<V4>(cluster.peers.values()).into_iter().map(IpNet::from);
        let v6 = self.protected::<V6>(cluster.peers.values()).into_iter().map(IpNet::from);
        let subnets: Vec<String> = v4.chain(v6).map(|subnet| subnet.to_string()).collect();
        let (first, others) = subnets.split_at(subnets.len().min(NAMED));
        let more = if others.is_empty() { String::new() } else { format!(" and {} more", others.len()) };
        (!first.is_empty()).then(|| {
            format!(
                "the kernel carries all packets to {}{more}: an IPsec policy of this host is for them (`ip xfrm policy`)",
                first.join(", ")
            )
        })
    }

    fn lease(&self, cluster: &Cluster, now: Instant) -> Lease {
        match &cluster.own {
            Own::Held(lease) => {
                let renewed = cluster.renewed.filter(|_| lease.etcd_lease.is_some());
                let age = renewed.map(|renewed| now.saturating_duration_since(renewed));
                let left = age.map(|age| self.node.config.lease_ttl.saturating_sub(age));
                Lease {
                    state: "held".into(),
                    subnet: first(lease.key.subnet, lease.key.subnet_v6),
                    subnet_v6: lease.key.subnet_v6.map(|subnet| subnet.to_string()),
                    etcd_lease: lease.etcd_lease,
                    renewed_seconds: age.map(|age| age.as_secs_f64()),
                    expires_seconds: left.map(|left| left.as_secs_f64()),
                    ..Lease::default()
                }
            }
            Own::Lost { key, reason } => Lease {
                state: "lost".into(),
                subnet: first(key.subnet, key.subnet_v6),
                subnet_v6: key.subnet_v6.map(|subnet| subnet.to_string()),
                reason: Some(reason.clone()),
                ..Lease::default()
            },
        }
    }

    fn etcd(&self, cluster: &Cluster, now: Instant) -> Etcd {
        let health = self.keeper.etcd_health();
        let unheard = cluster.unheard.filter(|_| !cluster.connected);
        Etcd {
            source: if self.node.config.kube.is_some() { "kubernetes" } else { "etcd" }.into(),
            endpoints: health.endpoints,
            member: health.member,
            connected: cluster.connected,
            revision: cluster.revision,
            lag_seconds: unheard.map_or(0.0, |since| now.saturating_duration_since(since).as_secs_f64()),
            requests: health.requests,
            errors: health.errors,
            renewals: health.renewals,
            broken_watches: health.broken_watches,
        }
    }

    fn report_peers(
        &self,
        status: &mut Status,
        cluster: &Cluster,
        dataplane: Option<&Dataplane>,
        now: Instant,
    ) {
        let (v4, v6) = (self.peer_traffic::<V4>(), self.peer_traffic::<V6>());
        let mut others = v4.others;
        others += v6.others;
        status.other_peers = traffic(&others);
        let direct = dataplane
            .map(|dataplane| (dataplane.half::<V4>().direct_peers(), dataplane.half::<V6>().direct_peers()));
        let seconds = |duration: Duration| duration.as_secs_f64();
        let wireguard = self.node.wireguard.as_ref().map(Wireguard::report_peers).unwrap_or_default();
        let peer = |lease: &crate::lease::Lease| {
            let (key, attrs) = (lease.key, &lease.attrs);
            let traffic = both(&key, &v4, &v6).as_ref().map(traffic);
            let is_direct = |(v4, v6): &(BTreeSet<Ipv4Net>, BTreeSet<Ipv6Net>)| {
                key.subnet.map_or_else(
                    || key.subnet_v6.is_some_and(|subnet| v6.contains(&subnet)),
                    |subnet| v4.contains(&subnet),
                )
            };
            let (public_ip, public_ipv6) = (
                attrs.public_ip.filter(|_| key.subnet.is_some()),
                attrs.public_ipv6.filter(|_| key.subnet_v6.is_some()),
            );
            Peer {
                subnet: first(key.subnet, key.subnet_v6),
                subnet_v6: key.subnet_v6.map(|subnet| subnet.to_string()),
                public_ip: first(public_ip, public_ipv6),
                public_ipv6: public_ipv6.map(|address| address.to_string()),
                wireguard: (attrs.wireguard::<V4>().or_else(|_| attrs.wireguard::<V6>()).ok())
                    .and_then(|data| wireguard.get(&data.public_key).cloned()),
                vtep_mac: attrs.vtep().or_else(|_| attrs.vtep_v6()).ok().map(|vtep| mac(vtep.vtep_mac)),
                direct: direct.as_ref().map(is_direct),
                known_seconds: self.peer_activity.known(&key, now).map_or(0.0, seconds),
                last_seen_seconds: self.peer_activity.last_seen(&key, now).map(seconds),
                fast_share: traffic.as_ref().and_then(Traffic::fast_share),
                traffic,
            }
        };
        status.peers = cluster.peers.values().map(peer).collect();
    }

    fn report_endpoints<F: Mapped>(&self, status: &mut Status, dataplane: &Dataplane, now: Instant) {
        let Counted { each, others } = self.endpoint_traffic::<F>();
        status.other_endpoints += traffic(&others.traffic);
        let endpoint = |endpoint: &abi::Endpoint<F::Octets>| {
            let address = F::of_octets(endpoint.address);
            let counted = each.get(&address);
            let traffic = counted.map(|counted| traffic(&counted.traffic));
            let last_seen = self.endpoint_activity.last_seen(&address.into(), now);
            Endpoint {
                address: address.to_string(),
                ifindex: endpoint.ifindex,
                mac: mac(endpoint.mac),
                gated: endpoint.gated == abi::TRANSLATED,
                last_seen_seconds: last_seen.map(|duration| duration.as_secs_f64()),
                fast_share: traffic.as_ref().and_then(Traffic::fast_share),
                traffic,
                slow: counted
                    .into_iter()
                    .flat_map(slow_reasons)
                    .map(|(r, n)| (r.name().to_owned(), n))
                    .collect(),
                ..Endpoint::default()
            }
        };
        let endpoints = dataplane.half::<F>().endpoints().unwrap_or_default();
        status.endpoints.extend(endpoints.iter().map(endpoint));
    }
}

/// What was counted of a peer, in both families together; `None` where neither is counted by itself.
fn both(
    key: &LeaseKey,
    v4: &Counted<Ipv4Net, abi::Traffic>,
    v6: &Counted<Ipv6Net, abi::Traffic>,
) -> Option<abi::Traffic> {
    let v4 = key.subnet.and_then(|subnet| v4.each.get(&subnet));
    let v6 = key.subnet_v6.and_then(|subnet| v6.each.get(&subnet));
    let counted = v4.into_iter().chain(v6).copied();
    counted.reduce(|mut sum, traffic| {
        sum += traffic;
        sum
    })
}

/// What the programs and maps say of themselves. What cannot be read is left out: the status is for finding out why.
fn count(status: &mut Status, dataplane: &Dataplane) {
    for (reason, counter) in dataplane.counters().unwrap_or_default() {
        status.counters.insert(reason.name().to_owned(), counter.packets);
        status.bytes.insert(reason.name().to_owned(), counter.bytes);
    }
    let programs = dataplane.loaded().into_iter();
    status.programs = programs
        .map(|loaded| Program {
            name: loaded.program.name().to_owned(),
            id: loaded.id,
            tag: format!("{:016x}", loaded.tag),
            interfaces: loaded.interfaces,
        })
        .collect();
    let maps = dataplane.fill().into_iter();
    status.maps = maps
        .map(|(name, entries, max_entries)| Map { name: name.to_owned(), entries, max_entries })
        .collect();
}

fn traffic(traffic: &abi::Traffic) -> Traffic {
    let amount = |counter: &abi::Counter| Amount { packets: counter.packets, bytes: counter.bytes };
    let ways = |fast, slow| Ways { fast: amount(fast), slow: amount(slow) };
    Traffic {
        sent: ways(&traffic.sent_fast, &traffic.sent_slow),
        received: ways(&traffic.received_fast, &traffic.received_slow),
    }
}

fn device(overlay: &Overlay) -> Device {
    Device {
        name: overlay.spec.name.clone(),
        mac: mac(overlay.device.mac),
        mtu: overlay.device.mtu,
        vni: overlay.vxlan.vni,
        port: overlay.vxlan.port,
    }
}

/// What there is of IPv4, and where there is nothing, of IPv6.
fn first(v4: Option<impl ToString>, v6: Option<impl ToString>) -> String {
    v4.map(|it| it.to_string()).or(v6.map(|it| it.to_string())).unwrap_or_default()
}

fn mac(mac: [u8; 6]) -> String {
    crate::kernel::mac_text(mac)
}

impl Reconcile {
    /// Counts a run.
    pub(super) fn ran(&mut self, took: Duration, failed: bool) {
        self.runs += 1;
        self.failed += u64::from(failed);
        self.last_seconds = took.as_secs_f64();
        self.seconds += self.last_seconds;
    }
}
