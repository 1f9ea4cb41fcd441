//! Every reason has a row that produces it.

use std::collections::BTreeSet;

use loden_ebpf::reason::Reason;

use crate::{case::Case, from_other, from_overlay, from_pod, from_wire, gate, observe};

/// Reasons that no row produces, and why.
pub(crate) const OUT_OF_REACH: [(Reason, &str); 4] = [
    (Reason::FastOverlayOut, "of IPv6 and of WireGuard: see the modules v6 and bare_device"),
    (Reason::PassPodChecksum, "of IPv6 and of WireGuard: see the modules v6 and bare_device"),
    (Reason::DropGuard, "an XDP program's: see the module guard"),
    (
        Reason::DropRedirect,
        "the redirect helpers refuse at once only flags that our programs never pass, and the bytes of a frame that \
     was just resized are always there; that a device is gone shows only when the kernel follows the redirect",
    ),
];

fn tables() -> [Vec<Case>; 6] {
    [
        from_pod::cases(),
        from_wire::cases(),
        from_other::cases(),
        from_overlay::cases(),
        observe::cases(),
        gate::cases(),
    ]
}

#[test]
fn every_reason_has_a_row_that_produces_it() {
    let cases = tables();
    let produced: BTreeSet<Reason> = cases.iter().flatten().filter_map(|case| case.reason()).collect();
    let out_of_reach: BTreeSet<Reason> = OUT_OF_REACH.iter().map(|(reason, _)| *reason).collect();
    assert!(produced.is_disjoint(&out_of_reach), "a reason that was thought out of reach has a row");
    let known: BTreeSet<Reason> = produced.union(&out_of_reach).copied().collect();
    let all: BTreeSet<Reason> = Reason::ALL.iter().copied().collect();
    let missing: Vec<_> = all.difference(&known).collect();
    assert!(missing.is_empty(), "no row produces {missing:?}");
}

#[test]
fn no_two_rows_of_a_table_have_the_same_name() {
    for cases in tables() {
        let names: BTreeSet<&str> = cases.iter().map(|case| case.what.as_str()).collect();
        assert_eq!(names.len(), cases.len());
    }
}
