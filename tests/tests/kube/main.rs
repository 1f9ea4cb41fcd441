//! The Kubernetes ring: leases from an API server, or rather from a double of one that speaks its protocol over real
//! HTTP.
//!
//! `following`, `leases`, `outages` and `starting` run the lease source alone; `nodes` runs agents in namespaces, with
//! containers; `secrets` reads all that an agent says; `manifests` looks at what is applied to a cluster.

#![expect(
    clippy::unwrap_used,
    reason = "clippy.toml allows it in tests, which for clippy does not mean their modules"
)]

mod dual;
mod following;
mod kubeconfig;
mod leases;
mod manifests;
mod nodes;
mod outages;
mod secrets;
mod server;
mod source;
mod starting;
