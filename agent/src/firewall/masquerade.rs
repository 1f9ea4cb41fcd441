//! `table ip loden`: masquerading of what leaves the network.

use super::{FirewallError, FirewallSpec, Result, tool::run};

const LIST: &[&str] = &["--stateless", "list", "table", "ip", "loden"];

/// The table and what it was when it was last set.
#[derive(Debug, Default)]
pub(super) struct Masquerade {
    /// What was set, and how nft lists it: how a version of nft prints a rule is its own affair, so its own
    /// print is what a later one is compared with.
    set: Option<(FirewallSpec, String)>,
}

impl Masquerade {
    pub(super) async fn ensure(&mut self, spec: &FirewallSpec) -> Result<bool> {
        if !spec.masquerade {
            self.set = None;
            return if list().await?.is_some() { remove().await.map(|()| true) } else { Ok(false) };
        }
        if self.is_current(spec).await? {
            return Ok(false);
        }
        run("nft", &["-f", "-"], &render(spec)).await?;
        self.set = list().await?.map(|listing| (*spec, listing));
        Ok(true)
    }

    pub(super) async fn is_current(&self, spec: &FirewallSpec) -> Result<bool> {
        if !spec.masquerade {
            return Ok(list().await?.is_none());
        }
        match &self.set {
            Some((set, listing)) if set == spec => Ok(list().await?.as_ref() == Some(listing)),
            _ => Ok(false),
        }
    }
}

pub(super) async fn remove() -> Result<()> {
    // `add` first: to delete a table that is not there is an error, and it would be undone with the rest.
    match run("nft", &["-f", "-"], "add table ip loden\ndelete table ip loden\n").await {
        Err(FirewallError::Missing(_)) => Ok(()),
        done => done.map(drop),
    }
}

/// The table as nft prints it, without counters; `None` where there is none, or no nft that could have made
/// one.
async fn list() -> Result<Option<String>> {
    match run("nft", LIST, "").await {
        Ok(listing) => Ok(Some(listing)),
        Err(FirewallError::Failed { message, .. }) if message.contains("No such file or directory") => {
            Ok(None)
        }
        Err(FirewallError::Missing(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The text that `nft -f -` takes in one transaction: our table as it ought to be, whatever it was before.
///
/// The rules are those of flannel's chain `FLANNEL-POSTRTG` (v0.28, `pkg/trafficmngr/iptables`), one for one.
#[must_use]
pub fn render(spec: &FirewallSpec) -> String {
    let (network, subnet) = (spec.network.trunc(), spec.subnet.trunc());
    let masquerade = if spec.fully_random { "masquerade fully-random" } else { "masquerade" };
    format!(
        "\
add table ip loden
delete table ip loden
table ip loden {{
\tchain postrouting {{
\t\ttype nat hook postrouting priority srcnat; policy accept;
\t\tmeta mark & 0x4000 == 0x4000 return comment \"marked by kube-proxy, which masquerades itself\"
\t\tip saddr {subnet} ip daddr {network} return comment \"pod to pod\"
\t\tip saddr {network} ip daddr {subnet} return comment \"pod to pod, received\"
\t\tip saddr != {network} ip daddr {subnet} return comment \"outside to pod: the client's address is kept\"
\t\tip saddr {network} ip daddr != 224.0.0.0/4 {masquerade} comment \"pod to outside\"
\t\tip saddr != {network} ip daddr {network} {masquerade} comment \"host to remote pod\"
\t}}
}}
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(fully_random: bool) -> FirewallSpec {
        FirewallSpec {
            network: "10.5.0.0/16".parse().unwrap(),
            subnet: "10.5.72.0/24".parse().unwrap(),
            masquerade: true,
            fully_random,
            forward: true,
        }
    }

    #[test]
    fn the_rules_are_flannels_in_flannels_order() {
        let expected = "\
add table ip loden
delete table ip loden
table ip loden {
\tchain postrouting {
\t\ttype nat hook postrouting priority srcnat; policy accept;
\t\tmeta mark & 0x4000 == 0x4000 return comment \"marked by kube-proxy, which masquerades itself\"
\t\tip saddr 10.5.72.0/24 ip daddr 10.5.0.0/16 return comment \"pod to pod\"
\t\tip saddr 10.5.0.0/16 ip daddr 10.5.72.0/24 return comment \"pod to pod, received\"
\t\tip saddr != 10.5.0.0/16 ip daddr 10.5.72.0/24 return comment \"outside to pod: the client's address is kept\"
\t\tip saddr 10.5.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random comment \"pod to outside\"
\t\tip saddr != 10.5.0.0/16 ip daddr 10.5.0.0/16 masquerade fully-random comment \"host to remote pod\"
\t}
}
";
        assert_eq!(render(&spec(true)), expected);
        assert_eq!(render(&spec(false)), expected.replace(" fully-random", ""));
    }
}
