//! What the kernel can load, what is attached, what is pinned.

use super::few;
use crate::{
    dataplane::{Attached, Program},
    doctor::{
        finding::Finding,
        snapshot::{Programs, Snapshot},
    },
};

const REMEDY: &str = "a running agent attaches and pins it again within 30 s: start it, or see its log";

pub(super) fn examine(snapshot: &Snapshot) -> Vec<Finding> {
    let Some(programs) = &snapshot.programs else {
        return vec![kernel_alone(snapshot)];
    };
    vec![kernel(programs), attached(programs), pins(programs)]
}

/// No programs: because that was asked for, or because something is missing.
fn kernel_alone(snapshot: &Snapshot) -> Finding {
    let why = snapshot.facts.kernel_alone.as_deref().unwrap_or_default();
    if why.starts_with("--datapath=kernel") {
        return Finding::ok("kernel", "no programs, as --datapath=kernel asks");
    }
    Finding::warning(
        "kernel",
        format_args!("the kernel alone carries the packets: {why}"),
        "a newer kernel, or the permission that is named; or --datapath=kernel, if this is as you want it",
    )
}

fn kernel(programs: &Programs) -> Finding {
    match &programs.loadable {
        Err(why) => Finding::fault(
            "kernel",
            format_args!("the programs do not load: {why}"),
            "see what is named here",
        ),
        Ok(tags) => {
            let btf = if programs.btf { "" } else { "; no BTF of the kernel, so bpftool shows less" };
            Finding::ok("kernel", format_args!("loads all {} programs{btf}", tags.len()))
        }
    }
}

fn attached(programs: &Programs) -> Finding {
    const CHECK: &str = "programs";
    let none = std::collections::BTreeMap::new();
    let tags = programs.loadable.as_ref().unwrap_or(&none);
    let (mut missing, mut other, mut unknown) = (Vec::new(), Vec::new(), Vec::new());
    for (hook, interface, found) in &programs.hooks {
        let name = format!("{} at {interface}", hook.program.name());
        match found {
            Attached::Missing => missing.push(name),
            Attached::Unknown(why) => unknown.push(format!("{name}: {why}")),
            Attached::Tag(tag) if tags.get(&hook.program).is_some_and(|ours| ours != tag) => other.push(name),
            Attached::Tag(_) | Attached::Recorded => {}
        }
    }
    if !missing.is_empty() {
        return Finding::fault(CHECK, format_args!("not attached: {}", few(&missing)), REMEDY);
    }
    if !other.is_empty() {
        return Finding::warning(
            CHECK,
            format_args!("of another version than this command: {}", few(&other)),
            "restart the agent: it swaps them in place",
        );
    }
    if !unknown.is_empty() {
        return Finding::unknown(CHECK, few(&unknown));
    }
    let pods = programs.hooks.iter().filter(|(hook, ..)| hook.program == Program::FromPod).count();
    Finding::ok(CHECK, format_args!("{} attached, {pods} pods among them", programs.hooks.len()))
}

fn pins(programs: &Programs) -> Finding {
    if programs.unpinned.is_empty() {
        return Finding::ok("pins", "every map is pinned");
    }
    Finding::fault("pins", format_args!("not pinned: {}", few(&programs.unpinned)), REMEDY)
}
