//! `loden status`: what the running agent says of this node, once or live.

pub mod document;
mod names;
pub mod rates;
mod view;

use std::{
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result};

use self::document::Status;
use crate::control::{self, Request};

/// How often the live view asks.
const EVERY: Duration = Duration::from_secs(2);

/// The flags of `loden status`.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// Print everything, as one JSON document
    #[arg(long)]
    pub json: bool,
    /// Go on, with rates instead of totals, until interrupted; with --json a document a line
    #[arg(long)]
    pub watch: bool,
    /// Directory of the agent's control socket
    #[arg(long, default_value = "/run/loden", value_name = "DIR")]
    pub run_dir: PathBuf,
    /// Accepted so that the agent's own list of paths can be given as it is
    #[arg(long, hide = true, value_name = "DIR")]
    pub bpffs_dir: Option<PathBuf>,
}

/// Asks and prints.
///
/// # Errors
///
/// Where no agent answers.
pub async fn run(args: &StatusArgs) -> Result<()> {
    if args.watch {
        return watch(args).await;
    }
    let status = ask(args).await?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&status)?);
    } else {
        print!("{}", view::text(&status, None));
    }
    Ok(())
}

async fn ask(args: &StatusArgs) -> Result<Status> {
    let answer = control::ask(&args.run_dir, Request::Status).await?;
    let mut status =
        serde_json::from_value(answer).context("the agent answers something else than a status")?;
    names::add(&mut status).await;
    Ok(status)
}

/// Draws over what was drawn before, so that nothing flickers; an agent that is away for a while is waited for.
async fn watch(args: &StatusArgs) -> Result<()> {
    // Also for who looks at once: without an earlier document there are no rates.
    let mut earlier = ask(args).await?;
    let screen = std::io::stdout().is_terminal() && !args.json;
    loop {
        tokio::time::sleep(EVERY).await;
        let answer = ask(args).await;
        let text = match &answer {
            Ok(status) if args.json => serde_json::to_string(status)?,
            Ok(status) => view::text(status, Some(&earlier)),
            Err(error) if args.json => serde_json::json!({ "error": format!("{error:#}") }).to_string(),
            Err(error) => format!("{error:#}\n"),
        };
        let mut out = std::io::stdout().lock();
        let written = if screen {
            // ECMA-48: cursor home; after each line erase its rest, at the end the rest of the screen.
            write!(out, "\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n"))
        } else {
            writeln!(out, "{text}")
        };
        // Whoever read it has gone.
        if written.and_then(|()| out.flush()).is_err() {
            return Ok(());
        }
        if let Ok(status) = answer {
            earlier = status;
        }
    }
}
