//! Ring 2: every program on frames of our making, run by the kernel itself (`BPF_PROG_TEST_RUN`): what it answers,
//! what became of the frame to the byte, and what it counted.
//!
//! A failing test leaves `target/pcap/<test>.pcap`.

#![expect(
    clippy::unwrap_used,
    reason = "a test ends at the first surprise; clippy knows tests by their attribute, and not their helpers"
)]

mod bare_device;
mod case;
mod flow_cache;
mod from_other;
mod from_overlay;
mod from_pod;
mod from_wire;
mod gate;
mod guard;
mod hash;
mod hostile;
mod interrupted;
mod observe;
mod oracle;
mod packet;
mod reasons;
mod rig;
mod samples;
mod scale;
mod trace;
mod traffic;
mod truncated;
mod v6;
