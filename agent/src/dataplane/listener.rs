//! Listening to verdicts: a slot of TRACERS and its ring, by the pins alone, whether an agent runs or not.

use std::{
    fs::File,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{Array, Map, MapData, MapInfo, MapType, PerCpuArray, PerCpuValues, RingBuf};
use loden_ebpf::{
    abi::map,
    trace::{TRACERS_MAX, Tally, Traced, Tracer},
};
use nix::{
    fcntl::{Flock, FlockArg},
    time::{ClockId, clock_gettime},
};
use tokio::io::unix::AsyncFd;

use super::{DataplaneError, Pins, reading::data, tables::at, traffic};

/// How long the programs go on telling a listener that says nothing.
const TERM: Duration = Duration::from_secs(2);
/// How often a listener must call [`Listener::renew`].
pub const RENEWAL: Duration = Duration::from_millis(250);

/// Somebody who is told of verdicts. Dropping it ends that at once; where it is killed, the programs stop after two
/// seconds.
pub struct Listener {
    pins: Pins,
    slot: u32,
    wanted: Tracer,
    tracing: Array<MapData, u32>,
    tracers: Array<MapData, Tracer>,
    tally: PerCpuArray<MapData, Tally>,
    ring: AsyncFd<RingBuf<MapData>>,
    ring_id: u32,
}

impl Listener {
    /// Takes a free slot below the directory of the pins and begins to listen. Must be called inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// Where no agent of this version has loaded the programs, or all slots are taken.
    pub fn open(bpffs_dir: &Path, wanted: Tracer) -> Result<Self> {
        let pins = Pins::below(bpffs_dir);
        let open = || -> Result<_> {
            let tracing = Array::try_from(Map::Array(data(&pins, map::TRACING, 4, size_of::<u32>())?))?;
            let tracers = Array::try_from(Map::Array(data(&pins, map::TRACERS, 4, size_of::<Tracer>())?))?;
            let tally = data(&pins, map::TRACE_TALLY, 4, size_of::<Tally>())?;
            Ok((tracing, tracers, PerCpuArray::try_from(Map::PerCpuArray(tally))?))
        };
        let (mut tracing, mut tracers, mut tally) = open().with_context(|| {
            format!(
                "no programs of this version are pinned in {}: the agent puts them there when it starts",
                bpffs_dir.display()
            )
        })?;
        // Two that begin at once must not take the same slot.
        let directory = File::open(pins.root()).with_context(|| pins.root().display().to_string())?;
        let lock = Flock::lock(directory, FlockArg::LockExclusive)
            .map_err(|(_, errno)| errno)
            .with_context(|| format!("locking {}", pins.root().display()))?;
        let Some(slot) = free_slot(&tracers)? else {
            bail!("{TRACERS_MAX} traces run on this node already, which is as many as there can be");
        };
        let path = pins.map(map::VERDICTS[slot as usize]);
        let ring = ring(&path)?;
        let ring_id = MapInfo::from_pin(&path)?.id();
        let zeroes = vec![Tally::default(); traffic::cpus()?];
        tally.set(slot, PerCpuValues::try_from(zeroes)?, 0).map_err(at(map::TRACE_TALLY))?;
        let wanted = Tracer { owner: rand::random(), until: monotonic() + nanoseconds(TERM), ..wanted };
        tracers.set(slot, wanted, 0).map_err(at(map::TRACERS))?;
        tracing.set(0, 1, 0).map_err(at(map::TRACING))?;
        drop(lock);
        Ok(Self { pins, slot, wanted, tracing, tracers, tally, ring, ring_id })
    }

    /// Says that it still listens. To be called every [`RENEWAL`].
    ///
    /// # Errors
    ///
    /// Where the slot is another's by now, because this process stood still for too long, or the programs are gone.
    pub fn renew(&mut self) -> Result<()> {
        let pin = self.pins.map(map::VERDICTS[self.slot as usize]);
        ensure!(
            MapInfo::from_pin(&pin).is_ok_and(|info| info.id() == self.ring_id),
            "the programs are gone, or others have taken their place ({} is not what it was)",
            pin.display()
        );
        ensure!(
            self.is_own()?,
            "this trace stood still for more than {TERM:?}, and another one has taken its place"
        );
        self.wanted.until = monotonic() + nanoseconds(TERM);
        self.tracers.set(self.slot, self.wanted, 0).map_err(at(map::TRACERS))?;
        Ok(self.tracing.set(0, 1, 0).map_err(at(map::TRACING))?)
    }

    /// Waits until there are verdicts, and hands each to `hear` until that has enough (`false`) or there is none left.
    /// Returns whether it may go on. Nothing is lost where this is given up while it waits.
    ///
    /// # Errors
    ///
    /// Where the kernel cannot wait, or a record is none.
    pub async fn hear(&mut self, mut hear: impl FnMut(Traced) -> Result<bool>) -> Result<bool> {
        // Enough that a pause between two batches costs little, not so much that renewing waits for them.
        const BATCH: usize = 4096;
        let mut ready = self.ring.readable_mut().await?;
        let ring = ready.get_inner_mut();
        for _ in 0..BATCH {
            let Some(record) = ring.next() else {
                ready.clear_ready();
                return Ok(true);
            };
            let verdict = Traced::from_record(&record)
                .with_context(|| format!("the programs wrote a record of {} bytes", record.len()))?;
            drop(record);
            if !hear(verdict)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Verdicts that were wanted, and of those that were picked the ones for which the ring had no room.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn tally(&self) -> Result<Tally, DataplaneError> {
        let each = self.tally.get(&self.slot, 0).map_err(at(map::TRACE_TALLY))?;
        Ok(each.iter().fold(Tally::default(), |sum, tally| Tally {
            wanted: sum.wanted + tally.wanted,
            lost: sum.lost + tally.lost,
        }))
    }

    fn is_own(&self) -> Result<bool, DataplaneError> {
        Ok(self.tracers.get(&self.slot, 0).map_err(at(map::TRACERS))?.owner == self.wanted.owner)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Where this fails, the slot is free when its term ends.
        if self.is_own().unwrap_or(false) {
            let _ = self.tracers.set(self.slot, Tracer::default(), 0);
        }
    }
}

fn free_slot(tracers: &Array<MapData, Tracer>) -> Result<Option<u32>> {
    let now = monotonic();
    for slot in 0..TRACERS_MAX as u32 {
        if tracers.get(&slot, 0).map_err(at(map::TRACERS))?.until <= now {
            return Ok(Some(slot));
        }
    }
    Ok(None)
}

/// The ring of a free slot, without what a listener before has left unread.
fn ring(path: &PathBuf) -> Result<AsyncFd<RingBuf<MapData>>> {
    let info = MapInfo::from_pin(path).with_context(|| format!("there is no map {}", path.display()))?;
    ensure!(info.map_type().is_ok_and(|kind| kind == MapType::RingBuf), "{} is no ring", path.display());
    let mut ring = RingBuf::try_from(Map::RingBuf(MapData::from_pin(path)?))?;
    while ring.next().is_some() {}
    // SAFETY: the ring buffer owns its descriptor and never closes or exchanges it while it lives, and AsyncFd owns
    // the ring buffer.
    Ok(unsafe { AsyncFd::register(ring) }?)
}

/// The programs' clock, in nanoseconds.
#[must_use]
pub fn monotonic() -> u64 {
    // The clock is always there.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| nanoseconds(now.into()))
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
