//! What the kernel's flow hash of a frame is (`skb_get_hash`, keyed anew at each boot): asked of a program of two
//! instructions, so that the source port that our program writes can be computed beside it.

use std::{ffi::CString, io, os::unix::ffi::OsStrExt as _, path::Path};

use aya::programs::SchedClassifier;
use nix::libc;

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;

/// `call bpf_get_hash_recalc; exit` (linux/bpf.h: opcode 0x85 with helper 34, opcode 0x95).
#[rustfmt::skip]
const INSTRUCTIONS: [u8; 16] = [
    0x85, 0, 0, 0, 34, 0, 0, 0,
    0x95, 0, 0, 0, 0, 0, 0, 0,
];

/// The first fields of `union bpf_attr` for BPF_PROG_LOAD.
#[repr(C)]
#[derive(Default)]
struct Load {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// The same for BPF_OBJ_PIN.
#[repr(C)]
struct Pin {
    path: u64,
    descriptor: u32,
    flags: u32,
}

/// Loads the program; the pin is how it comes into aya's hands, and goes with the file system.
pub(crate) fn load(pin: &Path) -> SchedClassifier {
    let license = c"GPL";
    let load = Load {
        program_type: BPF_PROG_TYPE_SCHED_CLS,
        instruction_count: (INSTRUCTIONS.len() / 8) as u32,
        instructions: INSTRUCTIONS.as_ptr() as u64,
        license: license.as_ptr() as u64,
        ..Load::default()
    };
    let program = bpf(BPF_PROG_LOAD, &load).unwrap();
    let path = CString::new(pin.as_os_str().as_bytes()).unwrap();
    bpf(BPF_OBJ_PIN, &Pin { path: path.as_ptr() as u64, descriptor: program as u32, flags: 0 }).unwrap();
    // SAFETY: the descriptor was made above, and nobody else has it.
    unsafe { libc::close(program) };
    SchedClassifier::from_pin(pin).unwrap()
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_int> {
    // SAFETY: the attributes live through the call and point to memory that does; the kernel reads as many bytes
    // as it is told and takes the rest of its own structure to be zero.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as libc::c_int) }
}
