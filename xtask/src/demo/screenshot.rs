//! `--screenshot`: the web page of the first node, as a browser shows it while there is traffic.

use std::{path::Path, thread, time::Duration};

use anyhow::{Context as _, Result};
use loden_tests::{
    cluster::Cluster,
    container::Container,
    netns, remains,
    traffic::stream::{self, Until},
};

use super::{EACH, settle};
use crate::progress::Step;

/// Where the agents serve their page.
pub(super) const WEB_ADDR: &str = "127.0.0.1:9102";
/// How long the browser looks at the page: a few of its questions to the agent.
const LOOK: Duration = Duration::from_secs(7);

/// Takes it, with traffic between the first containers of all nodes.
pub(super) fn take(cluster: &Cluster, containers: &[Container], file: &Path) -> Result<()> {
    let step = Step::start("a picture of the web page");
    let first: Vec<&Container> = containers.iter().step_by(EACH as usize).collect();
    settle(cluster, &first, &|it| Some(it.host()))?;
    let node = cluster.nodes.first().context("a cluster without nodes")?;
    let profile = remains::directory("browser")?;
    let mut command = node.netns().command("chromium");
    command
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("--virtual-time-budget={}", LOOK.as_millis()))
        .args(["--window-size=1280,700", &format!("--screenshot={}", file.display())])
        .arg(format!("http://{WEB_ADDR}/"))
        .env("HOME", profile.path());
    thread::scope(|scope| -> Result<()> {
        let until = Until::Time(LOOK + Duration::from_secs(3));
        let streams: Vec<_> = first
            .iter()
            .zip(first.iter().cycle().skip(1))
            .map(|(from, to)| scope.spawn(move || stream::run(from.host(), to.host(), None, until)))
            .collect();
        netns::output(&mut command)?;
        for stream in streams {
            stream.join().map_err(|_| anyhow::anyhow!("a stream's thread has panicked"))??;
        }
        Ok(())
    })?;
    step.done(file.display().to_string());
    Ok(())
}
