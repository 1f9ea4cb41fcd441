//! The iptables chain `LODEN-FWD`: the network may be forwarded, whatever the policy of `FORWARD` says.
//!
//! It is set by one `iptables-restore --noflush`, which is one transaction, and only when a listing shows that
//! it is not as it ought to be: Docker and others rewrite `FORWARD` when they start.

use super::{FirewallError, FirewallSpec, Result, tool::run};

const CHAIN: &str = "LODEN-FWD";
const JUMP: &str = "-A FORWARD -j LODEN-FWD";
/// Docker's own chains, which drop what they do not know (Docker 28), come after ours, except for the one in which
/// an operator may put rules.
const DOCKERS: &str = "-A FORWARD -j DOCKER-";
/// That one.
const OPERATORS: &str = "-A FORWARD -j DOCKER-USER";

/// The chain.
#[derive(Debug, Default)]
pub(super) struct Forward {
    /// It was set once, so that iptables is there for sure.
    set: bool,
}

impl Forward {
    pub(super) async fn ensure(&mut self, spec: &FirewallSpec) -> Result<bool> {
        let Some(listing) = list().await? else { return Ok(false) };
        let Some(transaction) = transaction(spec, &listing) else {
            self.set = true;
            return Ok(false);
        };
        run("iptables-restore", &["--noflush", "--wait"], &transaction).await?;
        self.set = true;
        Ok(true)
    }

    pub(super) async fn is_current(&self, spec: &FirewallSpec) -> Result<bool> {
        match list().await? {
            Some(listing) => Ok(transaction(spec, &listing).is_none()),
            None => Ok(!self.set),
        }
    }
}

pub(super) async fn remove() -> Result<()> {
    let Some(listing) = list().await? else { return Ok(()) };
    match removal(&listing) {
        Some(transaction) => run("iptables-restore", &["--noflush", "--wait"], &transaction).await.map(drop),
        None => Ok(()),
    }
}

/// The filter table as `iptables -S` prints it; `None` without iptables.
async fn list() -> Result<Option<String>> {
    match run("iptables", &["--wait", "-t", "filter", "-S"], "").await {
        Ok(listing) => Ok(Some(listing)),
        Err(FirewallError::Missing(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What must be done to this table; `None` where it is right.
fn transaction(spec: &FirewallSpec, listing: &str) -> Option<String> {
    if !spec.forward {
        return removal(listing);
    }
    let rules = rules(spec);
    let there: Vec<&str> = lines_of(listing, CHAIN).collect();
    let forward: Vec<&str> = lines_of(listing, "FORWARD").collect();
    // Behind everything else, as flannel's: what somebody denies on purpose stays denied, and ours is still
    // before the policy. It stays where it is as long as it is before Docker's.
    let others: Vec<&str> = forward.iter().copied().filter(|line| *line != JUMP).collect();
    let is_dockers = |line: &&str| line.starts_with(DOCKERS) && *line != OPERATORS;
    let place = others.iter().position(is_dockers).unwrap_or(others.len());
    let right = forward.iter().filter(|line| **line == JUMP).count() == 1
        && forward.iter().position(|line| *line == JUMP) <= Some(place)
        && there == rules;
    if right {
        return None;
    }
    let mut lines = vec!["*filter".to_owned(), format!(":{CHAIN} - [0:0]")];
    let jumps = forward.iter().filter(|line| **line == JUMP).count();
    lines.extend(std::iter::repeat_n(format!("-D FORWARD -j {CHAIN}"), jumps));
    lines.push(format!("-I FORWARD {} -j {CHAIN}", place + 1));
    lines.extend(rules);
    lines.push("COMMIT\n".to_owned());
    Some(lines.join("\n"))
}

/// What takes the chain and every jump to it away; `None` where there is none.
fn removal(listing: &str) -> Option<String> {
    if !listing.lines().any(|line| line == format!("-N {CHAIN}")) {
        return None;
    }
    let mut lines = vec!["*filter".to_owned(), format!(":{CHAIN} - [0:0]")];
    let jumps = listing.lines().filter(|line| line.ends_with(&format!("-j {CHAIN}")));
    lines.extend(jumps.map(|line| line.replacen("-A ", "-D ", 1)));
    lines.push(format!("-X {CHAIN}"));
    lines.push("COMMIT\n".to_owned());
    Some(lines.join("\n"))
}

/// As `iptables -S` prints them again.
fn rules(spec: &FirewallSpec) -> Vec<String> {
    let comment = "-m comment --comment \"loden forward\"";
    let network = spec.network.trunc();
    ["-s", "-d"].map(|side| format!("-A {CHAIN} {side} {network} {comment} -j ACCEPT")).to_vec()
}

fn lines_of<'a>(listing: &'a str, chain: &str) -> impl Iterator<Item = &'a str> {
    let start = format!("-A {chain} ");
    listing.lines().filter(move |line| line.starts_with(&start))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: &str = "\
-A LODEN-FWD -s 10.5.0.0/16 -m comment --comment \"loden forward\" -j ACCEPT
-A LODEN-FWD -d 10.5.0.0/16 -m comment --comment \"loden forward\" -j ACCEPT
";

    fn spec(forward: bool) -> FirewallSpec {
        FirewallSpec {
            network: "10.5.0.0/16".parse().unwrap(),
            subnet: "10.5.72.0/24".parse().unwrap(),
            masquerade: true,
            fully_random: true,
            forward,
        }
    }

    #[test]
    fn an_empty_table_gets_chain_and_jump() {
        let transaction =
            transaction(&spec(true), "-P INPUT ACCEPT\n-P FORWARD DROP\n-P OUTPUT ACCEPT\n").unwrap();
        let expected = format!("*filter\n:LODEN-FWD - [0:0]\n-I FORWARD 1 -j LODEN-FWD\n{RULES}COMMIT\n");
        assert_eq!(transaction, expected);
    }

    #[test]
    fn the_place_is_behind_docker_user_and_before_the_rest() {
        let docker = "-P FORWARD DROP\n-N DOCKER-USER\n-N LODEN-FWD\n\
            -A FORWARD -j DOCKER-USER\n-A FORWARD -j DOCKER-FORWARD\n-A FORWARD -j LODEN-FWD\n";
        let transaction = transaction(&spec(true), &format!("{docker}{RULES}")).unwrap();
        assert!(
            transaction.contains("-D FORWARD -j LODEN-FWD\n-I FORWARD 2 -j LODEN-FWD\n"),
            "{transaction}"
        );
    }

    #[test]
    fn what_is_right_is_left_alone() {
        let head = "-P FORWARD DROP\n-N LODEN-FWD\n-A FORWARD -j LODEN-FWD\n-A FORWARD -j DOCKER-FORWARD\n";
        assert_eq!(transaction(&spec(true), &format!("{head}{RULES}")), None);
        assert_eq!(transaction(&spec(false), "-P FORWARD DROP\n"), None);
    }

    #[test]
    fn duplicates_and_foreign_rules_in_our_chain_are_put_right() {
        let twice = "-N LODEN-FWD\n-A FORWARD -j LODEN-FWD\n-A FORWARD -j LODEN-FWD\n";
        let repaired = transaction(&spec(true), &format!("{twice}{RULES}")).unwrap();
        assert_eq!(repaired.matches("-D FORWARD -j LODEN-FWD\n").count(), 2);
        assert_eq!(repaired.matches("-I FORWARD 1 -j LODEN-FWD\n").count(), 1);
        let once = "-N LODEN-FWD\n-A FORWARD -j LODEN-FWD\n-A LODEN-FWD -j DROP\n";
        assert!(transaction(&spec(true), &format!("{once}{RULES}")).is_some());
    }

    #[test]
    fn removal_takes_every_jump_and_only_ours() {
        let listing = "-P FORWARD DROP\n-N DOCKER-USER\n-N LODEN-FWD\n-A FORWARD -j DOCKER-USER\n\
            -A FORWARD -j LODEN-FWD\n-A OUTPUT -d 10.0.0.0/8 -j LODEN-FWD\n";
        let expected = "*filter\n:LODEN-FWD - [0:0]\n-D FORWARD -j LODEN-FWD\n\
            -D OUTPUT -d 10.0.0.0/8 -j LODEN-FWD\n-X LODEN-FWD\nCOMMIT\n";
        assert_eq!(removal(listing).unwrap(), expected);
        assert_eq!(removal("-P FORWARD DROP\n"), None);
    }
}
