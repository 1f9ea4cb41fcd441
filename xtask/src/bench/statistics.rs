//! Medians, and how sure they are.

use serde::{Deserialize, Serialize};

/// A median with an interval that holds the true one with a known probability.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Median {
    pub(super) value: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

/// The least probability with which an interval holds the true median, where there are values enough for it.
const CONFIDENCE: f64 = 0.95;

impl Median {
    /// The median of independent values, with the narrowest interval between order statistics of the same rank from
    /// both ends that holds the true median with at least 95 %; below six values that is more than they can tell, and
    /// the interval is all of their range. No distribution is assumed.
    pub(super) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let n = values.len();
        let Some(last) = n.checked_sub(1) else {
            return Self { value: f64::NAN, low: f64::NAN, high: f64::NAN };
        };
        let rank = rank(n);
        let value = f64::midpoint(values[last / 2], values[n / 2]);
        Self { value, low: values[rank], high: values[last - rank] }
    }
}

/// The number of values to leave out at each end: the true median lies outside with the probability that at most so
/// many of `n` fair coins show heads, at either end.
fn rank(n: usize) -> usize {
    let (mut chance, mut outside, mut rank) = (0.5_f64.powi(i32::try_from(n).unwrap_or(i32::MAX)), 0.0, 0);
    for heads in 0..n / 2 {
        outside += 2.0 * chance;
        if 1.0 - outside < CONFIDENCE {
            break;
        }
        rank = heads;
        chance *= (n - heads) as f64 / (heads + 1) as f64;
    }
    rank
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle_and_its_interval_around_it() {
        let median = Median::of(vec![3.0, 1.0, 2.0]);
        assert_eq!(median, Median { value: 2.0, low: 1.0, high: 3.0 });
        assert_eq!(Median::of(vec![4.0, 1.0, 2.0, 3.0]).value, 2.5);
        assert!(Median::of(Vec::new()).value.is_nan());
    }

    #[test]
    fn intervals_are_those_of_the_sign_test() {
        // Tables of the sign test at 95 %: the k-th smallest and largest value for n values.
        for (n, k) in [(5, 1), (6, 1), (8, 1), (9, 2), (12, 3), (20, 6), (25, 8)] {
            assert_eq!(rank(n) + 1, k, "{n} values");
        }
    }
}
