//! A container that Docker has made.

use std::{net::Ipv4Addr, ops::Deref};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::room::Room;
use crate::{container::Container, netns::Netns};

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
        let addresses = networks.into_iter().flat_map(|networks| networks.values());
        let address: Ipv4Addr = addresses
            .filter_map(|network| network["IPAddress"].as_str()?.parse().ok())
            .next()
            .with_context(|| format!("{id} has no address: {}", inspected["NetworkSettings"]))?;
        let netns = Netns::hold(&format!("d-{address}"), &room.proc(pid).join("ns/net"))?;
        Ok(Self { id, inside: Container::wired(netns, address) })
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
