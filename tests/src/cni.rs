//! What a container runtime does with CNI plugins: runs each of a chain with the configuration on standard input, the
//! previous result in it, and takes the answer.

use std::{
    fs,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Map, Value, json};

use crate::{
    netns::Netns,
    node::{self, Node},
    process::wait_if_held,
    traffic::Host,
};

/// Where Debian has the standard plugins.
const STANDARD: &str = "/usr/lib/cni";

/// A runtime on one node, with one network.
#[derive(Debug)]
pub struct Runtime {
    netns: PathBuf,
    directory: PathBuf,
    /// The network's configuration, a list of plugins.
    pub network: Value,
    /// What the runtime tells plugins that have the capability.
    pub capabilities: Map<String, Value>,
}

/// What a plugin has printed.
#[derive(Debug)]
pub struct Answer {
    /// Whether it ended well.
    pub success: bool,
    /// Its standard output, as JSON; null where there was none.
    pub output: Value,
    /// Its standard error.
    pub log: String,
}

impl Answer {
    /// What it printed, where it ended well.
    ///
    /// # Errors
    ///
    /// Where it did not; the message holds all that it said.
    pub fn well(self) -> Result<Value> {
        ensure!(self.success, "the plugin says {} {}", self.output, self.log);
        Ok(self.output)
    }

    /// Code and message, where it ended with an error object.
    ///
    /// # Errors
    ///
    /// Where it ended well, or without an error object.
    pub fn error(&self) -> Result<(u64, String)> {
        ensure!(!self.success, "the plugin had no error: {}", self.output);
        let code = self.output["code"].as_u64();
        code.zip(self.output["msg"].as_str().map(str::to_owned))
            .with_context(|| format!("no error object: {} {}", self.output, self.log))
    }
}

/// A pod: a namespace, and what the plugins answered.
#[derive(Debug)]
pub struct Pod {
    /// `CNI_CONTAINERID`.
    pub id: String,
    /// Its namespace.
    pub netns: Netns,
    /// The answer of the last plugin of the chain.
    pub result: Value,
    /// Its IPv4 address; unspecified where it has none.
    pub address: Ipv4Addr,
    /// Its IPv6 address, where it has one.
    pub address6: Option<Ipv6Addr>,
}

impl Pod {
    /// It as one end of a conversation.
    #[must_use]
    pub fn host(&self) -> Host<'_> {
        Host { netns: &self.netns, address: self.address.into() }
    }

    /// It as one end of a conversation over IPv6, where it has an address of that.
    #[must_use]
    pub fn host6(&self) -> Option<Host<'_>> {
        self.address6.map(|address| Host { netns: &self.netns, address: address.into() })
    }

    /// Packets that left through `eth0` since it was made; a GSO packet counts once, as in the programs.
    ///
    /// # Errors
    ///
    /// Where the pod is gone.
    pub fn packets_sent(&self) -> Result<u64> {
        let links: Value = serde_json::from_str(&self.netns.ip("-json -statistics link show eth0")?)?;
        links[0]["stats64"]["tx"]["packets"].as_u64().context("eth0 has no counter of sent packets")
    }

    /// The name of its veth on the host.
    #[must_use]
    pub fn veth(&self) -> &str {
        self.result["interfaces"][0]["name"].as_str().unwrap_or_default()
    }
}

impl Runtime {
    /// On a node, with this network. Its files, and those of the plugins, are the node's own; whatever else it needs
    /// of them is in `network` already.
    ///
    /// # Errors
    ///
    /// Where the plugins are not built or not installed.
    pub fn new(node: &Node, network: Value) -> Result<Self> {
        let directory = node.run_directory().join("cni");
        let binaries = directory.join("bin");
        if !binaries.exists() {
            fs::create_dir_all(&binaries)?;
            ensure!(
                Path::new(STANDARD).join("host-local").exists(),
                "containernetworking-plugins is not installed"
            );
            for name in ["loden-cni", "flannel"] {
                symlink(binary()?, binaries.join(name))?;
            }
        }
        Ok(Self { netns: node.netns().path(), directory, network, capabilities: Map::new() })
    }

    /// Where host-local keeps the addresses of the networks that [`routed`] and [`flannel`] make.
    #[must_use]
    pub fn addresses(&self) -> PathBuf {
        self.directory.join("addresses").join(self.network["name"].as_str().unwrap_or_default())
    }

    /// Addresses that are given out, by host-local's files.
    #[must_use]
    pub fn given_out(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.addresses()) else { return Vec::new() };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        names.filter(|name| name.parse::<IpAddr>().is_ok()).collect()
    }

    /// Runs one plugin.
    ///
    /// # Errors
    ///
    /// Where it cannot be started.
    pub fn call(&self, command: &str, id: &str, netns: Option<&Netns>, conf: &Value) -> Result<Answer> {
        let kind = conf["type"].as_str().unwrap_or("loden-cni");
        let path = format!("{}:{STANDARD}", self.directory.join("bin").display());
        let file = path.split(':').map(|dir| Path::new(dir).join(kind)).find(|file| file.exists());
        let file = file.with_context(|| format!("there is no plugin {kind}"))?;
        let mut process = std::process::Command::new("nsenter");
        process
            .arg(format!("--net={}", self.netns.display()))
            .arg(file)
            .env("CNI_COMMAND", command)
            .env("CNI_PATH", path)
            .env("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if !["GC", "STATUS", "VERSION"].contains(&command) {
            process.env("CNI_CONTAINERID", id).env("CNI_IFNAME", "eth0");
        }
        if let Some(netns) = netns {
            process.env("CNI_NETNS", netns.path());
        }
        wait_if_held();
        let mut child = process.spawn().with_context(|| format!("{process:?} cannot be started"))?;
        // A plugin that refuses what it is told need not read it.
        let _ = child.stdin.take().context("stdin is a pipe")?.write_all(conf.to_string().as_bytes());
        let output = child.wait_with_output()?;
        Ok(Answer {
            success: output.status.success(),
            output: serde_json::from_slice(&output.stdout).unwrap_or_default(),
            log: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// The configuration of each plugin of the chain, as the runtime hands it over.
    #[must_use]
    pub fn chain(&self) -> Vec<Value> {
        let plugins = self.network["plugins"].as_array().cloned().unwrap_or_default();
        let mut chain = Vec::new();
        for mut conf in plugins {
            conf["name"] = self.network["name"].clone();
            conf["cniVersion"] = self.network["cniVersion"].clone();
            for (capability, value) in &self.capabilities {
                if conf["capabilities"][capability] == true {
                    conf["runtimeConfig"][capability] = value.clone();
                }
            }
            chain.push(conf);
        }
        chain
    }

    /// The first plugin's configuration.
    #[must_use]
    pub fn first(&self) -> Value {
        self.chain().into_iter().next().unwrap_or_default()
    }

    /// ADD along the chain, in a fresh namespace; what was made is undone where a plugin fails.
    ///
    /// # Errors
    ///
    /// What the failing plugin says.
    pub fn add(&self, id: &str) -> Result<Pod> {
        let netns = Netns::create(&format!("p-{id}"))?;
        match self.add_to(id, &netns) {
            Ok(result) => {
                let all = addresses(&result);
                let v4 = all.iter().find_map(|it| if let IpAddr::V4(it) = it { Some(*it) } else { None });
                let v6 = all.iter().find_map(|it| if let IpAddr::V6(it) = it { Some(*it) } else { None });
                ensure!(!all.is_empty(), "no address: {result}");
                let address = v4.unwrap_or(Ipv4Addr::UNSPECIFIED);
                Ok(Pod { id: id.to_owned(), netns, result, address, address6: v6 })
            }
            Err(error) => {
                self.del(id, Some(&netns), &Value::Null)?;
                Err(error)
            }
        }
    }

    /// ADD along the chain, in this namespace.
    ///
    /// # Errors
    ///
    /// What the failing plugin says.
    pub fn add_to(&self, id: &str, netns: &Netns) -> Result<Value> {
        let mut result = Value::Null;
        for mut conf in self.chain() {
            if !result.is_null() {
                conf["prevResult"] = result.clone();
            }
            let kind = conf["type"].to_string();
            result =
                self.call("ADD", id, Some(netns), &conf)?.well().with_context(|| format!("ADD of {kind}"))?;
        }
        Ok(result)
    }

    /// DEL along the chain, in reverse.
    ///
    /// # Errors
    ///
    /// What the failing plugin says.
    pub fn del(&self, id: &str, netns: Option<&Netns>, result: &Value) -> Result<()> {
        for mut conf in self.chain().into_iter().rev() {
            if !result.is_null() {
                conf["prevResult"] = result.clone();
            }
            let kind = conf["type"].to_string();
            self.call("DEL", id, netns, &conf)?.well().with_context(|| format!("DEL of {kind}"))?;
        }
        Ok(())
    }

    /// Takes a pod off and removes its namespace.
    ///
    /// # Errors
    ///
    /// What the failing plugin says.
    pub fn remove(&self, pod: Pod) -> Result<()> {
        self.del(&pod.id, Some(&pod.netns), &pod.result)
    }

    /// CHECK by the first plugin, with a pod's result.
    ///
    /// # Errors
    ///
    /// Where it cannot be started.
    pub fn check(&self, pod: &Pod) -> Result<Answer> {
        let mut conf = self.first();
        conf["prevResult"] = pod.result.clone();
        self.call("CHECK", &pod.id, Some(&pod.netns), &conf)
    }
}

/// The addresses that a plugin has answered.
#[must_use]
pub fn addresses(result: &Value) -> Vec<IpAddr> {
    let ips = result["ips"].as_array().map(Vec::as_slice).unwrap_or_default();
    ips.iter().filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok()).collect()
}

/// A network of routed pods on this node, with these plugins behind.
#[must_use]
pub fn routed(node: &Node, name: &str, behind: &[Value]) -> Value {
    let first = json!({
        "type": "loden-cni",
        "subnetFile": node.subnet_file(),
        "bpffsDir": node.bpffs(),
        "ipam": { "dataDir": node.run_directory().join("cni/addresses") },
        "capabilities": { "bandwidth": true },
    });
    list(name, first, behind)
}

/// flannel's own configuration on this node, as its manifest has it.
#[must_use]
pub fn flannel(node: &Node, name: &str, delegate: Value, behind: &[Value]) -> Value {
    let first = json!({
        "type": "flannel",
        "subnetFile": node.subnet_file(),
        "dataDir": node.run_directory().join("cni/flannel"),
        "ipam": { "dataDir": node.run_directory().join("cni/addresses") },
        "delegate": delegate,
    });
    list(name, first, behind)
}

fn list(name: &str, first: Value, behind: &[Value]) -> Value {
    let plugins: Vec<Value> = std::iter::once(first).chain(behind.iter().cloned()).collect();
    json!({ "name": name, "cniVersion": "1.0.0", "plugins": plugins })
}

/// The plugin's binary, beside the agent's.
///
/// # Errors
///
/// Where it is not built.
pub fn binary() -> Result<PathBuf> {
    let file = node::binary()?.with_file_name("loden-cni");
    if !file.is_file() {
        bail!("{} is not built: cargo build --package loden-agent", file.display());
    }
    Ok(file)
}
