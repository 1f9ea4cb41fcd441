//! The image: built without network by a real engine; what is in it is a whole node, and takes it off again.

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
    traffic::{ping, stream},
};
use object::{
    Endianness,
    elf::{FileHeader64, PT_INTERP},
    read::elf::{FileHeader as _, ProgramHeader as _},
};
use serde_json::Value;

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

    engine.docker("rm --force agent").unwrap();
    let ((), _) = stream::during(a.host(), b.host(), || hands_back(&cluster, &engine, &rights)).unwrap();
    ping(b.netns(), a.address(), 20).unwrap();
    let help = engine.docker(&format!("run --rm --pull never --network none {TAG} --help")).unwrap();
    assert!(help.contains("docker-opts"), "{help}");
}

/// What `deploy/kube/loden-cleanup.yml` does on a node, by its own command lines.
fn hands_back(cluster: &Cluster, engine: &Engine, rights: &str) {
    let node = &cluster.nodes[0];
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kube/loden-cleanup.yml");
    let text = fs::read_to_string(path).unwrap();
    let pods: Value = serde_saphyr::from_str(text.split("\n---").nth(1).unwrap()).unwrap();
    let pods = &pods["spec"]["template"]["spec"];
    let words = |container: &Value| -> (String, String) {
        let words = ["command", "args"].into_iter().filter_map(|list| container[list].as_array());
        let words: Vec<&str> = words.flatten().map(|word| word.as_str().unwrap()).collect();
        (words[0].to_owned(), words[1..].join(" "))
    };
    let (program, args) = words(&pods["initContainers"][0]);
    let paths = node.agent_arguments().join(" ");
    let said = engine
        .docker(&format!("run --rm --pull never {rights} --entrypoint {program} {TAG} {args} {paths}"))
        .unwrap();
    assert_eq!(node.bpffs().read_dir().map_or(0, Iterator::count), 0, "{said}");
    let rules =
        node.netns().exec("iptables -S FORWARD").unwrap() + &node.netns().exec("nft list tables").unwrap();
    assert!(rules.contains("FLANNEL-FWD") && !rules.to_lowercase().contains("loden"), "{rules}\n{said}");

    // What the pod does then, until it is deleted.
    let (program, args) = words(&pods["containers"][0]);
    let rights = "--cap-drop ALL --cap-add NET_ADMIN --network host";
    engine
        .docker(&format!(
            "run --detach --name done --pull never {rights} --entrypoint {program} {TAG} {args}"
        ))
        .unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(engine.inspect("done").unwrap()["State"]["Running"], true, "{:?}", engine.docker("logs done"));
    engine.docker("rm --force done").unwrap();
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
