//! `kubernetes-validate` from PyPI, which brings Kubernetes' schemas with it: where it is and how it gets there.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

use crate::netns::run;

/// Its release, and so the newest Kubernetes whose schemas it has.
pub const VERSION: &str = "1.37.0";
/// That Kubernetes.
pub const NEWEST: &str = "1.37";

/// The virtual environment, in cargo's target directory.
pub(crate) fn environment() -> Result<PathBuf> {
    let executable = std::env::current_exe()?;
    let target = executable.ancestors().find(|directory| directory.join("CACHEDIR.TAG").is_file());
    Ok(target.context("this program does not lie in cargo's target directory")?.join("kubernetes-validate"))
}

pub(crate) fn installed(name: &str) -> Result<PathBuf> {
    let path = environment()?.join("bin").join(name);
    ensure!(path.is_file(), "{} is missing: cargo xtask setup installs it", path.display());
    Ok(path)
}

/// The program.
///
/// # Errors
///
/// Where it is not installed.
pub fn program() -> Result<PathBuf> {
    installed("kubernetes-validate")
}

/// The Python of its virtual environment, which has pip.
///
/// # Errors
///
/// As [`program`].
pub fn python() -> Result<PathBuf> {
    installed("python3")
}

/// Installs it, unless it is there.
///
/// # Errors
///
/// Where Python's venv is missing or PyPI cannot be reached.
pub fn install() -> Result<()> {
    let environment = environment()?;
    let wanted = format!("kubernetes-validate=={VERSION}");
    let pip = environment.join("bin/pip").display().to_string();
    if program().is_ok() && run(&pip, &["show", "kubernetes-validate"])?.contains(VERSION) {
        return Ok(());
    }
    run("python3", &["-m", "venv", "--clear", &environment.display().to_string()])?;
    run(&pip, &["install", "--quiet", "--disable-pip-version-check", &wanted])?;
    Ok(())
}
