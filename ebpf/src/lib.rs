//! What the eBPF programs and the agent share: the map ABI, and packet code that is pure.
//!
//! Everything here is `no_std`, free of helpers and of maps, and is unit-tested on the host. The programs
//! (`src/main.rs`) only fetch bytes, ask this library, and store bytes.

#![cfg_attr(not(test), no_std)]

pub mod abi;
pub mod checksum;
pub mod ecn;
pub mod ethernet;
pub mod family;
pub mod flow;
pub mod flow_cache;
pub mod grid;
pub mod ipv4;
pub mod ipv6;
pub mod reason;
pub mod segments;
pub mod trace;
pub mod transport;
pub mod vxlan;
