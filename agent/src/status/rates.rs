//! What happened between two documents: packets and bits a second. Pure.

use super::document::{Amount, Traffic, Ways};

/// What flows each second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rate {
    /// Packets a second.
    pub packets: f64,
    /// Bits a second.
    pub bits: f64,
}

/// The rates of a peer or an endpoint, and which part of the packets between the two documents was fast.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// To the peer, or by the endpoint.
    pub sent: Rate,
    /// From the peer, or to the endpoint.
    pub received: Rate,
    /// 0 to 1; none where nothing was sent or received.
    pub fast_share: Option<f64>,
}

impl Rates {
    /// Between an earlier and a later document, this many seconds apart. A counter that began anew in between counts
    /// from its beginning.
    #[must_use]
    pub fn between(earlier: &Traffic, later: &Traffic, seconds: f64) -> Self {
        let grown = Traffic {
            sent: ways(&earlier.sent, &later.sent),
            received: ways(&earlier.received, &later.received),
        };
        Self {
            sent: rate(&grown.sent, seconds),
            received: rate(&grown.received, seconds),
            fast_share: grown.fast_share(),
        }
    }
}

fn ways(earlier: &Ways, later: &Ways) -> Ways {
    Ways { fast: amount(earlier.fast, later.fast), slow: amount(earlier.slow, later.slow) }
}

fn amount(earlier: Amount, later: Amount) -> Amount {
    let grown = |earlier: u64, later: u64| later.checked_sub(earlier).unwrap_or(later);
    Amount { packets: grown(earlier.packets, later.packets), bytes: grown(earlier.bytes, later.bytes) }
}

fn rate(ways: &Ways, seconds: f64) -> Rate {
    if seconds <= 0.0 {
        return Rate::default();
    }
    Rate { packets: ways.packets() as f64 / seconds, bits: ways.bytes() as f64 * 8.0 / seconds }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traffic(fast: u64, slow: u64) -> Traffic {
        let amount = |packets| Amount { packets, bytes: packets * 100 };
        Traffic { sent: Ways { fast: amount(fast), slow: amount(slow) }, ..Traffic::default() }
    }

    #[test]
    fn rates_are_what_grew_by_second() {
        let rates = Rates::between(&traffic(10, 10), &traffic(40, 20), 2.0);
        assert_eq!(rates.sent, Rate { packets: 20.0, bits: 16_000.0 });
        assert_eq!(rates.received, Rate::default());
        assert_eq!(rates.fast_share, Some(0.75));
    }

    #[test]
    fn nothing_has_no_share_and_a_new_counter_counts_from_its_beginning() {
        assert_eq!(Rates::between(&traffic(5, 5), &traffic(5, 5), 1.0), Rates::default());
        assert_eq!(Rates::between(&traffic(5, 0), &traffic(3, 0), 1.0).sent.packets, 3.0);
        assert_eq!(Rates::between(&traffic(0, 0), &traffic(3, 0), 0.0).sent, Rate::default());
    }
}
