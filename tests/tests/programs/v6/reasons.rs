//! Every reason has a row of IPv6 that produces it.

use super::*;
use crate::reasons::OUT_OF_REACH;

/// Reasons of IPv4 alone, and why.
const OF_IPV4: [(Reason, &str); 2] = [
    (PassPodFragment, "an IPv6 fragment has an extension header, and is passed on for that"),
    (PassPodNoRoom, "aggregates, which alone may find no room, go into the VXLAN device"),
];

#[test]
fn every_reason_has_a_row_that_produces_it() {
    let tables = [from_pod::TABLES, from_wire::TABLES, strangers::TABLES, gate::TABLES];
    let tables = tables.into_iter().flatten();
    let produced: Produced = tables.flat_map(|table| Lab::run(table)).collect();
    // What the module of IPv4 leaves to this one is produced here.
    let here = [FastOverlayOut, PassPodChecksum, DropGuard];
    let elsewhere = OUT_OF_REACH.iter().map(|(reason, _)| *reason).filter(|reason| !here.contains(reason));
    let excused: Produced = elsewhere.chain(OF_IPV4.map(|(reason, _)| reason)).collect();
    assert!(produced.is_disjoint(&excused), "a reason that was thought out of reach has a row");
    let all: Produced = Reason::ALL.iter().copied().collect();
    let known: Produced = produced.union(&excused).copied().collect();
    let missing: Vec<_> = all.difference(&known).collect();
    assert!(missing.is_empty(), "no row of IPv6 produces {missing:?}");
}
