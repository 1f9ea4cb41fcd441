//! Runs `nft` and the iptables tools.

use std::{io, process::Stdio, time::Duration};

use tokio::{io::AsyncWriteExt as _, process::Command, time::timeout};

use super::Result;

/// How long a tool may take. Large rulesets of others take seconds to list.
const LIMIT: Duration = Duration::from_secs(20);

/// Why the rules could not be read or set.
#[derive(Debug, thiserror::Error)]
pub enum FirewallError {
    /// The program is not installed.
    #[error("{0} is not installed or not in PATH: install {package}, or run without {flag}", package = package(.0), flag = flag(.0))]
    Missing(&'static str),
    /// It cannot be run.
    #[error("{program} cannot be run: {source}")]
    Run {
        /// The program.
        program: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It took longer than 20 s.
    #[error("{program} has not ended within {} s", LIMIT.as_secs())]
    Slow {
        /// The program.
        program: &'static str,
    },
    /// It failed.
    #[error("{command} failed ({status}): {message}")]
    Failed {
        /// The program with its arguments.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it printed.
        message: String,
    },
}

fn package(program: &str) -> &'static str {
    if program == "nft" { "nftables" } else { "iptables" }
}

fn flag(program: &str) -> &'static str {
    if program == "nft" { "--ip-masq and --notrack-underlay" } else { "--iptables-forward-rules" }
}

/// Runs a program with this on its standard input and returns its standard output, in the C locale, so that
/// what it prints does not depend on who started the agent.
pub(super) async fn run(program: &'static str, args: &[&str], input: &str) -> Result<String> {
    let fail = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => FirewallError::Missing(program),
        _ => FirewallError::Run { program, source },
    };
    let mut child = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(fail)?;
    let stdin = child.stdin.take();
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A tool that ends early says so by its status, not by the broken pipe.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
    };
    let (output, ()) = timeout(LIMIT, async { tokio::join!(child.wait_with_output(), feed) })
        .await
        .map_err(|_| FirewallError::Slow { program })?;
    let output = output.map_err(fail)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    Err(FirewallError::Failed {
        command: format!("{program} {}", args.join(" ")),
        status: output.status,
        message,
    })
}
