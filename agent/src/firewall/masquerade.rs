//! `table ip loden` and `table ip6 loden`: masquerading of what leaves the network, and none of what stays in it; and
//! what [`super::underlay`] adds.

use super::{FirewallError, FirewallSpec, Half, Result, foreign, tool::run, underlay};

/// The name of the table.
pub(super) const TABLE: &str = "loden";

/// What the table is to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Content {
    spec: FirewallSpec,
    /// Others masquerade here, as Docker does what leaves its bridge: pods keep their addresses all the same.
    own_addresses: bool,
}

impl Content {
    async fn wanted(spec: &FirewallSpec) -> Result<Self> {
        Ok(Self { spec: *spec, own_addresses: foreign::translates_sources(spec.half()).await? })
    }

    fn is_empty(self) -> bool {
        !self.spec.masquerade && !self.own_addresses && self.spec.notrack.is_none()
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
            let half = spec.half();
            return if list(half).await?.is_some() { remove(half).await.map(|()| true) } else { Ok(false) };
        }
        if self.holds(content).await? {
            return Ok(false);
        }
        run("nft", &["-f", "-"], &render(content)).await?;
        self.set = list(spec.half()).await?.map(|listing| (content, listing));
        Ok(true)
    }

    pub(super) async fn is_current(&self, spec: &FirewallSpec) -> Result<bool> {
        let content = Content::wanted(spec).await?;
        if content.is_empty() { Ok(list(spec.half()).await?.is_none()) } else { self.holds(content).await }
    }

    async fn holds(&self, content: Content) -> Result<bool> {
        match &self.set {
            Some((set, listing)) if *set == content => {
                Ok(list(content.spec.half()).await?.as_ref() == Some(listing))
            }
            _ => Ok(false),
        }
    }
}

pub(super) async fn remove(half: Half) -> Result<()> {
    let family = half.nft();
    // `add` first: to delete a table that is not there is an error, and it would be undone with the rest.
    let transaction = format!("add table {family} {TABLE}\ndelete table {family} {TABLE}\n");
    match run("nft", &["-f", "-"], &transaction).await {
        Err(FirewallError::Missing(_)) => Ok(()),
        done => done.map(drop),
    }
}

/// The table as nft prints it, without counters; `None` where there is none, or no nft that could have made
/// one.
pub(super) async fn list(half: Half) -> Result<Option<String>> {
    match run("nft", &["--stateless", "list", "table", half.nft(), TABLE], "").await {
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
    let chains = [
        own_addresses.then(|| keep_addresses(&spec)),
        spec.masquerade.then(|| masquerade(&spec)),
        spec.notrack.map(|vtep| underlay::chains(spec.half(), vtep)),
    ];
    let chains: String = chains.into_iter().flatten().collect();
    let ip = spec.half().nft();
    format!("add table {ip} {TABLE}\ndelete table {ip} {TABLE}\ntable {ip} {TABLE} {{\n{chains}}}\n")
}

/// Before everybody else's rules: a source translated into itself is translated, and no later chain is asked. That is
/// what the kernel does to a connection that no rule matches. Pods of one node are left to others: Docker masquerades
/// a container that reaches itself by a published port, and must.
fn keep_addresses(spec: &FirewallSpec) -> String {
    let (network, subnet) = (spec.network.trunc(), spec.subnet.trunc());
    let ip = spec.half().nft();
    format!(
        "\
\tchain own-addresses {{
\t\ttype nat hook postrouting priority srcnat - 1; policy accept;
\t\tmeta mark & 0x4000 == 0x4000 return comment \"marked by kube-proxy, which masquerades itself\"
\t\t{ip} saddr {subnet} {ip} daddr {network} {ip} daddr != {subnet} snat to {ip} saddr comment \"pod to remote pod\"
\t}}
"
    )
}

/// The rules are those of flannel's chain `FLANNEL-POSTRTG` (v0.28, `pkg/trafficmngr/iptables`), one for one.
fn masquerade(spec: &FirewallSpec) -> String {
    let (network, subnet) = (spec.network.trunc(), spec.subnet.trunc());
    let masquerade = if spec.fully_random { "masquerade fully-random" } else { "masquerade" };
    let ip = spec.half().nft();
    let multicast = spec.half().multicast();
    format!(
        "\
\tchain postrouting {{
\t\ttype nat hook postrouting priority srcnat; policy accept;
\t\tmeta mark & 0x4000 == 0x4000 return comment \"marked by kube-proxy, which masquerades itself\"
\t\t{ip} saddr {subnet} {ip} daddr {network} return comment \"pod to pod\"
\t\t{ip} saddr {network} {ip} daddr {subnet} return comment \"pod to pod, received\"
\t\t{ip} saddr != {network} {ip} daddr {subnet} return comment \"outside to pod: the client's address is kept\"
\t\t{ip} saddr {network} {ip} daddr != {multicast} {masquerade} comment \"pod to outside\"
\t\t{ip} saddr != {network} {ip} daddr {network} {masquerade} comment \"host to remote pod\"
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
            notrack: None,
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
        let (network, subnet) = ("fc00::/48".parse().unwrap(), "fc00:0:0:72::/64".parse().unwrap());
        let v6 = Content { spec: FirewallSpec { network, subnet, ..spec(true) }, own_addresses: false };
        let expected = expected.replace("table ip ", "table ip6 ").replace("ip saddr", "ip6 saddr");
        let expected = expected.replace("ip daddr", "ip6 daddr").replace("224.0.0.0/4", "ff00::/8");
        let expected =
            expected.replace("10.5.0.0/16", "fc00::/48").replace("10.5.72.0/24", "fc00:0:0:72::/64");
        assert_eq!(render(v6), expected);
    }
}
