//! flannel's own rules: those that a flanneld left on this node, and those that are left for one.
//!
//! Its masquerade rules mean the same as ours, so beside ours they do nothing, as long as the subnet is the same:
//! once the node has another one they would masquerade its pods among themselves. So whoever takes the node over
//! removes them, when its own are in place. flannel's forward rules (`FLANNEL-FWD`) only accept, and stay.
//!
//! A node that is handed back gets flannel's iptables chains in place of ours, so that nothing changes for its
//! packets and the flanneld that comes finds what it would have made, and keeps it up. (Source: flannel v0.28,
//! `pkg/trafficmngr/iptables`.)

use ipnet::IpNet;

use super::{
    FirewallError, FirewallSpec, Half, Result, forward,
    iptables::{default, removal, rules_of, rulesets},
    masquerade,
    tool::run,
};

const CHAIN: &str = "FLANNEL-POSTRTG";

/// One of flannel's chains, and what it puts into each rule's comment.
struct Chain {
    table: &'static str,
    /// The chain that jumps to it.
    from: &'static str,
    name: &'static str,
    comment: &'static str,
}

const MASQUERADE: Chain = Chain { table: "nat", from: "POSTROUTING", name: CHAIN, comment: "flanneld masq" };
const FORWARD: Chain =
    Chain { table: "filter", from: "FORWARD", name: "FLANNEL-FWD", comment: "flanneld forward" };

/// Puts flannel's masquerade rules in the place of ours, where ours are.
pub(super) async fn hand_back_masquerade(network: IpNet, subnet: IpNet) -> Result<()> {
    let half = Half::of(network);
    let Some(ours) = masquerade::list(half).await? else { return Ok(()) };
    // The table may be there only to keep pods' addresses where Docker masquerades, which flannel does not.
    if !ours.contains("chain postrouting") {
        return masquerade::remove(half).await;
    }
    let random = if ours.contains("fully-random") { " --random-fully" } else { "" };
    let rules = [
        "-m mark --mark 0x4000/0x4000 {} -j RETURN".to_owned(),
        format!("-s {subnet} -d {network} {{}} -j RETURN"),
        format!("-s {network} -d {subnet} {{}} -j RETURN"),
        format!("! -s {network} -d {subnet} {{}} -j RETURN"),
        format!("-s {network} ! -d {} {{}} -j MASQUERADE{random}", half.multicast()),
        format!("! -s {network} -d {network} {{}} -j MASQUERADE{random}"),
    ];
    let iptables = default(half);
    let listing = iptables.list(MASQUERADE.table).await?.ok_or(FirewallError::Missing("iptables"))?;
    if let Some(transaction) = MASQUERADE.additions(None, &rules, &listing) {
        iptables.restore(&transaction).await?;
    }
    masquerade::remove(half).await
}

/// Puts flannel's forward rules in the place of ours, where ours are: others' chains may drop behind it.
pub(super) async fn hand_back_forward(network: IpNet) -> Result<()> {
    let half = Half::of(network);
    let rules = ["-s", "-d"].map(|side| format!("{side} {network} {{}} -j ACCEPT"));
    for iptables in rulesets(half, FORWARD.table) {
        let Some(listing) = iptables.list(FORWARD.table).await? else { continue };
        let Some(place) = forward::place(&listing) else { continue };
        if let Some(transaction) = FORWARD.additions(Some(place), &rules, &listing) {
            iptables.restore(&transaction).await?;
        }
    }
    forward::remove(half).await
}

impl Chain {
    /// What the table lacks of the chain, its rules (`{}` stands for the comment) and the jump to it, which comes to
    /// this place, counted from 1, or to the end; `None` where nothing is missing. Another flanneld of this host may
    /// have rules of its own in the chain.
    fn additions(&self, place: Option<usize>, rules: &[String], listing: &str) -> Option<String> {
        let Self { table, from, name, comment } = self;
        let comment = format!("-m comment --comment \"{comment}\"");
        let has = |line: &String| listing.lines().any(|there| there == line);
        let jump = format!("{comment} -j {name}");
        let mut lines = vec![format!("-N {name}")];
        lines.extend(rules.iter().map(|rule| format!("-A {name} {}", rule.replace("{}", &comment))));
        lines.retain(|line| !has(line));
        if !has(&format!("-A {from} {jump}")) {
            lines.push(match place {
                Some(place) => format!("-I {from} {place} {jump}"),
                None => format!("-A {from} {jump}"),
            });
        }
        (!lines.is_empty()).then(|| format!("*{table}\n{}\nCOMMIT\n", lines.join("\n")))
    }
}

/// Removes what flanneld has made for this very network; says whether there was anything.
pub(super) async fn take_over(spec: &FirewallSpec) -> Result<bool> {
    let network = spec.network.trunc().to_string();
    let mut found = false;
    for iptables in rulesets(spec.half(), "nat") {
        let listing = iptables.list("nat").await?;
        if let Some(transaction) = listing.and_then(|listing| transaction(&network, &listing)) {
            iptables.restore(&transaction).await?;
            found = true;
        }
    }
    let (family, table) = match spec.half() {
        Half::Ipv4 => ("ip", "flannel-ipv4"),
        Half::Ipv6 => ("ip6", "flannel-ipv6"),
    };
    match run("nft", &["list", "table", family, table], "").await {
        Ok(listing) if is_of(&network, listing.lines()) => {
            run("nft", &["delete", "table", family, table], "").await?;
            found = true;
        }
        Ok(_) | Err(FirewallError::Failed { .. }) => {}
        Err(error) => return Err(error),
    }
    Ok(found)
}

fn transaction(network: &str, listing: &str) -> Option<String> {
    if !is_of(network, rules_of(listing, CHAIN)) {
        return None;
    }
    removal("nat", CHAIN, listing)
}

/// Whether every rule that masquerades is about this network: a flanneld for another one may still run.
fn is_of<'a>(network: &str, rules: impl Iterator<Item = &'a str>) -> bool {
    let mut masquerading = rules.filter(|rule| rule.to_ascii_lowercase().contains("masquerade")).peekable();
    masquerading.peek().is_some() && masquerading.all(|rule| rule.split(' ').any(|word| word == network))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLANNELS: &str = "-P POSTROUTING ACCEPT
-N FLANNEL-POSTRTG
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -s 10.5.1.0/24 -d 10.5.0.0/16 -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment \"flanneld masq\" -j MASQUERADE
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.0.0/16 -m comment --comment \"flanneld masq\" -j MASQUERADE
";

    #[test]
    fn only_what_is_missing_is_added() {
        let rules = ["-s 10.5.0.0/16 {} -j ACCEPT".to_owned(), "-d 10.5.0.0/16 {} -j ACCEPT".to_owned()];
        let bare = "-P FORWARD DROP\n-A FORWARD -j DOCKER-USER\n-A FORWARD -j LODEN-FWD\n";
        let expected = "\
*filter
-N FLANNEL-FWD
-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT
-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT
-I FORWARD 2 -m comment --comment \"flanneld forward\" -j FLANNEL-FWD
COMMIT
";
        assert_eq!(FORWARD.additions(Some(2), &rules, bare).unwrap(), expected);
        let whole = "-N FLANNEL-FWD\n-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n\
            -A FLANNEL-FWD -s 10.6.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\n\
            -A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\n";
        let missing = "*filter\n-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\nCOMMIT\n";
        assert_eq!(FORWARD.additions(Some(2), &rules, whole).unwrap(), missing);
        assert_eq!(FORWARD.additions(Some(2), &rules[..1], whole), None);
    }

    #[test]
    fn chain_and_jump_of_this_network_go() {
        let expected = "\
*nat
:FLANNEL-POSTRTG - [0:0]
-D POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG
-X FLANNEL-POSTRTG
COMMIT
";
        assert_eq!(transaction("10.5.0.0/16", FLANNELS).unwrap(), expected);
    }

    #[test]
    fn those_of_another_network_stay() {
        assert_eq!(transaction("10.6.0.0/16", FLANNELS), None);
        assert_eq!(transaction("10.5.0.0/16", "-P POSTROUTING ACCEPT\n"), None);
        let both = format!("{FLANNELS}-A FLANNEL-POSTRTG -s 10.6.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE\n");
        assert_eq!(transaction("10.5.0.0/16", &both), None);
    }
}
