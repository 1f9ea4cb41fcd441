//! What the settings are to the programs: read-only data that the loader writes.

use aya::EbpfLoader;
use loden_ebpf::abi::global;

use super::{DataplaneError, Mapped, Settings, features};
use crate::family::{V4, V6};

/// The values of the programs' globals, each as it stands in memory.
#[derive(Default)]
pub(super) struct Constants {
    v4_network: u32,
    v4_network_mask: u32,
    v4_grid_shift: u32,
    v4_subnet: u32,
    v4_subnet_mask: u32,
    v4_vtep: u32,
    v4_vtep_mac: [u8; 6],
    v4_vni: u32,
    v4_port: u16,
    v4_outer_ttl: u8,
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
            v4_network: u32::MAX,
            v4_network_mask: u32::MAX,
            v4_subnet: u32::MAX,
            v4_subnet_mask: u32::MAX,
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
            constants.v4_network = grid.network().into();
            constants.v4_network_mask = grid.netmask().into();
            constants.v4_grid_shift = u32::from(32 - half.subnet_len);
            constants.v4_subnet = half.subnet.network().into();
            constants.v4_subnet_mask = half.subnet.netmask().into();
            constants.v4_vtep = half.vtep.into();
            (constants.v4_vtep_mac, constants.v4_vni, constants.v4_port) = (vxlan.mac, vxlan.vni, vxlan.port);
            constants.v4_outer_ttl = half.outer_ttl;
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
            .override_global(global::V4_NETWORK, &self.v4_network, true)
            .override_global(global::V4_NETWORK_MASK, &self.v4_network_mask, true)
            .override_global(global::V4_GRID_SHIFT, &self.v4_grid_shift, true)
            .override_global(global::V4_SUBNET, &self.v4_subnet, true)
            .override_global(global::V4_SUBNET_MASK, &self.v4_subnet_mask, true)
            .override_global(global::V4_VTEP, &self.v4_vtep, true)
            .override_global(global::V4_VTEP_MAC, &self.v4_vtep_mac, true)
            .override_global(global::V4_VNI, &self.v4_vni, true)
            .override_global(global::V4_PORT, &self.v4_port, true)
            .override_global(global::V4_OUTER_TTL, &self.v4_outer_ttl, true)
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
