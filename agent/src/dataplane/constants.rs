//! What the settings are to the programs: read-only data that the loader writes.

use aya::EbpfLoader;
use loden_ebpf::abi::global;

use super::{DataplaneError, Mapped, Settings, features};
use crate::family::{V4, V6};

/// The values of the programs' globals, each as it stands in memory.
#[derive(Default)]
pub(super) struct Constants {
    network: u32,
    network_mask: u32,
    grid_shift: u32,
    subnet: u32,
    subnet_mask: u32,
    vtep: u32,
    vtep_mac: [u8; 6],
    vni: u32,
    port: u16,
    outer_ttl: u8,
    has_v6: u8,
    v6_grid: [u8; 16],
    v6_grid_mask: [u8; 16],
    v6_subnet_len: u32,
    v6_subnet: [u8; 16],
    v6_subnet_mask: [u8; 16],
    v6_vtep: [u8; 16],
    v6_vtep_mac: [u8; 6],
    v6_vni: u32,
    v6_port: u16,
    v6_outer_hops: u8,
    v6_device: u32,
    source_port_min: u16,
    source_port_max: u16,
    strict: u8,
    drop_forged: u8,
    coarse_clock: u8,
    bare_device: u8,
    log_level: u8,
}

impl Constants {
    /// # Errors
    ///
    /// Where the network does not fit the maps.
    pub(super) fn of(settings: &Settings) -> Result<Self, DataplaneError> {
        let mut constants = Self {
            // Of a family that the network has not, no packet's address is in it.
            network: u32::MAX,
            network_mask: u32::MAX,
            subnet: u32::MAX,
            subnet_mask: u32::MAX,
            v6_grid_mask: [0xff; 16],
            v6_subnet_mask: [0xff; 16],
            v6_subnet_len: 64,
            source_port_min: settings.source_ports.0,
            source_port_max: settings.source_ports.1,
            strict: settings.strict.into(),
            drop_forged: settings.drop_forged.into(),
            coarse_clock: features::has_coarse_clock().into(),
            bare_device: settings.bare_device.into(),
            // aya-log's levels: 3 is info; at 0 nothing is told, and the verifier removes the telling.
            log_level: if settings.log_packets { 3 } else { 0 },
            ..Self::default()
        };
        if let Some(half) = &settings.v4 {
            let vxlan = half.vxlan.unwrap_or_default();
            let grid = V4::grid(half)?;
            constants.network = grid.network().into();
            constants.network_mask = grid.netmask().into();
            constants.grid_shift = u32::from(32 - half.subnet_len);
            constants.subnet = half.subnet.network().into();
            constants.subnet_mask = half.subnet.netmask().into();
            constants.vtep = half.vtep.into();
            (constants.vtep_mac, constants.vni, constants.port) = (vxlan.mac, vxlan.vni, vxlan.port);
            constants.outer_ttl = half.outer_ttl;
        }
        if let Some(half) = &settings.v6 {
            let vxlan = half.vxlan.unwrap_or_default();
            let grid = V6::grid(half)?;
            constants.has_v6 = 1;
            constants.v6_grid = grid.network().octets();
            constants.v6_grid_mask = grid.netmask().octets();
            constants.v6_subnet_len = half.subnet_len.into();
            constants.v6_subnet = half.subnet.network().octets();
            constants.v6_subnet_mask = half.subnet.netmask().octets();
            constants.v6_vtep = half.vtep.octets();
            (constants.v6_vtep_mac, constants.v6_vni, constants.v6_port) = (vxlan.mac, vxlan.vni, vxlan.port);
            constants.v6_outer_hops = half.outer_ttl;
            constants.v6_device = vxlan.ifindex;
        }
        Ok(constants)
    }

    pub(super) fn put_into<'a>(&'a self, loader: &mut EbpfLoader<'a>) {
        loader
            .override_global(global::NETWORK, &self.network, true)
            .override_global(global::NETWORK_MASK, &self.network_mask, true)
            .override_global(global::GRID_SHIFT, &self.grid_shift, true)
            .override_global(global::SUBNET, &self.subnet, true)
            .override_global(global::SUBNET_MASK, &self.subnet_mask, true)
            .override_global(global::VTEP, &self.vtep, true)
            .override_global(global::VTEP_MAC, &self.vtep_mac, true)
            .override_global(global::VNI, &self.vni, true)
            .override_global(global::PORT, &self.port, true)
            .override_global(global::OUTER_TTL, &self.outer_ttl, true)
            .override_global(global::HAS_V6, &self.has_v6, true)
            .override_global(global::V6_GRID, &self.v6_grid, true)
            .override_global(global::V6_GRID_MASK, &self.v6_grid_mask, true)
            .override_global(global::V6_SUBNET_LEN, &self.v6_subnet_len, true)
            .override_global(global::V6_SUBNET, &self.v6_subnet, true)
            .override_global(global::V6_SUBNET_MASK, &self.v6_subnet_mask, true)
            .override_global(global::V6_VTEP, &self.v6_vtep, true)
            .override_global(global::V6_VTEP_MAC, &self.v6_vtep_mac, true)
            .override_global(global::V6_VNI, &self.v6_vni, true)
            .override_global(global::V6_PORT, &self.v6_port, true)
            .override_global(global::V6_OUTER_HOPS, &self.v6_outer_hops, true)
            .override_global(global::V6_DEVICE, &self.v6_device, true)
            .override_global(global::SOURCE_PORT_MIN, &self.source_port_min, true)
            .override_global(global::SOURCE_PORT_MAX, &self.source_port_max, true)
            .override_global(global::STRICT, &self.strict, true)
            .override_global(global::DROP_FORGED, &self.drop_forged, true)
            .override_global(global::COARSE_CLOCK, &self.coarse_clock, true)
            .override_global(global::BARE_DEVICE, &self.bare_device, true)
            .override_global(aya_log::LEVEL, &self.log_level, true);
    }
}
