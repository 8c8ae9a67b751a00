//! How fast a guest changes its disks: distinct bytes that differ after a time. A set that is rewritten all the time is
//! full soon, the rest grows steadily:
//!
//! ```text
//! dirty
//!   |                    ____----
//!   |          ____----            slope: steady
//!   |   __----
//!   |  /                           height: hot
//!   | /
//!   +--------------------------- t since a rotation
//! ```

use serde::{Deserialize, Serialize};

/// Looks are kept by how long after the rotation they were, in powers of two of seconds from 1/4 s on.
const SLOTS: usize = 24;
/// The weight of the newest of several looks.
const NEWEST: f64 = 0.3;

/// What looks at the live bitmaps found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// By the time since the rotation: mean seconds and bytes.
    slots: Vec<Option<(f64, f64)>>,
}

/// The curve that fits the looks.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Fit {
    /// Bytes that are rewritten all the time.
    pub hot: f64,
    /// Seconds until they are all rewritten.
    pub within: f64,
    /// Bytes a second that come on top.
    pub steady: f64,
}

impl Change {
    /// Takes in that so many bytes differ so many seconds after a rotation.
    pub fn looked(&mut self, seconds: f64, bytes: f64) {
        if seconds < 0.25 || !seconds.is_finite() {
            return;
        }
        self.slots.resize(SLOTS, None);
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "at least 0, and small"
        )]
        let slot = ((seconds * 4.0).log2() as usize).min(SLOTS - 1);
        let mix = |old: f64, new: f64| old + (new - old) * NEWEST;
        self.slots[slot] = Some(match self.slots[slot] {
            None => (seconds, bytes),
            Some((at, size)) => (mix(at, seconds), mix(size, bytes)),
        });
    }

    /// The curve, when there was a look.
    #[must_use]
    pub fn fit(&self) -> Option<Fit> {
        let looks: Vec<(f64, f64)> = self.slots.iter().flatten().copied().collect();
        let (first, last) = (looks.first()?, looks.last()?);
        let ratio = |pairs: &[(f64, f64)]| {
            let by_time: f64 = pairs.iter().map(|(t, size)| t * size).sum();
            by_time / pairs.iter().map(|(t, _)| t * t).sum::<f64>()
        };
        if last.0 < first.0 * 2.0 {
            return Some(Fit {
                hot: 0.0,
                within: 0.0,
                steady: ratio(&looks),
            });
        }
        // Each weighs the less the longer it is, else the long ones alone would say what is hot.
        let weight = |t: f64| 1.0 / t;
        let sum = |of: &dyn Fn(f64, f64) -> f64| {
            looks
                .iter()
                .map(|(t, y)| weight(*t) * of(*t, *y))
                .sum::<f64>()
        };
        let total = sum(&|_, _| 1.0);
        let (mean_t, mean_y) = (sum(&|t, _| t) / total, sum(&|_, y| y) / total);
        let slope = sum(&|t, y| (t - mean_t) * (y - mean_y)) / sum(&|t, _| (t - mean_t).powi(2));
        let steady = slope.max(0.0);
        let hot = mean_y - steady * mean_t;
        Some(if hot <= 0.0 {
            Fit {
                hot: 0.0,
                within: 0.0,
                steady: ratio(&looks),
            }
        } else {
            Fit {
                hot,
                within: first.0,
                steady,
            }
        })
    }
}

impl Fit {
    /// Bytes that differ so many seconds after a rotation.
    #[must_use]
    pub fn dirty(self, seconds: f64) -> f64 {
        let seconds = seconds.max(0.0);
        let filled = if self.within > 0.0 {
            (seconds / self.within).min(1.0)
        } else {
            1.0
        };
        self.hot * filled + self.steady * seconds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: f64 = 1_048_576.0;

    fn close(found: f64, expected: f64) -> bool {
        (found - expected).abs() <= expected * 0.1 + MIB
    }

    #[test]
    fn a_hot_set_and_a_steady_rate_are_told_apart() {
        let mut change = Change::default();
        assert_eq!(change.fit(), None);
        for seconds in [1.0, 2.0, 4.0, 8.0, 30.0, 60.0, 3.0, 1.5] {
            change.looked(seconds, 64.0 * MIB + 2.0 * MIB * seconds);
        }
        let fit = change.fit().unwrap();
        assert!(close(fit.hot, 64.0 * MIB), "{fit:?}");
        assert!(close(fit.steady, 2.0 * MIB), "{fit:?}");
        assert!(
            close(fit.dirty(600.0), 64.0 * MIB + 1200.0 * MIB),
            "{fit:?}"
        );
        assert!(fit.dirty(0.5) < 64.0 * MIB);
    }

    #[test]
    fn nothing_hot_is_a_rate_and_nothing_steady_is_a_set() {
        let mut rate = Change::default();
        let mut set = Change::default();
        for seconds in [1.0, 5.0, 20.0, 100.0] {
            rate.looked(seconds, 3.0 * MIB * seconds);
            set.looked(seconds, 10.0 * MIB);
        }
        let (rate, set) = (rate.fit().unwrap(), set.fit().unwrap());
        assert!(
            close(rate.hot, 0.0) && close(rate.steady, 3.0 * MIB),
            "{rate:?}"
        );
        assert!(
            close(set.hot, 10.0 * MIB) && set.steady < 0.01 * MIB,
            "{set:?}"
        );
    }

    #[test]
    fn what_the_guest_does_now_counts_more_than_what_it_did() {
        let mut change = Change::default();
        change.looked(10.0, 1000.0 * MIB);
        for _ in 0..20 {
            change.looked(10.0, 10.0 * MIB);
        }
        assert!(close(change.fit().unwrap().dirty(10.0), 10.0 * MIB));
    }
}
