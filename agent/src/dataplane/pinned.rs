//! What the agent leaves pinned, for whoever wires pods while it may be away: the two programs of a pod's veth, and
//! the endpoints.
//!
//! The programs' directory is named after the subnet that they were loaded for, so that nobody attaches programs or
//! writes endpoints of one subnet by the look of another. Where there is no such directory (kernel mode, no agent
//! yet), there is no fast path, and the agent finds the pods when it comes.

use std::{fs, io, path::Path};

use aya::{
    Ebpf,
    maps::{Array, Map, MapData, MapInfo, MapType},
    programs::SchedClassifier,
};
use ipnet::IpNet;
use loden_ebpf::abi::{Endpoint, UNPROVEN, map};

use super::{DataplaneError, Hook, Mapped, Program, hooks, pins::Pins, tables::at};
use crate::family::{V4, V6};

/// The programs that a pod's veth has: first what notes packets that enter the host's stack, then what looks at
/// those that leave it.
pub const OF_A_POD: [Program; 2] = [Program::FromPod, Program::ToPod];

/// The pinned part of a data path.
pub struct PinnedDataplane {
    pins: Pins,
    subnet: IpNet,
    pub(super) v4: Option<<V4 as Mapped>::Endpoints>,
    pub(super) v6: Option<<V6 as Mapped>::Endpoints>,
    epoch: Array<MapData, u32>,
}

impl PinnedDataplane {
    /// Opens what an agent has left; `None` where there is nothing of this version.
    ///
    /// # Errors
    ///
    /// Where a map that is there cannot be used.
    pub fn open(bpffs_dir: &Path) -> Result<Option<Self>, DataplaneError> {
        let pins = Pins::below(bpffs_dir);
        let Some(subnet) = pins.program_subnets().into_iter().next() else { return Ok(None) };
        let v4 = match subnet {
            IpNet::V4(subnet) => {
                let addresses = 1u64 << (32 - subnet.prefix_len());
                endpoints::<V4>(&pins, |entries| entries == addresses)?
            }
            IpNet::V6(_) => None,
        };
        // Programs without that half have the smallest there is.
        let v6 = endpoints::<V6>(&pins, |entries| entries > 1)?;
        if v4.is_none() && v6.is_none() {
            return Ok(None);
        }
        let epoch = MapData::from_pin(pins.map(map::EPOCH)).map(Map::Array).map_err(at(map::EPOCH))?;
        let epoch = Array::try_from(epoch).map_err(at(map::EPOCH))?;
        Ok(Some(Self { pins, subnet, v4, v6, epoch }))
    }

    /// The subnet that the programs were loaded for: IPv4's, where the node has one.
    #[must_use]
    pub fn subnet(&self) -> IpNet {
        self.subnet
    }

    /// Whether there are endpoints of a family.
    #[must_use]
    pub fn has<F: Mapped>(&self) -> bool {
        F::pinned(self).is_some()
    }

    /// Attaches the programs to the host's end of a pod's veth, under the pins by which the agent knows them.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub fn attach(&self, ifindex: u32, interface: &str) -> Result<(), DataplaneError> {
        for program in OF_A_POD {
            let attach = || {
                let mut classifier = SchedClassifier::from_pin(self.pins.program(self.subnet, program))?;
                hooks::attach_classifier(&mut classifier, &self.pins, Hook { program, ifindex }, interface)
                    .map(drop)
            };
            attach().map_err(|source| DataplaneError::Attach {
                program: program.name(),
                interface: interface.to_owned(),
                source,
            })?;
        }
        Ok(())
    }

    /// Whether a program is attached there, as far as the pins tell.
    #[must_use]
    pub fn is_attached(&self, program: Program, ifindex: u32) -> bool {
        let hook = Hook { program, ifindex };
        self.pins.link(&hook).exists() || self.pins.filter(&hook).exists()
    }

    /// Makes a pod's address an endpoint, gated until the agent has looked whether the host translates flows of it.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub fn set_endpoint<F: Mapped>(&mut self, endpoint: Endpoint<F::Octets>) -> Result<(), DataplaneError> {
        let address = F::of_octets(endpoint.address);
        if self.endpoint::<F>(address)?.is_some() {
            // A pod that had the address before: what its flows qualified for is not this one's.
            self.bump_epoch()?;
        }
        self.write::<F>(address, Some(Endpoint { gated: UNPROVEN, ..endpoint }))
    }

    /// The endpoint at an address.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub fn endpoint<F: Mapped>(
        &self,
        address: F::Addr,
    ) -> Result<Option<Endpoint<F::Octets>>, DataplaneError> {
        let subnet = self.subnet_of::<F>();
        let Some(map) = F::pinned(self).filter(|_| F::contains(subnet, address)) else { return Ok(None) };
        F::endpoint(map, subnet, address).map_err(at(F::NAMES.endpoints))
    }

    /// Takes an endpoint away, unless it is behind another interface by now.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub fn remove_endpoint<F: Mapped>(
        &mut self,
        address: F::Addr,
        ifindex: u32,
    ) -> Result<(), DataplaneError> {
        if self.endpoint::<F>(address)?.is_none_or(|there| there.ifindex != ifindex) {
            return Ok(());
        }
        self.write::<F>(address, None)?;
        self.bump_epoch()
    }

    fn write<F: Mapped>(
        &mut self,
        address: F::Addr,
        endpoint: Option<Endpoint<F::Octets>>,
    ) -> Result<(), DataplaneError> {
        let subnet = self.subnet_of::<F>();
        match F::pinned_mut(self).filter(|_| F::contains(subnet, address)) {
            Some(map) => F::set_endpoint(map, subnet, address, endpoint).map_err(at(F::NAMES.endpoints)),
            None => Ok(()),
        }
    }

    /// Where a family's addresses are counted from; all there are where they are not.
    fn subnet_of<F: Mapped>(&self) -> F::Net {
        let base = F::addr(self.subnet.network());
        base.and_then(|base| F::net(base, self.subnet.prefix_len())).unwrap_or_default()
    }

    fn bump_epoch(&mut self) -> Result<(), DataplaneError> {
        let epoch = self.epoch.get(&0, 0).map_err(at(map::EPOCH))?;
        self.epoch.set(0, epoch.wrapping_add(1), 0).map_err(at(map::EPOCH))
    }
}

/// A family's endpoints, if they are of this shape and have so many entries.
fn endpoints<F: Mapped>(
    pins: &Pins,
    has_entries: impl FnOnce(u64) -> bool,
) -> Result<Option<F::Endpoints>, DataplaneError> {
    let (name, (kind, key)) = (F::NAMES.endpoints, F::ENDPOINTS);
    let Ok(info) = MapInfo::from_pin(pins.map(name)) else { return Ok(None) };
    let shape = (info.key_size(), info.value_size());
    if shape != (key, size_of::<Endpoint<F::Octets>>() as u32) || !has_entries(info.max_entries().into()) {
        return Ok(None);
    }
    let data = MapData::from_pin(pins.map(name)).map_err(at(name))?;
    let map = if kind == MapType::Array { Map::Array(data) } else { Map::HashMap(data) };
    F::open_endpoints(map).map(Some).map_err(at(name))
}

/// Removes the pins of the programs on a veth that goes, or has gone.
///
/// # Errors
///
/// Where the file system refuses.
pub fn forget_pod(bpffs_dir: &Path, ifindex: u32) -> Result<(), DataplaneError> {
    let pins = Pins::below(bpffs_dir);
    for program in OF_A_POD {
        let hook = Hook { program, ifindex };
        Pins::remove(&pins.link(&hook))?;
        // The filter itself goes with the veth.
        let record = pins.filter(&hook);
        match fs::remove_dir(&record) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(DataplaneError::Pin { path: record, source });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Pins the programs of a pod's veth, in the place of an earlier agent's: whoever opens one finds the old one or the
/// new one. Those for another subnet go.
pub(super) fn pin_programs(ebpf: &mut Ebpf, pins: &Pins, subnet: IpNet) -> Result<(), DataplaneError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| DataplaneError::Pin { path, source }
    };
    for program in OF_A_POD {
        let path = pins.program(subnet, program);
        let fresh = path.with_file_name(format!("{}-new", program.name()));
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(failed(directory))?;
        }
        Pins::remove(&fresh)?;
        // One that the object lacks was missed when it was loaded.
        if let Some(loaded) = ebpf.program_mut(program.name()) {
            loaded.pin(&fresh).map_err(|error| failed(&fresh)(io::Error::other(error)))?;
            fs::rename(&fresh, &path).map_err(failed(&path))?;
        }
    }
    let others = pins.program_subnets().into_iter().filter(|other| *other != subnet);
    others.flat_map(|other| pins.remove_programs(other)).next().map_or(Ok(()), Err)
}
