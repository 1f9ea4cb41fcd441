//! What a process of ours has made on this machine, told by its process id: found, and removed by force.
//!
//! Namespaces are named `ld-<pid>-…`, directories `/tmp/loden-<pid>-…`, cgroups `loden-<pid>-…`, and every mount is
//! below such a directory.

pub(crate) mod cgroups;
pub mod host;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use crate::netns::run;

/// Makes an empty directory that is found as this process's, and is removed with its value.
///
/// # Errors
///
/// Where the directory for temporary files cannot be written.
pub fn directory(label: &str) -> Result<TempDir> {
    let prefix = format!("{}{label}-", directory_prefix(std::process::id()));
    tempfile::Builder::new().prefix(&prefix).tempdir().context("no temporary directory")
}

/// Names, one a line, everything that the process has made and that is still there.
///
/// # Errors
///
/// Where the machine cannot be asked.
pub fn of(pid: u32) -> Result<Vec<String>> {
    let namespaces = namespaces(pid)?;
    let mut remains: Vec<String> = namespaces.iter().map(|name| format!("namespace {name}")).collect();
    remains.extend(mounts(pid)?.iter().map(|path| format!("mount {}", path.display())));
    remains.extend(directories(pid)?.iter().map(|path| format!("directory {}", path.display())));
    let processes: BTreeSet<i32> = children(pid).into_iter().chain(mentioning(pid)?).collect();
    remains.extend(processes.iter().map(|process| format!("process {process}")));
    remains.extend(
        cgroups::named(&directory_prefix(pid))?.iter().map(|path| format!("cgroup {}", path.display())),
    );
    let links = run("ip", &["-oneline", "link", "show"])?;
    let prefix = namespace_prefix(pid);
    remains.extend(links.lines().filter(|line| line.contains(&prefix)).map(|line| format!("device {line}")));
    Ok(remains)
}

/// Removes everything that [`of`] names: ends the processes, then removes the namespaces, mounts and
/// directories. Goes on after a failure.
///
/// # Errors
///
/// All failures in one message.
pub fn remove(pid: u32) -> Result<()> {
    let mut failures = Vec::new();
    for name in namespaces(pid)? {
        let processes = run("ip", &["netns", "pids", &name]).unwrap_or_default();
        processes.split_whitespace().filter_map(|id| id.parse().ok()).for_each(end);
        failures.extend(run("ip", &["netns", "del", &name]).err());
    }
    mentioning(pid)?.into_iter().for_each(end);
    for group in cgroups::named(&directory_prefix(pid))? {
        failures.extend(cgroups::remove(&group).with_context(|| group.display().to_string()).err());
    }
    for path in mounts(pid)? {
        failures.extend(run("umount", &[&path.display().to_string()]).err());
    }
    for path in directories(pid)? {
        failures.extend(fs::remove_dir_all(&path).with_context(|| path.display().to_string()).err());
    }
    let failures: Vec<String> = failures.iter().map(|failure| format!("{failure:#}")).collect();
    anyhow::ensure!(failures.is_empty(), "{}", failures.join("; "));
    Ok(())
}

/// The processes that have ended and left something behind: a kept demo, or a run that was killed.
///
/// # Errors
///
/// Where the machine cannot be asked.
pub fn owners() -> Result<BTreeSet<u32>> {
    let id = |name: &String| name.split('-').nth(1).and_then(|id| id.parse::<u32>().ok());
    let namespaces = entries(Path::new("/run/netns"), "ld-")?;
    let directories = entries(&std::env::temp_dir(), "loden-")?;
    let owners = namespaces.iter().chain(&directories).filter_map(id);
    Ok(owners.filter(|id| !Path::new("/proc").join(id.to_string()).exists()).collect())
}

fn namespace_prefix(pid: u32) -> String {
    format!("ld-{pid}-")
}

fn directory_prefix(pid: u32) -> String {
    format!("loden-{pid}-")
}

fn namespaces(pid: u32) -> Result<Vec<String>> {
    entries(Path::new("/run/netns"), &namespace_prefix(pid))
}

fn directories(pid: u32) -> Result<Vec<PathBuf>> {
    let root = std::env::temp_dir();
    Ok(entries(&root, &directory_prefix(pid))?.iter().map(|name| root.join(name)).collect())
}

fn entries(directory: &Path, prefix: &str) -> Result<Vec<String>> {
    if !directory.exists() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        names.extend(entry?.file_name().into_string().ok().filter(|name| name.starts_with(prefix)));
    }
    names.sort();
    Ok(names)
}

fn mounts(pid: u32) -> Result<Vec<PathBuf>> {
    let prefix = std::env::temp_dir().join(directory_prefix(pid)).display().to_string();
    let table = fs::read_to_string("/proc/self/mounts")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(1));
    Ok(points.filter(|point| point.starts_with(&prefix)).map(PathBuf::from).collect())
}

fn end(process: i32) {
    // It may have ended since it was listed.
    let _ = kill(Pid::from_raw(process), Signal::SIGKILL);
}

/// The processes that were started with a file below one of the directories: etcd, agents.
fn mentioning(pid: u32) -> Result<Vec<i32>> {
    let prefix = std::env::temp_dir().join(directory_prefix(pid)).display().to_string();
    let mentions = |id: &i32| {
        let words = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&words).split('\0').any(|word| word.starts_with(&prefix))
    };
    let ids = fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    Ok(ids.filter(mentions).collect())
}

/// Only a living process has children; those of one that has ended are found by what they mention.
fn children(pid: u32) -> Vec<i32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let lists =
        threads.flatten().filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    let ids = lists.flat_map(|list| list.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
    ids.filter(|id| !is_zombie(id)).filter_map(|id| id.parse().ok()).collect()
}

/// Whether the process has ended and only its parent has not asked for its status yet.
fn is_zombie(id: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    // The name before the state may hold anything, a bracket too (proc(5)).
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z'))
}
