//! Chains of others that drop forwarded packets where no accept of ours can help.

use serde::Deserialize;

use super::{FirewallError, Result, tool::run};

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
    match run("nft", &["--json", "list", "chains"], "").await {
        Ok(listing) => Ok(dropping(&listing)),
        Err(FirewallError::Missing(_)) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
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
    hook: String,
    policy: String,
}

fn dropping(listing: &str) -> Vec<String> {
    // What cannot be understood holds nothing that could be told.
    let listing: Listing = serde_json::from_str(listing).unwrap_or_default();
    let chains = listing.nftables.into_iter().filter_map(|item| item.chain);
    chains
        .filter(|chain| chain.hook == "forward" && chain.policy == "drop")
        .filter(|chain| chain.family == "inet" || chain.family == "ip")
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
}
