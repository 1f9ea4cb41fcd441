//! Lists a table of iptables, and changes it in one transaction.

use super::{FirewallError, Half, Result, tool::run};

/// Another holder of the xtables lock (legacy iptables only) is waited for this long; then the next pass tries
/// again, instead of this one standing still.
const WAIT: &str = "--wait=5";

/// A pair of programs for one of the two rulesets that iptables can have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Iptables {
    list: &'static str,
    restore: &'static str,
}

/// What the host calls iptables.
pub(super) fn default(half: Half) -> Iptables {
    match half {
        Half::Ipv4 => Iptables { list: "iptables", restore: "iptables-restore" },
        Half::Ipv6 => Iptables { list: "ip6tables", restore: "ip6tables-restore" },
    }
}

/// The ruleset of the old kernel interface, and where the kernel lists its tables. A packet passes both, so a DROP
/// in either is a DROP.
fn legacy(half: Half) -> (Iptables, &'static str) {
    match half {
        Half::Ipv4 => (
            Iptables { list: "iptables-legacy", restore: "iptables-legacy-restore" },
            "/proc/thread-self/net/ip_tables_names",
        ),
        Half::Ipv6 => (
            Iptables { list: "ip6tables-legacy", restore: "ip6tables-legacy-restore" },
            "/proc/thread-self/net/ip6_tables_names",
        ),
    }
}

/// The rulesets of this network namespace in which a table may hold rules. The legacy one counts only if it has
/// the table already: to list it would bring it into being.
pub(super) fn rulesets(half: Half, table: &str) -> Vec<Iptables> {
    let (legacy, _) = legacy(half);
    std::iter::once(default(half)).chain(has_legacy(half, table).then_some(legacy)).collect()
}

/// Whether the legacy ruleset has this table.
pub(super) fn has_legacy(half: Half, table: &str) -> bool {
    let names = std::fs::read_to_string(legacy(half).1).unwrap_or_default();
    names.lines().any(|name| name == table)
}

impl Iptables {
    /// A table as `iptables -S` prints it; `None` without iptables.
    pub(super) async fn list(self, table: &str) -> Result<Option<String>> {
        match run(self.list, &[WAIT, "-t", table, "-S"], "").await {
            Ok(listing) => Ok(Some(listing)),
            Err(FirewallError::Missing(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Carries out what [`transaction`] wrote: all of it or nothing.
    pub(super) async fn restore(self, transaction: &str) -> Result<()> {
        run(self.restore, &["--noflush", WAIT], transaction).await.map(drop)
    }
}

/// The text of a transaction that begins with this chain empty, made where it is not there.
pub(super) fn transaction(table: &str, chain: &str, lines: impl IntoIterator<Item = String>) -> String {
    let head = [format!("*{table}"), format!(":{chain} - [0:0]")];
    let lines: Vec<String> = head.into_iter().chain(lines).chain(["COMMIT\n".to_owned()]).collect();
    lines.join("\n")
}

/// What takes a chain and every jump to it away; `None` where there is no such chain.
pub(super) fn removal(table: &str, chain: &str, listing: &str) -> Option<String> {
    if !listing.lines().any(|line| line == format!("-N {chain}")) {
        return None;
    }
    let jumps = listing.lines().filter(|line| line.ends_with(&format!(" -j {chain}")));
    let jumps = jumps.map(|line| line.replacen("-A ", "-D ", 1));
    Some(transaction(table, chain, jumps.chain([format!("-X {chain}")])))
}

/// The rules of one chain in a listing, in order.
pub(super) fn rules_of<'a>(listing: &'a str, chain: &str) -> impl Iterator<Item = &'a str> {
    let start = format!("-A {chain} ");
    listing.lines().filter(move |line| line.starts_with(&start))
}
