//! What must be the same on the host itself after a run: its rules, its devices, its pins, the kernel's maps.

use std::{collections::BTreeSet, path::Path, time::Duration};

use anyhow::Result;

use crate::{netns::run, process::wait_for};

/// Where an agent that is told nothing else pins.
const DEFAULT_PINS: &str = "/sys/fs/bpf/loden";

/// Everything of ours that the host's own namespace could have. Empty on a host that runs no agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host(BTreeSet<String>);

impl Host {
    /// Looks now.
    ///
    /// # Errors
    ///
    /// Where a program is missing.
    pub fn now() -> Result<Self> {
        let ours = |line: &&str| {
            let line = line.to_lowercase();
            ["flannel", "loden"].iter().any(|name| line.contains(name))
        };
        let rules = run("nft", &["list", "ruleset"])?;
        let links = run("ip", &["-oneline", "link", "show"])?;
        let routes = run("ip", &["route", "show", "table", "all"])?;
        let mut seen = BTreeSet::new();
        for (what, text) in [("rule", rules), ("device", links), ("route", routes)] {
            seen.extend(text.lines().filter(ours).map(|line| format!("{what} {}", line.trim())));
        }
        seen.extend(Path::new(DEFAULT_PINS).exists().then(|| format!("pin {DEFAULT_PINS}")));
        Ok(Self(seen))
    }

    /// What is there now and was not earlier.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Vec<String> {
        self.0.difference(&earlier.0).cloned().collect()
    }
}

/// The ids of the maps that are pinned below a directory. Ids are given only once, so that a map that is still
/// there later is this one.
///
/// # Errors
///
/// Where the directory cannot be read.
pub fn pinned_maps(directory: &Path) -> Result<Vec<u64>> {
    let mut ids = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            ids.extend(pinned_maps(&path)?);
        } else if let Ok(text) = run("bpftool", &["-j", "map", "show", "pinned", &path.display().to_string()])
        {
            // Links are pinned beside the maps; bpftool refuses those here.
            let map: serde_json::Value = serde_json::from_str(&text)?;
            ids.extend(map["id"].as_u64());
        }
    }
    Ok(ids)
}

/// Names the maps that are still there after the kernel had time to free them (programs that are attached
/// somewhere hold theirs).
#[must_use]
pub fn maps_left(ids: &[u64]) -> Vec<String> {
    let left = |id: &&u64| run("bpftool", &["map", "show", "id", &id.to_string()]).is_ok();
    let gone = wait_for("the maps to go", Duration::from_secs(3), || {
        (!ids.iter().any(|id| left(&id))).then_some(())
    });
    match gone {
        Ok(()) => Vec::new(),
        Err(_) => ids.iter().filter(left).map(|id| format!("map {id}")).collect(),
    }
}
