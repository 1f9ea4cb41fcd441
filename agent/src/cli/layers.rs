//! Where a flag's value comes from when several places give one. The first of these that gives it counts:
//!
//! 1. the command line;
//! 2. `FLANNEL_OPTIONS`, a line of flags, as the packaged `/etc/sysconfig/flanneld` has it;
//! 3. the flag's own variable: `FLANNELD_` and the name (`FLANNELD_ETCD_ENDPOINTS`) for flannel's flags,
//!    `LODEN_` and the name for ours;
//! 4. `FLANNEL_ETCD_ENDPOINTS` or `FLANNEL_ETCD` for `--etcd-endpoints`, `FLANNEL_ETCD_PREFIX` or
//!    `FLANNEL_ETCD_KEY` for `--etcd-prefix`, from the same packaged file; flannel's `WIREGUARD_KEY_FILE` for
//!    `--wireguard-key-file`.
//!
//! Empty variables are as good as unset ones. A repeatable flag is taken from one place, never joined.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};

use super::agent::LODEN;
use super::words::{self, Flags, Word};

/// Variables without a prefix: the packaged file's, the newer name of each first, and flannel's for the key.
const PACKAGED: [(&str, &str); 5] = [
    ("FLANNEL_ETCD_ENDPOINTS", "etcd-endpoints"),
    ("FLANNEL_ETCD", "etcd-endpoints"),
    ("FLANNEL_ETCD_PREFIX", "etcd-prefix"),
    ("FLANNEL_ETCD_KEY", "etcd-prefix"),
    ("WIREGUARD_KEY_FILE", "wireguard-key-file"),
];

/// The words of one place.
#[derive(Debug)]
pub(super) struct Layer {
    /// The variable's name; `None` for the command line.
    pub(super) origin: Option<String>,
    words: Vec<Word>,
}

impl Layer {
    /// The words for clap: those that set a flag to nothing are left out.
    pub(super) fn words(&self) -> Vec<OsString> {
        self.words.iter().filter_map(|word| word.text.clone()).collect()
    }
}

/// Gathers all layers, each without the flags that an earlier one gives. `own` are the flags of the command that was
/// given; the environment is written for the agent, whose flags are `agents`, and what the command does not know of it
/// is left out.
pub(super) fn collect(
    given: Vec<Word>,
    own: &Flags,
    agents: &Flags,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Vec<Layer>, String> {
    let env = |name: &str| env(name).filter(|value| !value.is_empty());
    let mut seen = BTreeSet::new();
    let mut layers = Vec::new();
    let mut add = |origin: Option<String>, words: Vec<Word>| {
        let words: Vec<Word> = words
            .into_iter()
            .filter(|word| word.flag.as_ref().is_none_or(|flag| !seen.contains(flag) && own.knows(flag)))
            .collect();
        seen.extend(words.iter().filter_map(|word| word.flag.clone()));
        layers.push(Layer { origin, words });
    };

    add(None, given);
    if let Some(line) = env("FLANNEL_OPTIONS") {
        let wrong = |reason: &dyn std::fmt::Display| format!("FLANNEL_OPTIONS: {reason}");
        let words = words::split_line(&line).map_err(|reason| wrong(&reason))?;
        let words = words::normalise(words.into_iter().map(OsString::from).collect(), agents)
            .map_err(|reason| wrong(&reason))?;
        add(Some("FLANNEL_OPTIONS".into()), words);
    }
    for (flag, heading) in agents.listed() {
        let owner = if heading == Some(LODEN) { "LODEN" } else { "FLANNELD" };
        let name = format!("{owner}_{}", flag.replace('-', "_").to_uppercase());
        if let Some(value) = env(&name) {
            add(Some(name), vec![Word::set(flag, OsStr::new(&value))]);
        }
    }
    for (name, flag) in PACKAGED {
        if let Some(value) = env(name) {
            add(Some(name.into()), vec![Word::set(flag, OsStr::new(&value))]);
        }
    }
    Ok(layers)
}
