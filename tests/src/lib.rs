//! The harness of the tests and of the demo: hosts as network namespaces, a real etcd, the built agent.
//!
//! Everything made here is removed when its value is dropped, in the order in which a person would: processes
//! by their id, then namespaces. Names start with `ld` and carry the process id, so that suites run side by side.

pub mod bpffs;
pub mod capture;
pub mod cluster;
pub mod cni;
pub mod container;
pub mod counters;
pub mod cpu;
pub mod crowd;
pub mod docker;
pub mod etcd;
pub mod family;
pub mod flannel;
pub mod helm;
pub mod ipvs;
pub mod kubernetes_validate;
pub mod netns;
pub mod nic;
pub mod node;
pub mod packet;
pub mod pcap;
pub mod policy;
pub mod process;
pub mod remains;
pub mod room;
pub mod said;
pub mod service;
pub mod tap;
pub mod traffic;
pub mod underlay;
