//! `table ip loden`: masquerading of what leaves the network, and none of what stays in it.

use super::{FirewallError, FirewallSpec, Result, foreign, tool::run};

/// The name of the table.
pub(super) const TABLE: &str = "loden";
const LIST: &[&str] = &["--stateless", "list", "table", "ip", TABLE];

/// What the table is to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Content {
    spec: FirewallSpec,
    /// Others masquerade here, as Docker does what leaves its bridge: pods keep their addresses all the same.
    own_addresses: bool,
}

impl Content {
    async fn wanted(spec: &FirewallSpec) -> Result<Self> {
        Ok(Self { spec: *spec, own_addresses: foreign::translates_sources().await? })
    }

    fn is_empty(self) -> bool {
        !self.spec.masquerade && !self.own_addresses
    }
}

/// The table and what it was when it was last set.
#[derive(Debug, Default)]
pub(super) struct Masquerade {
    /// What was set, and how nft lists it: how a version of nft prints a rule is its own affair, so its own
    /// print is what a later one is compared with.
    set: Option<(Content, String)>,
}

impl Masquerade {
    pub(super) async fn ensure(&mut self, spec: &FirewallSpec) -> Result<bool> {
        let content = Content::wanted(spec).await?;
        if content.is_empty() {
            self.set = None;
            return if list().await?.is_some() { remove().await.map(|()| true) } else { Ok(false) };
        }
        if self.holds(content).await? {
            return Ok(false);
        }
        run("nft", &["-f", "-"], &render(content)).await?;
        self.set = list().await?.map(|listing| (content, listing));
        Ok(true)
    }

    pub(super) async fn is_current(&self, spec: &FirewallSpec) -> Result<bool> {
        let content = Content::wanted(spec).await?;
        if content.is_empty() { Ok(list().await?.is_none()) } else { self.holds(content).await }
    }

    async fn holds(&self, content: Content) -> Result<bool> {
        match &self.set {
            Some((set, listing)) if *set == content => Ok(list().await?.as_ref() == Some(listing)),
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
pub(super) async fn list() -> Result<Option<String>> {
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
fn render(content: Content) -> String {
    let Content { spec, own_addresses } = content;
    let chains = [own_addresses.then(|| keep_addresses(&spec)), spec.masquerade.then(|| masquerade(&spec))];
    let chains: String = chains.into_iter().flatten().collect();
    format!("add table ip loden\ndelete table ip loden\ntable ip loden {{\n{chains}}}\n")
}

/// Before everybody else's rules: a source translated into itself is translated, and no later chain is asked. That is
/// what the kernel does to a connection that no rule matches. Pods of one node are left to others: Docker masquerades
/// a container that reaches itself by a published port, and must.
fn keep_addresses(spec: &FirewallSpec) -> String {
    let (network, subnet) = (spec.network.trunc(), spec.subnet.trunc());
    format!(
        "\
\tchain own-addresses {{
\t\ttype nat hook postrouting priority srcnat - 1; policy accept;
\t\tmeta mark & 0x4000 == 0x4000 return comment \"marked by kube-proxy, which masquerades itself\"
\t\tip saddr {subnet} ip daddr {network} ip daddr != {subnet} snat to ip saddr comment \"pod to remote pod\"
\t}}
"
    )
}

/// The rules are those of flannel's chain `FLANNEL-POSTRTG` (v0.28, `pkg/trafficmngr/iptables`), one for one.
fn masquerade(spec: &FirewallSpec) -> String {
    let (network, subnet) = (spec.network.trunc(), spec.subnet.trunc());
    let masquerade = if spec.fully_random { "masquerade fully-random" } else { "masquerade" };
    format!(
        "\
\tchain postrouting {{
\t\ttype nat hook postrouting priority srcnat; policy accept;
\t\tmeta mark & 0x4000 == 0x4000 return comment \"marked by kube-proxy, which masquerades itself\"
\t\tip saddr {subnet} ip daddr {network} return comment \"pod to pod\"
\t\tip saddr {network} ip daddr {subnet} return comment \"pod to pod, received\"
\t\tip saddr != {network} ip daddr {subnet} return comment \"outside to pod: the client's address is kept\"
\t\tip saddr {network} ip daddr != 224.0.0.0/4 {masquerade} comment \"pod to outside\"
\t\tip saddr != {network} ip daddr {network} {masquerade} comment \"host to remote pod\"
\t}}
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
        let content = |fully_random| Content { spec: spec(fully_random), own_addresses: false };
        assert_eq!(render(content(true)), expected);
        assert_eq!(render(content(false)), expected.replace(" fully-random", ""));
    }
}
