//! `loden`: parse, check, run.

use std::process::ExitCode;

use loden_agent::cli::{self, Command, Exit};
use loden_agent::config::Config;
use loden_agent::docker_opts;

fn main() -> ExitCode {
    // What is not UTF-8 is looked at all the same, so that it is refused and not passed over.
    let env = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    match cli::parse(std::env::args_os(), &env).and_then(run) {
        Ok(code) => code,
        Err(exit) => exit.report(),
    }
}

fn run(command: Command) -> Result<ExitCode, Exit> {
    match command {
        Command::Agent(args) => {
            let _config = Config::from_args(args).map_err(Exit::error)?;
            Err(Exit::error("the agent is not part of this build"))
        }
        Command::Cleanup(args) => {
            let _config = Config::from_args(args.agent).map_err(Exit::error)?;
            Err(Exit::error("cleanup is not part of this build"))
        }
        Command::DockerOpts(args) => docker_opts::run(&args, docker_opts::process_variables())
            .map(|()| ExitCode::SUCCESS)
            .map_err(|error| Exit { code: 1, ..Exit::error(error) }),
    }
}
