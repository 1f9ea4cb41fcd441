//! Under the strict gate a flow goes through the host again every few seconds: that must not be felt.

use std::{
    thread,
    time::{Duration, Instant},
};

use loden_tests::{
    counters::Share,
    cpu, each_family,
    family::Family,
    service::at,
    traffic::{
        socket::{self, open, say},
        stream::{self, Until},
        transactions::{self, Kind},
    },
};

use crate::{STRICT, cluster, snmp};

const PORT: u16 = 8080;
const PHASE: Duration = Duration::from_secs(20);

each_family!(bulk_and_transactions_stay_fast_across_requalification_and_nothing_stalls,);

fn bulk_and_transactions_stay_fast_across_requalification_and_nothing_stalls<F: Family>() {
    let (cluster, containers) = cluster::<F>(2, &[STRICT]);
    let all: Vec<_> = containers.iter().collect();
    let [a, a2, b, b2] = [0, 1, 2, 3].map(|n| F::host(&containers[n]));
    let retransmitted = || [a, b].map(|c| snmp(c.netns, "Tcp", "RetransSegs")).iter().sum::<u64>();
    let before = retransmitted();
    let listener = socket::listen(b2, PORT).unwrap();
    let (near, far) = open(a2.netns, None, at(b2.address, PORT), &listener).unwrap();
    thread::scope(|scope| {
        let slow = scope.spawn(move || {
            let (start, mut longest) = (Instant::now(), Duration::ZERO);
            while start.elapsed() < 2 * PHASE {
                let sent = Instant::now();
                say(&near, &far, "a few bytes").unwrap();
                say(&far, &near, "and back").unwrap();
                longest = longest.max(sent.elapsed());
                thread::sleep(Duration::from_millis(100));
            }
            longest
        });
        // On one CPU: where a sender moves to another, its packets overtake one another in any datapath here.
        cpu::stay_on_one();
        let bulk = || stream::run(a, b, None, Until::Time(PHASE));
        let (stream, share) = Share::during(&cluster.nodes, &all, bulk).unwrap();
        assert!(share.smaller() >= 0.99, "bulk: {share:?}");
        let again = retransmitted() - before;
        // Hardly any; one that is sent again by mistake may be a GSO packet of 46 segments.
        let segments = stream.bytes / 1400;
        assert!(again * 100_000 <= segments, "{again} of {segments} segments sent again");
        let exchange = || transactions::run(Kind::TcpRr, a, b, PHASE);
        let (rate, share) = Share::during(&cluster.nodes, &all, exchange).unwrap();
        assert!(share.smaller() >= 0.95, "transactions: {share:?} {rate:?}");
        let longest = slow.join().unwrap();
        assert!(longest < Duration::from_millis(200), "the slow flow stalled for {longest:?}");
    });
}
