//! The page of bpftool commands: each is run as it stands there, and answers what the page says.

use std::{fs, path::Path, process::Command, time::Duration};

use loden_tests::{
    cluster::{Cluster, Plan},
    node::Node,
    process::wait_for,
    traffic::{
        ping,
        stream::{self, Until},
    },
};
use serde_json::Value;

/// What the page calls the directory of the pins.
const PINS: &str = "/sys/fs/bpf/loden";

/// A command of the page, and the words that its answer must hold.
struct Entry {
    command: String,
    expected: Vec<String>,
}

/// The page's blocks: a line that begins with `$ ` is a command; each line of the block after it is a piece of its answer.
/// What stands between `…` marks must be found on one line, in that order.
fn entries(page: &str) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut inside = false;
    for line in page.lines() {
        if line.starts_with("```") {
            inside = line == "```console";
        } else if let Some(command) = line.strip_prefix("$ ").filter(|_| inside) {
            entries.push(Entry { command: command.to_owned(), expected: Vec::new() });
        } else if let Some(entry) = entries.last_mut().filter(|_| inside && !line.trim().is_empty()) {
            entry.expected.push(line.trim().to_owned());
        }
    }
    entries
}

fn holds(answer: &str, expected: &str) -> bool {
    let pieces: Vec<&str> = expected.split('…').map(str::trim).filter(|piece| !piece.is_empty()).collect();
    answer.lines().any(|line| {
        let mut rest = line;
        pieces.iter().all(|piece| match rest.split_once(piece) {
            Some((_, after)) => {
                rest = after;
                true
            }
            None => false,
        })
    })
}

#[test]
fn every_command_of_the_page_answers_as_the_page_says() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/BPFTOOL.md");
    let entries = entries(&fs::read_to_string(page).unwrap());
    assert!(entries.len() >= 10, "the page has {} commands", entries.len());
    assert!(entries.iter().all(|entry| !entry.expected.is_empty()), "each shows an answer");

    let mut cluster = Cluster::start(&Plan { nodes: 2, ..Plan::default() }, &["--gate=strict"]).unwrap();
    let containers = cluster.run_containers(1).unwrap();
    let (a, b) = (&containers[0], &containers[1]);
    ping(a.netns(), b.address(), 20).unwrap();
    stream::run(a.host(), b.host(), None, Until::Bytes(5_000_000)).unwrap();
    let node = &cluster.nodes[0];
    wait_for("the endpoint", Duration::from_secs(5), || {
        (!node.status().unwrap()["endpoints"].as_array().unwrap().is_empty()).then_some(())
    })
    .unwrap();
    let mut wrong = Vec::new();
    for Entry { command, expected } in &entries {
        let here = command.replace(PINS, &node.bpffs().display().to_string());
        let mut shell = Command::new("nsenter");
        shell
            .arg(format!("--net={}", node.netns().path().display()))
            .args(["bash", "-o", "pipefail", "-c", &here]);
        let output = shell.output().unwrap();
        let answer = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            wrong.push(format!(
                "{command}: {}{answer}{}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            ));
        }
        for line in expected.iter().filter(|line| !holds(&answer, line)) {
            wrong.push(format!("{command}: no line like {line:?} in\n{answer}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_every_map_has_named_fields(node);
}

/// Also those that the page does not show. Ring buffers have records and no entries.
fn assert_every_map_has_named_fields(node: &Node) {
    let ask = |verb: &str, pin: &Path| -> Value {
        let text = node.netns().exec(&format!("bpftool -j map {verb} pinned {}", pin.display())).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let entries = fs::read_dir(node.bpffs().join("v1")).unwrap().map(|entry| entry.unwrap().path());
    let (mut seen, mut dumped) = (0, 0);
    for pin in entries.filter(|path| !path.is_dir()) {
        let map = ask("show", &pin);
        let name = pin.file_name().unwrap().to_string_lossy();
        assert!(name.starts_with(map["name"].as_str().unwrap()), "{name}: {map}");
        seen += 1;
        if map["type"] == "ringbuf" {
            continue;
        }
        assert!(map["btf_id"].as_u64().is_some_and(|id| id > 0), "{name} has no BTF: {map}");
        if let Some(first) = ask("dump", &pin).as_array().unwrap().first() {
            assert!(first["formatted"].is_object(), "{name}: {first}");
            dumped += 1;
        }
    }
    assert!(seen >= 16 && dumped >= 10, "{seen} maps, {dumped} of them with entries");
}

#[test]
fn the_page_is_read_as_it_is_meant() {
    let entries = entries("text\n```console\n$ first | wc -l\n  \"a\": 1,\nx … y\n$ second\n```\n$ none\n");
    let read: Vec<_> = entries.iter().map(|e| (e.command.as_str(), e.expected.len())).collect();
    assert_eq!(read, [("first | wc -l", 2), ("second", 0)]);
    assert!(holds("1: x 17 y\n", "x … y") && !holds("y 17 x\n", "x … y") && !holds("x\ny\n", "x … y"));
}
