//! Chains of others: those that drop forwarded packets where no accept of ours can help, and those that may
//! translate what we want left alone.

use serde::Deserialize;

use super::{FirewallError, Half, Result, iptables, masquerade, tool::run};

/// The base chains at the forward hook whose policy is to drop, as `FAMILY TABLE CHAIN`: those of nftables.conf,
/// ufw or firewalld. Whoever wrote them must accept the network there; every packet passes all chains of a hook,
/// and one drop is final. iptables' own `FORWARD` is not among them: `LODEN-FWD` sees to it.
///
/// A chain with an accepting policy may hold drop rules all the same; they are not looked for.
///
/// # Errors
///
/// Where `nft` fails. Without nft there are none.
pub async fn forward_drops() -> Result<Vec<String>> {
    Ok(dropping(&chains().await?))
}

/// Whether anybody else may translate sources here: a base chain of type nat at the postrouting hook, or iptables'
/// legacy nat table. Where there is none, connections are perhaps not even tracked.
pub(super) async fn translates_sources(half: Half) -> Result<bool> {
    Ok(iptables::has_legacy(half, "nat") || translating(half, &chains().await?))
}

/// All chains, in JSON; nothing without nft.
async fn chains() -> Result<String> {
    match run("nft", &["--json", "list", "chains"], "").await {
        Err(FirewallError::Missing(_)) => Ok(String::new()),
        listing => listing,
    }
}

/// All rules of the host that nft knows, as it prints them; those of iptables-legacy it does not.
///
/// # Errors
///
/// Where `nft` fails or is missing.
pub async fn rules() -> Result<String> {
    run("nft", &["list", "ruleset"], "").await
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Listing {
    nftables: Vec<Item>,
}

/// Each item has one member; those that are not chains are passed over.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Item {
    chain: Option<Chain>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Chain {
    family: String,
    table: String,
    name: String,
    #[serde(rename = "type")]
    kind: String,
    hook: String,
    policy: String,
}

/// The chains that see packets of a family.
fn parse(half: Half, listing: &str) -> impl Iterator<Item = Chain> {
    // What cannot be understood holds nothing that could be told.
    let listing: Listing = serde_json::from_str(listing).unwrap_or_default();
    let chains = listing.nftables.into_iter().filter_map(|item| item.chain);
    chains.filter(move |chain| chain.family == "inet" || chain.family == half.nft())
}

fn translating(half: Half, listing: &str) -> bool {
    let ours = (half.nft(), masquerade::TABLE);
    let is_ours = |chain: &Chain| (chain.family.as_str(), chain.table.as_str()) == ours;
    parse(half, listing).any(|chain| chain.kind == "nat" && chain.hook == "postrouting" && !is_ours(&chain))
}

fn dropping(listing: &str) -> Vec<String> {
    parse(Half::Ipv4, listing)
        .filter(|chain| chain.hook == "forward" && chain.policy == "drop")
        .filter(|chain| {
            (chain.family.as_str(), chain.table.as_str()) != ("ip", "filter") || chain.name != "FORWARD"
        })
        .map(|Chain { family, table, name, .. }| format!("{family} {table} {name}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dropping_chains_of_others_at_the_forward_hook_are_told() {
        let listing = r#"{"nftables": [
            {"metainfo": {"version": "1.0.6", "json_schema_version": 1}},
            {"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "hook": "forward", "policy": "drop"}},
            {"chain": {"family": "inet", "table": "fw", "name": "in", "hook": "input", "prio": 0, "policy": "drop"}},
            {"chain": {"family": "inet", "table": "fw", "name": "jumped", "handle": 3}},
            {"chain": {"family": "ip6", "table": "fw6", "name": "fwd", "hook": "forward", "policy": "drop"}},
            {"chain": {"family": "inet", "table": "fw", "name": "fwd", "hook": "forward", "policy": "drop"}},
            {"chain": {"family": "ip", "table": "x", "name": "fwd", "hook": "forward", "policy": "accept"}}
        ]}"#;
        assert_eq!(dropping(listing), ["inet fw fwd"]);
        assert!(dropping("").is_empty());
    }

    #[test]
    fn only_nat_of_others_behind_routing_translates_sources() {
        let chain = |family: &str, table: &str, kind: &str, hook: &str| {
            let chain = serde_json::json!({ "family": family, "table": table, "name": "c", "type": kind, "hook": hook });
            translating(Half::Ipv4, &serde_json::json!({ "nftables": [{ "chain": chain }] }).to_string())
        };
        assert!(chain("ip", "nat", "nat", "postrouting"));
        assert!(chain("inet", "firewalld", "nat", "postrouting"));
        assert!(!chain("ip", "loden", "nat", "postrouting"));
        assert!(!chain("ip6", "nat", "nat", "postrouting"));
        assert!(!chain("ip", "nat", "nat", "prerouting"));
        assert!(!chain("ip", "mangle", "filter", "postrouting"));
        assert!(!translating(Half::Ipv4, ""));
    }
}
