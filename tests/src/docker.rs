//! A real Docker engine on a node: containerd and dockerd, as Debian's docker.io brings them.
//!
//! dockerd runs in the node's network namespace, so that its bridge, its rules and the ports that it publishes are
//! the node's. See [`crate::room`] for what keeps the rest away from the host.

mod container;

use std::{
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

pub use self::container::DockerContainer;
use crate::{
    netns,
    node::Node,
    process::{Process, wait_for},
    room::{self, Room},
};

/// The image that every engine has from the start: busybox and nothing else.
pub const IMAGE: &str = "busybox";

/// What a container runs that only has to be there.
const IDLE: [&str; 3] = ["/bin/busybox", "sleep", "1000000"];

/// How long dockerd may take to answer.
const READY: Duration = Duration::from_secs(30);

/// A running engine. Dropping it ends it with all its containers, at once.
#[derive(Debug)]
pub struct Engine {
    daemon: Option<Process>,
    room: Room,
    node: String,
    netns: PathBuf,
    directory: PathBuf,
}

impl Engine {
    /// Starts containerd, and dockerd with these options besides those that keep its files below the node's, and
    /// imports [`IMAGE`].
    ///
    /// # Errors
    ///
    /// Where a program is missing, or dockerd does not answer in time; the message holds the end of its log.
    pub fn start(node: &Node, options: &[&str]) -> Result<Self> {
        let directory = node.directory().join("docker");
        fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
        fs::write(directory.join("daemon.json"), "{}\n")?;
        let room = Room::open(node.netns(), &directory, None)?;
        let mut engine =
            Self { daemon: None, room, node: node.name().to_owned(), netns: node.netns().path(), directory };
        engine.start_daemon(options)?;
        engine.import_busybox()?;
        Ok(engine)
    }

    /// Starts dockerd again after it was ended, perhaps with other options.
    ///
    /// # Errors
    ///
    /// As [`Self::start`], and where it runs.
    pub fn start_daemon(&mut self, options: &[&str]) -> Result<()> {
        ensure!(self.daemon.is_none(), "{} has a dockerd already", self.node);
        // A killed one leaves its file behind, with a number that another process may have by now.
        let _ = fs::remove_file(self.directory.join("dockerd.pid"));
        let log = OpenOptions::new().create(true).append(true).open(self.directory.join("dockerd.log"))?;
        let path = |name: &str| self.directory.join(name).display().to_string();
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.room.first_process().to_string(), "--pid", "--mount"])
            .arg(format!("--net={}", self.netns.display()))
            .arg("dockerd")
            .args(["--containerd", &self.room.containerd().display().to_string()])
            .args(["--host", &self.address()])
            .args(["--config-file", &path("daemon.json"), "--pidfile", &path("dockerd.pid")])
            .args(["--data-root", &path("data"), "--exec-root", &path("exec")])
            .args(["--cgroup-parent", &self.room.cgroup()])
            .args(options)
            .stdin(fs::File::open("/dev/null")?)
            .stdout(log.try_clone()?)
            .stderr(log);
        self.daemon = Some(Process::start(&mut command)?);
        let ready = wait_for("dockerd to answer", READY, || {
            let ended = self.daemon.as_mut().is_none_or(|daemon| !matches!(daemon.ended(), Ok(None)));
            let answer = self.docker("version --format {{.Server.Version}}");
            (ended || answer.is_ok()).then_some(answer)
        });
        ready
            .and_then(|answer| answer)
            .map(drop)
            .with_context(|| format!("{}: {}", self.node, self.log_end()))
    }

    /// Asks dockerd to end (SIGTERM) and waits until it has.
    ///
    /// # Errors
    ///
    /// Where it takes more than half a minute.
    pub fn stop_daemon(&mut self) -> Result<()> {
        self.end_daemon(Signal::SIGTERM)
    }

    /// Ends dockerd at once (SIGKILL), as a crash does; containers go on.
    ///
    /// # Errors
    ///
    /// Where none runs.
    pub fn kill_daemon(&mut self) -> Result<()> {
        self.end_daemon(Signal::SIGKILL)
    }

    fn end_daemon(&mut self, signal: Signal) -> Result<()> {
        let mut entered = self.daemon.take().with_context(|| format!("{} has no dockerd", self.node))?;
        // nsenter waits for what it has started in the room.
        let daemon = room::only_child(entered.id())?;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(daemon), signal)?;
        entered.wait(READY).map(drop)
    }

    /// Where clients find it, for `DOCKER_HOST`.
    #[must_use]
    pub fn address(&self) -> String {
        format!("unix://{}", self.directory.join("docker.sock").display())
    }

    /// Runs `docker` with these words, split at blanks, and returns what it prints, without the last line's end.
    ///
    /// # Errors
    ///
    /// Where it fails; the message holds what it printed.
    pub fn docker(&self, words: &str) -> Result<String> {
        let mut command = self.client();
        command.args(words.split_whitespace());
        Ok(netns::output(&mut command)?.trim_end().to_owned())
    }

    /// The client, with nothing of this host's configuration.
    fn client(&self) -> Command {
        let mut command = Command::new("docker");
        command.env("DOCKER_HOST", self.address()).env("DOCKER_CONFIG", self.directory.join("client"));
        command.env_remove("DOCKER_CONTEXT");
        command
    }

    /// `docker inspect` of one thing.
    ///
    /// # Errors
    ///
    /// Where there is no such thing.
    pub fn inspect(&self, name: &str) -> Result<Value> {
        let text = self.docker(&format!("inspect {name}"))?;
        let list: Value = serde_json::from_str(&text).with_context(|| format!("no JSON: {text}"))?;
        Ok(list[0].clone())
    }

    /// Runs a container that idles, with these options of `docker run`. It ends at once when it is to stop.
    ///
    /// # Errors
    ///
    /// Where docker refuses.
    pub fn run(&self, options: &str) -> Result<DockerContainer> {
        let idle = IDLE.join(" ");
        let id =
            self.docker(&format!("run --detach --pull never --stop-signal KILL {options} {IMAGE} {idle}"))?;
        self.find(&id)
    }

    /// The running container of this id or name.
    ///
    /// # Errors
    ///
    /// Where it does not run, or has no IPv4 address.
    pub fn find(&self, id: &str) -> Result<DockerContainer> {
        DockerContainer::of(&self.inspect(id)?, &self.room)
    }

    /// Runs a container to its end and removes it: `docker run --rm` of a program that does nothing.
    ///
    /// # Errors
    ///
    /// Where docker refuses.
    pub fn run_and_remove(&self) -> Result<()> {
        self.docker(&format!("run --rm --pull never --log-driver none {IMAGE} /bin/busybox true")).map(drop)
    }

    fn import_busybox(&self) -> Result<()> {
        let (tree, archive) = (self.directory.join("busybox"), self.directory.join("busybox.tar"));
        fs::create_dir_all(tree.join("bin"))?;
        fs::copy("/bin/busybox", tree.join("bin/busybox")).context("busybox-static is not installed")?;
        netns::run("tar", &["-C", &tree.display().to_string(), "-cf", &archive.display().to_string(), "."])?;
        self.docker(&format!("import {} {IMAGE}", archive.display())).map(drop)
    }

    /// What dockerd has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.join("dockerd.log")).unwrap_or_default()
    }

    fn log_end(&self) -> String {
        let log = self.log();
        let from = log.lines().count().saturating_sub(20);
        log.lines().skip(from).collect::<Vec<_>>().join("\n")
    }

    /// Its files.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}
