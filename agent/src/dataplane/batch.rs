//! Maps of many entries, read by few system calls.
//!
//! A grid of 65 536 peers takes as many system calls to read one by one, at each tick and for each status.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    ptr,
};

use aya::{
    Pod,
    maps::{Map, MapData, MapError},
    sys::SyscallError,
    util::nr_cpus,
};
use nix::libc;

/// `BPF_MAP_LOOKUP_BATCH` of `enum bpf_cmd`, since Linux 5.6 (cb4d03ab499d for arrays, 057996380a42 for hashes) and 5.13
/// (f008d732ab18 for arrays per CPU).
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;

/// Values that one call asks for.
const AT_ONCE: usize = 4096;

/// The part of `union bpf_attr` that this command reads, and writes `count` of.
#[repr(C)]
#[derive(Debug)]
struct LookupBatch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// An array or a hash whose entries are read many at once. An array per CPU has each key as often as there are CPUs.
#[derive(Debug)]
pub(super) struct Batches<K, V> {
    fd: OwnedFd,
    /// Values at a key.
    values: usize,
    entry: PhantomData<fn() -> (K, V)>,
}

impl<K: Pod, V: Pod> Batches<K, V> {
    /// Of this map, which may go elsewhere afterwards.
    ///
    /// # Errors
    ///
    /// Where its keys or values have another size, or it is neither an array nor a hash, or descriptors have run out.
    pub(super) fn of(map: &Map) -> Result<Self, MapError> {
        let (data, values) = match map {
            Map::Array(data) | Map::HashMap(data) | Map::LruHashMap(data) => (data, 1),
            // The kernel rounds each CPU's value up to a multiple of 8 bytes.
            Map::PerCpuArray(data) if size_of::<V>().is_multiple_of(8) => {
                (data, nr_cpus().map_err(|(_, error)| error)?)
            }
            _ => return Err(MapError::InvalidMapType { map_type: 0 }),
        };
        let info = data.info()?;
        let (key, value) = (info.key_size() as usize, info.value_size() as usize);
        if key != size_of::<K>() {
            return Err(MapError::InvalidKeySize { size: key, expected: size_of::<K>() });
        }
        if value != size_of::<V>() {
            return Err(MapError::InvalidValueSize { size: value, expected: size_of::<V>() });
        }
        let fd = descriptor(data).map_err(|error| failed("dup", error))?;
        Ok(Self { fd, values, entry: PhantomData })
    }

    /// Shows each entry; of a hash that changes meanwhile one may be missed, or shown twice.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub(super) fn for_each(&self, mut visit: impl FnMut(K, V)) -> Result<(), MapError> {
        let at_once = (AT_ONCE / self.values).max(1);
        let mut keys = Vec::<K>::with_capacity(at_once);
        let mut values = Vec::<V>::with_capacity(at_once * self.values);
        // Where to go on: an array's key, a hash's bucket.
        let mut at: Option<u32> = None;
        loop {
            let (next, is_last) = self.lookup(at, &mut keys, &mut values)?;
            for (key, values) in keys.iter().zip(values.chunks_exact(self.values)) {
                values.iter().for_each(|value| visit(*key, *value));
            }
            if is_last {
                return Ok(());
            }
            at = Some(next);
        }
    }

    /// All entries for which there is something to keep.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub(super) fn filter_map<T>(&self, mut keep: impl FnMut(K, V) -> Option<T>) -> Result<Vec<T>, MapError> {
        let mut kept = Vec::new();
        self.for_each(|key, value| kept.extend(keep(key, value)))?;
        Ok(kept)
    }

    /// How many entries there are.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub(super) fn count(&self) -> Result<u64, MapError> {
        let mut count = 0;
        self.for_each(|_, _| count += 1)?;
        Ok(count)
    }

    /// Fills the vectors with the next entries; says where to go on, and whether there is nothing more.
    fn lookup(
        &self,
        at: Option<u32>,
        keys: &mut Vec<K>,
        values: &mut Vec<V>,
    ) -> Result<(u32, bool), MapError> {
        keys.clear();
        values.clear();
        let mut next = 0u32;
        let mut attr = LookupBatch {
            in_batch: at.as_ref().map_or(0, |at| ptr::from_ref(at) as u64),
            out_batch: ptr::from_mut(&mut next) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: keys.capacity().min(values.capacity() / self.values) as u32,
            map_fd: self.fd.as_raw_fd() as u32,
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: the attribute's pointers lead to `at`, `next` and the vectors, which outlive the call; the kernel
        // writes no more than `count` keys, and the values of each, for which there is room, since both have the map's
        // sizes; in and
        // out batch are of 4 bytes for a hash, and of a key's size for an array, whose keys have 4.
        let outcome = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_MAP_LOOKUP_BATCH,
                ptr::from_mut(&mut attr),
                size_of::<LookupBatch>(),
            )
        };
        let error = (outcome != 0).then(io::Error::last_os_error);
        // The last entries come with this error.
        let is_last = error.as_ref().is_some_and(|error| error.kind() == io::ErrorKind::NotFound);
        if let Some(error) = error.filter(|_| !is_last) {
            return Err(failed("bpf_map_lookup_batch", error));
        }
        // SAFETY: the kernel has written so many, and any bytes are a value of what is Pod.
        unsafe {
            keys.set_len(attr.count as usize);
            values.set_len(attr.count as usize * self.values);
        }
        Ok((next, is_last))
    }
}

fn descriptor(data: &MapData) -> io::Result<OwnedFd> {
    data.fd().as_fd().try_clone_to_owned()
}

fn failed(call: &'static str, io_error: io::Error) -> MapError {
    SyscallError { call, io_error }.into()
}
