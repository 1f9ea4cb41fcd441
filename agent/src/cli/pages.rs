//! Shell completions and manual pages, generated from the command line itself: neither can fall behind it.

use std::{io, path::Path, path::PathBuf};

use clap_complete::Shell;

/// The flags of `loden completions`.
#[derive(Debug, clap::Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_name = "SHELL", value_enum)]
    pub shell: Shell,
}

/// The flags of `loden man`.
#[derive(Debug, clap::Args)]
pub struct ManArgs {
    /// Where to write them, such as /usr/local/share/man/man1
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
}

/// The script for a shell to read.
#[must_use]
pub fn completions(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut super::command(), "loden", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// Writes `loden.1` and a page for each command, `loden-agent.1` and so on, into the directory, which is made where it
/// is missing.
///
/// # Errors
///
/// Where the directory cannot be written.
pub fn write_manual(directory: &Path) -> io::Result<()> {
    std::fs::create_dir_all(directory)?;
    clap_mangen::generate_to(super::command(), directory)
}
