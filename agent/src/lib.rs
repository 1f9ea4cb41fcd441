//! The agent of Loden: keeps this node's subnet lease in etcd, programs the kernel's overlay for every peer
//! as flannel does, and loads the eBPF programs that carry the packets past it.
//!
//! | module | owns |
//! | --- | --- |
//! | [`cli`], [`config`] | flags and environment, flannel's and our own; the validated configuration |
//! | [`network`], [`subnet`], [`lease`] | the network config, the choice of a subnet, the lease: pure |
//! | [`registry`] | the only user of etcd-client: claim, keep alive, watch |
//! | [`kube`] | the only user of kube-client: the same snapshots from the Kubernetes API |
//! | [`host`] | what of this host the choices depend on: interfaces, addresses, routes |
//! | [`uplink`], [`subnet_file`] | the interface that carries the overlay; the contract file `subnet.env` |
//! | [`family`] | IPv4 and IPv6, for what is one source for both |
//! | [`kernel`] | the only user of rtnetlink: devices, routes, neighbours, FDB, and their events |
//! | [`overlay`] | desired minus actual kernel state for all peers: pure |
//! | [`wireguard`] | keys, peers and desired minus actual of the wireguard backend: pure |
//! | [`firewall`] | forward and masquerade rules |
//! | [`dataplane`] | the only user of aya: loads, pins, attaches, fills and reads maps |
//! | [`endpoints`] | which local pod sits behind which veth: pure |
//! | [`telemetry`], [`health`], [`service`] | logging; `/healthz` and `/readyz`; what the service manager is told |
//! | [`docker_opts`] | dockerd's options from `subnet.env` |
//! | [`run`], [`reconcile`] | the start, and the loop that brings all of them together |
//! | [`control`], [`status`], [`cleanup`] | the control socket, what it tells, and undoing everything |
//! | [`activity`], [`metrics`], [`web`] | when who was heard of; `/metrics`; the web page |
//! | [`state`], [`facts`] | what there is to undo; what the agent wants of the node |
//! | [`doctor`] | what is wrong with this node, from a snapshot of it |
//! | [`explain`] | would this flow be fast, and why not |
//! | [`cni`] | the CNI plugin `loden-cni`, which needs no running agent |

pub mod activity;
pub mod bridges;
pub mod cleanup;
pub mod cli;
pub mod cni;
pub mod config;
pub mod control;
pub mod dataplane;
pub mod docker_opts;
pub mod doctor;
mod durable_file;
pub mod endpoints;
pub mod explain;
pub mod facts;
pub mod family;
pub mod firewall;
pub mod health;
pub mod host;
pub mod kernel;
pub mod kube;
pub mod lease;
pub mod metrics;
pub mod network;
pub mod overlay;
pub mod reconcile;
pub mod registry;
pub mod run;
pub mod service;
pub mod state;
pub mod status;
pub mod subnet;
pub mod subnet_file;
pub mod telemetry;
pub mod trace;
pub mod uplink;
pub mod web;
pub mod wireguard;
