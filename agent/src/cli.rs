//! The command line: flannel's flags and environment under their own names, and ours beside them.
//!
//! Flags may be written as Go's `flag` package takes them (`-iface=eth1`, `--iface eth1`, `-ip-masq`,
//! `-ip-masq=false`), because that is how flannel's unit files and manifests write them. A flag that is not on
//! the command line may come from the environment; see `cli/layers.rs` for the order. Called as `flanneld`,
//! the program takes the agent's flags without a subcommand.
//!
//! Nothing here reads the process's own environment or arguments: [`parse`] is given both.

mod agent;
mod layers;
pub mod pages;
pub(crate) mod words;

use std::ffi::OsString;
use std::fmt;
use std::path::Path;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

pub use agent::{AgentArgs, EtcdArgs, FlannelOnlyArgs, KubeArgs, UplinkArgs};
pub use pages::{CompletionsArgs, ManArgs};

use crate::{
    docker_opts::DockerOptsArgs, doctor::DoctorArgs, explain::ExplainArgs, status::StatusArgs,
    trace::TraceArgs,
};

/// The whole command line.
#[derive(Debug, Parser)]
#[command(
    name = "loden",
    version,
    propagate_version = true,
    about = "Container networking across hosts: flannel's job, done with eBPF",
    args_override_self = true,
    max_term_width = 110
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// How the help tells of `cli/layers.rs`.
const ENVIRONMENT: &str = "\
Flags may be written with one dash or two, as flannel's. A flag that is not on the command line is taken from \
FLANNEL_OPTIONS (a line of flags), then from its own variable (--etcd-prefix from FLANNELD_ETCD_PREFIX, --gate \
from LODEN_GATE), then from FLANNEL_ETCD_ENDPOINTS or FLANNEL_ETCD and FLANNEL_ETCD_PREFIX or FLANNEL_ETCD_KEY.";

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the agent: keep this node's subnet lease, and carry packets to and from every other node
    #[command(after_help = ENVIRONMENT)]
    Agent(AgentArgs),
    /// Show what the running agent knows and does
    Status(StatusArgs),
    /// Look for what is wrong: this host, its peers, the ways to them, etcd; ends with 0 where nothing is
    Doctor(DoctorArgs),
    /// Tell whether a flow would skip the host's stack, and if not, why
    Explain(ExplainArgs),
    /// Print what the programs decide of each packet, as it happens
    Trace(TraceArgs),
    /// Remove from this node what the agent has left in place, and nothing else
    #[command(after_help = ENVIRONMENT)]
    Cleanup(CleanupArgs),
    /// Write dockerd's options from subnet.env, as flannel's mk-docker-opts.sh does
    DockerOpts(DockerOptsArgs),
    /// Print what a shell needs to complete `loden`'s commands and flags
    Completions(CompletionsArgs),
    /// Write the manual pages, one for each command
    Man(ManArgs),
}

/// The flags of `loden cleanup`.
///
/// It takes every flag of the agent, so that one environment file or one list of flags serves both; those that do
/// not say which agent is meant are accepted without a word.
#[derive(Debug, clap::Args)]
pub struct CleanupArgs {
    /// The flags that the agent ran with.
    #[command(flatten)]
    pub agent: AgentArgs,

    /// Take away the eBPF programs and maps only; leave the device, routes and rules for flannel or another agent
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false",
          value_parser = crate::config::flag_value::boolean, value_name = "BOOL")]
    pub keep_kernel: bool,
}

/// The program ends here, before it has touched anything: help was asked for (code 0) or the command line is
/// wrong (code 2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// What to print: for code 0 on standard output, otherwise one line on standard error.
    pub text: String,
    /// The process's exit status.
    pub code: u8,
}

impl Exit {
    /// An error in the command line, the environment or the configuration, as one line.
    #[must_use]
    pub fn error(reason: impl fmt::Display) -> Self {
        Self { text: format!("loden: {}", printable(&without_passwords(&reason.to_string()))), code: 2 }
    }

    /// Prints the text and turns the code into the process's.
    #[must_use]
    pub fn report(&self) -> std::process::ExitCode {
        use std::io::Write as _;
        // A closed standard output or error leaves nobody to tell.
        let _ = match self.code {
            0 => writeln!(std::io::stdout(), "{}", self.text),
            _ => writeln!(std::io::stderr(), "{}", self.text),
        };
        std::process::ExitCode::from(self.code)
    }
}

/// Parses a command line, `args[0]` being the program's name, with `env` to look variables up.
///
/// # Errors
///
/// [`Exit`] with code 0 for `--help` and `--version`, with code 2 and one line for anything that cannot be
/// understood; the line names the flag or variable, its value and what would be right.
pub fn parse(
    args: impl IntoIterator<Item = OsString>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Command, Exit> {
    let mut args: Vec<OsString> = args.into_iter().collect();
    if args.is_empty() {
        args.push("loden".into());
    }
    if Path::new(&args[0]).file_name().is_some_and(|name| name == "flanneld") {
        args.insert(1, "agent".into());
    }
    // Help and usage speak of the program by its own name, whatever it was called as.
    args[0] = "loden".into();
    let mut command = Cli::command();
    command.build();
    let subcommand = args.get(1).and_then(|word| word.to_str()).unwrap_or_default().to_owned();
    let flags = |name: &str| command.find_subcommand(name).map(words::Flags::of);
    match flags(&subcommand) {
        // The script's options are one letter each and have no variables; help takes words.
        Some(_) if matches!(subcommand.as_str(), "docker-opts" | "help") => matches(args, None),
        Some(own) => {
            let given = words::normalise(args.split_off(2), &own).map_err(Exit::error)?;
            let agents = flags("agent").unwrap_or_default();
            let layers = layers::collect(given, &own, &agents, env).map_err(Exit::error)?;
            // Each layer is tried alone first, so that an error says where the bad word stands.
            for layer in &layers {
                let alone = [&args[..], &layer.words()[..]].concat();
                matches(alone, layer.origin.as_deref())?;
            }
            args.extend(layers.iter().flat_map(layers::Layer::words));
            matches(args, None)
        }
        None => {
            let top = words::Flags::of(&command);
            let rest = words::normalise(args.split_off(1), &top).map_err(Exit::error)?;
            args.extend(rest.into_iter().filter_map(|word| word.text));
            matches(args, None)
        }
    }
}

/// Hands normalised words to clap.
fn matches(args: Vec<OsString>, origin: Option<&str>) -> Result<Command, Exit> {
    let found =
        command().try_get_matches_from(args).and_then(|mut matches| Cli::from_arg_matches_mut(&mut matches));
    found.map(|cli| cli.command).map_err(|error| match error.kind() {
        clap::error::ErrorKind::DisplayVersion => {
            Exit { text: concat!("loden ", env!("CARGO_PKG_VERSION")).to_owned(), code: 0 }
        }
        clap::error::ErrorKind::DisplayHelp => {
            Exit { text: error.render().to_string().trim_end().to_owned(), code: 0 }
        }
        clap::error::ErrorKind::MissingSubcommand
        | clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            Exit::error("no command given; `loden --help` lists them, `loden agent` runs the agent")
        }
        _ => match origin {
            Some(origin) => Exit::error(format_args!("{origin}: {}", one_line(&error))),
            None => Exit::error(one_line(&error)),
        },
    })
}

/// The whole command line, as the help shows it.
fn command() -> clap::Command {
    Cli::command().mut_subcommand("cleanup", |cleanup| cleanup.mut_args(hide_from_cleanup))
}

/// `cleanup --help` shows only the flags that say which agent's things are meant.
fn hide_from_cleanup(arg: clap::Arg) -> clap::Arg {
    const SHOWN: [&str; 6] = ["keep-kernel", "subnet-file", "run-dir", "bpffs-dir", "log", "log-format"];
    let long = arg.get_long().unwrap_or_default();
    let shown = SHOWN.contains(&long)
        || ["etcd-", "iface", "public-ip"].iter().any(|start| long.starts_with(start))
        || matches!(long, "help" | "version");
    if shown { arg } else { arg.hide(true) }
}

/// clap's message without its usage and its pointer to `--help`, on one line.
fn one_line(error: &clap::Error) -> String {
    let rendered = error.render().to_string();
    let lines: Vec<&str> = rendered
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty())
        .collect();
    let joined = lines.join("; ");
    joined.strip_prefix("error: ").map(str::to_owned).unwrap_or(joined)
}

/// The text without what stands before an `@` in a URL: there flannel's users may have a user and a password.
fn without_passwords(text: &str) -> String {
    let words = text.split_inclusive(|c: char| c.is_whitespace() || "'\",".contains(c));
    let without = |word: &str| match word.rsplit_once('@') {
        Some((before, host)) if before.contains(':') => format!("…@{host}"),
        _ => word.to_owned(),
    };
    words.map(without).collect()
}

/// The text with control characters escaped: a hostile argument must not drive the terminal or fake a log line.
fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let escaped: Box<dyn Iterator<Item = char>> =
                if c.is_control() { Box::new(c.escape_default()) } else { Box::new(std::iter::once(c)) };
            escaped
        })
        .collect()
}

#[cfg(test)]
mod tests;
