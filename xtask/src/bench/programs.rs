//! What the programs themselves cost: the kernel's own run-time statistics, in a run of their own since taking them
//! costs some 20 ns a run.

use std::{collections::BTreeMap, fs};

use anyhow::{Context as _, Result};
use aya::{
    programs::loaded_programs,
    sys::{Stats, enable_stats},
};
use loden_tests::{netns, node::Node};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    measure::{self, Servers},
    mode::Mode,
    plan::{Block, Family, Variant},
    stage::Stage,
    work::Work,
};
use crate::table::table;

/// The file of the results.
pub(super) const FILE: &str = "programs.json";

/// The mean run times of the programs in some work, nanoseconds by program.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Row {
    pub(super) family: Family,
    pub(super) variant: Variant,
    pub(super) mode: Mode,
    pub(super) work: Work,
    pub(super) means: BTreeMap<String, f64>,
}

/// Runs and time of a program.
type Runs = (u64, std::time::Duration);

/// Runs each kind of work of a block once in each of its modes that has programs: a table of their mean run times.
///
/// # Errors
///
/// Where the kernel does not tell.
pub(super) fn measure(stage: &Stage, block: &Block, millis: u64) -> Result<Vec<Row>> {
    let (table, rows) = tables(stage, block, millis)?;
    println!("{}, {}\n{table}", block.family.title(), block.variant.title());
    Ok(rows)
}

fn tables(stage: &Stage, block: &Block, millis: u64) -> Result<(comfy_table::Table, Vec<Row>)> {
    let mut table = table(["work", "mode", "program", "runs", "ns a run"], 3);
    let mut rows = Vec::new();
    // The kernel counts for as long as this is open.
    let _counting = enable_stats(Stats::RunTime).context("run-time statistics")?;
    let is_meant = |mode: Mode| mode.is_fast() && block.modes.contains(&mode);
    for pair in stage.pairs.iter().filter(|pair| is_meant(pair.mode)) {
        let _servers = Servers::start(pair, block.family, block.variant)?;
        let Some((nodes, _)) = pair.loden_nodes() else { continue };
        let ids = attached(nodes)?;
        for &work in block.works.iter().filter(|work| !work.is_through_service()) {
            let before = runs(&ids)?;
            measure::run(pair, work, block.family, block.variant, millis)?;
            let mut means = BTreeMap::new();
            for (name, (count, time)) in runs(&ids)? {
                let (count_before, time_before) = before.get(&name).copied().unwrap_or_default();
                let (count, time) = (count - count_before, time - time_before);
                if count > 0 {
                    // Exact below 2^53 ns.
                    let each = time.as_nanos() as f64 / count as f64;
                    let title = work.metrics()[0].name.to_owned();
                    means.insert(name.clone(), each);
                    table.add_row([title, pair.mode.name(), name, count.to_string(), format!("{each:.0}")]);
                }
            }
            rows.push(Row { family: block.family, variant: block.variant, mode: pair.mode, work, means });
        }
    }
    Ok((table, rows))
}

/// The ids of the programs that these nodes' pinned links attach.
fn attached(nodes: &[Node]) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for node in nodes {
        for version in fs::read_dir(node.bpffs())? {
            let links = version?.path().join("links");
            if !links.is_dir() {
                continue;
            }
            for link in fs::read_dir(links)? {
                let path = link?.path().display().to_string();
                let text = netns::run("bpftool", &["-j", "link", "show", "pinned", &path])?;
                let link: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
                let id = link["prog_id"].as_u64().and_then(|id| u32::try_from(id).ok());
                ids.push(id.with_context(|| format!("{path} attaches no program: {text}"))?);
            }
        }
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// Runs so far of these programs, those of one name added up.
fn runs(ids: &[u32]) -> Result<BTreeMap<String, Runs>> {
    let mut sums = BTreeMap::<String, Runs>::new();
    for program in loaded_programs() {
        // Others' programs come and go meanwhile.
        let Ok(program) = program else { continue };
        if ids.contains(&program.id()) {
            let name = program.name_as_str().unwrap_or("?").to_owned();
            let sum = sums.entry(name).or_default();
            *sum = (sum.0 + program.run_count(), sum.1 + program.run_time());
        }
    }
    Ok(sums)
}
