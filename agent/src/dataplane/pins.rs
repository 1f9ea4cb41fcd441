//! Where links and maps are pinned.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use loden_ebpf::abi::{ABI_VERSION, map};
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::{DataplaneError, Hook, clsact};

/// The maps that outlive the agent. The ring buffer does not: what it carried is in SIGHTINGS too.
pub(super) const PINNED_MAPS: [&str; 7] =
    [map::PEERS, map::VTEPS, map::ENDPOINTS, map::FLOWS, map::EPOCH, map::COUNTERS, map::SIGHTINGS];

/// The pins of one agent: `<bpffs-dir>/v1/<MAP>`, `<bpffs-dir>/v1/links/<program>-<ifindex>`, and, where the kernel
/// has no TCX, records of filters: `<bpffs-dir>/v1/filters/<program>-<ifindex>`.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
}

impl Pins {
    /// The pins below a directory; nothing is touched.
    #[must_use]
    pub fn below(bpffs_dir: &Path) -> Self {
        Self { root: bpffs_dir.join(format!("v{ABI_VERSION}")) }
    }

    /// Makes the directories, mounting a BPF file system first where there is none.
    ///
    /// # Errors
    ///
    /// Where that is refused.
    pub(super) fn prepare(&self, bpffs_dir: &Path) -> Result<(), DataplaneError> {
        let parent = bpffs_dir.parent().filter(|_| !bpffs_dir.exists()).unwrap_or(bpffs_dir);
        let refused = |source: io::Error| DataplaneError::Bpffs { path: parent.to_owned(), source };
        if !is_bpffs(parent) {
            fs::create_dir_all(parent).map_err(refused)?;
            mount(Some("bpf"), parent, Some("bpf"), MsFlags::empty(), None::<&str>)
                .map_err(|errno| refused(errno.into()))?;
        }
        for directory in [self.links(), self.filters()] {
            fs::create_dir_all(&directory)
                .map_err(|source| DataplaneError::Pin { path: directory, source })?;
        }
        Ok(())
    }

    /// The pin of a map.
    #[must_use]
    pub fn map(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The pin of a link.
    #[must_use]
    pub fn link(&self, hook: &Hook) -> PathBuf {
        self.links().join(hook.pin_name())
    }

    /// The record of a filter.
    #[must_use]
    pub fn filter(&self, hook: &Hook) -> PathBuf {
        self.filters().join(hook.pin_name())
    }

    /// The directory of the links' pins.
    #[must_use]
    pub fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    /// The directory of the filters' records.
    #[must_use]
    pub fn filters(&self) -> PathBuf {
        self.root.join("filters")
    }

    /// The hooks that have a pinned link, of this or an earlier agent.
    #[must_use]
    pub fn pinned_hooks(&self) -> Vec<Hook> {
        hooks_in(&self.links())
    }

    /// The hooks that have a filter, of this or an earlier agent.
    #[must_use]
    pub fn filter_hooks(&self) -> Vec<Hook> {
        hooks_in(&self.filters())
    }

    /// Removes a pin; that it is gone already is fine.
    ///
    /// # Errors
    ///
    /// Where the file system refuses.
    pub(super) fn remove(path: &Path) -> Result<(), DataplaneError> {
        match fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(DataplaneError::Pin { path: path.to_owned(), source })
            }
            _ => Ok(()),
        }
    }
}

fn hooks_in(directory: &Path) -> Vec<Hook> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.flatten().filter_map(|entry| Hook::from_pin(entry.file_name().to_str()?)).collect()
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC)
}

/// Removes every filter and every pin below the directory: the programs are detached, the maps freed, and the kernel's own path
/// carries all packets from the next one on. Says what could not be removed, and goes on.
pub fn detach_all(bpffs_dir: &Path) -> Vec<DataplaneError> {
    let pins = Pins::below(bpffs_dir);
    let mut paths: Vec<PathBuf> = pins.pinned_hooks().iter().map(|hook| pins.link(hook)).collect();
    paths.extend(PINNED_MAPS.iter().map(|name| pins.map(name)));
    let mut errors: Vec<_> =
        pins.filter_hooks().into_iter().filter_map(|hook| clsact::detach(&pins, hook).err()).collect();
    errors.extend(paths.iter().filter_map(|path| Pins::remove(path).err()));
    // Directories last, and only where nothing of others is in them.
    for directory in [pins.links(), pins.filters(), pins.root.clone(), bpffs_dir.to_owned()] {
        match fs::remove_dir(&directory) {
            Ok(()) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::ResourceBusy
                ) => {}
            Err(source) => errors.push(DataplaneError::Pin { path: directory, source }),
        }
    }
    errors
}
