//! A network namespace that stands for a host or for a container.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CloneFlags, setns};

use crate::process::wait_if_held;

/// A named network namespace (`/run/netns/NAME`), deleted when dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes a namespace with a name of its own (`ld-<pid>-<n>-<label>`) and brings its loopback up. What comes into it has
    /// its IPv6 addresses at once: nobody else is there to have them, and looking for one takes a second or two, in which
    /// no neighbour is asked for.
    ///
    /// # Errors
    ///
    /// Without root, or where `ip` is missing.
    pub fn create(label: &str) -> Result<Self> {
        Self::named(format!("ld-{}-{}-{label}", std::process::id(), next()))
    }

    /// Makes a namespace with just this name.
    ///
    /// # Errors
    ///
    /// As [`Self::create`], and where the name is taken.
    pub fn named(name: String) -> Result<Self> {
        run("ip", &["netns", "add", &name])?;
        let netns = Self { name };
        netns.ip("link set lo up")?;
        netns.run(|| fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0")).context("accept_dad")?;
        Ok(netns)
    }

    /// Gives a namespace that somebody else has made (`/proc/PID/ns/net`) a name of ours. Dropping it takes the name
    /// away; the namespace is its owner's.
    ///
    /// # Errors
    ///
    /// Where there is no such namespace.
    pub fn hold(label: &str, namespace: &Path) -> Result<Self> {
        let name = format!("ld-{}-{}-{label}", std::process::id(), next());
        let path = Path::new("/run/netns").join(&name);
        File::create_new(&path).with_context(|| path.display().to_string())?;
        let netns = Self { name };
        run("mount", &["--bind", &namespace.display().to_string(), &path.display().to_string()])?;
        Ok(netns)
    }

    /// The name under `/run/netns`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that holds the namespace.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// Runs `f` on a thread inside the namespace and returns what it returns; a panic in `f` goes on here.
    ///
    /// # Panics
    ///
    /// Where the namespace cannot be entered.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                self.enter();
                f()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Moves the calling thread into the namespace, for good: for threads made for that.
    ///
    /// # Panics
    ///
    /// Where the namespace cannot be entered.
    pub fn enter(&self) {
        let file = File::open(self.path()).expect("the namespace exists while self does");
        setns(file, CloneFlags::CLONE_NEWNET).expect("entering a network namespace needs root");
    }

    /// A command that will run inside. Only the network changes (`ip netns exec` would hide bpffs as well).
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg(program);
        command
    }

    /// Runs a command line inside, split at blanks, and returns its standard output.
    ///
    /// # Errors
    ///
    /// Where it cannot be started or exits with a failure; the error holds what it printed.
    pub fn exec(&self, line: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        let program = words.next().context("an empty command line")?;
        // The child is born where its parent's thread is: that saves starting `nsenter` each time.
        self.run(|| output(Command::new(program).args(words))).with_context(|| format!("in {}", self.name))
    }

    /// Runs `ip` with these words inside.
    ///
    /// # Errors
    ///
    /// As [`Self::exec`].
    pub fn ip(&self, words: &str) -> Result<String> {
        self.exec(&format!("ip {words}"))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // Not there any more where an interrupted run has been cleared away by force.
        if self.path().exists()
            && let Err(error) = run("ip", &["netns", "del", &self.name])
        {
            eprintln!("namespace {} is left behind: {error:#}", self.name);
        }
    }
}

/// A number that no other namespace of this process has in its name.
fn next() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Joins two namespaces by a veth pair; both ends are up.
///
/// # Errors
///
/// Where a name is taken.
pub fn join(a: &Netns, a_name: &str, b: &Netns, b_name: &str) -> Result<()> {
    a.ip(&format!("link add {a_name} type veth peer name {b_name} netns {}", b.name()))?;
    a.ip(&format!("link set {a_name} up"))?;
    b.ip(&format!("link set {b_name} up"))?;
    Ok(())
}

/// Runs a program and returns its standard output.
///
/// # Errors
///
/// Where it cannot be started or exits with a failure; the error holds what it printed.
pub fn run(program: &str, args: &[&str]) -> Result<String> {
    output(Command::new(program).args(args))
}

/// Runs a command and returns its standard output.
///
/// # Errors
///
/// As [`run`].
pub fn output(command: &mut Command) -> Result<String> {
    wait_if_held();
    let output = command.output().with_context(|| format!("{command:?} cannot be started"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "{command:?} ended with {}: {stdout}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(stdout)
}
