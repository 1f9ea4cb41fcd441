//! A container that Docker has made.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    ops::Deref,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{container::Container, netns::Netns, room::Room};

/// A running container; to the tests it is a [`Container`] like those that the harness makes itself. Dropping it
/// lets go of it and does not end it.
#[derive(Debug)]
pub struct DockerContainer {
    id: String,
    inside: Container,
}

impl DockerContainer {
    /// Takes hold of the container that `docker inspect` has described.
    pub(super) fn of(inspected: &Value, room: &Room) -> Result<Self> {
        let id = inspected["Id"].as_str().with_context(|| format!("no container: {inspected}"))?.to_owned();
        let pid = inspected["State"]["Pid"].as_u64().filter(|pid| *pid > 0);
        let pid = pid.with_context(|| format!("{id} does not run: {}", inspected["State"]))?;
        let networks = inspected["NetworkSettings"]["Networks"].as_object();
        let networks: Vec<&Value> = networks.into_iter().flat_map(|networks| networks.values()).collect();
        let of_network =
            |key: &str| networks.iter().find_map(|network| network[key].as_str().filter(|it| !it.is_empty()));
        let address6: Option<Ipv6Addr> =
            of_network("GlobalIPv6Address").and_then(|address| address.parse().ok());
        let address: Ipv4Addr = of_network("IPAddress")
            .and_then(|address| address.parse().ok())
            .with_context(|| format!("{id} has no address: {}", inspected["NetworkSettings"]))?;
        let netns = Netns::hold(&format!("d-{address}"), &room.proc(pid).join("ns/net"))?;
        Ok(Self { id, inside: Container::wired(netns, address, address6) })
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl Deref for DockerContainer {
    type Target = Container;

    fn deref(&self) -> &Container {
        &self.inside
    }
}
