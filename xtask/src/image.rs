//! `cargo xtask image`: a container image of the agent, made of what is on this machine and of nothing else.
//!
//! It holds our programs, nft and both kinds of iptables with the libraries that they load, and the certificates of
//! public authorities. There is no shell in it and no package manager.

mod rootfs;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};
use clap::Args;
use loden_tests::netns;
use serde_json::Value;

use self::rootfs::Rootfs;
use crate::{build, progress::Step, setup};

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Name of the image
    #[arg(long, default_value = concat!("loden:", env!("CARGO_PKG_VERSION")))]
    tag: String,
    /// Take `loden` and a static `loden-cni` from this directory instead of building them for release
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// Where the context for the build goes
    #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/image"))]
    output: PathBuf,
    /// Make the context only: for a builder that is not Docker, or not here
    #[arg(long)]
    context_only: bool,
}

/// Makes the context, and the image where a Docker engine answers (`DOCKER_HOST` says which).
///
/// # Errors
///
/// Where a program does not build or a file is missing, and where Docker refuses.
pub(crate) fn run(options: &Options) -> Result<()> {
    let (agent, plugin) = match &options.programs {
        Some(directory) => (directory.join("loden"), directory.join("loden-cni")),
        None => release()?,
    };
    let step = Step::start("collecting the image's files");
    let context = &options.output;
    fs::create_dir_all(context).with_context(|| context.display().to_string())?;
    let archive = context.join("rootfs.tar");
    let mut rootfs = Rootfs::create()?;
    rootfs.add_program(&agent)?;
    rootfs.add_static_program(&plugin)?;
    rootfs.add_tools()?;
    rootfs.add_certificates()?;
    rootfs.pack(&archive)?;
    fs::copy(build::root().join("deploy/image/Dockerfile"), context.join("Dockerfile"))?;
    step.done(megabytes(fs::metadata(&archive)?.len()));
    if options.context_only || !engine_answers() {
        println!("docker build --tag {} {}", options.tag, context.display());
        return Ok(());
    }
    build_image(&options.tag, context)
}

/// Builds agent and CNI plugin for release.
fn release() -> Result<(PathBuf, PathBuf)> {
    setup::run()?;
    Ok((build::Agent::build_release()?.binary, build::cni(&["--release"])?))
}

fn engine_answers() -> bool {
    let mut version = Command::new("docker");
    version.args(["version", "--format", "{{.Server.Version}}"]).stdout(Stdio::null()).stderr(Stdio::null());
    version.status().is_ok_and(|status| status.success())
}

fn build_image(tag: &str, context: &Path) -> Result<()> {
    let step = Step::start(format!("docker build --tag {tag}"));
    netns::output(Command::new("docker").args(["build", "--quiet", "--tag", tag]).arg(context))?;
    let inspected: Value = serde_json::from_str(&netns::run("docker", &["image", "inspect", tag])?)?;
    let size = inspected[0]["Size"].as_u64().context("the image has no size")?;
    step.done(megabytes(size));
    println!("{tag} {}", megabytes(size));
    Ok(())
}

/// In megabytes (10^6 bytes).
fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}
