//! From an address to a peer or an endpoint.

use loden_ebpf::{
    abi::{Endpoint, Peer, TRANSLATED},
    grid,
};

use super::{globals, maps};

/// The peer whose subnet holds the address (host order).
#[inline(always)]
pub(super) fn peer(address: u32) -> Option<&'static Peer> {
    let slot = grid::slot(
        address,
        globals::NETWORK.load(),
        globals::NETWORK_MASK.load(),
        globals::GRID_SHIFT.load(),
    )?;
    let peer = maps::PEERS.get(slot)?;
    if peer.is_empty() { None } else { Some(peer) }
}

/// The local pod that has the address (host order).
#[inline(always)]
pub(super) fn endpoint(address: u32) -> Option<&'static Endpoint> {
    let offset = own_offset(address)?;
    let endpoint = maps::ENDPOINTS.get(offset)?;
    if endpoint.ifindex == 0 { None } else { Some(endpoint) }
}

/// From now on every flow of the endpoint at this address must qualify.
#[inline(always)]
pub(super) fn gate_endpoint(address: u32) {
    if let Some(endpoint) = own_offset(address).and_then(|offset| maps::ENDPOINTS.get_ptr_mut(offset)) {
        // SAFETY: the pointer is valid as long as the map is; the field is written whole, and not for every packet:
        // other CPUs read the same cache line.
        unsafe {
            if (*endpoint).gated != TRANSLATED {
                (*endpoint).gated = TRANSLATED;
            }
        }
    }
}

/// Whether the address (host order) is in the own subnet.
#[inline(always)]
pub(super) fn is_own(address: u32) -> bool {
    own_offset(address).is_some()
}

/// Whether the address may send VXLAN to us.
#[inline(always)]
pub(super) fn is_vtep(address: [u8; 4]) -> bool {
    maps::VTEPS.get_ptr(address).is_some()
}

#[inline(always)]
fn own_offset(address: u32) -> Option<u32> {
    grid::offset(address, globals::SUBNET.load(), globals::SUBNET_MASK.load())
}
