//! The image's files, collected in a directory.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use loden_tests::netns::run;
use tempfile::TempDir;

use crate::build::STATICALLY;

/// What the agent runs, with the names under which each is one program.
const TOOLS: [(&str, &[&str]); 3] = [
    ("nft", &[]),
    (
        "xtables-nft-multi",
        &[
            "iptables",
            "iptables-restore",
            "iptables-save",
            "ip6tables",
            "ip6tables-restore",
            "ip6tables-save",
        ],
    ),
    (
        "xtables-legacy-multi",
        &[
            "iptables-legacy",
            "iptables-legacy-restore",
            "iptables-legacy-save",
            "ip6tables-legacy",
            "ip6tables-legacy-restore",
            "ip6tables-legacy-save",
        ],
    ),
];

/// Where Debian has them.
const SBIN: &str = "/usr/sbin";
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// A directory that becomes the image's root.
#[derive(Debug)]
pub(super) struct Rootfs {
    directory: TempDir,
    /// Libraries that are in it already.
    libraries: BTreeSet<PathBuf>,
}

impl Rootfs {
    pub(super) fn create() -> Result<Self> {
        let rootfs = Self { directory: tempfile::tempdir()?, libraries: BTreeSet::new() };
        for directory in ["usr/bin", "usr/sbin", "etc/ssl/certs", "run", "tmp"] {
            fs::create_dir_all(rootfs.path(directory))?;
        }
        // Without it glibc asks no name server but that of a default which differs between versions.
        fs::write(rootfs.path("etc/nsswitch.conf"), "hosts: files dns\n")?;
        Ok(rootfs)
    }

    fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        self.directory.path().join(inside.strip_prefix("/").unwrap_or(inside))
    }

    /// A program of ours, without its symbols, and what it loads.
    pub(super) fn add_program(&mut self, program: &Path) -> Result<()> {
        self.add_stripped(program)?;
        self.add_libraries(program)
    }

    /// A program of ours that hosts get of the image, whatever libraries they have.
    pub(super) fn add_static_program(&mut self, program: &Path) -> Result<()> {
        let libraries = libraries(&run("ldd", &[&program.display().to_string()])?);
        ensure!(
            libraries.is_empty(),
            "{} is linked dynamically, and hosts have another glibc or none: cargo rustc --package loden-agent --bin \
             loden-cni {}",
            program.display(),
            STATICALLY.join(" ")
        );
        self.add_stripped(program)
    }

    fn add_stripped(&self, program: &Path) -> Result<()> {
        let name = program.file_name().context("a program has a name")?;
        let target = self.path("usr/bin").join(name);
        let paths = [program.display().to_string(), target.display().to_string()];
        run("strip", &["-o", &paths[1], &paths[0]]).map(drop)
    }

    /// The tools that the agent runs, with iptables' extensions.
    pub(super) fn add_tools(&mut self) -> Result<()> {
        for (tool, names) in TOOLS {
            let source = Path::new(SBIN).join(tool);
            self.copy(&source)?;
            self.add_libraries(&source)?;
            for name in names {
                symlink(tool, self.path(SBIN).join(name))?;
            }
        }
        let extensions = extensions()?;
        for entry in fs::read_dir(&extensions).with_context(|| extensions.display().to_string())? {
            let path = entry?.path();
            self.copy(&path)?;
            self.add_libraries(&path)?;
        }
        Ok(())
    }

    pub(super) fn add_certificates(&mut self) -> Result<()> {
        self.copy(Path::new(CERTIFICATES))
    }

    /// Copies a file to where it is on this machine; what it links to is copied in its place.
    fn copy(&self, source: &Path) -> Result<()> {
        let target = self.path(source);
        fs::create_dir_all(target.parent().context("a file is in a directory")?)?;
        fs::copy(source, &target).map(drop).with_context(|| format!("{} cannot be copied", source.display()))
    }

    fn add_libraries(&mut self, program: &Path) -> Result<()> {
        for library in libraries(&run("ldd", &[&program.display().to_string()])?) {
            if self.libraries.insert(library.clone()) {
                self.copy(&library)?;
            }
        }
        Ok(())
    }

    /// Packs it, the same bytes for the same files.
    pub(super) fn pack(&self, archive: &Path) -> Result<()> {
        let root = self.directory.path().display().to_string();
        let same = ["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mtime=@0"];
        let what = ["-C", &root, "-cf", &archive.display().to_string(), "."];
        run("tar", &[&same[..], &what[..]].concat()).map(drop)
    }
}

/// The paths in what ldd prints: `NAME => PATH (ADDRESS)`, or `PATH (ADDRESS)` for the loader.
fn libraries(listing: &str) -> Vec<PathBuf> {
    let path = |line: &str| {
        let path = line.split("=>").last()?.split_whitespace().next()?;
        path.starts_with('/').then(|| PathBuf::from(path))
    };
    listing.lines().filter_map(path).collect()
}

/// Where iptables has its extensions: in the directory of the machine's libraries.
fn extensions() -> Result<PathBuf> {
    let triplets = fs::read_dir("/usr/lib")?.flatten().map(|entry| entry.path().join("xtables"));
    triplets.into_iter().find(|path| path.is_dir()).context("iptables' extensions are not below /usr/lib")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldds_lines_are_read() {
        let listing = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x7f)\n\tlibx.so => not found\n";
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(libraries(listing), expected);
        assert!(libraries("\tstatically linked\n").is_empty());
    }
}
