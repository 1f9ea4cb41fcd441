//! The masquerade rules that a flanneld left on this node.
//!
//! They mean the same as ours, so beside ours they do nothing, as long as the subnet is the same: once the node
//! has another one they would masquerade its pods among themselves. So whoever takes the node over removes
//! them, when its own are in place. flannel's forward rules (`FLANNEL-FWD`) only accept, and stay.

use super::{
    FirewallError, FirewallSpec, Result,
    iptables::{removal, rules_of, rulesets},
    tool::run,
};

const CHAIN: &str = "FLANNEL-POSTRTG";

/// Removes what flanneld has made for this very network; says whether there was anything.
pub(super) async fn take_over(spec: &FirewallSpec) -> Result<bool> {
    let network = spec.network.trunc().to_string();
    let mut found = false;
    for iptables in rulesets("nat") {
        let listing = iptables.list("nat").await?;
        if let Some(transaction) = listing.and_then(|listing| transaction(&network, &listing)) {
            iptables.restore(&transaction).await?;
            found = true;
        }
    }
    match run("nft", &["list", "table", "ip", "flannel-ipv4"], "").await {
        Ok(listing) if is_of(&network, listing.lines()) => {
            run("nft", &["delete", "table", "ip", "flannel-ipv4"], "").await?;
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
