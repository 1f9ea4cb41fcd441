//! What the agent leaves pinned, for whoever wires pods while it may be away: the two programs of a pod's veth, and
//! the endpoints.
//!
//! The programs' directory is named after the subnet that they were loaded for, so that nobody attaches programs or
//! writes endpoints of one subnet by the look of another. Where there is no such directory (kernel mode, no agent
//! yet), there is no fast path, and the agent finds the pods when it comes.

use std::{fs, io, net::Ipv4Addr, path::Path};

use aya::{
    Ebpf,
    maps::{Array, Map, MapData, MapInfo},
    programs::SchedClassifier,
};
use ipnet::{IpNet, Ipv4Net};
use loden_ebpf::abi::{Endpoint, UNPROVEN, map};

use super::{DataplaneError, Hook, Program, hooks, pins::Pins, tables::at};

/// The programs that a pod's veth has: first what notes packets that enter the host's stack, then what looks at
/// those that leave it.
pub const OF_A_POD: [Program; 2] = [Program::FromPod, Program::ToPod];

/// The pinned part of a data path.
pub struct PinnedDataplane {
    pins: Pins,
    subnet: Ipv4Net,
    endpoints: Array<MapData, Endpoint>,
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
        let subnets = pins.program_subnets();
        let Some(IpNet::V4(subnet)) = subnets.first().copied() else { return Ok(None) };
        let path = pins.map(map::ENDPOINTS);
        let Ok(info) = MapInfo::from_pin(&path) else { return Ok(None) };
        let shape = (info.key_size(), info.value_size(), u64::from(info.max_entries()));
        if shape != (4, size_of::<Endpoint>() as u32, 1 << (32 - subnet.prefix_len())) {
            return Ok(None);
        }
        let open = |name: &'static str| MapData::from_pin(pins.map(name)).map(Map::Array).map_err(at(name));
        let endpoints = Array::try_from(open(map::ENDPOINTS)?).map_err(at(map::ENDPOINTS))?;
        let epoch = Array::try_from(open(map::EPOCH)?).map_err(at(map::EPOCH))?;
        Ok(Some(Self { endpoints, epoch, subnet, pins }))
    }

    /// The subnet whose endpoints these are.
    #[must_use]
    pub fn subnet(&self) -> Ipv4Net {
        self.subnet
    }

    /// Attaches the programs to the host's end of a pod's veth, under the pins by which the agent knows them.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub fn attach(&self, ifindex: u32, interface: &str) -> Result<(), DataplaneError> {
        for program in OF_A_POD {
            let attach = || {
                let mut classifier =
                    SchedClassifier::from_pin(self.pins.program(self.subnet.into(), program))?;
                hooks::attach_classifier(&mut classifier, &self.pins, Hook { program, ifindex }, interface)
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

    /// Makes a pod an endpoint, gated until the agent has looked whether the host translates flows of it.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub fn set_endpoint(&mut self, endpoint: Endpoint) -> Result<(), DataplaneError> {
        let Some(at) = self.offset(endpoint.address.into()) else { return Ok(()) };
        if self.read(at)?.ifindex != 0 {
            // A pod that had the address before: what its flows qualified for is not this one's.
            self.bump_epoch()?;
        }
        let endpoint = Endpoint { gated: UNPROVEN, ..endpoint };
        self.endpoints.set(at, endpoint, 0).map_err(self::at(map::ENDPOINTS))
    }

    /// The endpoint at an address.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub fn endpoint(&self, address: Ipv4Addr) -> Result<Option<Endpoint>, DataplaneError> {
        let Some(at) = self.offset(address) else { return Ok(None) };
        Ok(Some(self.read(at)?).filter(|endpoint| endpoint.ifindex != 0))
    }

    /// Takes an endpoint away, unless it is behind another interface by now.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub fn remove_endpoint(&mut self, address: Ipv4Addr, ifindex: u32) -> Result<(), DataplaneError> {
        let Some(at) = self.offset(address) else { return Ok(()) };
        if self.read(at)?.ifindex != ifindex {
            return Ok(());
        }
        self.endpoints.set(at, Endpoint::default(), 0).map_err(self::at(map::ENDPOINTS))?;
        self.bump_epoch()
    }

    fn offset(&self, address: Ipv4Addr) -> Option<u32> {
        self.subnet.contains(&address).then(|| u32::from(address) - u32::from(self.subnet.network()))
    }

    fn read(&self, offset: u32) -> Result<Endpoint, DataplaneError> {
        self.endpoints.get(&offset, 0).map_err(at(map::ENDPOINTS))
    }

    fn bump_epoch(&mut self) -> Result<(), DataplaneError> {
        let epoch = self.epoch.get(&0, 0).map_err(at(map::EPOCH))?;
        self.epoch.set(0, epoch.wrapping_add(1), 0).map_err(at(map::EPOCH))
    }
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
