//! Leases against a real etcd: claims and races, what flannel writes and reads, failures of every kind. The nodes
//! here are lease clients and nothing else: no device, no routes, no root needed.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod chaos;
mod claims;
mod config;
mod flannel;
mod following;
mod ipv6_only;
mod node;
mod outages;
mod security;
mod way;
