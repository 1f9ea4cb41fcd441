//! Kernels from Debian's archive, by apt with lists of its own: the machine's sources stay as they are.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use loden_tests::netns::{output, run};

use super::Series;

/// The package that depends on the newest kernel of a suite.
const NEWEST: &str = "linux-image-cloud-amd64";
const ARCHIVES: &str = "http://deb.debian.org";
/// Pauses before a download that failed is tried again.
const PAUSES: [Duration; 3] = [Duration::from_secs(5), Duration::from_secs(15), Duration::from_secs(45)];
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// An unpacked kernel.
#[derive(Debug)]
pub(super) struct Kernel {
    /// As `uname -r` says it.
    pub(super) release: String,
    /// What boots.
    pub(super) image: PathBuf,
    /// `lib/modules/<release>`.
    pub(super) modules: PathBuf,
}

/// Downloads the newest kernel of a series and unpacks it below the cache, unless that has one already. What fails is
/// tried again a few times, and told.
///
/// # Errors
///
/// Where the archive cannot be reached or has none, and the cache has none either.
pub(super) fn get(series: &Series, cache: &Path) -> Result<Kernel> {
    let directory = cache.join(series.name);
    let root = directory.join("root");
    if let Ok(kernel) = unpacked(&root) {
        return Ok(kernel);
    }
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let Series { name, archive, suite } = series;
    let from = format!("kernel {name} from {ARCHIVES}/{archive} ({suite})");
    persist(&from, &PAUSES, || download(series, &directory))?;
    // Under another name until it is whole: what was interrupted would be taken for a kernel.
    let part = directory.join("root.part");
    for left in [&part, &root].into_iter().filter(|left| left.exists()) {
        fs::remove_dir_all(left)?;
    }
    let packages = packages_in(&directory)?;
    for package in &packages {
        run("dpkg", &["-x", &package.display().to_string(), &part.display().to_string()])?;
    }
    fs::rename(&part, &root).with_context(|| part.display().to_string())?;
    packages.into_iter().try_for_each(fs::remove_file)?;
    unpacked(&root)
}

/// Tries again after each of the pauses, and says so.
fn persist(what: &str, pauses: &[Duration], mut attempt: impl FnMut() -> Result<()>) -> Result<()> {
    for pause in pauses {
        match attempt() {
            Ok(()) => return Ok(()),
            Err(error) => eprintln!("{what}: no download, trying again in {} s: {error:#}", pause.as_secs()),
        }
        thread::sleep(*pause);
    }
    attempt().with_context(|| format!("{what}: no download in {} attempts", pauses.len() + 1))
}

/// Has apt look for the newest kernel and put its packages into the directory; they are verified by its keys.
fn download(series: &Series, directory: &Path) -> Result<()> {
    for package in packages_in(directory)? {
        fs::remove_file(package)?;
    }
    let apt = Apt::new(series, directory)?;
    apt.packages()?.iter().try_for_each(|package| apt.download(package))
}

fn packages_in(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut packages = Vec::new();
    for file in fs::read_dir(directory)? {
        let path = file?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            packages.push(path);
        }
    }
    Ok(packages)
}

fn unpacked(root: &Path) -> Result<Kernel> {
    let first = |directory: PathBuf, prefix: &str| -> Result<PathBuf> {
        let entries = fs::read_dir(&directory).with_context(|| directory.display().to_string())?;
        let matching = |path: &PathBuf| {
            path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(prefix))
        };
        entries
            .flatten()
            .map(|entry| entry.path())
            .find(matching)
            .with_context(|| format!("no {prefix}* in {}", directory.display()))
    };
    let modules = first(root.join("usr/lib/modules"), "").or_else(|_| first(root.join("lib/modules"), ""))?;
    let release = modules.file_name().and_then(|name| name.to_str()).context("a name that is no text")?;
    let image = first(root.join("boot"), "vmlinuz")
        .or_else(|_| first(modules.clone(), "vmlinuz"))
        .context("the package has no kernel")?;
    Ok(Kernel { release: release.to_owned(), image, modules: modules.clone() })
}

/// apt for one suite, with directories of its own.
struct Apt {
    options: Vec<String>,
    directory: PathBuf,
}

impl Apt {
    fn new(series: &Series, directory: &Path) -> Result<Self> {
        let apt = directory.join("apt");
        fs::create_dir_all(apt.join("lists/partial"))?;
        let sources = apt.join("sources.list");
        let Series { archive, suite, .. } = series;
        fs::write(&sources, format!("deb [signed-by={KEYS}] {ARCHIVES}/{archive} {suite} main\n"))?;
        let option = |name: &str, path: &Path| format!("{name}={}", path.display());
        let options = [
            option("Dir::Etc::SourceList", &sources),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            option("Dir::State::Lists", &apt.join("lists")),
            option("Dir::Cache", &apt),
            "APT::Sandbox::User=root".to_owned(),
            // Without this an archive that cannot be reached is a warning only.
            "APT::Update::Error-Mode=any".to_owned(),
            // Descriptions of packages that nobody reads.
            "Acquire::Languages=none".to_owned(),
        ];
        let options = options.into_iter().flat_map(|option| ["-o".to_owned(), option]).collect();
        let apt = Self { options, directory: directory.to_owned() };
        apt.tool("apt-get", &["--quiet=2", "update"])?;
        Ok(apt)
    }

    fn tool(&self, program: &str, args: &[&str]) -> Result<String> {
        output(Command::new(program).current_dir(&self.directory).args(&self.options).args(args))
    }

    /// The kernel's package, and those that newer releases have split off it.
    fn packages(&self) -> Result<Vec<String>> {
        let of_kernel = |package: &String| {
            ["linux-image-", "linux-binary-", "linux-modules-"]
                .iter()
                .any(|prefix| package.starts_with(prefix))
        };
        let Some(kernel) = self.depends(NEWEST)?.into_iter().find(of_kernel) else {
            bail!("{NEWEST} depends on no kernel");
        };
        let mut packages = self.depends(&kernel)?;
        packages.retain(of_kernel);
        packages.push(kernel);
        Ok(packages)
    }

    fn depends(&self, package: &str) -> Result<Vec<String>> {
        let shown = self.tool("apt-cache", &["show", "--no-all-versions", package])?;
        let line = shown.lines().find_map(|line| line.strip_prefix("Depends: "));
        let names = line.into_iter().flat_map(|line| line.split(", "));
        Ok(names.filter_map(|name| name.split([' ', ':']).next()).map(str::to_owned).collect())
    }

    fn download(&self, package: &str) -> Result<()> {
        ensure!(package.starts_with("linux-"), "{package} is no kernel");
        self.tool("apt-get", &["--quiet=2", "download", package]).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_download_that_fails_is_tried_again_and_the_last_failure_is_told() {
        let pauses = [Duration::ZERO; 2];
        let mut attempts = 0;
        let mut failing = |times| {
            attempts = 0;
            persist("kernel 0.0", &pauses, || {
                attempts += 1;
                ensure!(attempts > times, "failure {attempts}");
                Ok(())
            })
        };
        failing(0).unwrap();
        failing(2).unwrap();
        let error = format!("{:#}", failing(3).unwrap_err());
        assert_eq!(error, "kernel 0.0: no download in 3 attempts: failure 3");
    }
}
