//! The document as text for people. Pure.

use comfy_table::{Cell, CellAlignment, Table, presets};

use super::{
    document::{Endpoint, Peer, Status, Traffic},
    rates::{Rate, Rates},
};

/// The whole node. With an earlier document, tables show rates since then instead of totals.
#[must_use]
pub(super) fn text(status: &Status, earlier: Option<&Status>) -> String {
    let mut out = node(status);
    let rates = earlier.map(|earlier| Since { earlier, seconds: status.timestamp - earlier.timestamp });
    if !status.peers.is_empty() {
        out += &format!("\n{}\n", peers(status, rates.as_ref()));
    }
    if !status.endpoints.is_empty() {
        out += &format!("\n{}\n", endpoints(status, rates.as_ref()));
    }
    if earlier.is_none() {
        out += &packets(status);
    }
    out
}

struct Since<'a> {
    earlier: &'a Status,
    seconds: f64,
}

impl Since<'_> {
    fn peer(&self, peer: &Peer) -> Option<Rates> {
        let earlier = self.earlier.peers.iter().find(|earlier| earlier.subnet == peer.subnet)?;
        Some(Rates::between(&earlier.traffic?, &peer.traffic?, self.seconds))
    }

    fn endpoint(&self, endpoint: &Endpoint) -> Option<Rates> {
        let earlier = self.earlier.endpoints.iter().find(|earlier| earlier.address == endpoint.address)?;
        Some(Rates::between(&earlier.traffic?, &endpoint.traffic?, self.seconds))
    }
}

fn node(status: &Status) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| out.push_str(&format!("{name:<10} {value}\n"));
    line("ready", if status.ready { "yes".into() } else { "NO".into() });
    for (condition, reason) in &status.not_ready {
        line("  because", format!("{condition}: {reason}"));
    }
    let lease = &status.lease;
    let expiry = match (lease.expires_seconds, lease.renewed_seconds) {
        (Some(expires), Some(renewed)) => {
            format!(", renewed {} ago, runs out in {}", age(renewed), age(expires))
        }
        _ if lease.state == "held" => ", a reservation".into(),
        _ => String::new(),
    };
    let subnets = both(&lease.subnet, lease.subnet_v6.as_ref());
    let networks = both(&status.network, status.network_v6.as_ref());
    line("lease", format!("{subnets} of {networks}, {}{expiry}", lease.state));
    let uplink = &status.uplink;
    let told = both(&uplink.public_ip, uplink.public_ipv6.as_ref());
    let own = both(&uplink.address, uplink.address_v6.as_ref());
    let public = if told == own { String::new() } else { format!(", public {told}") };
    line("uplink", format!("{} {own}{public}, MTU {}", uplink.interface, uplink.mtu));
    for device in status.device.iter().chain(&status.device_v6) {
        line(
            "device",
            format!(
                "{} {}, VNI {}, port {}, MTU {}",
                device.name, device.mac, device.vni, device.port, device.mtu
            ),
        );
    }
    for device in &status.wireguard {
        let text = format!("{} {}, port {}, MTU {}", device.name, device.public_key, device.port, device.mtu);
        line("device", text);
    }
    if status.device.is_none() && status.device_v6.is_none() && status.wireguard.is_empty() {
        line("device", format!("none ({}), MTU {}", status.backend, status.pod_mtu));
    }
    line("datapath", format!("{}, gate {}", status.datapath, status.gate));
    if let Some(reason) = &status.datapath_reason {
        line("  because", reason.clone());
    }
    let programs: Vec<String> = status
        .programs
        .iter()
        .filter(|program| program.interfaces > 0)
        .map(|program| format!("{} {} ({}x)", program.name, program.id, program.interfaces))
        .collect();
    if !programs.is_empty() {
        line("programs", programs.join(", "));
    }
    let etcd = &status.etcd;
    let heard = if etcd.connected {
        "followed".into()
    } else {
        format!("NOT followed for {}", age(etcd.lag_seconds))
    };
    let member = etcd.member.as_deref().unwrap_or("no endpoint answers");
    line(&etcd.source, format!("{member}, {heard}, revision {}", etcd.revision));
    for refused in &status.refused {
        line("refused", refused.clone());
    }
    for advice in &status.advice {
        line("advice", advice.clone());
    }
    out
}

/// What there is of each family; of a node without IPv4 the first is IPv6's already.
fn both(first: &str, v6: Option<&String>) -> String {
    match v6.filter(|v6| *v6 != first) {
        Some(v6) => format!("{first} and {v6}"),
        None => first.to_owned(),
    }
}

fn peers(status: &Status, since: Option<&Since<'_>>) -> Table {
    let unit = if since.is_some() { "bit/s (packets/s)" } else { "bytes (packets)" };
    let mut table = new_table(&["peer", "node", "way", "known", "seen", "fast"], unit);
    for peer in &status.peers {
        let way = match (&peer.wireguard, peer.direct) {
            (Some(wireguard), _) => match wireguard.handshake_seconds {
                Some(seconds) => format!("wireguard, handshake {} ago", age(seconds)),
                None => "wireguard, no handshake".to_owned(),
            },
            (None, Some(true)) => "direct".to_owned(),
            (None, Some(false)) => "vxlan".to_owned(),
            (None, None) => "-".to_owned(),
        };
        let mut row = vec![
            both(&peer.subnet, peer.subnet_v6.as_ref()),
            both(&peer.public_ip, peer.public_ipv6.as_ref()),
            way,
            age(peer.known_seconds),
            peer.last_seen_seconds.map_or("-".into(), age),
        ];
        row.extend(flow(peer.traffic.as_ref(), since.map(|since| since.peer(peer))));
        add(&mut table, row, 4);
    }
    table
}

fn endpoints(status: &Status, since: Option<&Since<'_>>) -> Table {
    let unit = if since.is_some() { "bit/s (packets/s)" } else { "bytes (packets)" };
    let mut table = new_table(&["endpoint", "container", "interface", "seen", "fast"], unit);
    table.set_header(header(
        &["endpoint", "container", "interface", "seen", "fast"],
        unit,
        Some("slow because"),
    ));
    for endpoint in &status.endpoints {
        let mut row = vec![
            endpoint.address.clone(),
            endpoint.name.clone().unwrap_or_else(|| "-".into()),
            endpoint.interface.clone().unwrap_or_else(|| endpoint.ifindex.to_string()),
            endpoint.last_seen_seconds.map_or("-".into(), age),
        ];
        row.extend(flow(endpoint.traffic.as_ref(), since.map(|since| since.endpoint(endpoint))));
        row.push(because(endpoint));
        add(&mut table, row, 3);
    }
    table
}

/// The three most frequent reasons.
fn because(endpoint: &Endpoint) -> String {
    let mut reasons: Vec<(&String, &u64)> = endpoint.slow.iter().collect();
    reasons.sort_by_key(|(_, packets)| std::cmp::Reverse(**packets));
    let most: Vec<String> = reasons
        .iter()
        .take(3)
        .map(|(reason, packets)| format!("{reason} {}", count(**packets as f64)))
        .collect();
    if most.is_empty() { "-".into() } else { most.join(", ") }
}

/// The cells fast, sent, received: of rates where they are asked for, else of totals.
fn flow(traffic: Option<&Traffic>, rates: Option<Option<Rates>>) -> [String; 3] {
    let share = |share: Option<f64>| share.map_or("-".into(), |share| format!("{:.1} %", share * 100.0));
    let none = || ["-".into(), "-".into(), "-".into()];
    match (rates, traffic) {
        (Some(Some(rates)), _) => {
            let rate = |rate: &Rate| format!("{} ({})", count(rate.bits), count(rate.packets));
            [share(rates.fast_share), rate(&rates.sent), rate(&rates.received)]
        }
        (None, Some(traffic)) => {
            let total =
                |bytes: u64, packets: u64| format!("{} ({})", count(bytes as f64), count(packets as f64));
            [
                share(traffic.fast_share()),
                total(traffic.sent.bytes(), traffic.sent.packets()),
                total(traffic.received.bytes(), traffic.received.packets()),
            ]
        }
        _ => none(),
    }
}

fn packets(status: &Status) -> String {
    let mut seen: Vec<(&String, &u64)> =
        status.counters.iter().filter(|(_, packets)| **packets > 0).collect();
    if seen.is_empty() {
        return String::new();
    }
    seen.sort_by_key(|(_, packets)| std::cmp::Reverse(**packets));
    let mut table = new_table(&["reason"], "");
    table.set_header([Cell::new("reason"), right("packets"), right("bytes")]);
    for (reason, packets) in seen {
        let bytes = status.bytes.get(reason).copied().unwrap_or(0);
        table.add_row([Cell::new(reason), right(&packets.to_string()), right(&bytes.to_string())]);
    }
    format!("\n{table}\n")
}

fn new_table(columns: &[&str], unit: &str) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header(columns, unit, None));
    table
}

fn header(columns: &[&str], unit: &str, last: Option<&str>) -> Vec<Cell> {
    let mut cells: Vec<Cell> = columns.iter().map(Cell::new).collect();
    cells.push(right(&format!("sent {unit}")));
    cells.push(right(&format!("received {unit}")));
    cells.extend(last.map(Cell::new));
    cells
}

/// Adds a row whose columns from `from` to the received one hold numbers.
fn add(table: &mut Table, row: Vec<String>, from: usize) {
    let last = from + 3;
    let cells = row.iter().enumerate();
    table.add_row(
        cells.map(|(i, text)| if (from..=last).contains(&i) { right(text) } else { Cell::new(text) }),
    );
}

fn right(text: &str) -> Cell {
    Cell::new(text).set_alignment(CellAlignment::Right)
}

/// A number with at most four digits, in powers of a thousand.
fn count(number: f64) -> String {
    let (mut number, mut unit) = (number, 0);
    while number >= 9999.5 && unit < 5 {
        number /= 1000.0;
        unit += 1;
    }
    format!("{number:.0}{}", ["", "k", "M", "G", "T", "P"][unit])
}

/// A time for people: its largest unit, and the next one where the first is small.
fn age(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, minutes) => format!("{minutes} min"),
        (0, hours, minutes) => format!("{hours} h {minutes} min"),
        (days, hours, _) => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::document::{
        Amount, Device, Etcd, Lease, Uplink, Ways, WireguardDevice, WireguardPeer,
    };

    fn status() -> Status {
        let ways = |fast, slow| Ways {
            fast: Amount { packets: fast, bytes: fast * 1000 },
            slow: Amount { packets: slow, bytes: slow * 100 },
        };
        let traffic = Traffic { sent: ways(900, 100), received: ways(1000, 0) };
        Status {
            timestamp: 1000.0,
            ready: true,
            network: "10.5.0.0/16".into(),
            lease: Lease {
                state: "held".into(),
                subnet: "10.5.34.0/24".into(),
                renewed_seconds: Some(61.0),
                expires_seconds: Some(86_000.0),
                ..Lease::default()
            },
            uplink: Uplink {
                interface: "eth0".into(),
                address: "192.0.2.1".into(),
                public_ip: "192.0.2.1".into(),
                mtu: 1500,
                ..Uplink::default()
            },
            datapath: "ebpf".into(),
            gate: "strict".into(),
            etcd: Etcd {
                source: "etcd".into(),
                member: Some("http://192.0.2.9:2379".into()),
                connected: true,
                revision: 7,
                ..Etcd::default()
            },
            peers: vec![Peer {
                subnet: "10.5.35.0/24".into(),
                public_ip: "192.0.2.2".into(),
                direct: Some(false),
                known_seconds: 7200.0,
                last_seen_seconds: Some(3.0),
                traffic: Some(traffic),
                fast_share: traffic.fast_share(),
                ..Peer::default()
            }],
            endpoints: vec![Endpoint {
                address: "10.5.34.2".into(),
                name: Some("web".into()),
                interface: Some("veth1".into()),
                traffic: Some(traffic),
                slow: [("pass_pod_gate".into(), 90), ("pass_pod_no_peer".into(), 12_345_678)].into(),
                ..Endpoint::default()
            }],
            counters: [("fast_encap".into(), 5), ("drop_guard".into(), 0)].into(),
            ..Status::default()
        }
    }

    #[test]
    fn totals_are_shown_with_their_shares_and_reasons() {
        let text = text(&status(), None);
        let line = |start: &str| {
            let line = text.lines().find(|line| line.trim_start().starts_with(start));
            line.unwrap_or_else(|| panic!("no line {start} in\n{text}"))
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(
            line("lease"),
            "lease 10.5.34.0/24 of 10.5.0.0/16, held, renewed 1 min ago, runs out in 23 h 53 min"
        );
        assert_eq!(line("etcd"), "etcd http://192.0.2.9:2379, followed, revision 7");
        assert_eq!(
            line("10.5.35.0/24"),
            "10.5.35.0/24 192.0.2.2 vxlan 2 h 0 min 3 s 95.0 % 910k (1000) 1000k (1000)"
        );
        assert_eq!(
            line("10.5.34.2"),
            "10.5.34.2 web veth1 - 95.0 % 910k (1000) 1000k (1000) pass_pod_no_peer 12M, pass_pod_gate 90"
        );
        assert_eq!(line("fast_encap"), "fast_encap 5 0");
        assert!(!text.contains("drop_guard"), "{text}");
    }

    #[test]
    fn wireguards_device_and_handshakes_are_shown() {
        let mut status = status();
        let device =
            WireguardDevice { name: "flannel-wg".into(), public_key: "K=".into(), mtu: 1420, port: 51820 };
        status.wireguard = vec![device];
        status.peers[0].wireguard =
            Some(WireguardPeer { handshake_seconds: Some(65.0), ..WireguardPeer::default() });
        let shown = text(&status, None);
        assert!(shown.contains("flannel-wg K=, port 51820, MTU 1420"), "{shown}");
        assert!(shown.contains("wireguard, handshake 1 min ago") && !shown.contains("none ("), "{shown}");
        status.peers[0].wireguard = Some(WireguardPeer::default());
        assert!(text(&status, None).contains("wireguard, no handshake"));
    }

    #[test]
    fn both_families_are_shown_and_ipv6_alone_once() {
        let mut status = status();
        let v6 = |text: &str| Some(text.to_owned());
        (status.network_v6, status.lease.subnet_v6) = (v6("fc00::/48"), v6("fc00:0:0:1::/64"));
        (status.uplink.address_v6, status.uplink.public_ipv6) = (v6("fd77::1"), v6("fd77::1"));
        let device = |name: &str, mtu| Device { name: name.into(), mtu, ..Device::default() };
        (status.device, status.device_v6) =
            (Some(device("flannel.1", 1450)), Some(device("flannel-v6.1", 1430)));
        let (peer, peer_v6) = (&mut status.peers[0], v6("fc00:0:0:2::/64"));
        (peer.subnet_v6, peer.public_ipv6) = (peer_v6, v6("fd77::2"));
        let dual = text(&status, None);
        for says in [
            "10.5.34.0/24 and fc00:0:0:1::/64 of 10.5.0.0/16 and fc00::/48, held",
            "eth0 192.0.2.1 and fd77::1, MTU 1500",
            "flannel.1 ",
            "flannel-v6.1 ",
            "10.5.35.0/24 and fc00:0:0:2::/64",
        ] {
            assert!(dual.contains(says), "{says}: {dual}");
        }
        status.network = "fc00::/48".into();
        status.lease.subnet = "fc00:0:0:1::/64".into();
        (status.uplink.address, status.uplink.public_ip) = ("fd77::1".into(), "fd77::1".into());
        let alone = text(&status, None);
        assert!(alone.contains("fc00:0:0:1::/64 of fc00::/48, held"), "{alone}");
        assert!(alone.contains("eth0 fd77::1, MTU 1500"), "{alone}");
    }

    #[test]
    fn rates_are_shown_since_an_earlier_document() {
        let earlier = status();
        let mut later = status();
        later.timestamp += 2.0;
        if let Some(traffic) = &mut later.peers[0].traffic {
            traffic.sent.fast.packets += 200;
            traffic.sent.fast.bytes += 250_000;
        }
        let text = text(&later, Some(&earlier));
        assert!(text.contains("100.0 %") && text.contains("1000k (100)"), "{text}");
    }

    #[test]
    fn what_is_wrong_is_said() {
        let mut status = status();
        status.ready = false;
        status.not_ready = [("lease".into(), "lost".into())].into();
        status.etcd.connected = false;
        status.etcd.lag_seconds = 130.0;
        let text = text(&status, None);
        assert!(
            text.contains("NO\n") && text.contains("lease: lost") && text.contains("NOT followed for 2 min"),
            "{text}"
        );
    }
}
