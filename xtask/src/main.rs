//! The jobs around the code: `cargo xtask setup | build-ebpf | demo | scale | test | bench | image | lint`.
//!
//! Progress goes to standard error, results to standard output. Nothing here depends on the agent's crate:
//! setup must run before that can compile.

mod bench;
mod build;
mod demo;
mod ebpf;
mod image;
mod interrupt;
mod kernels;
mod lint;
mod progress;
mod scale;
mod setup;
mod table;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The jobs around the code of Loden.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    job: Job,
}

#[derive(Debug, Subcommand)]
enum Job {
    /// Install what building and testing need; says what it does, and does nothing where all is there
    Setup,
    /// Compile the eBPF programs, load them, and print their sizes
    BuildEbpf,
    /// Three nodes, six containers, one etcd on this machine: show that they reach each other, and how fast
    Demo(demo::Options),
    /// One node against thousands of peers, from the start to a hundred lease changes a second (release build)
    Scale(scale::Options),
    /// Run the rings of tests
    Test(test::Options),
    /// Measure Loden beside flannel and beside the limit, all in one run on this machine
    Bench(bench::Options),
    /// One end of the bench's traffic
    #[command(subcommand, hide = true)]
    Traffic(bench::generator::End),
    /// Make a container image of the agent from what is on this machine
    Image(image::Options),
    /// Check format, clippy for host and BPF, documentation, licences
    Lint,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().job {
        Job::Setup => setup::run(),
        Job::BuildEbpf => setup::run().and_then(|()| ebpf::run()),
        Job::Demo(options) => demo::run(&options),
        Job::Scale(options) => scale::run(&options),
        Job::Test(options) => setup::run().and_then(|()| test::run(&options)),
        Job::Bench(options) => bench::run(&options),
        Job::Traffic(end) => bench::generator::run(&end),
        Job::Image(options) => image::run(&options),
        Job::Lint => setup::run().and_then(|()| lint::run()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
