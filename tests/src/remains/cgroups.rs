//! Cgroups, which outlive the processes that were in them.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The topmost cgroups whose names begin so, in whatever hierarchies this host has.
pub(crate) fn named(prefix: &str) -> io::Result<Vec<PathBuf>> {
    let root = Path::new("/sys/fs/cgroup");
    let mut found = Vec::new();
    // One hierarchy at the root (cgroup v2), or one in each directory (v1).
    for hierarchy in [root.to_owned()].into_iter().chain(directories(root)?) {
        let groups = directories(&hierarchy)?;
        found.extend(groups.into_iter().filter(|group| {
            group.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(prefix))
        }));
    }
    Ok(found)
}

/// Removes a cgroup with those below it.
///
/// # Errors
///
/// Where one still has processes.
pub(crate) fn remove(group: &Path) -> io::Result<()> {
    directories(group)?.iter().try_for_each(|below| remove(below))?;
    fs::remove_dir(group)
}

/// Those below; none where it has gone meanwhile.
fn directories(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let is_directory = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    Ok(entries.flatten().filter(is_directory).map(|entry| entry.path()).collect())
}
