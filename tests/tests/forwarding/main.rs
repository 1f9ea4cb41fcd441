//! The forwarding ring: what the fast path does to a packet is what the kernel does to it.
//!
//! Packets are built byte by byte and captured byte by byte. Each case says which verdict the programs must have
//! counted, so that what is compared with the kernel was really theirs. What both families have runs for each of them.

#![expect(
    clippy::unwrap_used,
    reason = "clippy.toml allows it in tests, which for clippy does not mean their modules"
)]

mod back_doors;
mod behind;
mod bulk;
mod intruder;
mod outer;
mod stage;
mod too_big;
mod twins;
mod uplink;
