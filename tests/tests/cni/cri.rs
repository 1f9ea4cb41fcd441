//! By a kubelet's own way: containerd's CRI plugin, asked as a kubelet asks it, runs the installed plugins for each sandbox.

mod client;

use std::{
    fs,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use loden_tests::{
    cluster::Plan,
    cni,
    netns::{self, Netns},
    node::Node,
    process::wait_for,
    room::Room,
    traffic::{
        Host, Service, hello, ping,
        stream::{self, Until},
    },
};
use serde_json::{Value, json};
use tokio::runtime;

use self::client::{Client, Config, Linux, Metadata, PortMapping};
use crate::{assert_known, assert_nothing_is_left, counted, routed_cluster_of};

const PAUSE: &str = "loden.test/pause:1";
const HOST_PORT: u16 = 8000;
const INSIDE: u16 = 8080;

/// A containerd with its CRI plugin on a node, and a connection to it.
struct Kubelet {
    runtime: runtime::Runtime,
    client: Client,
    room: Room,
    directory: PathBuf,
}

/// A running sandbox.
struct Sandbox {
    id: String,
    netns: Netns,
    addresses: Vec<IpAddr>,
}

impl Sandbox {
    fn end(&self, address: IpAddr) -> Host<'_> {
        Host { netns: &self.netns, address }
    }
}

impl Kubelet {
    /// With this network, installed by the plugin itself.
    fn start(node: &Node, network: &Value) -> Self {
        let directory = node.directory().join("kubelet");
        let part = |name: &str| directory.join(name);
        fs::create_dir_all(part("plugins")).unwrap();
        fs::write(part("given.conflist"), network.to_string()).unwrap();
        let mut install = Command::new(cni::binary().unwrap());
        install.arg("install").arg("--bin-dir").arg(part("plugins"));
        install.arg("--conf-dir").arg(part("net.d")).arg("--conf").arg(part("given.conflist"));
        netns::output(&mut install).unwrap();
        for plugin in ["host-local", "portmap", "loopback"] {
            symlink(Path::new("/usr/lib/cni").join(plugin), part("plugins").join(plugin)).unwrap();
        }
        // As kubelets' nodes have it, but for what this host may not allow or others must not share.
        let cri = format!(
            "[plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = '{PAUSE}'\nrestrict_oom_score_adj = true\n\
             netns_mounts_under_state_dir = true\n\
             [plugins.'io.containerd.grpc.v1.cri'.cni]\nbin_dir = '{}'\nconf_dir = '{}'\n",
            part("plugins").display(),
            part("net.d").display()
        );
        let room = Room::open(node.netns(), &directory, Some(&cri)).unwrap();
        let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
        // Its socket is there a moment before it listens.
        let connect = || runtime.block_on(Client::connect(room.containerd())).ok();
        let client = wait_for("containerd to listen", Duration::from_secs(10), connect).unwrap();
        let kubelet = Self { runtime, client, room, directory };
        kubelet.import_pause();
        wait_for("the network to be ready", Duration::from_secs(10), || {
            kubelet.runtime.block_on(kubelet.client.network_ready()).is_ok_and(|it| it.status).then_some(())
        })
        .unwrap_or_else(|error| panic!("{error:#}: {}", kubelet.log()));
        kubelet
    }

    /// The image of which sandboxes are made: busybox, which sleeps.
    fn import_pause(&self) {
        let part = |name: &str| self.directory.join("image").join(name);
        fs::create_dir_all(part("tree/bin")).unwrap();
        fs::copy("/bin/busybox", part("tree/bin/busybox")).expect("busybox-static is installed");
        let tar = |from: &Path, to: &Path, what: &[&str]| {
            let (from, to) = (from.display().to_string(), to.display().to_string());
            netns::run("tar", &[&["-C", &from, "-cf", &to], what].concat()).unwrap();
        };
        tar(&part("tree"), &part("layer.tar"), &["."]);
        let sum = netns::run("sha256sum", &[&part("layer.tar").display().to_string()]).unwrap();
        let sum = sum.split_whitespace().next().unwrap();
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let config = json!({
            "architecture": architecture, "os": "linux", "config": { "Entrypoint": ["/bin/busybox", "sleep", "1000000"] },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{sum}")] },
        });
        let manifest = json!([{ "Config": "config.json", "RepoTags": [PAUSE], "Layers": ["layer.tar"] }]);
        fs::write(part("config.json"), config.to_string()).unwrap();
        fs::write(part("manifest.json"), manifest.to_string()).unwrap();
        tar(&part(""), &part("pause.tar"), &["manifest.json", "config.json", "layer.tar"]);
        let mut import = Command::new("nsenter");
        import.args(["--target", &self.room.first_process().to_string(), "--pid", "--mount", "ctr"]);
        import.arg("--address").arg(self.room.containerd()).args([
            "--namespace",
            "k8s.io",
            "images",
            "import",
        ]);
        netns::output(import.arg(part("pause.tar"))).unwrap();
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.join("containerd.log")).unwrap_or_default()
    }

    fn config(&self, name: &str, port_mappings: Vec<PortMapping>) -> Config {
        let metadata =
            Metadata { name: name.into(), uid: format!("{name}-uid"), namespace: "default".into() };
        Config {
            metadata: Some(metadata),
            hostname: name.into(),
            log_directory: self.directory.join("logs").display().to_string(),
            port_mappings,
            linux: Some(Linux { cgroup_parent: self.room.cgroup() }),
        }
    }

    /// `RunPodSandbox`, and what `PodSandboxStatus` says of it.
    fn run(&self, name: &str, port_mappings: Vec<PortMapping>) -> Sandbox {
        let id = self.runtime.block_on(self.client.run(self.config(name, port_mappings)));
        let id = id.unwrap_or_else(|error| panic!("{error}: {}", self.log()));
        let answer = self.runtime.block_on(self.client.sandbox(&id)).unwrap();
        let network = answer.status.unwrap().network.unwrap();
        let addresses = [network.ip].into_iter().chain(network.additional_ips.into_iter().map(|it| it.ip));
        let info: Value = serde_json::from_str(&answer.info["info"]).unwrap();
        let pid = info["pid"].as_u64().unwrap();
        let netns = Netns::hold(&format!("s-{name}"), &self.room.proc(pid).join("ns/net")).unwrap();
        Sandbox { id, netns, addresses: addresses.map(|it| it.parse().unwrap()).collect() }
    }

    /// `StopPodSandbox`, as often as a kubelet likes, and `RemovePodSandbox`.
    fn remove(&self, sandbox: &Sandbox) {
        self.runtime.block_on(async {
            self.client.stop(&sandbox.id).await.unwrap();
            self.client.stop(&sandbox.id).await.unwrap();
            self.client.remove(&sandbox.id).await.unwrap();
        });
    }
}

/// Routed pods with host ports.
fn network(node: &Node) -> Value {
    cni::routed(
        node,
        "pods",
        &[json!({ "type": "portmap", "capabilities": { "portMappings": true }, "snat": true })],
    )
}

#[test]
fn a_kubelets_sandboxes_are_wired_in_both_families_and_taken_off() {
    let (mut cluster, runtimes) = routed_cluster_of(Plan { nodes: 2, ..Plan::dual() }, &[]);
    let kubelet = Kubelet::start(&cluster.nodes[0], &network(&cluster.nodes[0]));
    let far = runtimes[1].add("far").unwrap();
    let mapping = PortMapping { container_port: INSIDE.into(), host_port: HOST_PORT.into() };
    let start = Instant::now();
    let web = kubelet.run("web-0", vec![mapping]);
    println!("RunPodSandbox and PodSandboxStatus took {:.2} s", start.elapsed().as_secs_f32());

    let env = cluster.nodes[0].subnet_env().unwrap();
    let [IpAddr::V4(v4), IpAddr::V6(v6)] = web.addresses[..] else {
        panic!("the kubelet is told of {:?}", web.addresses)
    };
    assert!(env.subnet().contains(&v4) && env.subnet6.unwrap().contains(&v6), "{v4} {v6}");
    let links = cluster.nodes[0].netns().ip("link show type veth").unwrap();
    assert!(links.contains(&format!("alias loden-cni {v4},{v6} ")), "{links}");
    assert!(links.contains(" default/web-0"), "the pod's name, for people: {links}");
    assert_known(&cluster.nodes[0], v4);

    for (ours, theirs) in [(web.end(v4.into()), far.host()), (web.end(v6.into()), far.host6().unwrap())] {
        assert_eq!(hello(ours, theirs, None).unwrap(), ours.address);
        assert_eq!(hello(theirs, ours, None).unwrap(), theirs.address);
        let stream = stream::run(ours, theirs, None, Until::Bytes(20_000_000)).unwrap();
        assert_eq!((stream.bytes, stream.source), (20_000_000, ours.address));
    }
    ping(&web.netns, far.address, 20).unwrap();
    let before = counted(&cluster.nodes, &["fast_encap"]);
    ping(&web.netns, far.address, 40).unwrap();
    let fast = counted(&cluster.nodes, &["fast_encap"]) - before;
    assert!(fast >= 70, "{fast} of 80 packets");
    let front6: Ipv6Addr = cluster.underlay().address6(11).unwrap();
    for (front, from, to) in [
        (SocketAddr::from((cluster.nodes[0].address(), HOST_PORT)), far.host(), web.end(v4.into())),
        (SocketAddr::from((front6, HOST_PORT)), far.host6().unwrap(), web.end(v6.into())),
    ] {
        hello(from, to, Some(Service { front, backend: INSIDE }))
            .unwrap_or_else(|error| panic!("{front}: {error:#}"));
    }

    // Sandboxes come and go while the agent is away, as it may be while it is upgraded.
    cluster.nodes[0].kill_agent();
    let other = kubelet.run("other", Vec::new());
    for address in &other.addresses {
        ping(&far.netns, *address, 1).unwrap();
    }
    kubelet.remove(&web);
    ping(&far.netns, v6, 1).expect_err("it is gone");
    cluster.nodes[0].start_agent(&[]).unwrap();
    kubelet.remove(&other);
    assert_nothing_is_left(&cluster.nodes[0], &runtimes[0]);
}

#[test]
fn a_kubelet_is_told_why_a_sandbox_cannot_be_wired_and_can_when_it_can() {
    let (cluster, runtimes) = routed_cluster_of(Plan { nodes: 1, ..Plan::default() }, &[]);
    let node = &cluster.nodes[0];
    let kubelet = Kubelet::start(node, &network(node));
    let env = fs::read_to_string(node.subnet_file()).unwrap();
    fs::remove_file(node.subnet_file()).unwrap();
    let refused =
        kubelet.runtime.block_on(kubelet.client.run(kubelet.config("early", Vec::new()))).unwrap_err();
    assert!(refused.message().contains("subnet.env does not exist"), "{refused}");
    fs::write(node.subnet_file(), env).unwrap();
    let sandboxes: Vec<Sandbox> = (0..3).map(|n| kubelet.run(&format!("p{n}"), Vec::new())).collect();
    let ends: Vec<Host<'_>> = sandboxes.iter().map(|it| it.end(it.addresses[0])).collect();
    assert_eq!(hello(ends[0], ends[1], None).unwrap(), ends[0].address);
    assert_eq!(hello(ends[2], ends[0], None).unwrap(), ends[2].address);
    sandboxes.iter().for_each(|sandbox| kubelet.remove(sandbox));
    assert_nothing_is_left(node, &runtimes[0]);
}
