//! What the demo says at its end: tables for people, JSON for machines, and the verdict.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Result, bail};
use loden_tests::{
    cluster::Cluster,
    counters::Counters,
    node::{Node, SubnetEnv},
};
use serde_json::{Value, json};

use super::{Bulk, Findings, LEAST_SHARE};
use crate::table::table;

/// What is told about a node.
#[derive(Debug)]
pub(super) struct NodeFacts {
    name: String,
    address: Ipv4Addr,
    env: SubnetEnv,
    counters: Counters,
}

impl NodeFacts {
    pub(super) fn of(node: &Node) -> Result<Self> {
        Ok(Self {
            name: node.name().to_owned(),
            address: node.address(),
            env: node.subnet_env()?,
            // Without those that are zero.
            counters: Counters::read(node)?.since(&Counters::default()),
        })
    }
}

/// Prints the findings. `leftovers` is what was still there after the removal; a kept cluster has none to tell.
///
/// # Errors
///
/// Where the findings are not what the demo promises.
pub(super) fn print(findings: &Findings, leftovers: Option<&[String]>, as_json: bool) -> Result<()> {
    if as_json {
        println!("{:#}", json(findings, leftovers));
    } else {
        tables(findings);
    }
    let failures: Vec<String> = findings
        .reach
        .failures()
        .map(|pair| format!("{} to {}: {}", pair.from, pair.to, pair.failure.as_deref().unwrap_or("")))
        .chain([Some(&findings.bulk), findings.bulk6.as_ref()].into_iter().flatten().filter_map(|bulk| {
            let share = &bulk.share;
            (share.smaller() < LEAST_SHARE)
                .then(|| format!("less than {LEAST_SHARE} of bulk TCP took the fast path: {share:?}"))
        }))
        .chain(leftovers.unwrap_or(&[]).iter().map(|left| format!("left behind: {left}")))
        .collect();
    if !failures.is_empty() {
        bail!("{}", failures.join("\n"));
    }
    Ok(())
}

fn tables(findings: &Findings) {
    let mut nodes = table(["node", "address", "FLANNEL_SUBNET", "FLANNEL_MTU", "fast out", "fast in"], 4);
    for NodeFacts { name, address, env, counters } in &findings.nodes {
        let [out, inward] = ["fast_encap", "fast_decap"].map(|name| counters.get(name).to_string());
        nodes.add_row([
            name.clone(),
            address.to_string(),
            env.subnet6
                .map_or_else(|| env.subnet().to_string(), |subnet6| format!("{}\n{subnet6}", env.subnet())),
            env.mtu.to_string(),
            out,
            inward,
        ]);
    }
    println!("\nsubnet.env and packets by the fast path, per node\n{nodes}");
    println!("\nleases in etcd");
    for (key, value) in &findings.leases {
        println!("  {key}\n    {value}");
    }
    println!("\nwho reaches whom, by TCP and ping, with unchanged source address\n{}", matrix(findings));
    println!("\nbulk TCP between nodes: {}", sentence(&findings.bulk));
    if let Some(bulk) = &findings.bulk6 {
        println!("\nthe same over IPv6: {}", sentence(bulk));
    }
    let mut comparison = table(["", "programs attached", "detached", "unit", "ratio"], 1);
    for row in &findings.comparison {
        comparison.add_row([
            row.test.to_owned(),
            format!("{:.0}", row.fast),
            format!("{:.0}", row.kernel),
            row.unit.to_owned(),
            format!("{:.2}", row.ratio),
        ]);
    }
    println!(
        "\nthe same containers with the programs attached and detached, medians over the rounds\n{comparison}"
    );
}

fn sentence(bulk: &Bulk) -> String {
    let Bulk { bytes, share } = bulk;
    let packets = share.sent;
    format!(
        "{bytes} bytes, every one compared; of {packets} packets sent, {} were encapsulated and {} delivered by the fast \
         path: {:.2} %",
        share.encapsulated,
        share.delivered,
        share.smaller() * 100.0
    )
}

fn matrix(findings: &Findings) -> String {
    let mut rows = Vec::new();
    let containers = &findings.reach.containers;
    for from in containers {
        let cell = |to: &IpAddr| {
            let pair = findings.reach.pairs.iter().find(|pair| pair.from == *from && pair.to == *to);
            match pair {
                None => "·",
                Some(pair) if pair.failure.is_none() => "✓",
                Some(_) => "✗",
            }
        };
        let of_family = containers.iter().filter(|to| to.is_ipv4() == from.is_ipv4());
        let cells: Vec<&str> = of_family.map(cell).collect();
        rows.push(format!("  {:<15} {}", from.to_string(), cells.join(" ")));
    }
    rows.join("\n")
}

fn json(findings: &Findings, leftovers: Option<&[String]>) -> Value {
    let bulk = |Bulk { bytes, share }: &Bulk| {
        json!({
            "bytes": bytes,
            "packets": share.sent,
            "encapsulated": share.encapsulated,
            "delivered": share.delivered,
            "fast_path_share": share.smaller(),
        })
    };
    let failed: Vec<Value> = findings
        .reach
        .failures()
        .map(|pair| json!({"from": pair.from, "to": pair.to, "failure": pair.failure}))
        .collect();
    let node = |node: &NodeFacts| {
        json!({
            "name": node.name,
            "address": node.address,
            "subnet_env": node.env.text,
            "counters": node.counters.iter().collect::<std::collections::BTreeMap<_, _>>(),
        })
    };
    let comparison = |row: &super::compare::Comparison| {
        json!({
            "test": row.test, "unit": row.unit, "attached": row.fast, "detached": row.kernel, "ratio": row.ratio,
        })
    };
    json!({
        "nodes": findings.nodes.iter().map(node).collect::<Vec<_>>(),
        "leases": findings.leases.iter().map(|(key, value)| json!({"key": key, "value": value})).collect::<Vec<_>>(),
        "pairs": {
            "tried": findings.reach.pairs.len(),
            "reached": findings.reach.pairs.len() - failed.len(),
            "failed": failed,
        },
        "bulk": bulk(&findings.bulk),
        // Without IPv6: null.
        "bulk_ipv6": findings.bulk6.as_ref().map(bulk),
        "comparison": findings.comparison.iter().map(comparison).collect::<Vec<_>>(),
        "leftovers": leftovers,
    })
}

/// Prints the end of each agent's log.
pub(super) fn show_logs(cluster: &Cluster) {
    for node in &cluster.nodes {
        let log = node.log();
        let from = log.lines().count().saturating_sub(15);
        eprintln!("--- the end of the agent's log on {}", node.name());
        for line in log.lines().skip(from) {
            eprintln!("{line}");
        }
    }
}
