//! `loden doctor`: what a seasoned engineer would look at when packets go missing, each with what was seen and what helps.
//!
//! It compares what the agent wants (see [`crate::facts`]) with the kernel, the maps and etcd, and sends packets to every
//! peer. It changes nothing, and needs no running agent.

mod check;
mod collect;
mod echo;
mod finding;
mod offload;
mod probe;
mod snapshot;

use std::{
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
};

use anyhow::Result;

pub use self::{
    check::examine,
    finding::{Finding, Outcome},
    snapshot::Snapshot,
};
use crate::config::Secret;

/// The flags of `loden doctor`.
#[derive(Debug, clap::Args)]
pub struct DoctorArgs {
    /// Print every finding, as one JSON document
    #[arg(long)]
    pub json: bool,
    /// Print only what is not as it should be
    #[arg(long, short)]
    pub quiet: bool,
    /// Send no packets to the peers
    #[arg(long)]
    pub no_probes: bool,
    /// How long a packet may take, there and back, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(10..=60_000))]
    pub timeout_ms: u32,
    /// Directory of the agent's control socket
    #[arg(long, default_value = "/run/loden", value_name = "DIR")]
    pub run_dir: PathBuf,
    /// Directory of the agent's pinned maps
    #[arg(long, default_value = "/sys/fs/bpf/loden", value_name = "DIR")]
    pub bpffs_dir: PathBuf,
    /// etcd user's password, where etcd wants one; better given as FLANNELD_ETCD_PASSWORD
    #[arg(long, value_name = "PASSWORD")]
    pub etcd_password: Option<Secret>,
}

/// Looks, and prints. The exit status: 0 where all is well, 1 where something is not, 2 where something could not be
/// checked and all else is well.
///
/// # Errors
///
/// Where nothing is known of an agent here, or the kernel grants no netlink socket: also a 2.
pub async fn run(args: &DoctorArgs) -> Result<u8> {
    let findings = examine(&collect::collect(args).await?);
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&findings)?)?;
    } else {
        let shown = findings.iter().filter(|finding| !args.quiet || finding.outcome != Outcome::Ok);
        let colours = std::io::stdout().is_terminal();
        for finding in shown {
            write!(out, "{}", line(finding, colours))?;
        }
    }
    Ok(status(&findings))
}

/// The exit status that the findings stand for.
#[must_use]
pub fn status(findings: &[Finding]) -> u8 {
    match findings.iter().map(|finding| finding.outcome).max() {
        Some(Outcome::Fault | Outcome::Warning) => 1,
        Some(Outcome::Unknown) => 2,
        Some(Outcome::Ok) | None => 0,
    }
}

fn line(finding: &Finding, colours: bool) -> String {
    let mark = format!("{:<5}", finding.outcome.mark());
    let mark = if colours { format!("\x1b[{}m{mark}\x1b[0m", finding.outcome.colour()) } else { mark };
    let subject = finding.subject.as_ref().map(|subject| format!("{subject}: ")).unwrap_or_default();
    let mut text = format!("{mark} {:<17} {subject}{}\n", finding.check, finding.evidence);
    if let Some(remedy) = &finding.remedy {
        text.push_str(&format!("{:24}-> {remedy}\n", ""));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_status_is_that_of_the_worst_finding() {
        let ok = Finding::ok("a", "");
        let unknown = Finding::unknown("b", "");
        let warning = Finding::warning("c", "", "");
        assert_eq!(status(&[]), 0);
        assert_eq!(status(std::slice::from_ref(&ok)), 0);
        assert_eq!(status(&[ok.clone(), unknown.clone()]), 2);
        assert_eq!(status(&[unknown, warning.clone(), ok]), 1);
        assert_eq!(status(&[warning]), 1);
    }

    #[test]
    fn a_line_holds_name_subject_evidence_and_remedy_and_colours_only_where_asked() {
        let finding = Finding::fault("fdb", "missing", "mend it").of("10.5.2.0/24");
        let plain = line(&finding, false);
        assert_eq!(
            plain,
            "FAULT fdb               10.5.2.0/24: missing\n                        -> mend it\n"
        );
        assert!(line(&finding, true).starts_with("\x1b[31mFAULT\x1b[0m"));
    }
}
