//! Logging: `tracing` to standard error, as text or as JSON.
//!
//! Standard error because that is where flannel logs (klog with `logtostderr`) and where systemd and the kubelet listen.

mod limit;

use std::{
    io::IsTerminal as _,
    sync::{Arc, OnceLock},
    time::Duration,
};

use tracing_subscriber::EnvFilter;

use self::limit::{Limit, Limited};

use crate::config::{LogConfig, LogFormat};

/// How often it is said what was left out.
const TELL_OMISSIONS: Duration = Duration::from_secs(30);

/// What lets lines through; there once logging has been set up.
static LIMIT: OnceLock<Arc<Limit>> = OnceLock::new();

/// Sets logging up for the whole process.
///
/// # Errors
///
/// If the directives cannot be understood, or logging has been set up already.
pub fn init(config: &LogConfig) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(directives(config))?;
    let limit = Arc::clone(LIMIT.get_or_init(Arc::default));
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(true);
    match config.format {
        LogFormat::Human => builder
            .with_ansi(std::io::stderr().is_terminal())
            .map_event_format(|format| Limited { format, limit })
            .try_init(),
        LogFormat::Json => builder
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .map_event_format(|format| Limited { format, limit })
            .try_init(),
    }
    .map_err(|error| anyhow::anyhow!("cannot set up logging: {error}"))
}

/// Says every half minute what was left out of the log because it came too often. Never ends.
pub async fn tell_of_omissions() {
    loop {
        tokio::time::sleep(TELL_OMISSIONS).await;
        say_omissions();
    }
}

/// Says it now.
pub fn say_omissions() {
    for omitted in LIMIT.get().map(|limit| limit.take_omitted()).unwrap_or_default() {
        tracing::warn!(
            lines = omitted.lines,
            of = omitted.target,
            like = omitted.like.trim_end(),
            "lines were left out, because so many of one kind came"
        );
    }
}

/// What is logged: the directives that were given, or those that klog's verbosity stands for. What kube-client says of
/// each failed request we say ourselves, once, with what it means.
fn directives(config: &LogConfig) -> &str {
    match (&config.directives, config.verbosity) {
        (Some(directives), _) => directives,
        (None, ..=0) => "info,kube_client=off",
        (None, 1..=4) => "info,kube_client=off,loden_agent=debug,loden=debug",
        (None, 5..) => "debug,loden_agent=trace,loden=trace",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(verbosity: i32, directives: Option<&str>) -> LogConfig {
        LogConfig { format: LogFormat::Human, verbosity, directives: directives.map(str::to_owned) }
    }

    #[test]
    fn verbosity_stands_for_directives_that_the_filter_takes() {
        for verbosity in [i32::MIN, -1, 0, 1, 4, 5, 10, i32::MAX] {
            EnvFilter::try_new(directives(&with(verbosity, None))).unwrap();
        }
        assert_eq!(directives(&with(0, None)), "info,kube_client=off");
        assert!(directives(&with(2, None)).contains("loden_agent=debug"));
        assert!(directives(&with(9, None)).contains("loden_agent=trace"));
    }

    #[test]
    fn directives_overrule_the_verbosity() {
        assert_eq!(directives(&with(9, Some("warn"))), "warn");
    }
}
