//! A lease: which node holds which subnet, as one key and one value in etcd.
//!
//! Keys and values are flannel's to the byte (`pkg/subnet/etcd`, `pkg/lease`), because flannel nodes read ours
//! and write theirs. Everything read is hostile until parsed. A lease has an IPv4 subnet, an IPv6 one, or both.

mod attrs;
mod key;

pub use self::{
    attrs::{AttrsError, LeaseAttrs, VtepData, WireguardData},
    key::{KeyError, LeaseKey, subnets_in_flannels_eyes},
};

/// A node's subnets and where it is, as etcd had it at `mod_revision`.
#[derive(Clone, Debug, PartialEq)]
pub struct Lease {
    /// The last segment of the key in etcd: the subnets.
    pub key: LeaseKey,
    /// Where the node is and how to reach it.
    pub attrs: LeaseAttrs,
    /// The etcd lease that the key lives by; `None`: a reservation, which does not run out.
    pub etcd_lease: Option<i64>,
    /// etcd's revision of the last write to the key.
    pub mod_revision: i64,
}
