//! A few peers of many in the maps: what [`Tables::set_peers`] would do for all of them.

use std::collections::BTreeMap;

use super::{
    Changes, DataplaneError, Mapped, PeerPath,
    tables::{Tables, at, gone_is_fine},
};

impl<F: Mapped> Tables<F> {
    /// Removes these subnets' slots, which no other peer has a part in. Returns how many went.
    ///
    /// # Errors
    ///
    /// Where the map cannot be written; what was written stays.
    pub fn remove_peers(&mut self, subnets: impl Iterator<Item = F::Net>) -> Result<usize, DataplaneError> {
        let mut gone = 0;
        for slot in subnets.flat_map(|subnet| self.slots_of(subnet)).collect::<Vec<_>>() {
            if self.peers_held.contains_key(&slot) {
                self.clear_peer(slot)?;
                gone += 1;
            }
        }
        Ok(gone)
    }

    /// Puts these peers in, whose subnets no other peer has a part in; `left` are VTEP addresses that so many subnets have
    /// had which are gone or have another now, once for each.
    ///
    /// # Errors
    ///
    /// Where a map cannot be written; what was written stays.
    pub fn change_peers(
        &mut self,
        paths: &[PeerPath<F>],
        left: &[F::Addr],
    ) -> Result<Changes, DataplaneError> {
        let mut vteps: BTreeMap<F::AddressKey, u32> = BTreeMap::new();
        let held = |key: &F::AddressKey| self.vteps_held.get(key).copied().unwrap_or_default();
        for key in paths.iter().map(|path| F::key(path.vtep)) {
            *vteps.entry(key).or_insert_with_key(held) += 1;
        }
        for key in left.iter().map(|vtep| F::key(*vtep)) {
            let subnets = vteps.entry(key).or_insert_with_key(held);
            *subnets = subnets.saturating_sub(1);
        }
        // A VTEP may send before its subnets are known to be its own, never after.
        for (vtep, subnets) in vteps.iter().filter(|(_, subnets)| **subnets > 0) {
            self.set_vtep(*vtep, *subnets)?;
        }
        let mut changes = Changes::default();
        let mut free = None;
        for path in paths {
            let (slots, peer) = self.counted_peer(path, &mut free)?;
            for slot in slots {
                self.set_peer(slot, peer, &mut changes)?;
            }
        }
        for vtep in vteps.iter().filter(|(_, subnets)| **subnets == 0).map(|(vtep, _)| *vtep) {
            gone_is_fine(self.vteps.remove(&vtep)).map_err(at(F::NAMES.vteps))?;
            self.vteps_held.remove(&vtep);
        }
        Ok(changes)
    }
}
