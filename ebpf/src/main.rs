//! The programs: TC but for one. Each entry point is one expression; the work is in `programs/`.
//!
//! | program | hook | does |
//! | --- | --- | --- |
//! | `from_pod` | ingress of the host side of a pod's veth | encapsulates and sends to the uplink |
//! | `guard` | XDP on an uplink, optional | drops VXLAN from strangers |
//! | `from_wire` | ingress of an uplink | decapsulates and delivers into the pod; routes what direct peers send |
//! | `from_overlay` | ingress of the overlay's device, VXLAN or WireGuard | delivers what the kernel decapsulated; point 1 of inbound flows |
//! | `to_overlay` | egress of the overlay's device | point 2 of outbound flows |
//! | `to_wire` | egress of an uplink with direct peers | point 2 of outbound flows to them |
//! | `to_pod` | egress of the host side of a pod's veth | point 2 of inbound flows |
//!
//! Each has two bodies, one per family, of one source.
//!
//! The rule above all: whatever a program is not sure of goes on into the kernel, and is decided before the
//! first write to the packet.

#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]

#[cfg(target_arch = "bpf")]
mod programs;

/// The host has no use for the programs; this lets plain `cargo build` and `cargo clippy` pass over them.
#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier proves that this is never reached: it rejects a program with an endless loop.
    loop {}
}

/// The helpers that redirect and adjust packets are for GPL-compatible programs only.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
