//! Where a container runtime's processes live: a PID and a mount namespace of their own, with containerd in them.
//!
//! The kernel ends every process of a PID namespace with its first one, and its mounts go with the last: however a
//! test ends, no container and no overlay mount stays. `/run` is a file system of its own in there, because
//! containerd's shims have their sockets at a fixed path below it.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    netns::Netns,
    process::{Process, wait_for},
    remains::cgroups,
};

/// A running containerd in namespaces of its own.
#[derive(Debug)]
pub struct Room {
    process: Process,
    /// Process id, in the host's count, of the first process in there.
    first: i32,
    socket: PathBuf,
    cgroup: String,
}

impl Room {
    /// Starts containerd in the node's network namespace, with its files below `directory`. `cri` is the configuration
    /// (TOML) of its plugin for kubelets, which does not run where there is none.
    ///
    /// # Errors
    ///
    /// Where a program is missing, or containerd does not listen in time; the message holds its log.
    pub fn open(netns: &Netns, directory: &Path, cri: Option<&str>) -> Result<Self> {
        let path = |name: &str| directory.join(name).display().to_string();
        let disabled = if cri.is_some() { "" } else { "'io.containerd.grpc.v1.cri'" };
        let config = format!(
            "version = 2\nroot = '{}'\nstate = '{}'\ndisabled_plugins = [{disabled}]\n[grpc]\naddress = '{}'\n{}",
            path("containerd/root"),
            path("containerd/state"),
            path("containerd.sock"),
            cri.unwrap_or_default()
        );
        fs::write(directory.join("containerd.toml"), config)?;
        let log = File::create(directory.join("containerd.log"))?;
        let mut command = netns.command("unshare");
        command
            .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"])
            // Shims are orphans by design: somebody must ask for their status when they end.
            .arg("mount -t tmpfs tmpfs /run && exec docker-init -- containerd --config \"$0\"")
            .arg(path("containerd.toml"))
            .stdin(File::open("/dev/null")?)
            .stdout(log.try_clone()?)
            .stderr(log);
        let process = Process::start(&mut command)?;
        let first =
            wait_for("the room's first process", Duration::from_secs(5), || only_child(process.id()).ok())?;
        // Found by the process id that is in it, as namespaces and directories are.
        let cgroup = netns.name().replacen("ld-", "loden-", 1);
        let room = Self { process, first, socket: directory.join("containerd.sock"), cgroup };
        wait_for("containerd's socket", Duration::from_secs(20), || room.socket.exists().then_some(()))
            .with_context(|| fs::read_to_string(directory.join("containerd.log")).unwrap_or_default())?;
        Ok(room)
    }

    /// Process id, in the host's count, of the first process in there: of whom the namespaces are to be entered.
    #[must_use]
    pub fn first_process(&self) -> i32 {
        self.first
    }

    /// Where containerd listens.
    #[must_use]
    pub fn containerd(&self) -> &Path {
        &self.socket
    }

    /// The cgroup above those of its containers.
    #[must_use]
    pub fn cgroup(&self) -> String {
        format!("/{}", self.cgroup)
    }

    /// A process of the room as its own `/proc` shows it.
    #[must_use]
    pub fn proc(&self, pid: u64) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root/proc/{pid}", self.first))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // It may have ended by itself. The first process is gone only when all others are.
        let _ = kill(Pid::from_raw(self.first), Signal::SIGKILL);
        if let Err(error) = self.process.wait(Duration::from_secs(10)) {
            eprintln!("containers are left behind: {error:#}");
        }
        let groups = cgroups::named(&self.cgroup).unwrap_or_default();
        for error in groups.iter().filter_map(|group| cgroups::remove(group).err()) {
            eprintln!("cgroups {} are left behind: {error:#}", self.cgroup);
        }
    }
}

/// The one child of a process.
pub(crate) fn only_child(pid: u32) -> Result<i32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let children = fs::read_to_string(&path).with_context(|| path.clone())?;
    children.trim().parse().with_context(|| format!("{path} says {children:?}"))
}
