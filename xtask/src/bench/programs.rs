//! What the programs themselves cost: the kernel's own run-time statistics, in a run of their own since taking them
//! costs some 20 ns a run.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result};
use aya::{
    programs::loaded_programs,
    sys::{Stats, enable_stats},
};
use loden_tests::{netns, node::Node};
use serde_json::Value;

use super::{
    Program, Variant, figures,
    measure::{self, Servers},
    stage::Stage,
};
use crate::table::table;

/// Runs and time of a program.
type Runs = (u64, std::time::Duration);

/// Runs each kind of work once in each mode that has programs: tables of their mean run times, and a block for the
/// documents of those with both ends on one CPU.
///
/// # Errors
///
/// Where the kernel does not tell.
pub(super) fn run_times(stage: &Stage, program: &Program, out: &Path) -> Result<()> {
    for &variant in &program.variants {
        let (table, block) = tables(stage, program, variant)?;
        println!("{}\n{table}", variant.title());
        if variant == Variant::OneCpu {
            figures::save(out, "programs", &block)?;
        }
    }
    Ok(())
}

fn tables(stage: &Stage, program: &Program, variant: Variant) -> Result<(comfy_table::Table, String)> {
    let mut table = table(["work", "mode", "program", "runs", "ns a run"], 3);
    let mut block = format!(
        "{}.\n\n| mode | work | `from_pod` | `from_wire` |\n| --- | --- | ---: | ---: |\n",
        figures::machine()?
    );
    // The kernel counts for as long as this is open.
    let _counting = enable_stats(Stats::RunTime).context("run-time statistics")?;
    for pair in stage.pairs.iter().filter(|pair| pair.mode.is_fast()) {
        let _servers = Servers::start(pair, variant)?;
        let Some((nodes, _)) = pair.loden_nodes() else { continue };
        let ids = attached(nodes)?;
        for &work in program.works.iter().filter(|work| !work.is_through_service()) {
            let before = runs(&ids)?;
            measure::run(pair, work, variant, program.millis)?;
            let mut means = BTreeMap::new();
            for (name, (count, time)) in runs(&ids)? {
                let (count_before, time_before) = before.get(&name).copied().unwrap_or_default();
                let (count, time) = (count - count_before, time - time_before);
                if count > 0 {
                    // Exact below 2^53 ns.
                    let each = time.as_nanos() as f64 / count as f64;
                    let title = work.metrics()[0].name.to_owned();
                    means.insert(name.clone(), format!("{each:.0}"));
                    table.add_row([title, pair.mode.name(), name, count.to_string(), format!("{each:.0}")]);
                }
            }
            let mean = |name: &str| means.get(name).map_or("", String::as_str);
            let (mode, title) = (pair.mode.name(), work.metrics()[0].name);
            let _ = writeln!(block, "| {mode} | {title} | {} | {} |", mean("from_pod"), mean("from_wire"));
        }
    }
    Ok((table, block))
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
