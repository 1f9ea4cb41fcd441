//! `/metrics`: the status document as Prometheus reads it (OpenMetrics text). Nothing is kept here: each scrape asks
//! the loop, as `loden status` does.
//!
//! Peers and endpoints come and go, and so would their series without end: at most `--metrics-max-each` of each have
//! series of their own, the others are summed up under `other`.

mod process;

use std::fmt;

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};

use self::process::Process;
use crate::{
    control::{Asker, Request},
    family::{Family as _, V4, V6},
    status::document::{Amount, Status, Traffic, WireguardPeer},
};

/// What `/metrics` answers with.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Label value of those that have no series of their own.
const OTHER: &str = "other";

/// The route `/metrics`. `max_each`: how many peers, and how many endpoints, have series of their own.
pub fn routes(asker: Asker, max_each: usize) -> Router {
    Router::new().route("/metrics", get(metrics)).with_state(Scrape { asker, max_each })
}

#[derive(Clone)]
struct Scrape {
    asker: Asker,
    max_each: usize,
}

async fn metrics(State(scrape): State<Scrape>) -> Response {
    let text = async {
        let status = serde_json::from_value(scrape.asker.ask(Request::Status).await?)?;
        encode(status, Process::read().ok(), scrape.max_each)
    };
    match text.await {
        Ok(text) => ([(CONTENT_TYPE, OPENMETRICS)], text).into_response(),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error:#}\n")).into_response(),
    }
}

fn encode(status: Status, process: Option<Process>, max_each: usize) -> anyhow::Result<String> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Document { status, process, max_each }));
    let mut out = String::new();
    text::encode(&mut out, &registry)?;
    Ok(out)
}

#[derive(Debug)]
struct Document {
    status: Status,
    process: Option<Process>,
    max_each: usize,
}

impl Collector for Document {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut families = Families(encoder);
        self.node(&mut families)?;
        self.packets(&mut families)?;
        self.peers(&mut families)?;
        self.wireguard(&mut families)?;
        self.endpoints(&mut families)?;
        self.etcd(&mut families)?;
        self.process.as_ref().map_or(Ok(()), |process| process.encode(&mut families))
    }
}

impl Document {
    fn node(&self, out: &mut Families<'_>) -> fmt::Result {
        let Self { status, .. } = self;
        let build = vec![("version", status.version.clone())];
        out.gauge("loden_build_info", "What runs here: always 1", None, [(build, 1.0)])?;
        let datapath = vec![
            ("datapath", status.datapath.clone()),
            ("gate", status.gate.clone()),
            ("backend", status.backend.clone()),
        ];
        out.gauge("loden_datapath_info", "How packets travel: always 1", None, [(datapath, 1.0)])?;
        out.gauge("loden_ready", "Whether this node carries packets as it should", None, one(status.ready))?;
        let lease = &status.lease;
        out.gauge("loden_lease_held", "Whether this node holds a subnet", None, one(lease.state == "held"))?;
        let at = |seconds: Option<f64>| seconds.map(|seconds| (Labels::new(), status.timestamp + seconds));
        let help = "When the lease runs out unless it is renewed; missing for a reservation and with the Kubernetes API";
        out.gauge("loden_lease_expiry_timestamp", help, Some(Unit::Seconds), at(lease.expires_seconds))?;
        let renewed = at(lease.renewed_seconds.map(|age| -age));
        let help =
            "When etcd last confirmed the lease; missing for a reservation and with the Kubernetes API";
        out.gauge("loden_lease_renewed_timestamp", help, Some(Unit::Seconds), renewed)?;
        let help = "Peers whose lease this node cannot follow";
        out.gauge("loden_refused_peers", help, None, value(status.refused.len() as f64))?;
        let entries = |entries: fn(&crate::status::document::Map) -> u64| {
            let map = move |map| -> (Labels, f64) { (vec![("map", name_of(map))], entries(map) as f64) };
            status.maps.iter().map(map).collect::<Vec<_>>()
        };
        out.gauge("loden_map_entries", "Entries of a map that are in use", None, entries(|map| map.entries))?;
        let help = "Entries that a map has room for";
        out.gauge("loden_map_max_entries", help, None, entries(|map| map.max_entries))?;
        let reconcile = &status.reconcile;
        let help = "Runs of the loop that keeps this node as it should be";
        out.counter("loden_reconcile_runs", help, None, value(reconcile.runs as f64))?;
        let help = "Runs that left something undone";
        out.counter("loden_reconcile_failures", help, None, value(reconcile.failed as f64))?;
        let help = "Time that all runs took together";
        out.counter("loden_reconcile_duration", help, Some(Unit::Seconds), value(reconcile.seconds))?;
        let help = "Time that the last run took";
        out.gauge("loden_reconcile_last_duration", help, Some(Unit::Seconds), value(reconcile.last_seconds))?;
        let help = "Requests to the kernel over netlink";
        out.counter("loden_kernel_requests", help, None, value(status.kernel_requests as f64))?;
        let repairs =
            reconcile.repairs.iter().map(|(part, runs)| (vec![("part", part.clone())], *runs as f64));
        let help = "Runs in which this part had to change something";
        out.counter("loden_reconcile_repairs", help, None, repairs.collect::<Vec<_>>())
    }

    fn packets(&self, out: &mut Families<'_>) -> fmt::Result {
        let by_reason = |counters: &std::collections::BTreeMap<String, u64>| -> Vec<(Labels, f64)> {
            counters.iter().map(|(reason, n)| (vec![("reason", reason.clone())], *n as f64)).collect()
        };
        let help = "Packets that the programs saw, by what became of them; an aggregate is one";
        out.counter("loden_packets", help, None, by_reason(&self.status.counters))?;
        let help = "Bytes of the frames that the programs saw, by what became of them";
        out.counter("loden_frame", help, Some(Unit::Bytes), by_reason(&self.status.bytes))
    }

    fn peers(&self, out: &mut Families<'_>) -> fmt::Result {
        let peers = &self.status.peers;
        out.gauge("loden_peers", "Other nodes that are known", None, value(peers.len() as f64))?;
        let labels = |peer: &crate::status::document::Peer| -> Labels {
            vec![("subnet", peer.subnet.clone()), ("node", peer.public_ip.clone())]
        };
        let each = peers.iter().filter_map(|peer| Some((labels(peer), peer.traffic?)));
        let other = vec![("subnet", OTHER.to_owned()), ("node", OTHER.to_owned())];
        let series = self.limit(each, other, self.status.other_peers);
        let help = "Packets to and from a peer; an aggregate counts as its segments";
        out.counter("loden_peer_packets", help, None, flows(&series, |amount| amount.packets))?;
        let help = "Bytes of the pods' IP packets to and from a peer";
        out.counter("loden_peer", help, Some(Unit::Bytes), flows(&series, |amount| amount.bytes))
    }

    fn wireguard(&self, out: &mut Families<'_>) -> fmt::Result {
        let peers = self.status.peers.iter().take(self.max_each);
        let peers = peers.filter_map(|peer| Some((peer, peer.wireguard.as_ref()?)));
        let peers: Vec<(Labels, &WireguardPeer)> = peers
            .map(|(peer, wireguard)| {
                (vec![("subnet", peer.subnet.clone()), ("node", peer.public_ip.clone())], wireguard)
            })
            .collect();
        if peers.is_empty() {
            return Ok(());
        }
        let at = peers.iter().filter_map(|(labels, peer)| {
            Some((labels.clone(), self.status.timestamp - peer.handshake_seconds?))
        });
        let help = "When the last handshake with a peer was completed; missing where none was";
        let unit = Some(Unit::Seconds);
        out.gauge("loden_wireguard_handshake_timestamp", help, unit, at.collect::<Vec<_>>())?;
        let bytes = peers.iter().flat_map(|(labels, peer)| {
            [("sent", peer.sent_bytes), ("received", peer.received_bytes)].map(|(direction, bytes)| {
                let mut labels = labels.clone();
                labels.push(("direction", direction.to_owned()));
                (labels, bytes as f64)
            })
        });
        let help = "Bytes to and from a peer as WireGuard's device counts them, encrypted";
        out.counter("loden_wireguard_peer", help, Some(Unit::Bytes), bytes.collect::<Vec<_>>())
    }

    fn endpoints(&self, out: &mut Families<'_>) -> fmt::Result {
        let endpoints = &self.status.endpoints;
        // A pod of both families has an endpoint in each.
        let of_family = |family: &'static str| {
            let is_of = |address: &str| address.contains(':') == (family == V6::NAME);
            let known = endpoints.iter().filter(|endpoint| is_of(&endpoint.address)).count();
            (vec![("family", family.to_owned())], known as f64)
        };
        let v4 = (!self.status.network.contains(':')).then_some(V4::NAME);
        let families = v4.into_iter().chain(self.status.network_v6.as_ref().map(|_| V6::NAME));
        let help = "Addresses of local pods that are known, by family";
        out.gauge("loden_endpoints", help, None, families.map(of_family).collect::<Vec<_>>())?;
        let each = endpoints
            .iter()
            .filter_map(|endpoint| Some((vec![("address", endpoint.address.clone())], endpoint.traffic?)));
        let other = vec![("address", OTHER.to_owned())];
        let series = self.limit(each, other, self.status.other_endpoints);
        let help = "Packets between a local pod and other pods; an aggregate counts as its segments";
        out.counter("loden_endpoint_packets", help, None, flows(&series, |amount| amount.packets))?;
        let help = "Bytes of the IP packets between a local pod and other pods";
        out.counter("loden_endpoint", help, Some(Unit::Bytes), flows(&series, |amount| amount.bytes))?;
        let slow = endpoints.iter().take(self.max_each).flat_map(|endpoint| {
            let labels =
                |reason: &String| vec![("address", endpoint.address.clone()), ("reason", reason.clone())];
            endpoint.slow.iter().map(move |(reason, packets)| (labels(reason), *packets as f64))
        });
        let help = "Packets of a local pod that were handed to the host stack, by why";
        out.counter("loden_endpoint_slow_packets", help, None, slow.collect::<Vec<_>>())
    }

    fn etcd(&self, out: &mut Families<'_>) -> fmt::Result {
        let etcd = &self.status.etcd;
        out.gauge("loden_etcd_connected", "Whether the leases are being watched", None, one(etcd.connected))?;
        let help =
            "How old what is known of the leases may be: the time since the watch broke, 0 while it is up";
        out.gauge("loden_etcd_lag", help, Some(Unit::Seconds), value(etcd.lag_seconds))?;
        let help = "Revision of the newest news of etcd, or of the Kubernetes API in its place";
        out.gauge("loden_etcd_revision", help, None, value(etcd.revision as f64))?;
        out.counter(
            "loden_etcd_requests",
            "Requests to etcd or the Kubernetes API",
            None,
            value(etcd.requests as f64),
        )?;
        let help = "Requests to etcd or the Kubernetes API that no endpoint answered or that were refused";
        out.counter("loden_etcd_errors", help, None, value(etcd.errors as f64))?;
        let help = "How often the watch of the leases broke";
        out.counter("loden_etcd_broken_watches", help, None, value(etcd.broken_watches as f64))?;
        let help = "How often the lease was renewed";
        out.counter("loden_lease_renewals", help, None, value(etcd.renewals as f64))
    }

    /// As many as have series of their own, and the rest as one.
    fn limit(
        &self,
        each: impl Iterator<Item = (Labels, Traffic)>,
        other: Labels,
        mut others: Traffic,
    ) -> Vec<(Labels, Traffic)> {
        let mut series: Vec<_> = each.collect();
        for (_, traffic) in series.drain(self.max_each.min(series.len())..) {
            others += traffic;
        }
        series.push((other, others));
        series
    }
}

fn name_of(map: &crate::status::document::Map) -> String {
    map.name.clone()
}

/// Four series for each: both directions, fast and slow.
fn flows(each: &[(Labels, Traffic)], number: fn(&Amount) -> u64) -> Vec<(Labels, f64)> {
    let mut samples = Vec::new();
    for (labels, traffic) in each {
        for (direction, ways) in [("sent", &traffic.sent), ("received", &traffic.received)] {
            for (path, amount) in [("fast", &ways.fast), ("slow", &ways.slow)] {
                let mut labels = labels.clone();
                labels.extend([("direction", direction.to_owned()), ("path", path.to_owned())]);
                samples.push((labels, number(amount) as f64));
            }
        }
    }
    samples
}

/// Names and values of a sample's labels.
type Labels = Vec<(&'static str, String)>;

fn value(value: f64) -> [(Labels, f64); 1] {
    [(Labels::new(), value)]
}

fn one(holds: bool) -> [(Labels, f64); 1] {
    value(if holds { 1.0 } else { 0.0 })
}

/// Writes family after family.
struct Families<'a>(DescriptorEncoder<'a>);

impl Families<'_> {
    fn gauge(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        samples: impl IntoIterator<Item = (Labels, f64)>,
    ) -> fmt::Result {
        self.family(MetricType::Gauge, ConstGauge::new, (name, help, unit), samples)
    }

    /// The name without `_total`.
    fn counter(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        samples: impl IntoIterator<Item = (Labels, f64)>,
    ) -> fmt::Result {
        self.family(MetricType::Counter, ConstCounter::new, (name, help, unit), samples)
    }

    fn family<M: EncodeMetric>(
        &mut self,
        kind: MetricType,
        metric: impl Fn(f64) -> M,
        (name, help, unit): (&str, &str, Option<Unit>),
        samples: impl IntoIterator<Item = (Labels, f64)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, unit.as_ref(), kind)?;
        for (labels, value) in samples {
            metric(value).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::document::{Endpoint, Peer, Ways};

    fn status(peers: u8) -> Status {
        let amount = |packets| Amount { packets, bytes: packets * 100 };
        let traffic = |n| Traffic { sent: Ways { fast: amount(n), slow: amount(1) }, ..Traffic::default() };
        Status {
            ready: true,
            peers: (0..peers)
                .map(|n| Peer {
                    subnet: format!("10.5.{n}.0/24"),
                    public_ip: format!("192.0.2.{n}"),
                    traffic: Some(traffic(10)),
                    ..Peer::default()
                })
                .collect(),
            endpoints: vec![Endpoint {
                address: "10.5.9.2".into(),
                traffic: Some(traffic(7)),
                slow: [("pass_pod_gate".into(), 3)].into(),
                ..Endpoint::default()
            }],
            ..Status::default()
        }
    }

    #[test]
    fn each_peer_and_endpoint_has_its_series_and_the_rest_is_summed_up() {
        let text = encode(status(5), None, 3).unwrap();
        let has = |line: &str| assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
        has(
            r#"loden_peer_packets_total{subnet="10.5.2.0/24",node="192.0.2.2",direction="sent",path="fast"} 10.0"#,
        );
        has(r#"loden_peer_packets_total{subnet="other",node="other",direction="sent",path="fast"} 20.0"#);
        has(r#"loden_peer_bytes_total{subnet="other",node="other",direction="sent",path="slow"} 200.0"#);
        has(r#"loden_endpoint_slow_packets_total{address="10.5.9.2",reason="pass_pod_gate"} 3.0"#);
        assert!(!text.contains("10.5.3.0/24"), "{text}");
        has("# EOF");
    }

    #[test]
    fn wireguards_peers_have_handshakes_and_bytes() {
        let mut status = status(2);
        status.timestamp = 1000.0;
        status.peers[0].wireguard =
            Some(WireguardPeer { handshake_seconds: Some(60.0), sent_bytes: 5, ..WireguardPeer::default() });
        status.peers[1].wireguard = Some(WireguardPeer::default());
        let text = encode(status, None, 500).unwrap();
        let has = |line: &str| assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
        has(r#"loden_wireguard_handshake_timestamp_seconds{subnet="10.5.0.0/24",node="192.0.2.0"} 940.0"#);
        has(
            r#"loden_wireguard_peer_bytes_total{subnet="10.5.0.0/24",node="192.0.2.0",direction="sent"} 5.0"#,
        );
        assert!(!text.contains(r#"handshake_timestamp_seconds{subnet="10.5.1.0/24""#), "{text}");
    }

    #[test]
    fn without_series_of_their_own_only_sums_are_left() {
        let text = encode(status(2), None, 0).unwrap();
        assert!(!text.contains("10.5."), "{text}");
        assert!(
            text.contains(
                r#"loden_endpoint_packets_total{address="other",direction="sent",path="fast"} 7.0"#
            )
        );
    }
}
