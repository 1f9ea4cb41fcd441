//! `<run-dir>/state.json`: what the agent has made or changed on this host, so that `loden cleanup` can undo it
//! after the agent is gone and the next agent finds what peers know of this node.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::durable_file;

/// What there is to undo, and to keep.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Name of the VXLAN or WireGuard device.
    pub device: Option<String>,
    /// Name of the VXLAN device with an IPv6 underlay, or of IPv6's WireGuard device.
    #[serde(default)]
    pub device_v6: Option<String>,
    /// Names of overlay devices that were made for an earlier network config and are still to be removed.
    #[serde(default)]
    pub stale_devices: BTreeSet<String>,
    /// The networks into which routes were made: others' routes may carry Loden's protocol number too.
    #[serde(default)]
    pub networks: BTreeSet<IpNet>,
    /// Sysctls that were changed, with what they were before the first agent changed them.
    #[serde(default)]
    pub sysctls: BTreeMap<String, String>,
    /// MAC addresses of the VXLAN devices, by name: peers send to them, so a device that was deleted while no agent ran
    /// comes back with the one that it had.
    #[serde(default)]
    pub vtep_macs: BTreeMap<String, [u8; 6]>,
}

impl State {
    /// Reads the file; a missing one is an empty state, and so is an empty file, which a crash may leave.
    ///
    /// # Errors
    ///
    /// Where it cannot be read, or is not what an agent writes.
    pub fn read(run_dir: &Path) -> Result<Self> {
        let path = path(run_dir);
        match fs::read(&path) {
            Ok(bytes) if bytes.is_empty() => {
                tracing::warn!("{} is empty: what an earlier agent noted in it is lost", path.display());
                Ok(Self::default())
            }
            Ok(bytes) => serde_json::from_slice(&bytes)
                .with_context(|| format!("{} is not an agent's state; remove it", path.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| path.display().to_string()),
        }
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    ///
    /// Where the directory cannot be written.
    pub fn write(&self, run_dir: &Path) -> Result<()> {
        let path = path(run_dir);
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        durable_file::replace(&path, &text, 0o600).with_context(|| path.display().to_string())
    }

    /// Removes the file.
    ///
    /// # Errors
    ///
    /// Where it cannot be removed; that it is gone already is fine.
    pub fn remove(run_dir: &Path) -> Result<()> {
        let path = path(run_dir);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| path.display().to_string())
            }
            _ => Ok(()),
        }
    }

    /// Notes which devices the agent has now. Those that it had before and has no longer are stale.
    pub fn note_devices(&mut self, device: Option<String>, device_v6: Option<String>) {
        self.stale_devices.extend(self.device.take());
        self.stale_devices.extend(self.device_v6.take());
        for device in device.iter().chain(&device_v6) {
            self.stale_devices.remove(device);
        }
        (self.device, self.device_v6) = (device, device_v6);
    }

    /// Notes what a sysctl was, if it was not noted before.
    pub fn note_sysctl(&mut self, name: &str, before: &str) {
        self.sysctls.entry(name.to_owned()).or_insert_with(|| before.to_owned());
    }
}

fn path(run_dir: &Path) -> PathBuf {
    run_dir.join("state.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_the_first_value_of_a_sysctl_stays() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(State::read(directory.path()).unwrap(), State::default());
        let mut state = State { device: Some("flannel.1".into()), ..State::default() };
        state.note_sysctl("net.ipv4.ip_forward", "0");
        state.note_sysctl("net.ipv4.ip_forward", "1");
        state.vtep_macs.insert("flannel.1".into(), [2, 0, 0, 0, 0, 1]);
        state.write(directory.path()).unwrap();
        let read = State::read(directory.path()).unwrap();
        assert_eq!(read, state);
        assert_eq!(read.sysctls["net.ipv4.ip_forward"], "0");
        State::remove(directory.path()).unwrap();
        State::remove(directory.path()).unwrap();
    }

    #[test]
    fn a_device_that_the_agent_has_no_longer_is_stale_until_it_has_it_again() {
        let name = |name: &str| Some(name.to_owned());
        let mut state = State::default();
        let mut stale_after = |device, device_v6| {
            state.note_devices(device, device_v6);
            state.stale_devices.iter().cloned().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(stale_after(name("flannel.1"), name("flannel-v6.1")), "");
        assert_eq!(stale_after(name("flannel.1"), name("flannel-v6.1")), "");
        assert_eq!(stale_after(name("flannel.2"), None), "flannel-v6.1 flannel.1");
        assert_eq!(stale_after(name("flannel.1"), None), "flannel-v6.1 flannel.2");
        assert_eq!(stale_after(None, None), "flannel-v6.1 flannel.1 flannel.2");
    }

    #[test]
    fn a_file_of_somebody_else_is_named() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("state.json"), "[1]").unwrap();
        let error = State::read(directory.path()).unwrap_err().to_string();
        assert!(error.contains("state.json is not an agent's state"), "{error}");
        fs::write(directory.path().join("state.json"), "").unwrap();
        assert_eq!(State::read(directory.path()).unwrap(), State::default(), "as after a crash");
    }
}
