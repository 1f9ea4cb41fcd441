//! From a snapshot to findings: pure.

mod direct_access;
mod etcd;
pub(super) mod host;
pub(super) mod ipv6;
mod overlay;
mod peers;
mod programs;
#[cfg(test)]
mod tests;
mod wireguard;

use super::{finding::Finding, snapshot::Snapshot};
use crate::{
    facts::Source,
    family::{Family, V6},
};

/// Every check, in the order in which one would look.
#[must_use]
pub fn examine(snapshot: &Snapshot) -> Vec<Finding> {
    let mut findings = vec![agent(snapshot)];
    findings.extend(etcd::examine(snapshot));
    findings.extend(host::examine(snapshot));
    findings.extend(overlay::examine(snapshot));
    findings.extend(wireguard::examine(snapshot));
    findings.extend(programs::examine(snapshot));
    findings.extend(peers::examine(snapshot));
    findings
}

fn agent(snapshot: &Snapshot) -> Finding {
    const CHECK: &str = "agent";
    match &snapshot.source {
        Source::File(why) => Finding::fault(
            CHECK,
            format_args!("{why}; what follows is compared with what the last agent wanted"),
            "start it: packets go on without it, but nothing follows changes",
        ),
        Source::Agent if !snapshot.not_ready.is_empty() => {
            let reasons: Vec<String> = snapshot
                .not_ready
                .iter()
                .map(|(condition, reason)| format!("{condition}: {reason}"))
                .collect();
            Finding::fault(
                CHECK,
                format_args!("not ready: {}", reasons.join("; ")),
                "see what is named here, and its log",
            )
        }
        Source::Agent => Finding::ok(CHECK, format_args!("version {}, ready", snapshot.facts.version)),
    }
}

/// Names the family of what was looked at where it is not IPv4, which goes without saying.
fn of_family<F: Family>(finding: Finding) -> Finding {
    match &finding.subject {
        None if F::BITS == V6::BITS => finding.of(F::NAME),
        _ => finding,
    }
}

/// The first few of many, for one line.
fn few<T: ToString>(items: &[T]) -> String {
    const SHOWN: usize = 4;
    let mut text = items.iter().take(SHOWN).map(ToString::to_string).collect::<Vec<_>>().join("; ");
    if items.len() > SHOWN {
        text.push_str(&format!("; and {} more", items.len() - SHOWN));
    }
    text
}
