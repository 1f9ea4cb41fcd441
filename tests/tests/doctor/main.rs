//! The commands that look into a node: what they say is compared with what the node does.

#![expect(
    clippy::unwrap_used,
    reason = "clippy.toml allows it in tests, which for clippy does not mean their modules"
)]

mod bpftool;
mod explain;
mod faults;
mod ipv6;
mod overlay;
mod records;
mod surroundings;
mod trace;
mod version;
mod ward;
