//! What the loop says about the node.

use std::{collections::BTreeMap, net::Ipv4Addr};

use ipnet::Ipv4Net;
use loden_ebpf::abi::{Counter, Traffic};
use serde_json::{Value, json};

use super::{Path, Reconciler};
use crate::{
    control::Request,
    dataplane::{Counted, slow_reasons},
    registry::{Cluster, Own},
};

impl Reconciler {
    pub(super) fn answer(&self, request: Request) -> Value {
        match request {
            Request::Status => self.status(),
        }
    }

    fn status(&self) -> Value {
        let cluster = self.cluster();
        let counters = self.counters();
        let traffic = self.peer_traffic();
        let missing: BTreeMap<_, _> = self.readiness.missing().into_iter().collect();
        json!({
            "ready": missing.is_empty(),
            "not_ready": missing,
            "lease": lease(&cluster),
            "network": self.node.network.network,
            "uplink": {
                "interface": self.node.uplink.name,
                "address": self.node.uplink.address,
                "public_ip": self.node.uplink.public_ip,
                "mtu": self.node.uplink.mtu,
            },
            "backend": self.node.network.backend.lease_type(),
            "device": self.node.overlay.as_ref().map(|overlay| json!({
                "name": overlay.spec.name,
                "mac": mac(overlay.device.mac),
                "mtu": overlay.device.mtu,
                "vni": overlay.vxlan.vni,
                "port": overlay.vxlan.port,
            })),
            "pod_mtu": self.node.pod_mtu(),
            "datapath": self.path.name(),
            "datapath_reason": match &self.path { Path::Kernel(reason) => Some(reason), Path::Ebpf(_) => None },
            "gate": format!("{:?}", self.node.config.gate).to_lowercase(),
            "counters": counters.0,
            "bytes": counters.1,
            "peers": cluster.peers.values().map(|lease| json!({
                "subnet": lease.subnet,
                "public_ip": lease.attrs.public_ip,
                "vtep_mac": lease.attrs.vtep().ok().map(|vtep| mac(vtep.vtep_mac)),
                "traffic": traffic.each.get(&lease.subnet).map(traffic_json),
            })).collect::<Vec<_>>(),
            "refused": self.refused,
            "endpoints": self.endpoints_report(),
            "etcd": { "connected": cluster.connected, "revision": cluster.revision },
            "passes": self.passes,
            "repairs": self.repairs,
            "kernel_requests": self.kernel.requests(),
        })
    }

    /// Packets and bytes by reason; empty without programs.
    fn counters(&self) -> (Value, Value) {
        let Path::Ebpf(dataplane) = &self.path else { return (json!({}), json!({})) };
        match dataplane.counters() {
            Ok(counters) => (
                counters.iter().map(|(reason, c)| (reason.name().to_owned(), json!(c.packets))).collect(),
                counters.iter().map(|(reason, c)| (reason.name().to_owned(), json!(c.bytes))).collect(),
            ),
            Err(error) => (json!({ "error": error.to_string() }), json!({})),
        }
    }

    fn peer_traffic(&self) -> Counted<Ipv4Net, Traffic> {
        let Path::Ebpf(dataplane) = &self.path else { return Counted::default() };
        dataplane.peer_traffic().unwrap_or_default()
    }

    fn endpoints_report(&self) -> Vec<Value> {
        let Path::Ebpf(dataplane) = &self.path else { return Vec::new() };
        let endpoints = dataplane.endpoints().unwrap_or_default();
        let traffic = dataplane.endpoint_traffic().unwrap_or_default();
        endpoints
            .iter()
            .map(|endpoint| {
                json!({
                    "address": Ipv4Addr::from(endpoint.address),
                    "ifindex": endpoint.ifindex,
                    "mac": mac(endpoint.mac),
                    "gated": endpoint.gated == loden_ebpf::abi::TRANSLATED,
                    "traffic": traffic.each.get(&Ipv4Addr::from(endpoint.address)).map(|each| traffic_json(&each.traffic)),
                    "slow": traffic.each.get(&Ipv4Addr::from(endpoint.address)).map(|each| {
                        slow_reasons(each).into_iter().map(|(reason, packets)| (reason.name(), packets)).collect::<BTreeMap<_, _>>()
                    }),
                })
            })
            .collect()
    }
}

fn lease(cluster: &Cluster) -> Value {
    match &cluster.own {
        Own::Held(lease) => {
            json!({ "state": "held", "subnet": lease.subnet, "etcd_lease": lease.etcd_lease })
        }
        Own::Lost { subnet, reason } => json!({ "state": "lost", "subnet": subnet, "reason": reason }),
    }
}

fn traffic_json(traffic: &Traffic) -> Value {
    let counter = |counter: &Counter| json!({ "packets": counter.packets, "bytes": counter.bytes });
    json!({
        "sent": { "fast": counter(&traffic.sent_fast), "slow": counter(&traffic.sent_slow) },
        "received": { "fast": counter(&traffic.received_fast), "slow": counter(&traffic.received_slow) },
    })
}

fn mac(mac: [u8; 6]) -> String {
    crate::kernel::mac_text(mac)
}
