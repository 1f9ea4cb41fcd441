//! Runs cargo for the workspace and reads what it says about the artifacts.
//!
//! The dev profile everywhere: the programs are compiled optimised in either profile (by the agent's build
//! script), and one profile means that the demo and the tests share every dependency.

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
    command.args(args).arg("--message-format=json-render-diagnostics").stdout(Stdio::piped());
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
