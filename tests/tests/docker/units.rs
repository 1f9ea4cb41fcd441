//! The systemd units of `deploy/systemd`: systemd understands them, and the agent runs with what they leave it.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use aya::programs::{LinkOrder, SchedClassifier, TcAttachType, tc::TcAttachOptions};
use loden_tests::{
    cluster::{Cluster, Plan},
    node::{Node, binary},
    process::wait_for,
    remains,
    traffic::ping,
};

use crate::assert_fast;

/// What systemd says of the units with the built binary in its place; nothing where all is well.
fn verify(directory: &Path, change: impl Fn(String) -> String) -> String {
    let drop_ins = directory.join("docker.service.d");
    fs::create_dir_all(&drop_ins).unwrap();
    let loden = binary().unwrap().display().to_string();
    let unit = change(read("loden.service").replace("/usr/bin/loden", &loden));
    fs::write(directory.join("loden.service"), unit).unwrap();
    fs::write(drop_ins.join("loden.conf"), change(read("docker.service.d/loden.conf"))).unwrap();
    // Docker's own, as its package has it.
    fs::copy("/lib/systemd/system/docker.service", directory.join("docker.service")).unwrap();
    let mut command = std::process::Command::new("systemd-analyze");
    command.args(["verify", "--man=no", "loden.service", "docker.service"]);
    command.env("SYSTEMD_UNIT_PATH", format!("{}:", directory.display()));
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() || !said.is_empty(), "it fails without a word");
    said
}

#[test]
fn systemd_understands_every_line_of_the_units() {
    let directory = remains::directory("units").unwrap();
    assert_eq!(verify(directory.path(), |text| text), "");
    for (line, wrong) in [("WatchdogSec=", "WatchdagSec="), ("EnvironmentFile=/run", "EnvironmentFail=/run")]
    {
        let said = verify(directory.path(), |text| text.replace(line, wrong));
        assert!(said.contains(wrong.split('=').next().unwrap()), "a mistake is found: {said:?}");
    }
}

#[test]
fn the_agent_needs_no_more_than_its_unit_leaves_it() {
    let directory = remains::directory("caps").unwrap();
    let args = ["--ip-masq", "--datapath=ebpf"];
    let unit = read("loden.service");
    let less = unit.replace(" CAP_BPF", "");
    let plan = Plan { nodes: 1, binary: Some(confined(directory.path(), &less)), ..Plan::default() };
    let error = Cluster::create(&plan).unwrap().nodes[0].start_agent(&args).unwrap_err();
    assert!(format!("{error:#}").contains("CAP_BPF"), "the capabilities are indeed taken: {error:#}");

    let plan = Plan { nodes: 2, binary: Some(confined(directory.path(), &unit)), ..Plan::default() };
    let mut cluster = Cluster::start(&plan, &args).unwrap();
    let containers = cluster.run_containers(1).unwrap();
    let (a, b) = (&containers[0], &containers[1]);
    ping(a.netns(), b.address(), 20).unwrap();
    assert_fast(&cluster.nodes, a, b);
    for node in &mut cluster.nodes {
        let status = node.status().unwrap();
        assert_eq!((&status["ready"], &status["datapath"]), (&true.into(), &"ebpf".into()), "{status}");
        // It adopts what it left, and takes it away.
        node.stop_agent().unwrap();
        node.start_agent(&args).unwrap();
        let log = node.log().to_lowercase();
        assert!(!log.contains("permitted") && !log.contains("permission"), "{log}");
        node.stop_agent().unwrap();
        node.loden(&["cleanup"]).unwrap();
    }
}

/// Somebody detaches a program where another one stays, of which this agent may learn no more than an id.
#[test]
fn with_what_its_unit_leaves_it_the_agent_notices_that_a_program_of_its_own_is_gone() {
    let directory = remains::directory("caps").unwrap();
    let binary = Some(confined(directory.path(), &read("loden.service")));
    let cluster =
        Cluster::start(&Plan { nodes: 1, binary, ..Plan::default() }, &["--datapath=ebpf"]).unwrap();
    let node = &cluster.nodes[0];
    let at_uplink = || -> Vec<String> {
        let found = node.netns().run(|| SchedClassifier::query_tcx("eth0", TcAttachType::Ingress)).unwrap();
        found.1.iter().map(|program| program.name_as_str().unwrap().to_owned()).collect()
    };
    let _anothers = attach_anothers(node);
    assert_eq!(at_uplink(), ["from_wire", "to_pod"]);
    let pin = node.bpffs().join("v1/links").read_dir().unwrap().map(|pin| pin.unwrap().path());
    let pin = pin.into_iter().find(|pin| pin.display().to_string().contains("/from_wire-")).unwrap();
    node.netns().exec(&format!("bpftool link detach pinned {}", pin.display())).unwrap();
    assert_eq!(at_uplink(), ["to_pod"]);
    wait_for("the program to be back", Duration::from_secs(40), || {
        (at_uplink() == ["from_wire", "to_pod"]).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {:?}\n{}", at_uplink(), node.log()));
}

/// Attaches a program to the uplink that is not the agent's to keep there, behind what is there. It is one of those that
/// wait for pods, and lets pass what no pod sends.
fn attach_anothers(node: &Node) -> SchedClassifier {
    let programs = node.bpffs().join("v1/programs");
    let of_subnet = programs.read_dir().unwrap().next().unwrap().unwrap().path();
    let mut program = SchedClassifier::from_pin(of_subnet.join("to_pod")).unwrap();
    let last = TcAttachOptions::TcxOrder(LinkOrder::last());
    node.netns().run(|| program.attach_with_options("eth0", TcAttachType::Ingress, last)).unwrap();
    program
}

/// A stand-in for the binary that runs it with the capabilities of the unit and no others, with `NoNewPrivileges=`,
/// and with the directories read-only that `ProtectSystem=full` makes so.
fn confined(directory: &Path, unit: &str) -> PathBuf {
    assert_eq!(values(unit, "NoNewPrivileges"), ["yes"]);
    assert_eq!(values(unit, "ProtectSystem"), ["full"]);
    let capabilities = values(unit, "CapabilityBoundingSet");
    let kept: String =
        capabilities[0].split_whitespace().map(|name| format!(",+{}", name[4..].to_lowercase())).collect();
    let script = format!(
        "#!/bin/sh\nexec unshare --mount sh -c 'for d in /usr /etc /boot; do mount --bind -o ro $d $d; done\n\
         exec setpriv --bounding-set=-all{kept} --inh-caps=-all --no-new-privs \"$0\" \"$@\"' {} \"$@\"\n",
        binary().unwrap().display()
    );
    let path = directory.join("confined-loden");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// The text of a file of `deploy/systemd`.
pub(crate) fn read(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/systemd").join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What a unit sets one of its keys to, in order.
pub(crate) fn values(unit: &str, key: &str) -> Vec<String> {
    let value = |line: &str| line.strip_prefix(key)?.strip_prefix('=').map(str::to_owned);
    unit.lines().filter_map(value).collect()
}
