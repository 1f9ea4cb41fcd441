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

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use loden_tests::netns;
use serde_json::Value;

use self::rootfs::Rootfs;
use crate::{build, progress::Step, setup};

/// The image's programs of ours; the second is there where the agent's package builds it.
const PROGRAMS: [&str; 2] = ["loden", "loden-cni"];

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Name of the image
    #[arg(long, default_value = concat!("loden:", env!("CARGO_PKG_VERSION")))]
    tag: String,
    /// Take the programs from this directory instead of building them for release
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
    let programs = match &options.programs {
        Some(directory) => {
            PROGRAMS.map(|name| directory.join(name)).into_iter().filter(|path| path.is_file()).collect()
        }
        None => release()?,
    };
    let step = Step::start("collecting the image's files");
    let context = &options.output;
    fs::create_dir_all(context).with_context(|| context.display().to_string())?;
    let archive = context.join("rootfs.tar");
    let mut rootfs = Rootfs::create()?;
    for program in &programs {
        rootfs.add_program(program)?;
    }
    ensure!(rootfs.has("usr/bin/loden"), "there is no program loden among {programs:?}");
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

/// Builds the agent's package for release and names its programs.
fn release() -> Result<Vec<PathBuf>> {
    setup::run()?;
    let messages = build::messages(&["build", "--release", "--package", "loden-agent"])?;
    let executables = messages.iter().filter_map(|message| message["executable"].as_str()).map(PathBuf::from);
    let is_ours = |path: &PathBuf| PROGRAMS.iter().any(|name| path.ends_with(name));
    Ok(executables.filter(is_ours).collect())
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
