//! With containerd itself: its own CNI library reads the configuration, runs the plugins and keeps the result for DEL.

use std::{
    fs,
    net::Ipv4Addr,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use loden_tests::{
    cluster::Cluster,
    cni, netns,
    process::{Process, wait_for},
    traffic::ping,
};

use crate::{assert_nothing_is_left, counted, routed_cluster};

/// A containerd in a node's namespace, with files of its own.
struct Containerd {
    _process: Process,
    directory: PathBuf,
    node: PathBuf,
}

impl Containerd {
    fn start(cluster: &Cluster) -> Self {
        let node = &cluster.nodes[0];
        let directory = node.run_directory().join("containerd");
        for part in ["plugins", "net.d", "rootfs/bin", "rootfs/proc", "rootfs/sys", "rootfs/dev"] {
            fs::create_dir_all(directory.join(part)).unwrap();
        }
        // Loden's own installation, of the configuration that it is given.
        let network = cni::routed(node, "pods", &[]).to_string();
        fs::write(directory.join("given.conflist"), network).unwrap();
        let mut install = Command::new(cni::binary().unwrap());
        install.arg("install").arg("--bin-dir").arg(directory.join("plugins"));
        install.arg("--conf-dir").arg(directory.join("net.d"));
        install.arg("--conf").arg(directory.join("given.conflist"));
        netns::output(&mut install).unwrap();
        symlink("/usr/lib/cni/host-local", directory.join("plugins/host-local")).unwrap();
        fs::copy("/bin/busybox", directory.join("rootfs/bin/busybox")).expect("busybox-static is installed");
        let config = directory.join("config.toml");
        let text = format!(
            "version = 2\nroot = \"{0}/root\"\nstate = \"{0}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = \"{0}/sock\"\n",
            directory.display()
        );
        fs::write(&config, text).unwrap();
        let log = fs::File::create(directory.join("log")).unwrap();
        let mut command = node.netns().command("containerd");
        command
            .arg("--config")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let process = Process::start(&mut command).unwrap();
        let started = Self { _process: process, node: node.netns().path(), directory };
        wait_for("containerd to listen", Duration::from_secs(10), || {
            netns::output(&mut started.ctr(&["version"])).ok()
        })
        .unwrap();
        started
    }

    /// `ctr`, which looks for plugins and configurations in fixed places: ours are there in a mount namespace of its
    /// own.
    fn ctr(&self, args: &[&str]) -> Command {
        let directory = self.directory.display();
        let script = format!(
            "mount -t tmpfs tmpfs /opt && mount -t tmpfs tmpfs /etc && mkdir -p /opt/cni/bin /etc/cni/net.d && \
             mount --bind {directory}/plugins /opt/cni/bin && mount --bind {directory}/net.d /etc/cni/net.d && \
             exec ctr --address {directory}/sock \"$@\""
        );
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.node.display()));
        command
            .args(["unshare", "--mount", "--propagation", "private", "sh", "-c", &script, "ctr"])
            .args(args);
        command
    }

    /// A container that sleeps; ctr ends with it, and detaches it then.
    fn run(&self, id: &str) -> Process {
        let rootfs = self.directory.join("rootfs").display().to_string();
        let args = ["run", "--rm", "--cni", "--rootfs", &rootfs, id, "/bin/busybox", "sleep", "1000"];
        let log = fs::File::create(self.directory.join(format!("{id}.log"))).unwrap();
        let mut command = self.ctr(&args);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        Process::start(&mut command).unwrap()
    }

    fn exec(&self, id: &str, line: &str) -> anyhow::Result<String> {
        let mut args = vec!["task", "exec", "--exec-id", "look", id, "/bin/busybox"];
        args.extend(line.split_whitespace());
        netns::output(&mut self.ctr(&args))
    }
}

#[test]
fn containerd_attaches_and_detaches_containers_by_the_installed_plugin() {
    let (cluster, runtimes) = routed_cluster(2, &[]);
    let containerd = Containerd::start(&cluster);
    let far = runtimes[1].add("far").unwrap();
    let mut container = containerd.run("box");
    let address: Ipv4Addr = wait_for("the container's address", Duration::from_secs(10), || {
        let shown = containerd.exec("box", "ip -4 -o address show dev eth0").ok()?;
        shown.split_whitespace().find_map(|word| word.strip_suffix("/32")?.parse().ok())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", log(&containerd.directory)));
    ping(&far.netns, address, 20).unwrap();
    let fast = counted(&cluster.nodes, &["fast_encap"]);
    containerd.exec("box", &format!("ping -q -c 3 {}", far.address)).unwrap();
    ping(&far.netns, address, 40).unwrap();
    assert!(counted(&cluster.nodes, &["fast_encap"]) - fast >= 70, "of 80 packets and more");
    netns::output(&mut containerd.ctr(&["task", "kill", "--signal", "9", "box"])).unwrap();
    container.wait(Duration::from_secs(10)).unwrap();
    assert_nothing_is_left(&cluster.nodes[0], &runtimes[0]);
}

fn log(directory: &Path) -> String {
    fs::read_to_string(directory.join("box.log")).unwrap_or_default()
}
