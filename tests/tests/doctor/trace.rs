//! `loden trace` on real nodes: what it prints is what happens, by whom it is asked and whatever becomes of the agent.

use std::{
    fs::{self, File},
    net::{Ipv4Addr, UdpSocket},
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    node::{self, Node},
    packet::{Ipv4, Packet as _, Vxlan},
    process::{Process, wait_for},
    tap::Tap,
    traffic::ping,
};
use nix::sys::signal::Signal;
use serde_json::Value;

const PORT: u16 = 6000;

/// A running `loden trace`, with what it has printed.
struct Trace {
    process: Process,
    out: PathBuf,
    err: PathBuf,
}

impl Trace {
    /// Starts one and waits until it listens.
    fn start(node: &Node, name: &str, args: &[&str]) -> Self {
        let path = |end: &str| node.directory().join(format!("{name}.{end}"));
        let (out, err) = (path("out"), path("err"));
        let mut command = node.netns().command(&node::binary().unwrap().display().to_string());
        command
            .arg("trace")
            .args(args)
            .arg("--bpffs-dir")
            .arg(node.bpffs())
            .stdout(File::create(&out).unwrap())
            .stderr(File::create(&err).unwrap());
        let mut process = Process::start(&mut command).unwrap();
        wait_for("the trace to listen", Duration::from_secs(10), || {
            let said = fs::read_to_string(&err).unwrap();
            assert!(said.contains("listening") || process.ended().unwrap().is_none(), "{said}");
            said.contains("listening").then_some(())
        })
        .unwrap();
        Self { process, out, err }
    }

    fn lines(&self) -> Vec<String> {
        let text = fs::read_to_string(&self.out).unwrap();
        text.split_inclusive('\n').filter(|line| line.ends_with('\n')).map(str::to_owned).collect()
    }

    fn verdicts(&self) -> Vec<Value> {
        self.lines().iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Ends it as Ctrl-C does; returns what it said on standard error.
    fn interrupt(mut self) -> String {
        self.process.signal(Signal::SIGINT).unwrap();
        assert!(self.process.wait(Duration::from_secs(5)).unwrap().success());
        fs::read_to_string(&self.err).unwrap()
    }
}

/// One datagram.
fn send(from: &Container, to: Ipv4Addr) {
    let socket = from.netns().run(|| UdpSocket::bind((from.address(), 5000)).unwrap());
    socket.send_to(b"wool", (to, PORT)).unwrap();
}

/// Sends until the trace has told of a datagram of ours once more.
fn send_until_told(from: &Container, to: Ipv4Addr, trace: &Trace) {
    let before = trace.lines().len();
    wait_for("a verdict", Duration::from_secs(10), || {
        send(from, to);
        (trace.lines().len() > before).then_some(())
    })
    .unwrap();
}

/// The word by which the programs know whether anybody listens.
fn tracing(node: &Node) -> u64 {
    let map = node.bpffs().join("v1/TRACING");
    let dump = node.netns().exec(&format!("bpftool -j map dump pinned {}", map.display())).unwrap();
    serde_json::from_str::<Value>(&dump).unwrap()[0]["formatted"]["value"].as_u64().unwrap()
}

fn pair() -> (Cluster, Container, Container) {
    let mut cluster = Cluster::start(&Plan { nodes: 2, ..Plan::default() }, &["--gate=open"]).unwrap();
    let mut containers = cluster.run_containers(1).unwrap();
    let b = containers.pop().unwrap();
    let a = containers.pop().unwrap();
    ping(a.netns(), b.address(), 3).unwrap();
    for node in &cluster.nodes {
        wait_for("the endpoint", Duration::from_secs(10), || {
            (!node.status().unwrap()["endpoints"].as_array().unwrap().is_empty()).then_some(())
        })
        .unwrap();
    }
    (cluster, a, b)
}

#[test]
fn verdicts_are_printed_as_they_are_given_and_only_those_that_were_asked_for() {
    let (cluster, a, b) = pair();
    let node = &cluster.nodes[0];
    let (ours, theirs, port) = (a.address().to_string(), b.address().to_string(), PORT.to_string());
    let json = Trace::start(node, "json", &["--json", &ours, &theirs, "--port", &port, "--proto=udp"]);
    let human = Trace::start(node, "human", &["--reason=fast_encap", "--proto", "udp"]);
    let dropped = Trace::start(node, "dropped", &["--verdict=drop"]);
    let counted = Trace::start(&cluster.nodes[1], "counted", &["--count=2", "--json", "--verdict", "fast"]);

    ping(a.netns(), b.address(), 3).unwrap();
    send_until_told(&a, b.address(), &json);
    let told = json.verdicts().pop().unwrap();
    assert_eq!((&told["verdict"], &told["reason"]), (&"fast".into(), &"fast_encap".into()), "{told}");
    assert_eq!((&told["program"], &told["interface"]), (&"from_pod".into(), &"veth1".into()), "{told}");
    assert_eq!((&told["source"], &told["destination"]), (&ours.clone().into(), &theirs.into()), "{told}");
    assert_eq!((&told["source_port"], &told["destination_port"]), (&5000.into(), &PORT.into()), "{told}");
    assert_eq!((&told["protocol"], &told["length"]), (&"udp".into(), &(14 + 20 + 8 + 4).into()), "{told}");
    assert_eq!(told["vtep"], cluster.nodes[1].address().to_string(), "{told}");
    assert!(json.verdicts().iter().all(|verdict| verdict["protocol"] == "udp"), "the pings are filtered");

    let line = wait_for("a line", Duration::from_secs(5), || human.lines().pop()).unwrap();
    assert!(line.contains(&format!("fast from_pod     veth1           {ours}:5000 > ")), "{line}");
    assert!(line.contains("fast_encap: encapsulated at the pod's veth"), "{line}");
    assert_eq!(dropped.lines(), Vec::<String>::new());

    let Trace { mut process, out, .. } = counted;
    assert!(process.wait(Duration::from_secs(5)).unwrap().success(), "it ends by itself");
    let there: Vec<Value> =
        fs::read_to_string(out).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(there.len(), 2);
    assert!(there.iter().any(|verdict| verdict["reason"] == "fast_decap"), "{there:?}");

    let out = json.out.clone();
    let said: Value = serde_json::from_str(json.interrupt().lines().last().unwrap()).unwrap();
    let lines = fs::read_to_string(out).unwrap().lines().count();
    assert_eq!((&said["shown"], &said["lost"]), (&lines.into(), &0.into()), "{said}");
    assert!(human.interrupt().contains("none lost"));
}

#[test]
fn at_an_interface_without_ethernet_addresses_are_read_where_they_stand() {
    let cluster = Cluster::start(&Plan { nodes: 1, ..Plan::default() }, &[]).unwrap();
    let node = &cluster.nodes[0];
    let tun = Tap::tun(node.netns(), "tun0").unwrap();
    let trace = Trace::start(node, "tun", &["--json", "--verdict=drop"]);
    let source = Ipv4Addr::new(192, 0, 2, 66);
    let destination = node.address();
    let frame = vec![0x5a; 60];
    let stranger =
        Vxlan::<Ipv4> { source, destination, ports: (40_000, 8472), flags: 0x0800_0000, vni: 1, frame }
            .packet()
            .bytes();
    let told = wait_for("a verdict", Duration::from_secs(10), || {
        tun.deliver(&stranger).unwrap();
        trace.verdicts().pop()
    })
    .unwrap();
    assert_eq!((&told["program"], &told["interface"]), (&"from_other".into(), &"tun0".into()), "{told}");
    assert_eq!(told["reason"], "drop_unknown_vtep", "{told}");
    let ends = (source.to_string().into(), destination.to_string().into());
    assert_eq!((&told["source"], &told["destination"]), (&ends.0, &ends.1), "{told}");
    assert_eq!((&told["source_port"], &told["destination_port"]), (&40_000.into(), &8472.into()), "{told}");
    assert_eq!((&told["protocol"], &told["length"]), (&"udp".into(), &stranger.len().into()), "{told}");
}

#[test]
fn it_outlives_the_agent_needs_none_and_is_over_when_it_is_killed() {
    let (mut cluster, a, b) = pair();
    let args = ["--json", "--proto=udp", "--verdict=fast"];
    let through = Trace::start(&cluster.nodes[0], "through", &args);
    send_until_told(&a, b.address(), &through);
    cluster.nodes[0].kill_agent();
    send_until_told(&a, b.address(), &through);
    let without = Trace::start(&cluster.nodes[0], "without", &args);
    send_until_told(&a, b.address(), &without);
    cluster.nodes[0].start_agent(&["--gate=open"]).unwrap();
    send_until_told(&a, b.address(), &through);
    send_until_told(&a, b.address(), &without);
    assert!(through.interrupt().contains(r#""lost":0"#));

    // Dropping the process is SIGKILL.
    drop(without);
    wait_for("the programs to tell nobody any more", Duration::from_secs(10), || {
        send(&a, b.address());
        (tracing(&cluster.nodes[0]) == 0).then_some(())
    })
    .unwrap();

    // Nobody reads on: `head` has its line, and the trace ends with it.
    let node = &cluster.nodes[0];
    let line = format!(
        "{} trace --proto udp --bpffs-dir {} | head -n 1",
        node::binary().unwrap().display(),
        node.bpffs().display()
    );
    let mut piped = Command::new("nsenter");
    piped
        .arg(format!("--net={}", node.netns().path().display()))
        .args(["bash", "-o", "pipefail", "-c", &line]);
    let mut piped = Process::start(piped.stdout(Stdio::null()).stderr(Stdio::null())).unwrap();
    let ended = wait_for("the pipe to end", Duration::from_secs(10), || {
        send(&a, b.address());
        piped.ended().unwrap()
    });
    assert!(ended.unwrap().success());

    cluster.nodes[0].stop_agent().unwrap();
    let doomed = Trace::start(&cluster.nodes[0], "doomed", &args);
    let subnet_file = cluster.nodes[0].subnet_file().display().to_string();
    cluster.nodes[0].loden(&["cleanup", "--subnet-file", &subnet_file]).unwrap();
    let Trace { mut process, err, .. } = doomed;
    assert_eq!(process.wait(Duration::from_secs(5)).unwrap().code(), Some(1));
    let said = fs::read_to_string(err).unwrap();
    assert!(said.contains("the programs are gone"), "{said}");
    let said = cluster.nodes[0].loden(&["trace"]).unwrap_err().to_string();
    assert!(said.contains("no programs of this version are pinned in"), "{said}");
}
