//! Runs cargo for the workspace and reads what it says about the artifacts.
//!
//! The dev profile, but where the agent's own cost is measured or it is shipped: the programs are compiled optimised in
//! either profile (by the agent's build script), and one profile means that the demo and the tests share every dependency.

use std::{
    env,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// The directory of the workspace.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// A cargo command in the workspace.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    // `cargo run` tells us about our own package; handed on, that would make ring's build script start anew.
    for (name, _) in env::vars_os() {
        if name
            .to_str()
            .is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_"))
        {
            command.env_remove(name);
        }
    }
    command
}

/// Runs cargo with these arguments and `--message-format=json`, shows its progress, and returns its messages.
///
/// # Errors
///
/// Where the build fails; cargo has shown why.
pub(crate) fn messages(args: &[&str]) -> Result<Vec<Value>> {
    let mut command = cargo();
    // Behind `--` it would be rustc's.
    let (subcommand, rest) = args.split_at(1);
    command
        .args(subcommand)
        .arg("--message-format=json-render-diagnostics")
        .args(rest)
        .stdout(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("{command:?} cannot be started"))?;
    let stdout = child.stdout.take().context("cargo has no standard output")?;
    let mut messages = Vec::new();
    for line in BufReader::new(stdout).lines() {
        // Build scripts may print lines of their own between the messages.
        messages.extend(serde_json::from_str::<Value>(&line?));
    }
    let status = child.wait()?;
    ensure!(status.success(), "cargo {} ended with {status}", args.join(" "));
    Ok(messages)
}

/// What the agent's package is built into.
#[derive(Debug)]
pub(crate) struct Agent {
    /// The binary `loden`.
    pub(crate) binary: PathBuf,
    /// The object with the BPF programs.
    pub(crate) programs: PathBuf,
}

impl Agent {
    /// Builds it.
    ///
    /// # Errors
    ///
    /// Where the build fails, or where cargo does not name what it built.
    pub(crate) fn build() -> Result<Self> {
        Self::among(&messages(&["build", "--package", "loden-agent"])?)
    }

    /// Builds it as it is shipped.
    ///
    /// # Errors
    ///
    /// As [`Self::build`].
    pub(crate) fn build_release() -> Result<Self> {
        Self::among(&messages(&["build", "--release", "--package", "loden-agent"])?)
    }

    /// Finds it among the messages of a build that had the agent in it.
    ///
    /// # Errors
    ///
    /// Where cargo does not name what it built.
    pub(crate) fn among(messages: &[Value]) -> Result<Self> {
        let manifest = root().join("agent/Cargo.toml");
        let binary = messages
            .iter()
            .filter(|message| message["manifest_path"].as_str().map(Path::new) == Some(&manifest))
            .filter(|message| message["profile"]["test"] == false && message["target"]["name"] == "loden")
            .find_map(|message| message["executable"].as_str())
            .context("cargo did not name the binary loden")?;
        // This kind of message has the package, but not its manifest.
        let package = format!("{}#", root().join("agent").display());
        let out = messages
            .iter()
            .filter(|message| message["reason"] == "build-script-executed")
            .filter(|message| message["package_id"].as_str().is_some_and(|id| id.contains(&package)))
            .find_map(|message| message["out_dir"].as_str())
            .context("cargo did not name the directory of the programs")?;
        Ok(Self { binary: PathBuf::from(binary), programs: Path::new(out).join("loden-programs") })
    }
}

/// What makes a program of a package one that needs neither libraries nor a loader where it runs.
pub(crate) const STATICALLY: [&str; 3] = ["--", "-C", "target-feature=+crt-static"];

/// Builds the CNI plugin as it is shipped, and returns where it is: linked statically, since it is installed on hosts that
/// have an older glibc than this one, or none. Nothing that it calls asks glibc for what that loads when it runs (names of
/// hosts or users). The flag is for the program's own crate alone, so nothing besides is compiled anew.
///
/// # Errors
///
/// Where the build fails, for one without `libc.a`, which Debian's compiler brings and others have in a package of its own.
pub(crate) fn cni(profile: &[&str]) -> Result<PathBuf> {
    let program = ["rustc", "--package", "loden-agent", "--bin", "loden-cni"];
    let messages = messages(&[&program[..], profile, &STATICALLY].concat())
        .context("a static loden-cni takes libc.a (Debian: libc6-dev; Fedora: glibc-static)")?;
    let built = messages.iter().filter(|message| message["target"]["name"] == "loden-cni");
    built
        .filter_map(|message| message["executable"].as_str())
        .map(PathBuf::from)
        .next_back()
        .context("cargo did not name loden-cni")
}
