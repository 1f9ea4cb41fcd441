//! The initramfs of a guest: busybox, the programs that agent and tests run, their libraries, kernel modules.

use std::{
    collections::BTreeSet,
    fs::{self, File, Permissions},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use loden_tests::netns::{output, run};

use super::{Kernel, Programs, Tests};

/// Runs in the guest as its first process.
const INIT: &str = include_str!("init.sh");

/// What agent, harness and tests run besides busybox.
const TOOLS: &[&str] = &[
    "bpftool",
    "bridge",
    "etcd",
    "etcdctl",
    "ethtool",
    "ip",
    "ip6tables",
    "ip6tables-restore",
    "ip6tables-save",
    "iptables",
    "iptables-restore",
    "iptables-save",
    "ipvsadm",
    "mount",
    "nft",
    "nsenter",
    "ping",
    "setpriv",
    "sysctl",
    "tc",
    "umount",
    "wg",
];

/// What they need of the kernel and Debian builds as a module; what a series has built in or does not know is left out.
const MODULES: &[&str] = &[
    "vxlan",
    "veth",
    "bridge",
    "br_netfilter",
    "nf_tables",
    "nfnetlink",
    "nf_conntrack",
    "nf_conntrack_netlink",
    "nf_nat",
    "nft_chain_nat",
    "nft_compat",
    "nft_ct",
    "nft_masq",
    "nft_nat",
    "nft_redir",
    "nft_counter",
    "nft_log",
    "nft_limit",
    "nft_numgen",
    "nft_hash",
    "nft_reject_inet",
    "nft_fib_inet",
    "xt_conntrack",
    "xt_nat",
    "xt_MASQUERADE",
    "xt_mark",
    "xt_comment",
    "xt_addrtype",
    "xt_statistic",
    "xt_multiport",
    "xt_tcpudp",
    "tun",
    "cls_bpf",
    "act_bpf",
    "sch_ingress",
    "af_packet",
    "loop",
    "wireguard",
    "dummy",
    "ip_vs",
    "ip_vs_rr",
];

/// What is the same for every kernel.
#[derive(Debug)]
pub(super) struct Image {
    tree: PathBuf,
}

impl Image {
    /// Puts it together below the cache.
    ///
    /// # Errors
    ///
    /// Where a program is missing.
    pub(super) fn prepare(cache: &Path, programs: &Programs<'_>) -> Result<Self> {
        let tree = cache.join("tree");
        if tree.exists() {
            fs::remove_dir_all(&tree)?;
        }
        for directory in ["bin", "dev", "etc", "loden", "proc", "root", "run", "sys", "tmp", "usr/bin", "var"]
        {
            fs::create_dir_all(tree.join(directory))?;
        }
        symlink("/run", tree.join("var/run"))?;
        let image = Self { tree };
        image.copy(Path::new("/bin/busybox"), "bin/busybox")?;
        let mut libraries = BTreeSet::new();
        for tool in TOOLS {
            let path = find(tool)?;
            image.copy(&path, &format!("usr/bin/{tool}"))?;
            libraries.extend(libraries_of(&path)?);
        }
        let binaries = [
            (programs.agent, "loden/loden"),
            (programs.cluster, "loden/cluster"),
            (programs.programs, "loden/programs"),
        ];
        for (path, name) in binaries {
            let to = image.tree.join(name).display().to_string();
            // Debug information would be most of the image, which the guest keeps in its memory.
            run("strip", &["--strip-debug", "-o", &to, &path.display().to_string()])?;
            libraries.extend(libraries_of(path)?);
        }
        for library in &libraries {
            image.copy(library, &inside(library))?;
        }
        image.extensions()?;
        for file in ["/etc/protocols", "/etc/services"].map(Path::new).iter().filter(|file| file.exists()) {
            image.copy(file, &inside(file))?;
        }
        fs::write(image.tree.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\n")?;
        fs::write(image.tree.join("init"), INIT)?;
        fs::set_permissions(image.tree.join("init"), Permissions::from_mode(0o755))?;
        Ok(image)
    }

    /// Writes the initramfs of one kernel, which runs these tests.
    ///
    /// # Errors
    ///
    /// Where a module cannot be unpacked.
    pub(super) fn write(&self, kernel: &Kernel, tests: Tests<'_>, to: &Path) -> Result<()> {
        let modules = self.tree.join("modules");
        if modules.exists() {
            fs::remove_dir_all(&modules)?;
        }
        fs::create_dir_all(&modules)?;
        let mut order = String::new();
        for (n, module) in in_order(kernel)?.iter().enumerate() {
            // Numbered, because two directories may have modules of one name.
            let name = format!("{n:03}.ko");
            unpack(module, &modules.join(&name))?;
            order += &format!("{name} {}\n", module.display());
        }
        fs::write(modules.join("order"), order)?;
        for (suite, tests) in [("programs", tests.programs), ("cluster", tests.cluster)] {
            fs::write(self.tree.join("loden").join(format!("{suite}.tests")), tests.join("\n"))?;
        }
        let mut cpio = Command::new("cpio");
        cpio.args(["--create", "--format=newc", "--null", "--quiet", "--owner=0:0"])
            .current_dir(&self.tree)
            .stdout(File::create(to)?);
        let mut find = Command::new("find");
        let mut files = find.args([".", "-print0"]).current_dir(&self.tree).stdout(Stdio::piped()).spawn()?;
        let names = files.stdout.take().context("find has no standard output")?;
        let status = cpio.stdin(names).status().context("cpio")?;
        ensure!(files.wait()?.success() && status.success(), "cpio ended with {status}");
        Ok(())
    }

    fn copy(&self, from: &Path, to: &str) -> Result<()> {
        let to = self.tree.join(to);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(from, &to).with_context(|| from.display().to_string()).map(drop)
    }

    /// iptables opens its extensions as it needs them.
    fn extensions(&self) -> Result<()> {
        let directory = ["/usr/lib/x86_64-linux-gnu/xtables", "/usr/lib/xtables", "/usr/lib64/xtables"]
            .map(Path::new)
            .into_iter()
            .find(|directory| directory.is_dir())
            .context("iptables has no directory of extensions")?;
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            self.copy(&path, &inside(&path))?;
        }
        Ok(())
    }
}

/// A path without its leading slash.
fn inside(path: &Path) -> String {
    path.display().to_string().trim_start_matches('/').to_owned()
}

fn find(program: &str) -> Result<PathBuf> {
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .map(|directory| Path::new(directory).join(program))
        .find(|path| path.is_file())
        .with_context(|| format!("{program} is not installed"))
}

/// The shared libraries of a program, the loader among them.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let said = output(Command::new("ldd").arg(program).env("LC_ALL", "C")).unwrap_or_default();
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    let libraries: Vec<PathBuf> = said.lines().filter_map(path).collect();
    ensure!(!said.contains("not found"), "{}: {said}", program.display());
    Ok(libraries)
}

/// The module files in the order in which they can be loaded.
fn in_order(kernel: &Kernel) -> Result<Vec<PathBuf>> {
    let list = kernel.modules.join("modules.dep");
    if !list.exists() {
        // The package leaves that to its installation; it looks for lib/modules below its base.
        let base = kernel.modules.ancestors().nth(3).context("modules without a root")?;
        run("depmod", &["-b", &base.display().to_string(), &kernel.release])?;
    }
    let text = fs::read_to_string(&list).with_context(|| list.display().to_string())?;
    Ok(load_order(&text, MODULES).into_iter().map(|path| kernel.modules.join(path)).collect())
}

/// The files of these modules and of what they need, each after what it needs itself; `dep` is a `modules.dep`.
fn load_order<'a>(dep: &'a str, wanted: &[&str]) -> Vec<&'a str> {
    let is_named = |line: &str, name: &str| {
        let file = line.split(':').next().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
        file.split('.').next().is_some_and(|stem| stem.replace('-', "_") == name)
    };
    let mut order: Vec<&str> = Vec::new();
    for name in wanted {
        let line = dep.lines().find(|line| is_named(line, name));
        let Some((module, needs)) = line.and_then(|line| line.split_once(':')) else { continue };
        // The nearest is named first, so the last one needs nothing that comes before it.
        for path in needs.split_whitespace().rev().chain([module]) {
            if !order.contains(&path) {
                order.push(path);
            }
        }
    }
    order
}

fn unpack(module: &Path, to: &Path) -> Result<()> {
    let program = match module.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::copy(module, to).with_context(|| module.display().to_string()).map(drop),
    };
    let status = Command::new(program).args(["-dc"]).arg(module).stdout(File::create(to)?).status();
    ensure!(status.with_context(|| program.to_owned())?.success(), "{} is not unpacked", module.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::load_order;

    #[test]
    fn every_module_is_loaded_once_and_after_what_it_needs() {
        let dep = "kernel/net/a-b.ko.xz: kernel/c.ko.xz kernel/d.ko.xz\nkernel/d.ko.xz:\n\
            kernel/c.ko.xz: kernel/d.ko.xz\nkernel/e.ko.xz:\n";
        let order = ["kernel/d.ko.xz", "kernel/c.ko.xz", "kernel/net/a-b.ko.xz"];
        assert_eq!(load_order(dep, &["a_b", "c", "built_in"]), order);
    }
}
