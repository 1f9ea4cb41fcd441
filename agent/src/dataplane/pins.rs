//! Where links and maps are pinned.

use std::{
    collections::BTreeSet,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use loden_ebpf::abi::{ABI_VERSION, map};
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::{DataplaneError, Hook, Program, clsact};

/// The maps that outlive the agent. Two ring buffers do not: what NEW_SIGHTINGS carried is in SIGHTINGS too, and what
/// TAKEN_TUPLES carried is told again.
pub(super) const PINNED_MAPS: [&str; 23] = [
    map::PEERS,
    map::VTEPS,
    map::ENDPOINTS,
    map::FLOWS,
    map::EPOCH,
    map::COUNTERS,
    map::PEER_TRAFFIC,
    map::ENDPOINT_TRAFFIC,
    map::SIGHTINGS,
    map::V6_PEERS,
    map::V6_VTEPS,
    map::V6_ENDPOINTS,
    map::V6_FLOWS,
    map::V6_PEER_TRAFFIC,
    map::V6_ENDPOINT_TRAFFIC,
    map::V6_SIGHTINGS,
    map::TRACING,
    map::TRACERS,
    map::TRACE_TALLY,
    map::VERDICTS[0],
    map::VERDICTS[1],
    map::VERDICTS[2],
    map::VERDICTS[3],
];

/// The pins of one agent: `<bpffs-dir>/v1/<MAP>`, `<bpffs-dir>/v1/links/<program>-<ifindex>`, and, where the kernel
/// has no TCX, records of filters: `<bpffs-dir>/v1/filters/<program>-<ifindex>`. The programs of pods' veths, for the
/// CNI plugin: `<bpffs-dir>/v1/programs/<subnet>/<program>`, the subnet as `10-5-1-0_24`: bpffs allows no dots.
///
/// Agents of another ABI version have a directory of their own beside it. Their maps are never read; their links
/// are taken over with the new programs in them, so that a change of version leaves no hook empty.
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

    /// The pins of every version below a directory, this one's first.
    fn every(bpffs_dir: &Path) -> Vec<Self> {
        let own = Self::below(bpffs_dir);
        let others = own.others();
        [vec![own], others].concat()
    }

    /// The pins of agents of other ABI versions, older and newer.
    pub(super) fn others(&self) -> Vec<Self> {
        let Some(Ok(entries)) = self.root.parent().map(fs::read_dir) else { return Vec::new() };
        let roots = entries.flatten().map(|entry| entry.path());
        roots.filter(|root| *root != self.root && is_version(root)).map(|root| Self { root }).collect()
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

    /// The directory that holds them all.
    #[must_use]
    pub(super) fn root(&self) -> &Path {
        &self.root
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

    /// The pin of a program that was loaded for this subnet.
    #[must_use]
    pub(super) fn program(&self, subnet: IpNet, program: Program) -> PathBuf {
        self.programs_for(subnet).join(program.name())
    }

    /// The directory of the programs that were loaded for this subnet.
    #[must_use]
    pub(super) fn programs_for(&self, subnet: IpNet) -> PathBuf {
        self.programs().join(subnet_name(subnet))
    }

    /// The subnets for which programs are pinned: one, but for the moment of a change.
    #[must_use]
    pub(super) fn program_subnets(&self) -> Vec<IpNet> {
        let Ok(entries) = fs::read_dir(self.programs()) else { return Vec::new() };
        entries.flatten().filter_map(|entry| subnet_of(entry.file_name().to_str()?)).collect()
    }

    /// Removes the programs that are pinned for a subnet.
    pub(super) fn remove_programs(&self, subnet: IpNet) -> Vec<DataplaneError> {
        remove_pins(&self.programs_for(subnet))
    }

    fn programs(&self) -> PathBuf {
        self.root.join("programs")
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

    /// Where the link of a hook is pinned, by an agent of this version or of another.
    pub(super) fn find_link(&self, hook: &Hook) -> Option<PathBuf> {
        let others = self.others();
        std::iter::once(self).chain(&others).map(|pins| pins.link(hook)).find(|pin| pin.exists())
    }

    /// Moves the pin of another version's link here; the link itself is not touched.
    pub(super) fn take_over(&self, found: &Path, hook: &Hook) -> Result<(), DataplaneError> {
        let pin = self.link(hook);
        if found == pin {
            return Ok(());
        }
        fs::rename(found, &pin).map_err(|source| DataplaneError::Pin { path: found.to_owned(), source })
    }

    /// Removes what agents of other versions have left, except the filters of these hooks, which hold our
    /// programs by now.
    pub(super) fn remove_others(&self, keep: &BTreeSet<Hook>) -> Vec<DataplaneError> {
        let others = self.others();
        if !others.is_empty() {
            tracing::info!("the programs of another version have been replaced; its maps are removed");
        }
        others.iter().flat_map(|pins| pins.clear(keep)).collect()
    }

    /// Removes every filter except these hooks', every pin, and the directories. Goes on past failures.
    fn clear(&self, keep: &BTreeSet<Hook>) -> Vec<DataplaneError> {
        let mut errors = Vec::new();
        for hook in self.filter_hooks() {
            let gone = if keep.contains(&hook) {
                remove_directory(&self.filter(&hook))
            } else {
                clsact::detach(self, hook)
            };
            errors.extend(gone.err());
        }
        errors.extend(self.program_subnets().into_iter().flat_map(|subnet| self.remove_programs(subnet)));
        for directory in [self.links(), self.filters(), self.programs(), self.root.clone()] {
            errors.extend(remove_pins(&directory));
        }
        errors
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

/// A subnet as the name of a directory.
fn subnet_name(subnet: IpNet) -> String {
    format!("{}_{}", subnet.network().to_string().replace(['.', ':'], "-"), subnet.prefix_len())
}

/// The subnet that a directory is named after.
fn subnet_of(name: &str) -> Option<IpNet> {
    let (address, len) = name.split_once('_')?;
    let v4 = address.replace('-', ".").parse().map(IpAddr::V4);
    let address = v4.or_else(|_| address.replace('-', ":").parse().map(IpAddr::V6)).ok()?;
    IpNet::new(address, len.parse().ok()?).ok()
}

fn hooks_in(directory: &Path) -> Vec<Hook> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.flatten().filter_map(|entry| Hook::from_pin(entry.file_name().to_str()?)).collect()
}

/// Removes the pins in a directory, and then the directory. Goes on past failures.
fn remove_pins(directory: &Path) -> Vec<DataplaneError> {
    let mut errors: Vec<_> = pins_in(directory).iter().filter_map(|pin| Pins::remove(pin).err()).collect();
    errors.extend(remove_directory(directory).err());
    errors
}

/// The files of a directory, not the directories.
fn pins_in(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.flatten().map(|entry| entry.path()).filter(|path| !path.is_dir()).collect()
}

/// Whether a directory is one version's: `v` and a number.
fn is_version(root: &Path) -> bool {
    let name = root.file_name().and_then(|name| name.to_str());
    name.and_then(|name| name.strip_prefix('v')).is_some_and(|number| number.parse::<u32>().is_ok())
}

/// Removes a directory; that it is gone already, in use as a mount point, or holds what is not ours, is fine.
fn remove_directory(directory: &Path) -> Result<(), DataplaneError> {
    match fs::remove_dir(directory) {
        Err(source)
            if !matches!(
                source.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::ResourceBusy
            ) =>
        {
            Err(DataplaneError::Pin { path: directory.to_owned(), source })
        }
        _ => Ok(()),
    }
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC)
}

/// Removes every filter and every pin below the directory, of this version and of others: the programs are
/// detached, the maps freed, and the kernel's own path carries all packets from the next one on. Says what could
/// not be removed, and goes on.
pub fn detach_all(bpffs_dir: &Path) -> Vec<DataplaneError> {
    let mut errors: Vec<_> =
        Pins::every(bpffs_dir).iter().flat_map(|pins| pins.clear(&BTreeSet::new())).collect();
    errors.extend(remove_directory(bpffs_dir).err());
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_named_after_a_subnet_of_either_family() {
        for (subnet, name) in [("10.5.1.0/24", "10-5-1-0_24"), ("fc00:0:0:22::/64", "fc00-0-0-22--_64")] {
            let subnet = subnet.parse().unwrap();
            assert_eq!(subnet_name(subnet), name);
            assert_eq!(subnet_of(name), Some(subnet));
        }
        assert_eq!(subnet_of("10-5-1-0_24-new"), None);
    }

    #[test]
    fn a_version_is_v_and_a_number() {
        for (name, expected) in [("v1", true), ("v12", true), ("v", false), ("links", false), ("vx", false)] {
            assert_eq!(is_version(&Path::new("/sys/fs/bpf/loden").join(name)), expected, "{name}");
        }
    }
}
