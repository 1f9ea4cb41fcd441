//! The iptables chain `LODEN-FWD`: the network may be forwarded, whatever the policy of `FORWARD` says.
//!
//! It is set by one `iptables-restore --noflush`, which is one transaction, and only when a listing shows that
//! it is not as it ought to be: Docker and others rewrite `FORWARD` when they start.

use super::{
    FirewallSpec, Half, Result,
    iptables::{self, removal, rules_of, rulesets},
};

const TABLE: &str = "filter";
const CHAIN: &str = "LODEN-FWD";
const JUMP: &str = "-A FORWARD -j LODEN-FWD";
/// Docker's own chains, which drop what they do not know (Docker 28), come after ours, except for two.
const DOCKERS: &str = "-A FORWARD -j DOCKER-";
/// The one in which an operator may put rules, and the one that keeps Docker's networks apart (up to Docker 27) and
/// drops nothing else.
const BEFORE_OURS: [&str; 2] = ["-A FORWARD -j DOCKER-USER", "-A FORWARD -j DOCKER-ISOLATION-STAGE-1"];

/// Sees to the chain in every ruleset that iptables has here; says whether there was anything to do.
pub(super) async fn ensure(spec: &FirewallSpec) -> Result<bool> {
    let mut changed = false;
    for iptables in rulesets(spec.half(), TABLE) {
        let Some(listing) = iptables.list(TABLE).await? else { continue };
        if let Some(transaction) = transaction(spec, &listing) {
            iptables.restore(&transaction).await?;
            changed = true;
        }
    }
    Ok(changed)
}

pub(super) async fn is_current(spec: &FirewallSpec) -> Result<bool> {
    for iptables in rulesets(spec.half(), TABLE) {
        let listing = iptables.list(TABLE).await?;
        if listing.is_some_and(|listing| transaction(spec, &listing).is_some()) {
            return Ok(false);
        }
    }
    Ok(true)
}

pub(super) async fn remove(half: Half) -> Result<()> {
    for iptables in rulesets(half, TABLE) {
        let Some(listing) = iptables.list(TABLE).await? else { continue };
        if let Some(transaction) = removal(TABLE, CHAIN, &listing) {
            iptables.restore(&transaction).await?;
        }
    }
    Ok(())
}

/// Where in `FORWARD` the jump to our chain is, counted from 1.
pub(super) fn place(listing: &str) -> Option<usize> {
    rules_of(listing, "FORWARD").position(|line| line == JUMP).map(|at| at + 1)
}

/// What must be done to this table; `None` where it is right.
fn transaction(spec: &FirewallSpec, listing: &str) -> Option<String> {
    if !spec.forward {
        return removal(TABLE, CHAIN, listing);
    }
    let rules = rules(spec);
    let there: Vec<&str> = rules_of(listing, CHAIN).collect();
    let forward: Vec<&str> = rules_of(listing, "FORWARD").collect();
    // Behind everything else, as flannel's: what somebody denies on purpose stays denied, and ours is still
    // before the policy. It stays where it is as long as it is before Docker's.
    let others: Vec<&str> = forward.iter().copied().filter(|line| *line != JUMP).collect();
    let is_dockers = |line: &&str| line.starts_with(DOCKERS) && !BEFORE_OURS.contains(line);
    let place = others.iter().position(is_dockers).unwrap_or(others.len());
    let right = forward.iter().filter(|line| **line == JUMP).count() == 1
        && forward.iter().position(|line| *line == JUMP) <= Some(place)
        && forward.iter().skip_while(|line| **line != JUMP).all(|line| !BEFORE_OURS.contains(line))
        && there == rules;
    if right {
        return None;
    }
    let jumps = forward.iter().filter(|line| **line == JUMP).count();
    let old = std::iter::repeat_n(format!("-D FORWARD -j {CHAIN}"), jumps);
    let new = format!("-I FORWARD {} -j {CHAIN}", place + 1);
    Some(iptables::transaction(TABLE, CHAIN, old.chain([new]).chain(rules)))
}

/// As `iptables -S` prints them again.
fn rules(spec: &FirewallSpec) -> Vec<String> {
    let comment = "-m comment --comment \"loden forward\"";
    let network = spec.network.trunc();
    ["-s", "-d"].map(|side| format!("-A {CHAIN} {side} {network} {comment} -j ACCEPT")).to_vec()
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
    fn dockers_networks_stay_apart() {
        let docker = "-P FORWARD DROP\n-N DOCKER-USER\n-N LODEN-FWD\n-A FORWARD -j DOCKER-USER\n-A FORWARD -j LODEN-FWD\n\
            -A FORWARD -j DOCKER-ISOLATION-STAGE-1\n-A FORWARD -o docker0 -j DOCKER\n";
        let transaction = transaction(&spec(true), &format!("{docker}{RULES}")).unwrap();
        assert!(transaction.contains("-I FORWARD 4 -j LODEN-FWD\n"), "{transaction}");
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
        assert_eq!(removal(TABLE, CHAIN, listing).unwrap(), expected);
        assert_eq!(removal(TABLE, CHAIN, "-P FORWARD DROP\n"), None);
    }
}
