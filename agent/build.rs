//! Compiles the eBPF programs of the `loden-ebpf` package into `OUT_DIR`: the one way in which they are built.

use anyhow::Context as _;

fn main() -> anyhow::Result<()> {
    // SAFETY: a build script's main thread is the only thread at this point, so nothing reads the
    // environment meanwhile.
    //
    // The BPF target has no prebuilt `core`; building it (`-Z build-std`) is unstable, and this variable
    // lets the stable compiler do it. It is set here, for that one build only.
    unsafe { std::env::set_var("RUSTC_BOOTSTRAP", "1") };
    let toolchain = std::env::var("RUSTUP_TOOLCHAIN").unwrap_or_else(|_| "stable".into());
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../ebpf");
    aya_build::build_ebpf(
        [aya_build::Package {
            name: "loden-ebpf",
            root_dir: root.to_str().context("the project's path is not UTF-8")?,
            ..Default::default()
        }],
        aya_build::Toolchain::Custom(&toolchain),
    )
    .context("building the eBPF programs failed; `cargo xtask setup` installs what it needs")
}
