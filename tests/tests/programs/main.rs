//! Ring 2: every program on frames of our making, run by the kernel itself (`BPF_PROG_TEST_RUN`): what it answers,
//! what became of the frame to the byte, and what it counted.
//!
//! A failing test leaves `target/pcap/<test>.pcap`.

mod case;
mod from_pod;
mod from_wire;
mod hash;
mod packet;
mod rig;
mod samples;
