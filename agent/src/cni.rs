//! The CNI plugin `loden-cni` (specification 1.1.0): wires pods to the node.
//!
//! | `type` in the configuration | mode |
//! | --- | --- |
//! | `loden-cni` | routed: a veth, no bridge ([`routed`]) |
//! | `flannel` | flannel's plugin: fills in the bridge plugin's configuration and runs that ([`flannel`]) |
//!
//! A runtime finds the binary by the `type`, so for the second it is installed as `flannel` too; it is told its mode
//! by the configuration and not by its name.
//!
//! It needs no running agent. What it makes of a routed pod is the kernel's: veth, route, neighbours, and on the
//! veth's alias whose it is. The programs it attaches from the pins that the agent has left, and the endpoint's entry
//! it writes itself, so that a pod is on the fast path at once; an agent that comes later finds pods by their alias.

pub mod addresses;
pub mod check;
pub mod delegate;
pub mod error;
pub mod flannel;
pub mod install;
pub mod ipam;
pub mod lease;
pub mod record;
pub mod request;
pub mod result;
pub mod routed;
pub mod sandbox;
pub mod wiring;

use std::{
    io::{Read, Write as _},
    process::ExitCode,
};

use serde_json::{Value, json};
use tokio::runtime::Builder;

use self::{
    error::{CniError, Result, code},
    request::{Command, Conf, Environment, NEWEST, VERSIONS, bad_field, version_at},
};

/// More than any configuration, in bytes.
const LARGEST: u64 = 1 << 20;

/// Runs as a plugin: the answer goes to standard output, an error as the specification's object.
#[must_use]
pub fn main(get: &dyn Fn(&str) -> Option<String>) -> ExitCode {
    let mut input = Vec::new();
    // What cannot be read is what is not there: parsing says what is wrong with it.
    let read = std::io::stdin().lock().take(LARGEST).read_to_end(&mut input);
    let answer = match read {
        Ok(_) => answer(get, &input),
        Err(error) => Err(CniError::new(code::IO, format_args!("standard input cannot be read: {error}"))),
    };
    let (text, exit) = match answer {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(value)) => (value, ExitCode::SUCCESS),
        Err(error) => (error.to_json(&version(&input)), ExitCode::FAILURE),
    };
    // A runtime that has gone away wants no answer.
    let _ = writeln!(std::io::stdout(), "{text:#}");
    exit
}

/// What the runtime gets on standard output.
///
/// # Errors
///
/// As the specification has them: see [`code`].
pub fn answer(get: &dyn Fn(&str) -> Option<String>, input: &[u8]) -> Result<Option<Value>> {
    let env = Environment::read(get)?;
    if env.command == Command::Version {
        return Ok(Some(json!({ "cniVersion": version(input), "supportedVersions": VERSIONS })));
    }
    let conf = Conf::parse(input, env.command)?;
    let done = match conf.kind.as_str() {
        flannel::TYPE => flannel::run(&env, &conf),
        routed::TYPE => {
            let runtime = Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|error| CniError::new(code::IO, error))?;
            runtime.block_on(routed::run(&env, &conf))
        }
        other => Err(CniError {
            code: code::UNSUPPORTED_FIELD,
            ..bad_field(
                "type",
                &other.into(),
                "must be \"loden-cni\" (routed) or \"flannel\" (flannel's plugin)",
            )
        }),
    };
    match env.command {
        // Whatever is not there yet keeps containers from being attached, and that is all that STATUS asks.
        Command::Status => done.map_err(|error| match error.code {
            code::TRY_AGAIN | code::DELEGATE | code::IO => CniError { code: code::NOT_AVAILABLE, ..error },
            _ => error,
        }),
        _ => done,
    }
}

/// The version that the runtime speaks, as far as it can be told; else our newest.
fn version(input: &[u8]) -> String {
    let conf: Value = serde_json::from_slice(input).unwrap_or_default();
    let version = conf["cniVersion"].as_str().filter(|version| version_at(version).is_some());
    version.unwrap_or(NEWEST).to_owned()
}

#[cfg(test)]
mod tests;
