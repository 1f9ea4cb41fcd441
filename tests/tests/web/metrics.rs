//! `/metrics`, scraped by a real Prometheus, and what `deploy/monitoring` asks of it.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use loden_tests::{
    cluster::{Cluster, Plan},
    each_family,
    family::Family,
    netns,
    node::Node,
    process::{Process, wait_for},
    traffic::{
        ping,
        stream::{self, Until},
    },
};
use serde_json::Value;

use crate::{http::get, served, served_in};

const PORT: u16 = 9101;
const PROMETHEUS: u16 = 9090;

fn monitoring() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/monitoring")
}

/// Names of the samples of a scrape.
fn names(text: &str) -> BTreeSet<&str> {
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples.filter_map(|line| line.split(['{', ' ']).next()).collect()
}

/// Names of our metrics in a query.
fn asked(query: &str) -> BTreeSet<&str> {
    let words = query.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("loden_") || word.starts_with("process_")).collect()
}

/// The dashboard's queries, by panel.
fn panels() -> Vec<(String, String)> {
    let text = fs::read_to_string(monitoring().join("dashboard.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    let panel = |panel: &Value| -> Vec<(String, String)> {
        let title = panel["title"].as_str().unwrap();
        let targets = panel["targets"].as_array().unwrap().iter();
        targets.map(|target| (title.to_owned(), target["expr"].as_str().unwrap().to_owned())).collect()
    };
    dashboard["panels"].as_array().unwrap().iter().flat_map(panel).collect()
}

fn percent_encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

/// The samples that Prometheus answers a query with.
fn query(node: &Node, expression: &str) -> Vec<Value> {
    let path = format!("/api/v1/query?query={}", percent_encoded(expression));
    let (status, _, body) = get(node, PROMETHEUS, &path, "localhost");
    assert_eq!(status, 200, "{expression}: {body}");
    let answer: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(answer["status"], "success", "{expression}: {body}");
    answer["data"]["result"].as_array().unwrap().clone()
}

fn start_prometheus(node: &Node, directory: &Path) -> Process {
    let config = directory.join("prometheus.yaml");
    let text = format!(
        "global: {{ scrape_interval: 500ms, scrape_timeout: 500ms }}\nscrape_configs:\n- job_name: loden\n  \
         static_configs: [{{ targets: ['127.0.0.1:{PORT}'] }}]\n"
    );
    fs::write(&config, text).unwrap();
    let log = fs::File::create(directory.join("prometheus.log")).unwrap();
    let mut command = node.netns().command("prometheus");
    command
        .arg(format!("--config.file={}", config.display()))
        .arg(format!("--storage.tsdb.path={}", directory.join("tsdb").display()))
        .arg(format!("--web.listen-address=127.0.0.1:{PROMETHEUS}"))
        .stdout(log.try_clone().unwrap())
        .stderr(log);
    Process::start(&mut command).unwrap()
}

each_family!(
    prometheus_reads_every_metric_and_every_panel_has_its_data,
    the_table_of_metrics_is_the_whole_truth,
    a_node_without_programs_has_the_same_metrics_but_for_the_packets,
);

fn prometheus_reads_every_metric_and_every_panel_has_its_data<F: Family>() {
    let (cluster, containers) = served_in::<F>();
    let node = &cluster.nodes[0];
    let directory = tempfile::tempdir().unwrap();
    let _prometheus = start_prometheus(node, directory.path());
    let log = || fs::read_to_string(directory.path().join("prometheus.log")).unwrap_or_default();
    let up = || -> Option<()> {
        // It listens before it answers: until it has opened its storage, every query is refused with 503.
        let listens = node.netns().run(|| std::net::TcpStream::connect(("127.0.0.1", PROMETHEUS)).is_ok());
        let ready = listens && get(node, PROMETHEUS, "/-/ready", "localhost").0 == 200;
        (ready && !query(node, "up == 1").is_empty()).then_some(())
    };
    wait_for("Prometheus to have scraped the agent", Duration::from_secs(20), up)
        .unwrap_or_else(|error| panic!("{error:#}: {}", log()));
    // Traffic over several scrapes; the last packets must be scraped before the queries.
    let last_seconds = Until::Time(Duration::from_secs(4));
    stream::run(F::host(&containers[0]), F::host(&containers[1]), None, last_seconds).unwrap();
    let (_, head, text) = get(node, PORT, "/metrics", "localhost");
    assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0"), "{head}");
    let scraped = query(node, "max_over_time(scrape_samples_scraped[10s])");
    let samples = text.lines().filter(|line| !line.starts_with('#')).count();
    let count: f64 = scraped[0]["value"][1].as_str().unwrap().parse().unwrap();
    assert!(count > 0.0 && (count - samples as f64).abs() <= 12.0, "{count} of {samples} samples");
    let known = names(&text);
    for (panel, expression) in panels() {
        for name in asked(&expression) {
            assert!(known.contains(name), "{panel} asks for {name}, which /metrics has not");
        }
        let expression = expression.replace("$instance", ".*").replace("$__rate_interval", "8s");
        let found = query(node, &expression);
        // Nobody attacks here, so nothing is dropped.
        assert!(!found.is_empty() || panel == "Dropped", "{panel}: {expression} has no data");
    }
    // And the alerts have what they judge by.
    let rules = fs::read_to_string(monitoring().join("alerts.yaml")).unwrap();
    for name in asked(&rules) {
        assert!(
            !query(node, &format!("count({name})")).is_empty(),
            "the rules ask for {name}, which has no data"
        );
    }
    let full = format!(
        r#"loden_map_entries{{map=~"(V6_)?FLOWS"}} / loden_map_max_entries{{map="{}FLOWS"}}"#,
        F::MAPS
    );
    assert!(rules.contains(r#"loden_map_entries{map=~"(V6_)?FLOWS"}"#), "{rules}");
    assert_eq!(query(node, &full).len(), 1, "{full}");
    let share = query(node, r#"sum(loden_peer_packets_total{path="fast"}) / sum(loden_peer_packets_total)"#);
    let share: f64 = share[0]["value"][1].as_str().unwrap().parse().unwrap();
    assert!(share > 0.98, "{share}");
}

#[test]
fn the_alert_rules_are_right_and_ask_for_what_there_is() {
    let (cluster, _containers) = served();
    let (_, _, text) = get(&cluster.nodes[0], PORT, "/metrics", "localhost");
    let known = names(&text);
    let rules = fs::read_to_string(monitoring().join("alerts.yaml")).unwrap();
    let asked = asked(&rules);
    assert!(asked.len() >= 9, "{asked:?}");
    for name in asked {
        assert!(known.contains(name), "a rule asks for {name}, which /metrics has not");
    }
    for arguments in [["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]] {
        let mut command = std::process::Command::new("promtool");
        let told = netns::output(command.args(arguments).current_dir(monitoring()));
        told.unwrap_or_else(|error| panic!("{arguments:?}: {error:#}"));
    }
}

fn the_table_of_metrics_is_the_whole_truth<F: Family>() {
    let (cluster, _containers) = served_in::<F>();
    let (_, _, text) = get(&cluster.nodes[0], PORT, "/metrics", "localhost");
    let documented = fs::read_to_string(monitoring().join("METRICS.md")).unwrap();
    let documented: BTreeSet<&str> =
        documented.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    assert_eq!(names(&text), documented);
}

#[test]
fn metrics_come_beside_the_health_endpoints_or_apart_from_them() {
    let mut cluster = Cluster::start(
        &Plan { nodes: 2, ..Plan::default() },
        &["--metrics-addr=127.0.0.1:9101", "--healthz-ip=127.0.0.1", "--healthz-port=9103"],
    )
    .unwrap();
    let node = &cluster.nodes[0];
    for (port, path, expected) in
        [(9101, "/metrics", 200), (9101, "/readyz", 200), (9103, "/healthz", 200), (9103, "/metrics", 404)]
    {
        assert_eq!(get(node, port, path, "x").0, expected, "{port}{path}");
    }
    let node = &mut cluster.nodes[1];
    node.stop_agent().unwrap();
    node.start_agent(&[
        "--metrics-addr=127.0.0.1:9101",
        "--healthz-ip=127.0.0.1",
        "--healthz-port=9101",
        "--metrics-max-each=0",
    ])
    .unwrap();
    let (status, _, text) = get(node, 9101, "/metrics", "x");
    assert_eq!((status, get(node, 9101, "/healthz", "x").0), (200, 200));
    assert!(
        text.contains(r#"loden_peer_packets_total{subnet="other""#) && !text.contains(r#"subnet="10."#),
        "{text}"
    );
}

fn a_node_without_programs_has_the_same_metrics_but_for_the_packets<F: Family>() {
    let args = ["--datapath=kernel", "--metrics-addr=127.0.0.1:9101"];
    let (cluster, containers) = Cluster::start_with_containers(&F::alone(), &args).unwrap();
    ping(containers[0].netns(), F::of(&containers[1]), 20).unwrap();
    let (status, _, text) = get(&cluster.nodes[0], PORT, "/metrics", "x");
    assert_eq!(status, 200);
    assert!(
        text.contains(r#"loden_datapath_info{datapath="kernel""#) && text.contains("\nloden_ready{} 1.0"),
        "{text}"
    );
    assert!(!text.contains("loden_packets_total"), "{text}");
}
