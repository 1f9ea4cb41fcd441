//! Whether the lease we hold is still ours, by what etcd has at its key: pure.

use std::net::IpAddr;

use super::record::Record;
use crate::lease::Lease;

/// What etcd's record says about our lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// It is as we wrote it.
    Ours,
    /// It is ours, but its value is not what it should be: write it again.
    Rewrite,
    /// A write of ours, by this etcd lease, has succeeded after all: its answer was lost.
    Unanswered(i64),
    /// An operator has made it a reservation (a plain `etcdctl put`): keep it, without a TTL.
    Reserved,
    /// It has gone: it ran out while we were cut off, or somebody deleted it.
    Gone,
    /// Another agent with this node's public IP has written it. Who is right is not for us to fight out.
    OtherAgent,
    /// It is another node's now.
    OtherNode(Option<IpAddr>),
}

/// Judges the record at our lease's key; `alive` says that our etcd lease has not run out, as far as known, and `granted`
/// which others this process was granted.
pub(super) fn standing(
    own: &Lease,
    record: Option<&Record>,
    alive: bool,
    granted: impl Fn(i64) -> bool,
) -> Standing {
    let Some(record) = record else { return Standing::Gone };
    let here = record.is_of(&own.attrs);
    let same_value = record.attrs.as_ref() == Ok(&own.attrs);
    // Our own public IP may have changed since: then the revision tells.
    let last_write_is_ours = record.mod_revision == own.mod_revision;
    if record.etcd_lease == own.etcd_lease {
        // Our own etcd lease, or none as agreed: nobody else writes with that, but an operator who edits.
        return match (&record.attrs, alive) {
            (Ok(attrs), _) if record.etcd_lease.is_none() && !here && !last_write_is_ours => {
                Standing::OtherNode(attrs.identity())
            }
            (Ok(_), true) if same_value => Standing::Ours,
            _ => Standing::Rewrite,
        };
    }
    match (&record.attrs, record.etcd_lease) {
        // As above: nobody else writes with that.
        (_, Some(id)) if granted(id) => Standing::Unanswered(id),
        (Ok(_), None) if here => Standing::Reserved,
        // Older than our own write to this very key: a restore has undone that.
        (Ok(_), Some(_)) if here && record.mod_revision < own.mod_revision => Standing::Rewrite,
        (Ok(_), Some(_)) if here => Standing::OtherAgent,
        (Ok(attrs), _) => Standing::OtherNode(attrs.identity()),
        (Err(_), None) => Standing::Rewrite,
        (Err(_), Some(_)) => Standing::OtherNode(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{AttrsError, LeaseAttrs, LeaseKey, VtepData};

    fn attrs(last: u8, mac: u8) -> LeaseAttrs {
        LeaseAttrs::vxlan([10, 0, 0, last].into(), VtepData { vni: 1, vtep_mac: [2, 0, 0, 0, 0, mac] })
    }

    fn record(attrs: Result<LeaseAttrs, AttrsError>, etcd_lease: Option<i64>) -> Record {
        Record { key: LeaseKey::v4("10.5.1.0/24".parse().unwrap()), attrs, etcd_lease, mod_revision: 9 }
    }

    fn garbage() -> Result<LeaseAttrs, AttrsError> {
        LeaseAttrs::parse(b"garbage")
    }

    #[test]
    fn every_kind_of_record_is_judged() {
        let written = |mod_revision, etcd_lease| Lease {
            mod_revision,
            ..record(Ok(attrs(1, 1)), etcd_lease).lease().unwrap()
        };
        let (own, reservation, undone) = (written(8, Some(7)), written(8, None), written(10, Some(7)));
        let moved = Lease { attrs: attrs(3, 1), ..written(9, None) };
        let other = Standing::OtherNode(Some(IpAddr::from([10, 0, 0, 2])));
        for (own, record, alive, says) in [
            (&own, record(Ok(attrs(1, 1)), Some(7)), true, Standing::Ours),
            (&own, record(Ok(attrs(1, 1)), Some(7)), false, Standing::Rewrite),
            (&own, record(Ok(attrs(1, 2)), Some(7)), true, Standing::Rewrite),
            (&own, record(garbage(), Some(7)), true, Standing::Rewrite),
            (&own, record(garbage(), None), true, Standing::Rewrite),
            (&own, record(garbage(), Some(8)), true, Standing::OtherNode(None)),
            (&own, record(Ok(attrs(1, 2)), None), true, Standing::Reserved),
            (&own, record(Ok(attrs(1, 1)), Some(8)), true, Standing::OtherAgent),
            (&own, record(Ok(attrs(1, 2)), Some(8)), true, Standing::OtherAgent),
            (&undone, record(Ok(attrs(1, 1)), Some(8)), true, Standing::Rewrite),
            (&undone, record(Ok(attrs(1, 2)), Some(8)), false, Standing::Rewrite),
            (&undone, record(Ok(attrs(2, 2)), Some(8)), true, other),
            (&own, record(Ok(attrs(1, 1)), Some(5)), true, Standing::Unanswered(5)),
            (&own, record(Ok(attrs(1, 2)), Some(5)), false, Standing::Unanswered(5)),
            (&own, record(garbage(), Some(5)), true, Standing::Unanswered(5)),
            (&undone, record(Ok(attrs(1, 1)), Some(5)), true, Standing::Unanswered(5)),
            (&reservation, record(Ok(attrs(1, 1)), Some(5)), true, Standing::Unanswered(5)),
            (&own, record(Ok(attrs(2, 2)), Some(8)), true, other),
            (&own, record(Ok(attrs(2, 2)), None), true, other),
            (&reservation, record(Ok(attrs(1, 1)), None), true, Standing::Ours),
            (&reservation, record(Ok(attrs(1, 2)), None), true, Standing::Rewrite),
            (&reservation, record(Ok(attrs(2, 2)), None), true, other),
            (&reservation, record(Ok(attrs(1, 1)), Some(8)), true, Standing::OtherAgent),
            (&moved, record(Ok(attrs(1, 1)), None), true, Standing::Rewrite),
        ] {
            let found = standing(own, Some(&record), alive, |id| id == 5);
            assert_eq!(found, says, "{own:?} {record:?} {alive}");
        }
        assert_eq!(standing(&own, None, true, |_| true), Standing::Gone);
    }
}
