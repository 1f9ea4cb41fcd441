//! Ring 3: the agent's netlink and firewall code against the real kernel, each test in network namespaces of
//! its own, read back with the tools that an operator would use (`ip`, `bridge`, `nft`, `iptables`).

#![expect(
    clippy::unwrap_used,
    reason = "clippy.toml allows it in tests, which for clippy does not mean their modules"
)]

mod conntrack;
mod events;
mod firewall;
mod ipv6;
mod node;
mod overlay;
mod reading;
mod scale;
mod traffic;
mod vxlan;

use loden_agent::kernel::Kernel;
use loden_tests::netns::Netns;
use serde_json::Value;

/// Runs `f` inside a namespace, with a netlink connection and a tokio runtime that live there.
fn inside<T: Send>(netns: &Netns, f: impl AsyncFnOnce(Kernel) -> T + Send) -> T {
    netns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { f(Kernel::connect().unwrap()).await })
    })
}

/// What a command with JSON output prints inside a namespace.
fn json(netns: &Netns, line: &str) -> Value {
    let text = netns.exec(line).unwrap();
    // iproute2 prints nothing at all for some empty lists.
    if text.trim().is_empty() { Value::Array(Vec::new()) } else { serde_json::from_str(&text).unwrap() }
}

/// The lines that a command prints inside a namespace, trimmed.
fn lines(netns: &Netns, line: &str) -> Vec<String> {
    netns
        .exec(line)
        .unwrap()
        .lines()
        .map(|line| line.trim().to_owned())
        .filter(|line| !line.is_empty())
        .collect()
}
