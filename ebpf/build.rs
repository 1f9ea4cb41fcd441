//! Linker settings of the programs (only the BPF target has them).

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("bpf") {
        // Headers are byte arrays at odd offsets. Without this a four-byte field becomes four loads and
        // three shifts; with it, one load, as the verifier allows on every CPU that has efficient
        // unaligned access (x86-64, arm64). Needs LLVM 22.
        println!("cargo:rustc-link-arg-bins=--cpu-features=+allows-misaligned-mem-access");
    }
}
