//! The iptables chain `LODEN-FWD`: the network may be forwarded, whatever the policy of `FORWARD` says.
//!
//! Docker 28 has chains that drop what comes to a container from elsewhere than its bridge, and keep its networks apart.
//! Before these only what goes from pod to pod is accepted, the rest of the network behind them.
//!
//! It is set by one `iptables-restore --noflush`, which is one transaction, and only when a listing shows that
//! it is not as it ought to be: Docker and others rewrite `FORWARD` when they start.

use std::ops::RangeInclusive;

use super::{
    FirewallSpec, Half, Result,
    iptables::{self, removal, rules_of, rulesets},
};

const TABLE: &str = "filter";
const CHAIN: &str = "LODEN-FWD";
const JUMP: &str = "-A FORWARD -j LODEN-FWD";
/// Docker's own chains, which drop what they do not know (Docker 28), except for two.
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

/// Where in `FORWARD` the first jump to our chain is, counted from 1.
pub(super) fn place(listing: &str) -> Option<usize> {
    rules_of(listing, "FORWARD").position(is_ours).map(|at| at + 1)
}

fn is_ours(rule: &str) -> bool {
    rule.ends_with(" -j LODEN-FWD")
}

/// What must be done to this table; `None` where it is right.
fn transaction(spec: &FirewallSpec, listing: &str) -> Option<String> {
    if !spec.forward {
        return removal(TABLE, CHAIN, listing);
    }
    let rules = rules(spec);
    let there: Vec<&str> = rules_of(listing, CHAIN).collect();
    let (ours, others): (Vec<&str>, Vec<&str>) = rules_of(listing, "FORWARD").partition(|rule| is_ours(rule));
    let wanted = jumps(spec, &others);
    if there == rules && stand_right(&wanted, listing) {
        return None;
    }
    let old = ours.iter().map(|jump| jump.replacen("-A ", "-D ", 1));
    // Each comes behind those before it, which count as well.
    let new = wanted.iter().enumerate().map(|(n, Jump { rule, places })| {
        rule.replacen("-A FORWARD", &format!("-I FORWARD {}", places.end() + n + 1), 1)
    });
    Some(iptables::transaction(TABLE, CHAIN, old.chain(new).chain(rules)))
}

/// A jump to our chain.
struct Jump {
    rule: String,
    /// How many rules of others may be before it; the most are what a new one gets.
    places: RangeInclusive<usize>,
}

/// The jumps that `FORWARD` should have beside these rules of others, in order. Ours is behind everything else, as flannel's:
/// what somebody denies on purpose stays denied, and it is still before the policy. It may stay where it is, unless that
/// is before what must come first.
fn jumps(spec: &FirewallSpec, others: &[&str]) -> Vec<Jump> {
    let behind = |rule: Option<usize>| rule.map_or(0, |at| at + 1);
    let comes_first = behind(others.iter().rposition(|rule| BEFORE_OURS.contains(rule)));
    let is_dockers = |rule: &&str| rule.starts_with(DOCKERS) && !BEFORE_OURS.contains(rule);
    let all = |least| Jump { rule: JUMP.to_owned(), places: least..=others.len() };
    let Some(dockers) = others.iter().position(is_dockers) else { return vec![all(comes_first)] };
    let network = spec.network.trunc();
    let pods = Jump {
        rule: format!("-A FORWARD -s {network} -d {network} -j {CHAIN}"),
        places: comes_first.min(dockers)..=dockers,
    };
    vec![pods, all(behind(others.iter().rposition(is_dockers)))]
}

/// Whether `FORWARD` has just these jumps to our chain.
fn stand_right(wanted: &[Jump], listing: &str) -> bool {
    let (mut wanted, mut others) = (wanted.iter(), 0);
    for rule in rules_of(listing, "FORWARD") {
        if !is_ours(rule) {
            others += 1;
        } else if !wanted.next().is_some_and(|jump| jump.rule == rule && jump.places.contains(&others)) {
            return false;
        }
    }
    wanted.next().is_none()
}

/// As `iptables -S` prints them again. The chain's name says whose they are: a comment would be a match that the kernel
/// goes through for every packet.
fn rules(spec: &FirewallSpec) -> Vec<String> {
    let network = spec.network.trunc();
    ["-s", "-d"].map(|side| format!("-A {CHAIN} {side} {network} -j ACCEPT")).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: &str = "\
-A LODEN-FWD -s 10.5.0.0/16 -j ACCEPT
-A LODEN-FWD -d 10.5.0.0/16 -j ACCEPT
";

    fn spec(forward: bool) -> FirewallSpec {
        FirewallSpec {
            network: "10.5.0.0/16".parse().unwrap(),
            subnet: "10.5.72.0/24".parse().unwrap(),
            masquerade: true,
            fully_random: true,
            forward,
            notrack: None,
        }
    }

    #[test]
    fn an_empty_table_gets_chain_and_jump() {
        let transaction =
            transaction(&spec(true), "-P INPUT ACCEPT\n-P FORWARD DROP\n-P OUTPUT ACCEPT\n").unwrap();
        let expected = format!("*filter\n:LODEN-FWD - [0:0]\n-I FORWARD 1 -j LODEN-FWD\n{RULES}COMMIT\n");
        assert_eq!(transaction, expected);
    }

    const PODS: &str = "-s 10.5.0.0/16 -d 10.5.0.0/16 -j LODEN-FWD";

    #[test]
    fn before_the_chains_of_docker_28_is_what_goes_from_pod_to_pod_and_behind_them_the_rest() {
        let docker = "-P FORWARD DROP\n-N DOCKER-USER\n-N LODEN-FWD\n\
            -A FORWARD -j DOCKER-USER\n-A FORWARD -j DOCKER-FORWARD\n";
        let right = format!("-I FORWARD 2 {PODS}\n-I FORWARD 4 -j LODEN-FWD\n");
        for ours in ["", "-A FORWARD -j LODEN-FWD\n"] {
            let transaction = transaction(&spec(true), &format!("{docker}{ours}{RULES}")).unwrap();
            let old = ours.replace("-A", "-D");
            assert!(transaction.contains(&format!("[0:0]\n{old}{right}-A LODEN-FWD")), "{transaction}");
        }
        let done = format!(
            "-P FORWARD DROP\n-N LODEN-FWD\n-A FORWARD -j DOCKER-USER\n-A FORWARD {PODS}\n\
             -A FORWARD -j DOCKER-FORWARD\n-A FORWARD -i x -j DROP\n-A FORWARD -j LODEN-FWD\n{RULES}"
        );
        assert_eq!(transaction(&spec(true), &done), None);
        // Docker has put its chains before everything when it started again.
        let again = done.replacen("-A FORWARD -j DOCKER-USER\n", "", 1).replacen(
            &format!("-A FORWARD {PODS}\n-A FORWARD -j DOCKER-FORWARD\n"),
            &format!("-A FORWARD -j DOCKER-USER\n-A FORWARD -j DOCKER-FORWARD\n-A FORWARD {PODS}\n"),
            1,
        );
        assert!(transaction(&spec(true), &again).unwrap().contains(&format!("-I FORWARD 2 {PODS}\n")));
        // And gone it leaves one.
        let gone = done.replace("-A FORWARD -j DOCKER-FORWARD\n", "");
        let transaction = transaction(&spec(true), &gone).unwrap();
        assert!(
            transaction.contains(&format!(
                "-D FORWARD {PODS}\n-D FORWARD -j LODEN-FWD\n-I FORWARD 3 -j LODEN-FWD\n"
            ))
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
        let head =
            "-P FORWARD DROP\n-N LODEN-FWD\n-A FORWARD -j LODEN-FWD\n-A FORWARD -o docker0 -j DOCKER\n";
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
