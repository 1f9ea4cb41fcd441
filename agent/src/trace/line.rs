//! A verdict as a line: for people, or as JSON.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use clap::ValueEnum as _;
use jiff::{SignedDuration, Timestamp};
use loden_ebpf::{
    reason::Reason,
    trace::{Program, Traced},
};
use serde::Serialize;

use super::filter::{PROTOCOLS, verdict_of};
use crate::{dataplane::monotonic, kernel::interface_name};

/// Makes lines; knows the names of interfaces and what time it was when a verdict was given.
pub(super) struct Lines {
    json: bool,
    /// When the programs' clock began.
    began: Timestamp,
    interfaces: HashMap<u32, String>,
}

/// A verdict in words.
#[derive(Debug, Serialize)]
struct Told<'a> {
    time: String,
    verdict: String,
    reason: &'a str,
    because: &'a str,
    program: &'a str,
    interface: &'a str,
    source: Option<IpAddr>,
    destination: Option<IpAddr>,
    source_port: Option<u16>,
    destination_port: Option<u16>,
    protocol: Option<String>,
    /// In bytes, of the frame as the program saw it first.
    length: u32,
    /// The far VTEP, of a packet that was encapsulated when the verdict was given.
    vtep: Option<IpAddr>,
}

impl Lines {
    pub(super) fn new(json: bool) -> Self {
        let since = SignedDuration::from_nanos(i64::try_from(monotonic()).unwrap_or(i64::MAX));
        let now = Timestamp::now();
        Self { json, began: now.checked_sub(since).unwrap_or(now), interfaces: HashMap::new() }
    }

    /// The line, with its end.
    pub(super) fn line(&mut self, verdict: &Traced) -> String {
        let since = SignedDuration::from_nanos(i64::try_from(verdict.time).unwrap_or(i64::MAX));
        let time = self.began.checked_add(since).unwrap_or(self.began);
        let interface = self
            .interfaces
            .entry(verdict.ifindex)
            .or_insert_with_key(|index| interface_name(*index).unwrap_or_else(|| format!("if{index}")));
        let told = told(verdict, time, interface);
        if self.json {
            // Strings and numbers: nothing that JSON has not.
            serde_json::to_string(&told).unwrap_or_default() + "\n"
        } else {
            human(&told)
        }
    }
}

fn told<'a>(verdict: &Traced, time: Timestamp, interface: &'a str) -> Told<'a> {
    let reason = Reason::ALL.get(verdict.reason as usize).copied();
    let is_ip = verdict.family != 0;
    let has_ports = (verdict.source_port, verdict.destination_port) != (0, 0);
    let word = reason.map(verdict_of).and_then(|verdict| verdict.to_possible_value());
    Told {
        // Six digits always, so that lines stand below one another.
        time: format!("{time:.6}"),
        verdict: word.map_or_else(String::new, |word| word.get_name().to_owned()),
        reason: reason.map_or("unknown", Reason::name),
        because: reason.map_or("a newer program's", |reason| reason.description().trim()),
        program: Program::name(verdict.program).unwrap_or("unknown"),
        interface,
        source: is_ip.then(|| address(verdict.source)),
        destination: is_ip.then(|| address(verdict.destination)),
        source_port: has_ports.then_some(verdict.source_port),
        destination_port: has_ports.then_some(verdict.destination_port),
        protocol: is_ip.then(|| protocol(verdict.protocol)),
        length: verdict.len,
        vtep: (verdict.vtep != [0; 2]).then(|| address(verdict.vtep)),
    }
}

fn address([high, low]: [u64; 2]) -> IpAddr {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&high.to_ne_bytes());
    bytes[8..].copy_from_slice(&low.to_ne_bytes());
    Ipv6Addr::from(bytes).to_canonical()
}

fn protocol(number: u16) -> String {
    let named = PROTOCOLS.iter().find(|(known, _)| u16::from(*known) == number);
    named.map_or_else(|| number.to_string(), |(_, name)| (*name).to_owned())
}

fn human(told: &Told<'_>) -> String {
    let end = |address: Option<IpAddr>, port: Option<u16>| match (address, port) {
        (Some(address), Some(port)) => SocketAddr::new(address, port).to_string(),
        (Some(address), None) => address.to_string(),
        (None, _) => "?".to_owned(),
    };
    // The date is today's, or the listener knows which.
    let time = told.time.split_once('T').map_or(told.time.as_str(), |(_, time)| time);
    let vtep = told.vtep.map(|vtep| format!(" vtep {vtep}")).unwrap_or_default();
    format!(
        "{time} {:<4} {:<12} {:<15} {} > {} {} {} bytes{vtep} {}: {}\n",
        told.verdict,
        told.program,
        told.interface,
        end(told.source, told.source_port),
        end(told.destination, told.destination_port),
        told.protocol.as_deref().unwrap_or("no-ip"),
        told.length,
        told.reason,
        told.because,
    )
}

#[cfg(test)]
mod tests {
    use loden_ebpf::trace::mapped;

    use super::*;

    fn lines(json: bool) -> Lines {
        let began = "2026-01-02T03:04:00Z".parse().unwrap();
        Lines { json, began, interfaces: HashMap::from([(7, "veth1".to_owned())]) }
    }

    fn verdict() -> Traced {
        Traced {
            time: 5_000_006_000,
            source: mapped([10, 5, 1, 2]),
            destination: mapped([10, 5, 2, 9]),
            vtep: mapped([192, 168, 64, 12]),
            ifindex: 7,
            len: 98,
            reason: Reason::FastEncap as u32,
            program: Program::FromPod as u32,
            source_port: 40_000,
            destination_port: 80,
            protocol: 6,
            family: 4,
        }
    }

    #[test]
    fn a_line_says_when_what_where_who_and_why() {
        assert_eq!(
            lines(false).line(&verdict()),
            "03:04:05.000006Z fast from_pod     veth1           10.5.1.2:40000 > 10.5.2.9:80 tcp 98 bytes \
             vtep 192.168.64.12 fast_encap: encapsulated at the pod's veth and sent to the uplink\n"
        );
        let ping = Traced { source_port: 0, destination_port: 0, protocol: 1, vtep: [0; 2], ..verdict() };
        assert!(lines(false).line(&ping).contains(" 10.5.1.2 > 10.5.2.9 icmp 98 bytes fast_encap: "));
        let arp = Traced { family: 0, ..ping };
        assert!(lines(false).line(&arp).contains(" ? > ? no-ip 98 bytes"));
        let ipv6 = Traced { source: [u64::from_be(0xfd00 << 48), 0], family: 6, ..verdict() };
        assert!(lines(false).line(&ipv6).contains(" [fd00::]:40000 > 10.5.2.9:80 tcp"));
    }

    #[test]
    fn json_has_every_field_also_what_is_not_there() {
        let told: serde_json::Value = serde_json::from_str(&lines(true).line(&verdict())).unwrap();
        assert_eq!(
            told,
            serde_json::json!({
                "time": "2026-01-02T03:04:05.000006Z", "verdict": "fast", "reason": "fast_encap",
                "because": "encapsulated at the pod's veth and sent to the uplink", "program": "from_pod",
                "interface": "veth1", "source": "10.5.1.2", "destination": "10.5.2.9",
                "source_port": 40_000, "destination_port": 80, "protocol": "tcp", "length": 98,
                "vtep": "192.168.64.12",
            })
        );
        let odd = Traced { family: 0, reason: 9999, program: 9999, ifindex: 0, ..Traced::default() };
        let line = lines(true).line(&odd);
        assert_eq!(line.matches('\n').count(), 1);
        let told: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&told["reason"], &told["interface"]), (&"unknown".into(), &"if0".into()));
        assert!(told["source"].is_null() && told["protocol"].is_null() && told["vtep"].is_null());
    }
}
