//! `loden status`: what the running agent says of this node.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::Value;

use crate::control::{self, Request};

/// The flags of `loden status`.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// Print everything, as one JSON document
    #[arg(long)]
    pub json: bool,
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
    let status = control::ask(&args.run_dir, Request::Status).await?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&status)?);
    } else {
        print!("{}", human(&status));
    }
    Ok(())
}

fn human(status: &Value) -> String {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".into(),
        other => other.to_string(),
    };
    let mut out = String::new();
    let mut line = |name: &str, value: String| out.push_str(&format!("{name:<10} {value}\n"));
    line("ready", text(&status["ready"]));
    for (condition, reason) in status["not_ready"].as_object().into_iter().flatten() {
        line("  because", format!("{condition}: {}", text(reason)));
    }
    line("subnet", format!("{} ({})", text(&status["lease"]["subnet"]), text(&status["lease"]["state"])));
    let (uplink, device) = (&status["uplink"], &status["device"]);
    line("uplink", format!("{} {}", text(&uplink["interface"]), text(&uplink["public_ip"])));
    line("device", format!("{} mtu {}", text(&device["name"]), text(&device["mtu"])));
    line("datapath", format!("{}, gate {}", text(&status["datapath"]), text(&status["gate"])));
    if !status["datapath_reason"].is_null() {
        line("  because", text(&status["datapath_reason"]));
    }
    line(
        "etcd",
        format!(
            "connected {}, revision {}",
            text(&status["etcd"]["connected"]),
            text(&status["etcd"]["revision"])
        ),
    );
    for peer in status["peers"].as_array().into_iter().flatten() {
        line("peer", format!("{:<18} {}", text(&peer["subnet"]), text(&peer["public_ip"])));
    }
    for endpoint in status["endpoints"].as_array().into_iter().flatten() {
        line(
            "endpoint",
            format!("{:<18} ifindex {}", text(&endpoint["address"]), text(&endpoint["ifindex"])),
        );
    }
    for (reason, packets) in status["counters"].as_object().into_iter().flatten() {
        if packets.as_u64() != Some(0) {
            line("packets", format!("{reason:<26} {packets}"));
        }
    }
    out
}
