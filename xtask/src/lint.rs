//! `cargo xtask lint`: what a reviewer should not have to say.

use std::process::Command;

use anyhow::{Result, bail};

use crate::{build, progress::Step, setup};

/// Runs every check, also after one has failed.
///
/// # Errors
///
/// Where a check fails; its own output is above.
pub(crate) fn run() -> Result<()> {
    if !setup::on_path("cargo-deny") {
        // Unoptimised: it builds in under a minute instead of five, and has little to do here.
        setup::cargo_install("cargo-deny", &["--no-default-features", "--debug"])?;
    }
    let checks: [(&str, Command); 5] = [
        ("format", cargo(&["fmt", "--all", "--check"])),
        ("clippy", cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])),
        ("clippy for BPF", clippy_bpf()),
        ("documentation", documentation()),
        ("licences and duplicates", cargo(&["deny", "check", "bans", "licenses", "sources"])),
    ];
    let mut failed = Vec::new();
    for (name, mut command) in checks {
        let step = Step::start(name);
        let passed = command.status()?.success();
        step.done(if passed { "clean" } else { "FAILED" });
        if !passed {
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("lint: {} failed", failed.join(", "));
    }
    println!("lint: all clean");
    Ok(())
}

fn cargo(args: &[&str]) -> Command {
    let mut command = build::cargo();
    command.args(args);
    command
}

fn clippy_bpf() -> Command {
    let mut command = cargo(&["clippy", "--package", "loden-ebpf", "--target", "bpfel-unknown-none"]);
    // As the agent's build script does: the BPF target has no prebuilt core. In a place of its own, since build scripts look
    // at this variable: elsewhere cargo would build everything anew after it, and again after the next lint.
    command.args(["-Zbuild-std=core", "--target-dir", "target/clippy-bpf", "--", "-D", "warnings"]);
    command.env("RUSTC_BOOTSTRAP", "1");
    command
}

fn documentation() -> Command {
    let mut command = cargo(&["doc", "--workspace", "--no-deps", "--document-private-items"]);
    // Private items link to each other, which is only wrong where they are not documented.
    command.env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private-intra-doc-links");
    command
}
