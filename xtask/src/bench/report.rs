//! What a run says at its end: a table for each kind of work, the goals, and the same as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::{
    goal::GOALS,
    mode::Mode,
    results::Section,
    statistics::Median,
    work::{Metric, Work},
};
use crate::table::table;

/// What every mode is compared with.
const BASES: [Mode; 3] = [Mode::Host, Mode::Direct, Mode::Flannel];

/// The tables.
pub(super) fn text(sections: &[Section]) -> String {
    let mut text =
        "medians over the rounds; [..]: an interval of order statistics that holds the true median of the\n\
         rounds' own ratios with at least 95 % (below 6 rounds: their range)\n"
            .to_owned();
    for section in sections {
        let _ = write!(
            text,
            "\n=== {}, {}: {} ===\n",
            section.family.title(),
            section.variant.title(),
            section.extent()
        );
        for work in section.works() {
            for (index, metric) in work.metrics().iter().enumerate() {
                let _ = write!(text, "\n{}\n{}\n", title(metric), work_table(section, work, index));
            }
        }
        if let Some(goals) = goals(section) {
            let _ = write!(text, "\ngoals\n{goals}\n");
        }
    }
    text
}

fn title(metric: &Metric) -> String {
    let better = if metric.is_cost { "less is better" } else { "more is better" };
    format!("{} ({}, {better})", metric.name, metric.unit)
}

fn work_table(section: &Section, work: Work, metric: usize) -> comfy_table::Table {
    let bases = BASES.map(|base| format!("to {}", base.name()));
    let cpu = format!("CPU us/{}", work.unit());
    let mut table =
        table(["mode", "median", &cpu, &bases[0], &bases[1], &bases[2], "fast", "resent", "lost"], 1);
    for mode in section.modes(work) {
        let samples = section.samples(work, mode);
        let median = section.value(work, mode, metric).value;
        let cpu = section.cpu_micros(work, mode);
        let ratio = |to| section.ratio(work, mode, to, metric).map_or_else(String::new, interval);
        let share = samples.iter().filter_map(|sample| sample.share).min_by(f64::total_cmp);
        let lost: u64 = samples.iter().map(|sample| sample.lost).sum();
        let mut row = vec![mode.name(), number(median), format!("{cpu:.3}")];
        row.extend(BASES.map(ratio));
        row.push(share.map_or_else(String::new, |share| format!("{share:.4}")));
        row.extend([section.resent(work, mode).to_string(), lost.to_string()]);
        table.add_row(row);
    }
    table
}

fn number(value: f64) -> String {
    if value < 1000.0 { format!("{value:.2}") } else { format!("{value:.0}") }
}

fn interval(Median { value, low, high }: Median) -> String {
    format!("{value:.2} [{low:.2} {high:.2}]")
}

/// What must be reached and what was, where this section measured any of it.
fn goals(section: &Section) -> Option<comfy_table::Table> {
    let mut table = table(["", "least", "measured", "", "redirect to the same"], 1);
    let mut any = false;
    for goal in GOALS {
        let Some(median) = goal.measured(section) else { continue };
        any = true;
        table.add_row([
            goal.title(),
            format!("{:.2}", goal.least),
            interval(median),
            if median.value >= goal.least { "reached" } else { "missed" }.to_owned(),
            goal.bound(section).map_or_else(String::new, interval),
        ]);
    }
    any.then_some(table)
}

/// Everything, with each round's own figures.
pub(super) fn json(sections: &[Section]) -> Value {
    json!({"sections": sections.iter().map(section_json).collect::<Vec<_>>()})
}

fn section_json(section: &Section) -> Value {
    let mut cells = Vec::new();
    for work in section.works() {
        for mode in section.modes(work) {
            for (index, metric) in work.metrics().iter().enumerate() {
                cells.push(cell(section, work, mode, index, metric));
            }
        }
    }
    let goals: Vec<Value> = GOALS
        .iter()
        .filter_map(|goal| {
            let median = goal.measured(section)?;
            let reached = median.value >= goal.least;
            Some(json!({"goal": goal.text(), "least": goal.least, "ratio": median_json(median), "reached": reached}))
        })
        .collect();
    json!({
        "family": section.family.title(),
        "variant": section.variant.title(),
        "extent": section.extent(),
        "discarded": section.discarded(),
        "cells": cells,
        "goals": goals,
    })
}

fn cell(section: &Section, work: Work, mode: Mode, index: usize, metric: &Metric) -> Value {
    let samples = section.samples(work, mode);
    let ratios: serde_json::Map<String, Value> = BASES
        .into_iter()
        .filter_map(|base| Some((base.name(), median_json(section.ratio(work, mode, base, index)?))))
        .collect();
    json!({
        "metric": metric.name,
        "unit": metric.unit,
        "less_is_better": metric.is_cost,
        "mode": mode.name(),
        "median": median_json(section.value(work, mode, index)),
        "ratios": ratios,
        "rounds": samples.iter().map(|sample| sample.values[index]).collect::<Vec<_>>(),
        "cpu_micros": samples.iter().map(|sample| sample.cpu_micros).collect::<Vec<_>>(),
        "retransmitted": samples.iter().map(|sample| sample.retransmitted).collect::<Vec<_>>(),
        "lost": samples.iter().map(|sample| sample.lost).collect::<Vec<_>>(),
        "fast_share": samples.iter().map(|sample| sample.share).collect::<Vec<_>>(),
    })
}

fn median_json(Median { value, low, high }: Median) -> Value {
    json!({"median": value, "low": low, "high": high})
}
