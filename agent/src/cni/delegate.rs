//! Other plugins, run as the runtime runs them: that for addresses, and what flannel's configuration delegates to.

use std::{
    io::{ErrorKind, Write as _},
    path::PathBuf,
    process::{Command as Process, Output, Stdio},
    thread,
};

use serde_json::Value;

use super::{
    error::{CniError, Result, code},
    request::{Attachment, Command, Environment, NEWEST, bad_field, excerpt, version_at},
};

/// A plugin by the name of its binary.
#[derive(Clone, Debug)]
pub struct Delegate<'a> {
    name: String,
    binary: PathBuf,
    env: &'a Environment,
}

impl<'a> Delegate<'a> {
    /// Finds it. `field` is where its name stands in the configuration.
    ///
    /// # Errors
    ///
    /// Code 7 where the name is a path, 101 where it is not in `CNI_PATH`.
    pub fn find(env: &'a Environment, field: &str, name: &str) -> Result<Self> {
        if name.contains('/') || name.starts_with('.') {
            return Err(bad_field(field, &name.into(), "must be the name of a plugin, not a path"));
        }
        let binary = env.path.iter().map(|directory| directory.join(name)).find(|path| path.is_file());
        let binary = binary.ok_or_else(|| {
            let path: Vec<String> = env.path.iter().map(|part| part.display().to_string()).collect();
            CniError::new(code::DELEGATE, format_args!("\"{field}\": there is no plugin {}", excerpt(name)))
                .details(format_args!("looked for in CNI_PATH={}", path.join(":")))
        })?;
        Ok(Self { name: name.to_owned(), binary, env })
    }

    /// Runs it for the same container. `None` where it printed nothing.
    ///
    /// # Errors
    ///
    /// What it says itself, with its name; code 101 where it says nothing.
    pub fn call(&self, command: Command, conf: &Value) -> Result<Option<Value>> {
        self.run(Process::new(&self.binary).env("CNI_COMMAND", command.name()), conf)
    }

    /// Runs DEL for another container, of which there is nothing left but its name.
    ///
    /// # Errors
    ///
    /// As [`Self::call`].
    pub fn delete(&self, attachment: &Attachment, conf: &Value) -> Result<()> {
        let mut process = Process::new(&self.binary);
        process
            .env("CNI_COMMAND", Command::Del.name())
            .env("CNI_CONTAINERID", &attachment.container)
            .env("CNI_IFNAME", &attachment.interface)
            .env_remove("CNI_NETNS");
        self.run(&mut process, conf).map(drop)
    }

    /// Whether it knows GC and STATUS, which came with 1.1.0.
    #[must_use]
    pub fn is_modern(&self) -> bool {
        let conf = serde_json::json!({ "cniVersion": NEWEST });
        let Ok(Some(answer)) = self.call(Command::Version, &conf) else { return false };
        let versions = answer["supportedVersions"].as_array().map(Vec::as_slice).unwrap_or_default();
        versions.iter().any(|version| version.as_str().and_then(version_at) == version_at(NEWEST))
    }

    /// Runs GC or STATUS where it knows them.
    ///
    /// # Errors
    ///
    /// As [`Self::call`].
    pub fn call_if_modern(&self, command: Command, conf: &Value) -> Result<()> {
        if self.is_modern() { self.call(command, conf).map(drop) } else { Ok(()) }
    }

    fn run(&self, process: &mut Process, conf: &Value) -> Result<Option<Value>> {
        let failed = |error: std::io::Error| {
            CniError::new(
                code::IO,
                format_args!("the plugin {} cannot be run: {error}", self.binary.display()),
            )
        };
        let path = std::env::join_paths(&self.env.path).unwrap_or_default();
        let process = process.env("CNI_PATH", path).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = process.stderr(Stdio::piped()).spawn().map_err(failed)?;
        let stdin = child.stdin.take();
        let output = thread::scope(|scope| {
            let writing = scope.spawn(move || match stdin {
                Some(mut stdin) => stdin.write_all(conf.to_string().as_bytes()),
                None => Ok(()),
            });
            let output = child.wait_with_output();
            match writing.join() {
                // It need not read what it does not want to know.
                Ok(Err(error)) if error.kind() != ErrorKind::BrokenPipe => Err(error),
                _ => output,
            }
        });
        self.answer(&output.map_err(failed)?)
    }

    fn answer(&self, output: &Output) -> Result<Option<Value>> {
        let name = &self.name;
        let stdout = output.stdout.trim_ascii();
        let stderr = String::from_utf8_lossy(output.stderr.trim_ascii()).into_owned();
        if output.status.success() {
            if stdout.is_empty() {
                return Ok(None);
            }
            return serde_json::from_slice(stdout).map(Some).map_err(|error| {
                let shown = excerpt(&String::from_utf8_lossy(stdout));
                CniError::new(
                    code::DELEGATE,
                    format_args!("the plugin {name} did not answer in JSON: {error}"),
                )
                .details(shown)
            });
        }
        match serde_json::from_slice::<CniError>(stdout) {
            Ok(error) if !error.msg.is_empty() => {
                Err(CniError { msg: format!("plugin {name}: {}", error.msg), ..error })
            }
            _ => Err(CniError::new(
                code::DELEGATE,
                format_args!("the plugin {name} ended with {}", output.status),
            )
            .details(excerpt(&stderr))),
        }
    }
}
