//! The web page, in a real browser.

use std::time::Duration;

use loden_tests::{
    each_family,
    family::Family,
    netns,
    node::Node,
    traffic::stream::{self, Until},
};

use crate::{http::get, served, served_in};

const PORT: u16 = 9102;

/// The page's DOM after it has asked the agent several times, as Chromium inside the node makes it.
fn dom(node: &Node) -> String {
    let profile = tempfile::tempdir().unwrap();
    let mut command = node.netns().command("chromium");
    command
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .args(["--virtual-time-budget=7000", "--dump-dom", &format!("http://127.0.0.1:{PORT}/")])
        // Chromium refuses to have its crash reports in root's home where that is read-only.
        .env("HOME", profile.path());
    netns::output(&mut command).unwrap()
}

/// The value of an attribute of the first element that starts with this text.
fn attribute<'a>(dom: &'a str, element: &str, name: &str) -> &'a str {
    let start = dom.find(element).unwrap_or_else(|| panic!("no {element} in\n{dom}"));
    let tag = dom[start..].split('>').next().unwrap();
    let value = tag.split(&format!("{name}=\"")).nth(1);
    value.unwrap_or_else(|| panic!("no {name} in {tag}")).split('"').next().unwrap()
}

each_family!(the_map_shows_nodes_links_rates_and_shares_in_a_browser);

fn the_map_shows_nodes_links_rates_and_shares_in_a_browser<F: Family>() {
    let (cluster, containers) = served_in::<F>();
    let subnet = |i: usize| F::subnet(&cluster.nodes[i]).to_string();
    let dom = std::thread::scope(|scope| {
        let (from, to) = (F::host(&containers[0]), F::host(&containers[1]));
        let traffic = scope.spawn(move || stream::run(from, to, None, Until::Time(Duration::from_secs(15))));
        let dom = dom(&cluster.nodes[0]);
        traffic.join().unwrap().unwrap();
        dom
    });
    let documents: u32 = attribute(&dom, "<body", "data-documents").parse().unwrap();
    assert!(documents >= 2, "{dom}");
    assert!(dom.contains(">ready</span>"), "{dom}");
    assert_eq!(dom.matches("class=\"node\"").count(), 2, "{dom}");
    assert_eq!(dom.matches("class=\"node self\"").count(), 1);
    let link = |i: usize| format!("data-peer=\"{}\"", subnet(i));
    let bits: u64 = attribute(&dom, &link(1), "data-bits").parse().unwrap();
    let share: f64 = attribute(&dom, &link(1), "data-share").parse().unwrap();
    assert!(bits > 1_000_000 && share > 0.95, "{bits} bit/s, {share}");
    assert_eq!(attribute(&dom, &link(2), "data-bits"), "0", "nobody speaks to the third node");
    assert_eq!(dom.matches("class=\"link fast\" data-peer").count(), 1, "{dom}");
    assert_eq!(dom.matches("class=\"link idle\" data-peer").count(), 1);
    for text in [subnet(1), subnet(2), F::of(&containers[0]).to_string()] {
        assert!(dom.contains(&format!("<th scope=\"row\">{text}</th>")), "{text} is in no table:\n{dom}");
    }
}

#[test]
fn only_requests_meant_for_loopback_are_answered() {
    let (cluster, _containers) = served();
    let node = &cluster.nodes[0];
    for path in ["/", "/status.json"] {
        let (status, head, _) = get(node, PORT, path, "127.0.0.1:9102");
        assert_eq!(status, 200);
        assert!(head.contains("content-security-policy: default-src 'none'"), "{head}");
        for host in ["evil.example", "evil.example:9102", "127.0.0.1.evil.example", ""] {
            let (status, _, body) = get(node, PORT, path, host);
            assert_eq!(status, 403, "{host}");
            assert!(!body.contains("10."), "{body}");
        }
    }
    let (_, _, body) = get(node, PORT, "/status.json", "localhost");
    let status: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(status["peers"].as_array().unwrap().len(), 2);
}
