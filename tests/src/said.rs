//! Everything that can be read of a node: to find what should be in none of it.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
};

use anyhow::{Context as _, Result, ensure};

use crate::node::Node;

/// Where [`Said::by`] looks for what an agent serves, on its loopback.
pub const METRICS_PORT: u16 = 9101;
/// Where it looks for the web page.
pub const WEB_PORT: u16 = 9102;
/// The flags with which an agent serves both.
pub const FLAGS: [&str; 2] = ["--metrics-addr=127.0.0.1:9101", "--web-addr=127.0.0.1:9102"];

/// Texts, each with where it is from.
#[derive(Debug, Default)]
pub struct Said(Vec<(String, String)>);

impl Said {
    /// What a node with a running agent says: log, commands, pages, files. `doctor`: further arguments of that.
    ///
    /// # Errors
    ///
    /// Where the agent does not serve what it should, or has written no file.
    pub fn by(node: &Node, doctor: &[&str]) -> Result<Self> {
        let mut said = Self::default();
        said.add("the log", node.log());
        for command in
            ["status", "status --json", "doctor --timeout-ms=100", "doctor --json --timeout-ms=100"]
        {
            let mut args: Vec<&str> = command.split(' ').collect();
            if args[0] == "doctor" {
                args.extend(doctor);
            }
            said.add_output(command, node, &args)?;
        }
        for (port, path) in [
            (METRICS_PORT, "/metrics"),
            (METRICS_PORT, "/readyz"),
            (METRICS_PORT, "/healthz"),
            (WEB_PORT, "/"),
            (WEB_PORT, "/status.json"),
        ] {
            let answer = get(node, port, path)?;
            ensure!(answer.contains("\r\n\r\n"), "GET {path}: {answer:?}");
            said.add(path, answer);
        }
        for entry in fs::read_dir(node.run_directory())? {
            let path = entry?.path();
            // Not the socket.
            if path.is_file() {
                said.add(&path.display().to_string(), fs::read_to_string(&path)?);
            }
        }
        Ok(said)
    }

    /// One more text.
    pub fn add(&mut self, from: &str, text: String) {
        self.0.push((from.to_owned(), text));
    }

    /// What a command prints, whatever becomes of it.
    ///
    /// # Errors
    ///
    /// Where it cannot be started.
    pub fn add_output(&mut self, what: &str, node: &Node, args: &[&str]) -> Result<()> {
        let output = node.loden_output(args)?;
        let printed = [output.stdout, output.stderr].concat();
        self.add(what, String::from_utf8_lossy(&printed).into_owned());
        Ok(())
    }

    /// Takes another's texts over.
    pub fn append(&mut self, mut other: Self) {
        self.0.append(&mut other.0);
    }

    /// The line in which one of these is, with where it is from.
    ///
    /// # Errors
    ///
    /// Where somebody has said nothing at all: then nothing is proven.
    pub fn find(&self, secrets: &[&str]) -> Result<Option<String>> {
        for (from, text) in self.0.iter().filter(|(from, _)| !from.ends_with(".lock")) {
            ensure!(!text.is_empty(), "{from} says nothing");
            if let Some(line) = text.lines().find(|line| secrets.iter().any(|secret| line.contains(secret))) {
                return Ok(Some(format!("{from}: {line}")));
            }
        }
        Ok(None)
    }
}

fn get(node: &Node, port: u16, path: &str) -> Result<String> {
    let stream = node.netns().run(|| TcpStream::connect(("127.0.0.1", port)));
    let mut stream = stream.with_context(|| format!("port {port}"))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
