//! The same containers on the same nodes, measured in turn with the programs attached and detached.

use anyhow::Result;
use loden_tests::{
    cluster::Cluster,
    container::Container,
    traffic::{
        ping,
        stream::{self, Until},
        transactions::{self, Kind},
    },
};

use super::{EACH, Options, millis, settle};
use crate::progress::Step;

/// What is measured, with its unit.
const TESTS: [(&str, &str); 4] =
    [("TCP_RR", "1/s"), ("TCP_CRR", "1/s"), ("UDP_RR", "1/s"), ("TCP stream", "MB/s")];

/// One test: medians over the rounds.
#[derive(Debug)]
pub(super) struct Comparison {
    pub(super) test: &'static str,
    pub(super) unit: &'static str,
    pub(super) fast: f64,
    pub(super) kernel: f64,
    /// The median of the rounds' own ratios, fast by kernel.
    pub(super) ratio: f64,
}

/// Measures both ways, round by round; the fast path is on when it returns.
pub(super) fn run(
    cluster: &mut Cluster,
    containers: &[Container],
    options: &Options,
) -> Result<Vec<Comparison>> {
    let (a, b) = (&containers[0], &containers[EACH as usize]);
    let step = Step::start("the fast path and the kernel's in turn");
    let mut rounds: Vec<[[f64; TESTS.len()]; 2]> = Vec::new();
    for round in 1..=options.rounds {
        let mut figures = [[0.0; TESTS.len()]; 2];
        // In turn first and second, so that neither always meets a warmer machine.
        let first = round % 2 == 0;
        for fast in [first, !first] {
            let datapath = if fast { "ebpf" } else { "kernel" };
            step.note(&format!("round {round} of {}, --datapath={datapath}", options.rounds));
            switch(cluster, datapath)?;
            if fast {
                settle(cluster, &[a, b], &|it| Some(it.host()))?;
            } else {
                ping(a.netns(), b.address(), 10)?;
            }
            figures[usize::from(fast)] = measure(a, b, options)?;
        }
        rounds.push(figures);
    }
    switch(cluster, "ebpf")?;
    step.done(format!("{} rounds", options.rounds));
    let column = |test: usize, of: &dyn Fn([f64; 2]) -> f64| {
        median(rounds.iter().map(|[kernel, fast]| of([kernel[test], fast[test]])).collect())
    };
    let comparison = |(test, &(name, unit)): (usize, &(&'static str, &'static str))| Comparison {
        test: name,
        unit,
        kernel: column(test, &|[kernel, _]| kernel),
        fast: column(test, &|[_, fast]| fast),
        ratio: column(test, &|[kernel, fast]| fast / kernel),
    };
    Ok(TESTS.iter().enumerate().map(comparison).collect())
}

fn switch(cluster: &mut Cluster, datapath: &str) -> Result<()> {
    for node in &mut cluster.nodes {
        node.stop_agent()?;
        node.start_agent(&["--datapath", datapath])?;
    }
    Ok(())
}

fn measure(a: &Container, b: &Container, options: &Options) -> Result<[f64; TESTS.len()]> {
    let rate = |kind| -> Result<f64> {
        Ok(transactions::run(kind, a.host(), b.host(), millis(options))?.per_second())
    };
    let stream = || stream::run(a.host(), b.host(), None, Until::Time(millis(options)));
    Ok([rate(Kind::TcpRr)?, rate(Kind::TcpCrr)?, rate(Kind::UdpRr)?, stream()?.megabytes_per_second()])
}

/// The middle value, or the mean of the two in the middle.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.as_slice() {
        [] => f64::NAN,
        values if values.len() % 2 == 1 => values[middle],
        values => f64::midpoint(values[middle - 1], values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(Vec::new()).is_nan());
    }
}
