//! What is said again and again is said less often: whatever a peer, a packet or an outage can cause must not fill a disk.
//!
//! Each place in the code has a bucket of its own, so that a storm of one kind hides no line of another. What was left out
//! is counted and said, with what the first of it would have been.

use std::{
    collections::HashMap,
    fmt::{self, Write as _},
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tracing::{Event, Level, Metadata, Subscriber, field::Field};
use tracing_subscriber::{
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

/// Where the programs' records go (`--bpf-log`): the target in `dataplane/packet_log.rs`.
const PACKETS: &str = "loden::packets";
/// Most of a line that stands for those that were left out, in bytes.
const EXAMPLE_MAX: usize = 200;

/// How often one place may speak: so many lines at once, then one each `every`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Allowance {
    pub(super) burst: u32,
    pub(super) every: Duration,
}

/// State changes: far more than a node in good health has, six a minute for one that has none.
const STATE: Allowance = Allowance { burst: 50, every: Duration::from_secs(10) };
/// Packets, which somebody has asked for.
const OF_PACKETS: Allowance = Allowance { burst: 500, every: Duration::from_millis(100) };

/// Lines that were left out, all of one place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Omitted {
    pub(super) target: String,
    pub(super) lines: u64,
    /// The first of them.
    pub(super) like: String,
}

/// Lets through what is within the allowance.
#[derive(Debug, Default)]
pub(super) struct Limit {
    places: Mutex<HashMap<tracing::callsite::Identifier, Place>>,
}

#[derive(Debug)]
struct Place {
    bucket: Bucket,
    target: &'static str,
    lines: u64,
    like: String,
}

#[derive(Debug)]
struct Bucket {
    allowance: Allowance,
    left: u32,
    filled: Instant,
}

impl Bucket {
    fn full(allowance: Allowance, now: Instant) -> Self {
        Self { allowance, left: allowance.burst, filled: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        let periods = now.duration_since(self.filled).as_nanos() / self.allowance.every.as_nanos().max(1);
        if let Ok(periods @ 1..) = u32::try_from(periods) {
            self.left = self.left.saturating_add(periods).min(self.allowance.burst);
            self.filled += self.allowance.every * periods;
        }
        let may = self.left > 0;
        self.left -= u32::from(may);
        may
    }
}

impl Limit {
    fn places(&self) -> MutexGuard<'_, HashMap<tracing::callsite::Identifier, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was left out since this was asked last.
    pub(super) fn take_omitted(&self) -> Vec<Omitted> {
        let mut places = self.places();
        let omitted = places.values_mut().filter(|place| place.lines > 0).map(|place| Omitted {
            target: place.target.to_owned(),
            lines: mem::take(&mut place.lines),
            like: mem::take(&mut place.like),
        });
        omitted.collect()
    }

    fn admits(&self, event: &Event<'_>, now: Instant) -> bool {
        let metadata = event.metadata();
        let Some(allowance) = allowance(metadata) else { return true };
        let mut places = self.places();
        let place = places.entry(metadata.callsite()).or_insert_with(|| Place {
            bucket: Bucket::full(allowance, now),
            target: metadata.target(),
            lines: 0,
            like: String::new(),
        });
        if place.bucket.take(now) {
            return true;
        }
        if place.lines == 0 {
            event.record(&mut Example(&mut place.like));
        }
        place.lines += 1;
        false
    }
}

/// What is only said because somebody asked for all of it (debug, trace) is not limited.
fn allowance(metadata: &Metadata<'_>) -> Option<Allowance> {
    let is_detail = *metadata.level() > Level::INFO;
    (!is_detail).then(|| if metadata.target() == PACKETS { OF_PACKETS } else { STATE })
}

/// A format that writes nothing where the limit says so. A filter of a layer would be the obvious place, and leaves marks
/// on the next event when it refuses one (tracing-subscriber 0.3).
pub(super) struct Limited<F> {
    pub(super) format: F,
    pub(super) limit: Arc<Limit>,
}

impl<S, N, F> FormatEvent<S, N> for Limited<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        if self.limit.admits(event, Instant::now()) {
            return self.format.format_event(context, writer, event);
        }
        Ok(())
    }
}

/// Writes a line as an example: the message, then the fields.
struct Example<'a>(&'a mut String);

impl tracing::field::Visit for Example<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let room = EXAMPLE_MAX.saturating_sub(self.0.len());
        let text = match field.name() {
            "message" => format!("{value:?} "),
            name => format!("{name}={value:?} "),
        };
        // Writing to a string cannot fail.
        let _ = self.0.write_str(&text[..text.floor_char_boundary(room)]);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_bucket_gives_its_burst_and_then_what_time_brings() {
        let start = Instant::now();
        let allowance = Allowance { burst: 3, every: Duration::from_secs(10) };
        let mut bucket = Bucket::full(allowance, start);
        let mut take = |seconds| bucket.take(start + Duration::from_secs(seconds));
        assert_eq!([0, 0, 0, 0, 9].map(&mut take), [true, true, true, false, false]);
        assert_eq!([10, 10, 25, 29, 30].map(&mut take), [true, false, true, false, true]);
        assert_eq!([100_000; 4].map(take), [true, true, true, false], "never more than the burst");
    }

    #[derive(Clone, Default)]
    struct Heard(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Heard {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn one_places_storm_is_cut_and_told_of_and_others_are_heard() {
        let (limit, heard) = (Arc::new(Limit::default()), Heard::default());
        let writer = heard.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(Level::DEBUG)
            .with_writer(move || writer.clone())
            .map_event_format(|format| Limited { format, limit: Arc::clone(&limit) })
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            for n in 0..1000 {
                tracing::warn!(n, "a peer flaps");
                tracing::debug!(n, "detail");
            }
            tracing::error!("something else");
        });
        let text = String::from_utf8(heard.0.lock().unwrap().clone()).unwrap();
        let count = |what: &str| text.lines().filter(|line| line.contains(what)).count();
        assert_eq!((count("a peer flaps"), count("detail"), count("something else")), (50, 1000, 1));
        assert_eq!(text.lines().count(), 1051, "what is left out leaves no empty line");
        let omitted = limit.take_omitted();
        assert_eq!(omitted.len(), 1);
        assert_eq!((omitted[0].lines, omitted[0].like.as_str()), (950, "a peer flaps n=50 "));
        assert_eq!(limit.take_omitted(), [], "told once");
    }
}
