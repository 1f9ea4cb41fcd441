//! Rules that keep other hosts from containers' own addresses, as Docker makes them from version 28 on.
//!
//! They are in the first hook that a packet comes by, and a drop is final: no accept of ours, nor any in `DOCKER-USER`,
//! can help. Docker itself leaves them out when it is told to.

use ipnet::IpNet;

use super::few;
use crate::{
    doctor::{
        finding::Finding,
        snapshot::{Half, Snapshot},
    },
    family::Family,
};

const CHECK: &str = "direct-access";

/// What of the rules concerns our subnet; nothing where they cannot be read, which `br-netfilter` tells.
pub(super) fn examine<F: Family>(snapshot: &Snapshot, half: &Half<F>) -> Option<Finding> {
    let rules = snapshot.rules.as_ref().ok()?;
    let device = half.facts.device.as_ref().map(|device| device.name.as_str());
    let tunnels = snapshot.facts.wireguard.iter().map(|tunnel| tunnel.name.as_str());
    let devices: Vec<&str> = device.into_iter().chain(tunnels).collect();
    let barred = barred(rules, half.facts.subnet.into(), &devices);
    if barred.is_empty() {
        return Some(Finding::ok(CHECK, "no rule keeps peers from containers' own addresses"));
    }
    Some(Finding::fault(
        CHECK,
        format_args!("what comes from peers is dropped before any chain that accepts: {}", few(&barred)),
        "Docker 28 and newer do that: start dockerd with --allow-direct-routing (28.2), or give the subnet to a network with \
         -o com.docker.network.bridge.gateway_mode_ipv4=nat-unprotected (IPv6: gateway_mode_ipv6)",
    ))
}

/// The rules, as nft prints them, that drop what comes to addresses of the subnet by another interface than some, unless one
/// before accepts that from a device of ours.
fn barred(rules: &str, subnet: IpNet, devices: &[&str]) -> Vec<String> {
    let mut accepted: Vec<IpNet> = Vec::new();
    let mut barred = Vec::new();
    for rule in rules.lines().map(str::trim) {
        let words: Vec<&str> = rule.split_whitespace().collect();
        let Some(destination) = after(&words, "daddr").and_then(prefix) else { continue };
        if words.contains(&"accept") && devices.iter().any(|device| words.contains(&quoted(device).as_str()))
        {
            accepted.push(destination);
        }
        let elsewhere = after(&words, "iifname") == Some("!=");
        let ours = subnet.contains(&destination) || destination.contains(&subnet.trunc());
        if elsewhere
            && ours
            && words.contains(&"drop")
            && !accepted.iter().any(|net| net.contains(&destination))
        {
            barred.push(rule.to_owned());
        }
    }
    barred
}

fn after<'a>(words: &[&'a str], word: &str) -> Option<&'a str> {
    let at = words.iter().position(|it| *it == word)?;
    words.get(at + 1).copied()
}

/// An address is a prefix of all its bits.
fn prefix(word: &str) -> Option<IpNet> {
    word.parse().ok().or_else(|| Some(IpNet::from(word.parse::<std::net::IpAddr>().ok()?)))
}

fn quoted(device: &str) -> String {
    format!("\"{device}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(rules: &str) -> Vec<String> {
        barred(rules, "10.5.7.1/24".parse().unwrap(), &["flannel.1"])
    }

    #[test]
    fn what_docker_drops_by_iptables_and_by_nft_is_found() {
        let by_iptables = "iifname != \"docker0\" ip daddr 10.5.7.2 counter packets 0 bytes 0 drop";
        let by_nft = "ip daddr 10.5.7.2 iifname != \"docker0\" counter packets 0 bytes 0 drop comment \"DROP DIRECT ACCESS\"";
        let of_the_subnet =
            "ip daddr 10.5.7.0/24 iifname != { \"docker0\", \"lo\" } counter packets 0 bytes 0 drop";
        for rule in [by_iptables, by_nft, of_the_subnet] {
            assert_eq!(of(&format!("table ip raw {{\n\tchain PREROUTING {{\n\t\t{rule}\n\t}}\n}}")), [rule]);
        }
    }

    #[test]
    fn what_concerns_others_or_accepts_us_first_is_none() {
        let of_another = "iifname != \"br-1\" ip daddr 172.18.0.2 counter packets 0 bytes 0 drop";
        let published =
            "iifname != \"docker0\" ip daddr 10.5.7.2 tcp dport 80 counter packets 0 bytes 0 accept";
        let trusted = "iifname \"flannel.1\" ip daddr 10.5.7.2 counter packets 0 bytes 0 accept\n\
                       iifname != \"docker0\" ip daddr 10.5.7.2 counter packets 0 bytes 0 drop";
        for rules in [of_another, published, trusted] {
            assert_eq!(of(rules), [""; 0], "{rules}");
        }
    }
}
