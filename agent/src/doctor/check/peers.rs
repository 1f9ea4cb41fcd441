//! What the probes of each peer say, taken together: a fault is named where it is, and not once more at each layer above.

use crate::doctor::{
    finding::Finding,
    snapshot::{Offload, Overlay, Probe, Reach, Snapshot},
};

pub(super) fn examine(snapshot: &Snapshot) -> Vec<Finding> {
    snapshot.probes.iter().flat_map(|probe| peer(snapshot, probe)).collect()
}

fn peer(snapshot: &Snapshot, probe: &Probe) -> Vec<Finding> {
    let name = format!("{} at {}", probe.subnet, probe.vtep);
    let overlay_works = probe.overlay.as_ref().is_some_and(|overlay| overlay.echo.is_full());
    let mut findings = vec![underlay(snapshot, probe, overlay_works).of(&name)];
    let Some(overlay) = &probe.overlay else { return findings };
    if matches!(probe.underlay, Reach::Nothing(_) | Reach::Unsent(_)) && !overlay_works {
        return findings;
    }
    findings.push(tunnel(snapshot, probe, overlay).of(&name));
    match overlay.offload {
        None => {}
        Some(Offload::Fine) => findings.push(Finding::ok("offload", "checksums and segments come out right").of(&name)),
        Some(Offload::BadChecksum) => findings.push(
            Finding::fault(
                "checksum",
                "a datagram with a checksum is lost in the overlay, one without arrives: a device on the way computes \
                 checksums of encapsulated packets wrongly",
                format_args!(
                    "ethtool -K {} tx-checksum-ip-generic off, here and there; it costs speed, a newer driver or \
                     firmware does not",
                    snapshot.facts.uplink.name
                ),
            )
            .of(&name),
        ),
        Some(Offload::BadSegments) => findings.push(
            Finding::fault(
                "segmentation",
                "single datagrams arrive, those that are handed over as one and cut on the way do not: a device on the \
                 way segments encapsulated packets wrongly",
                format_args!(
                    "ethtool -K {} tx-udp_tnl-segmentation off tx-udp_tnl-csum-segmentation off, here and there",
                    snapshot.facts.uplink.name
                ),
            )
            .of(&name),
        ),
        Some(Offload::Silent) => findings.push(
            Finding::unknown("offload", "the peer answers at no closed port (a firewall there?), so it was not tried")
                .of(&name),
        ),
    }
    findings
}

fn underlay(snapshot: &Snapshot, probe: &Probe, overlay_works: bool) -> Finding {
    const CHECK: &str = "underlay";
    match &probe.underlay {
        Reach::Full { size, took } => Finding::ok(
            CHECK,
            format_args!("{size} bytes, there and back in {:.1} ms", took.as_secs_f64() * 1000.0),
        ),
        Reach::Smaller { size, wanted } => Finding::fault(
            "underlay-mtu",
            format_args!(
                "{size} bytes come back, {} do not; {} promises {wanted}",
                size + 1,
                snapshot.facts.uplink.name
            ),
            format_args!(
                "mend the path, or set the MTU of {} (or of the backend in the network config) to {size} on all nodes",
                snapshot.facts.uplink.name
            ),
        ),
        // The overlay's packets are the underlay's too.
        Reach::Nothing(_) if overlay_works => {
            Finding::ok(CHECK, "answers no echo, but carries the overlay's in full size")
        }
        Reach::Nothing(heard) => {
            let heard = heard.as_ref().map(|heard| format!(" ({heard})")).unwrap_or_default();
            Finding::fault(
                CHECK,
                format_args!("{} does not answer{heard}", probe.vtep),
                "is the node up? Is there a way to it, and does it let ICMP through? If it is gone for good, its lease \
                 runs out",
            )
        }
        Reach::Unsent(why) => Finding::fault(
            CHECK,
            format_args!("nothing can be sent to {}: {why}", probe.vtep),
            "see the routes",
        ),
    }
}

fn tunnel(snapshot: &Snapshot, probe: &Probe, overlay: &Overlay) -> Finding {
    let v4 = snapshot.facts.v4.as_ref().and_then(|half| half.device.as_ref());
    let v6 = snapshot.facts.v6.as_ref().and_then(|half| half.device.as_ref());
    let (check, port) = match (v4.or(v6), snapshot.facts.wireguard.first()) {
        (Some(device), _) => ("vxlan", device.port),
        (None, Some(tunnel)) => ("wireguard", tunnel.port),
        (None, None) => ("vxlan", 0),
    };
    match &overlay.echo {
        Reach::Full { size, took } => Finding::ok(
            "overlay",
            format_args!("{size} bytes, there and back in {:.1} ms", took.as_secs_f64() * 1000.0),
        ),
        // Named already, where it is.
        Reach::Smaller { size, .. } if !probe.underlay.is_full() => {
            Finding::ok("overlay", format_args!("{size} bytes: what the underlay leaves"))
        }
        Reach::Smaller { size, wanted } => Finding::fault(
            "overlay-mtu",
            format_args!(
                "{size} bytes come back through the overlay, {} do not; it promises {wanted}",
                size + 1
            ),
            "packets of the overlay's full size do not fit somewhere: compare the MTU of the overlay's devices of both nodes",
        ),
        Reach::Nothing(_) | Reach::Unsent(_) => {
            let hints = snapshot.rules.as_deref().map(|rules| dropping(rules, port)).unwrap_or_default();
            let hint = match hints.as_slice() {
                [] => "no rule here names that port; look there".to_owned(),
                hints => format!("here: {}", super::few(hints)),
            };
            Finding::fault(
                check,
                format_args!(
                    "{} answers and its overlay does not: UDP port {port} does not get through one way or the other ({hint})",
                    probe.vtep
                ),
                format_args!("accept UDP port {port} between the nodes, on both and in between"),
            )
        }
    }
}

/// Rules that drop what comes to this UDP port, or everything that comes.
pub(super) fn dropping(rules: &str, port: u16) -> Vec<String> {
    let number = port.to_string();
    let names_port = |line: &str| line.split(|c: char| !c.is_ascii_digit()).any(|word| word == number);
    let drops = |line: &str| line.contains("drop") || line.contains("reject");
    let rule = |line: &&str| names_port(line) && drops(line);
    let closed = |line: &&str| line.contains("hook input") && line.contains("policy drop");
    rules.lines().map(str::trim).filter(|line| rule(line) || closed(line)).map(str::to_owned).collect()
}
