//! `loden`: parse, check, run.

use std::{io::Write as _, process::ExitCode};

use loden_agent::{
    cleanup,
    cli::{self, CleanupArgs, Command, Exit, pages},
    config::Config,
    docker_opts, doctor, explain, run, status, telemetry, trace,
};
use tokio::runtime::Builder;

fn main() -> ExitCode {
    // What is not UTF-8 is looked at all the same, so that it is refused and not passed over.
    let env = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    match cli::parse(std::env::args_os(), &env).and_then(dispatch) {
        Ok(code) => code,
        Err(exit) => exit.report(),
    }
}

fn dispatch(command: Command) -> Result<ExitCode, Exit> {
    match command {
        Command::Agent(args) => {
            let config = Config::from_args(args).map_err(Exit::error)?;
            telemetry::init(&config.log).map_err(Exit::error)?;
            block_on(run::run(config)).map(|()| ExitCode::SUCCESS)
        }
        Command::Status(args) => block_on(status::run(&args)).map(|()| ExitCode::SUCCESS),
        Command::Doctor(args) => {
            block_on(doctor::run(&args)).map(ExitCode::from).map_err(|exit| Exit { code: 2, ..exit })
        }
        Command::Explain(args) => block_on(explain::run(&args)).map(|()| ExitCode::SUCCESS),
        Command::Trace(args) => block_on(trace::run(&args)).map(|()| ExitCode::SUCCESS),
        Command::Cleanup(args) => clean_up(args),
        Command::DockerOpts(args) => docker_opts::run(&args, docker_opts::process_variables())
            .map(|()| ExitCode::SUCCESS)
            .map_err(failure),
        Command::Completions(args) => std::io::stdout()
            .write_all(pages::completions(args.shell).as_bytes())
            .map(|()| ExitCode::SUCCESS)
            .map_err(failure),
        Command::Man(args) => pages::write_manual(&args.directory)
            .map(|()| ExitCode::SUCCESS)
            .map_err(|error| failure(format!("{}: {error}", args.directory.display()))),
    }
}

fn clean_up(args: CleanupArgs) -> Result<ExitCode, Exit> {
    let config = Config::from_args(args.agent).map_err(Exit::error)?;
    let errors = block_on(cleanup::run(&config, args.keep_kernel))?;
    for error in &errors {
        eprintln!("loden: {error}");
    }
    Ok(if errors.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs on one thread: a network namespace belongs to a thread, and nothing here computes for long.
fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> Result<T, Exit> {
    let runtime = Builder::new_current_thread().enable_all().build().map_err(failure)?;
    runtime.block_on(work).map_err(|error| failure(format!("{error:#}")))
}

/// A failure while running, as opposed to a wrong command line.
fn failure(reason: impl std::fmt::Display) -> Exit {
    Exit { code: 1, ..Exit::error(reason) }
}
