//! The image: built without network by a real engine, and what is in it is a whole node.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use loden_tests::{
    cluster::{Cluster, Plan},
    docker::Engine,
    netns::output,
    node::binary,
    process::wait_for,
    traffic::ping,
};
use object::{
    Endianness,
    elf::{FileHeader64, PT_INTERP},
    read::elf::{FileHeader as _, ProgramHeader as _},
};

use crate::assert_fast;

const TAG: &str = "loden:under-test";

#[test]
fn the_image_starts_takes_a_lease_and_carries_packets() {
    let mut cluster = Cluster::create(&Plan { nodes: 2, ..Plan::default() }).unwrap();
    let args = ["--ip-masq", "--datapath=ebpf"];
    cluster.nodes[1].start_agent(&args).unwrap();
    let engine = Engine::start(&cluster.nodes[0], &["--bridge", "none"]).unwrap();
    println!("{}", build(&cluster, &engine));
    let node = &cluster.nodes[0];
    let directory = cluster.directory().display().to_string();
    let agent = node.agent_arguments().join(" ");
    let lock = cluster.directory().join("xtables.lock").display().to_string();
    fs::File::create(&lock).unwrap();
    let rights =
        format!("{RIGHTS} --network host --volume {directory}:{directory} --volume {lock}:/run/xtables.lock");
    let run =
        format!("run --detach --name agent --pull never {rights} {TAG} agent {agent} {}", args.join(" "));
    engine.docker(&run).unwrap();
    wait_for("the agent in the container to be ready", Duration::from_secs(20), || {
        (node.status().ok()?["ready"] == true).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {:?}", engine.docker("logs agent")));
    assert_eq!(node.status().unwrap()["datapath"], "ebpf");
    // The tools in the image have made the rules.
    node.netns().exec("nft list table ip loden").unwrap();
    node.netns().exec("iptables -C FORWARD -j LODEN-FWD").unwrap();

    for node in &cluster.nodes {
        wait_for("subnet.env", Duration::from_secs(5), || node.subnet_env().ok()).unwrap();
        node.make_bridge().unwrap();
    }
    cluster.wait_for_routes().unwrap();
    let containers = cluster.run_containers(1).unwrap();
    let (a, b) = (&containers[0], &containers[1]);
    ping(a.netns(), b.address(), 20).unwrap();
    assert_fast(&cluster.nodes, a, b);

    // An upgrade: the container goes, what it made stays, the next one adopts it.
    engine.docker("rm --force agent").unwrap();
    ping(a.netns(), b.address(), 20).unwrap();
    engine.docker(&run).unwrap();
    wait_for("the next agent", Duration::from_secs(20), || {
        (cluster.nodes[0].status().ok()?["ready"] == true).then_some(())
    })
    .unwrap();
    assert_fast(&cluster.nodes, a, b);
    installs_the_cni_plugin(&cluster, &engine);
    let help = engine.docker(&format!("run --rm --pull never --network none {TAG} --help")).unwrap();
    assert!(help.contains("docker-opts"), "{help}");
}

/// Whether a program asks for a loader, and with it for the libraries of its host.
fn asks_for_a_loader(program: &Path) -> bool {
    let bytes = fs::read(program).unwrap();
    let header = FileHeader64::<Endianness>::parse(&*bytes).unwrap();
    let endian = header.endian().unwrap();
    header.program_headers(endian, &*bytes).unwrap().iter().any(|it| it.p_type(endian) == PT_INTERP)
}

/// What the DaemonSet's init container does.
fn installs_the_cni_plugin(cluster: &Cluster, engine: &Engine) {
    let [bin, conf] = ["cni-bin", "net.d"].map(|name| cluster.directory().join(name));
    for directory in [&bin, &conf] {
        fs::create_dir(directory).unwrap();
    }
    let volumes =
        format!("--volume {}:/opt/cni/bin --volume {}:/etc/cni/net.d", bin.display(), conf.display());
    let run = format!("run --rm --pull never --network none {volumes} --entrypoint loden-cni {TAG} install");
    engine.docker(&run).unwrap();
    let installed = bin.join("loden-cni");
    assert!(asks_for_a_loader(&binary().unwrap()), "the agent, which stays in its image");
    assert!(!asks_for_a_loader(&installed), "the plugin, which runs with what the host has");
    let version = output(Command::new(installed).env("CNI_COMMAND", "VERSION").stdin(Stdio::null())).unwrap();
    assert!(version.contains("supportedVersions"), "{version}");
    assert!(conf.join("10-loden.conflist").is_file());
}

/// What the agent needs, as Docker 20.10 can say it: it knows neither `CAP_BPF` nor `CAP_PERFMON`. `--privileged` would
/// do as well, but only for a dockerd that has every capability itself.
const RIGHTS: &str = "--cap-drop ALL --cap-add NET_ADMIN --cap-add NET_RAW --cap-add SYS_ADMIN \
                      --security-opt systempaths=unconfined --security-opt seccomp=unconfined \
                      --security-opt apparmor=unconfined";

/// Builds it as `cargo xtask image` does, of the programs that are tested here; returns what that says.
fn build(cluster: &Cluster, engine: &Engine) -> String {
    let programs = binary().unwrap().parent().unwrap().to_owned();
    let mut xtask = Command::new(programs.join("xtask"));
    xtask.args(["image", "--tag", TAG, "--programs"]).arg(&programs);
    xtask.arg("--output").arg(cluster.directory().join("image"));
    xtask.env("DOCKER_HOST", engine.address()).env("DOCKER_CONFIG", engine.directory().join("client"));
    output(&mut xtask).unwrap()
}
