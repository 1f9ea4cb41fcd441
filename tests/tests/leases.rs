//! Leases against a real etcd: claims and races, what flannel writes and reads, failures of all kinds.

#[path = "leases/basic.rs"]
mod basic;
#[path = "leases/cluster.rs"]
mod cluster;
