//! A bpffs of our own, so that tests and demo never touch the pins of others.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::netns::run;

/// A mounted bpffs. Dropping it unmounts it, which removes every pin in it, and removes its directory.
#[derive(Debug)]
pub struct Bpffs {
    path: PathBuf,
}

impl Bpffs {
    /// Makes the directory and mounts a fresh bpffs there.
    ///
    /// # Errors
    ///
    /// Without root, or where the directory cannot be made.
    pub fn mount(path: &Path) -> Result<Self> {
        std::fs::create_dir_all(path).with_context(|| path.display().to_string())?;
        run("mount", &["-t", "bpf", "bpf", &path.display().to_string()])?;
        Ok(Self { path: path.to_owned() })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        if !self.path.exists() {
            return;
        }
        let path = self.path.display().to_string();
        let gone = run("umount", &[&path])
            .and_then(|_| std::fs::remove_dir(&self.path).context("the directory stays"));
        if let Err(error) = gone {
            eprintln!("bpffs {path} is left behind: {error:#}");
        }
    }
}
