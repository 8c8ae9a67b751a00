//! The residual and the window that are to be expected at a time, and the limits that are set for them.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::change::Fit;

/// Until a freeze or a pass was measured: bytes a second, and seconds.
const COPY: f64 = 100_000_000.0;
const SPOOL: f64 = 200_000_000.0;
const OVERHEAD: f64 = 1.0;
/// What the last pass before the due time takes at least, in seconds.
pub(super) const LAST_PASS: f64 = 3.0;
/// The weight of the newest measure.
const NEWEST: f64 = 0.4;
/// Less than so many bytes in less than such a time say nothing of a speed.
const TELLING: u64 = 8 << 20;
const TELLS_LATER: Duration = Duration::from_secs(10);

/// What was measured of a target on this host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Speeds {
    copy: Option<f64>,
    spool: Option<f64>,
    overhead: Option<f64>,
}

fn mix(known: &mut Option<f64>, measured: f64) {
    if measured.is_finite() {
        *known = Some(known.map_or(measured, |old| old + (measured - old) * NEWEST));
    }
}

#[allow(clippy::cast_precision_loss, reason = "sizes for predictions")]
fn float(bytes: u64) -> f64 {
    bytes as f64
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "not negative; what is too large is cut"
)]
fn whole(number: f64) -> u64 {
    number.max(0.0) as u64
}

impl Speeds {
    /// A pass copied so much in this time, in which it gave way to others, too. Such speeds differ by factors. Says whether
    /// that was enough to tell.
    pub fn copied(&mut self, bytes: u64, took: Duration) -> bool {
        let tells = (bytes >= TELLING && !took.is_zero()) || took >= TELLS_LATER;
        if tells {
            let measured = (float(bytes) / took.as_secs_f64()).max(1.0);
            let known = self.copy.unwrap_or(measured).max(1.0);
            self.copy = Some(known * (measured / known).powf(NEWEST));
        }
        tells
    }

    /// A freeze took this time from its begin until the guest was free, and read so much; `reading` is that part of it.
    pub fn froze(&mut self, bytes: u64, reading: Duration, took: Duration) {
        if bytes >= TELLING && !reading.is_zero() {
            mix(&mut self.spool, float(bytes) / reading.as_secs_f64());
        }
        let rest = took.as_secs_f64() - float(bytes) / self.spool();
        mix(&mut self.overhead, rest.max(0.0));
    }

    /// Bytes a second that passes copy.
    #[must_use]
    pub fn copy(&self, rate: Option<u64>) -> f64 {
        let measured = self.copy.unwrap_or(COPY);
        rate.map_or(measured, |rate| measured.min(float(rate)))
            .max(1.0)
    }

    fn spool(&self) -> f64 {
        self.spool.unwrap_or(SPOOL).max(1.0)
    }

    /// What a freeze reads in such a time.
    #[must_use]
    pub fn spooled_in(&self, time: Duration) -> u64 {
        whole(time.as_secs_f64() * self.spool())
    }

    /// How long a freeze of this residual keeps the guest waiting for its end, in milliseconds.
    #[must_use]
    pub fn window_ms(&self, residual: u64) -> u64 {
        let seconds = self.overhead.unwrap_or(OVERHEAD) + float(residual) / self.spool();
        whole(seconds * 1000.0)
    }

    /// The largest residual that such a window has room for.
    #[must_use]
    pub fn residual_within(&self, window: Duration) -> u64 {
        let overhead = Duration::from_secs_f64(self.overhead.unwrap_or(OVERHEAD));
        self.spooled_in(window.saturating_sub(overhead))
    }
}

/// What is not copied yet. Bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Debt {
    /// In older bitmaps, and not proved.
    pub open: u64,
    /// Of these, left for later since it keeps changing.
    pub postponed: u64,
    /// Changed since the last rotation.
    pub live: u64,
    /// Of disks that are read in full.
    pub whole: u64,
    /// The sizes of all disks.
    pub size: u64,
}

impl Debt {
    /// What a freeze would find now; an upper bound, since a block may be in several parts.
    #[must_use]
    pub fn total(&self) -> u64 {
        (self.open + self.live + self.whole).min(self.size)
    }

    /// As [`total`](Self::total), where what was left for later has changed again.
    #[must_use]
    pub fn expected(&self) -> u64 {
        self.total() - self.postponed.min(self.live).min(self.total())
    }

    /// What a pass would copy for good: not what is rewritten all the time.
    #[must_use]
    pub fn useful(&self, fit: Option<Fit>) -> u64 {
        let hot = whole(fit.map_or(0.0, |fit| fit.hot)).max(self.postponed);
        let open = self.open.saturating_sub(self.postponed);
        open + self.whole + self.live.saturating_sub(hot)
    }
}

/// What is to be expected at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Outlook {
    /// What the freeze will find, bytes.
    pub residual: u64,
    /// From the due time until the guest is free, milliseconds.
    pub window_ms: u64,
    /// All that is worth copying before will be copied by then.
    pub in_time: bool,
}

impl Outlook {
    /// With passes going on for `left`.
    #[must_use]
    pub fn with_passes(
        debt: &Debt,
        fit: Option<Fit>,
        speeds: &Speeds,
        rate: Option<u64>,
        left: Duration,
    ) -> Self {
        let fit = fit.unwrap_or_default();
        let left = left.as_secs_f64();
        let copy = speeds.copy(rate);
        let backlog = float(debt.useful(Some(fit)));
        let gains = copy - fit.steady;
        let behind = backlog - gains * left;
        // The last pass reads what is there when it begins; what is written until the freeze is left.
        let tail = LAST_PASS.min(left);
        let rest = fit.dirty(tail).max(float(debt.postponed.min(debt.total())));
        let missing = if backlog > 0.0 { behind.max(0.0) } else { 0.0 };
        let residual = whole(rest + missing).min(debt.size);
        Self {
            residual,
            window_ms: speeds.window_ms(residual),
            in_time: backlog <= 0.0 || behind <= 0.0,
        }
    }

    /// Where nothing is copied before, and `backup` then copies live what is much.
    #[must_use]
    pub fn alone(
        debt: &Debt,
        fit: Option<Fit>,
        speeds: &Speeds,
        rate: Option<u64>,
        left: Duration,
    ) -> Self {
        let fit = fit.unwrap_or_default();
        let grown = fit.steady * left.as_secs_f64();
        let residual = whole(float(debt.total()) + grown).min(debt.size);
        let copying = float(residual) / speeds.copy(rate);
        let would = Self::with_passes(debt, Some(fit), speeds, rate, left);
        Self {
            residual,
            window_ms: speeds.window_ms(0) + whole(copying * 1000.0),
            in_time: would.in_time,
        }
    }
}

/// What to do when the limits cannot be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnMiss {
    /// Make the point all the same.
    #[default]
    Backup,
    /// Make none.
    Skip,
}

/// Limits of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Of the time from due until the guest is free.
    pub window: Option<Duration>,
    /// Of what the freeze finds, bytes.
    pub residual: Option<u64>,
    /// When they are not held.
    pub on_miss: OnMiss,
}

impl Limits {
    /// Which of them this misses, in words; `None` when both hold.
    #[must_use]
    pub fn missed(&self, residual: u64, window_ms: u64) -> Option<String> {
        let mut missed = Vec::new();
        if let Some(limit) = self.window
            && u128::from(window_ms) > limit.as_millis()
        {
            missed.push(format!(
                "a window of {:.1} s where {:.1} s are allowed",
                Duration::from_millis(window_ms).as_secs_f64(),
                limit.as_secs_f64()
            ));
        }
        if let Some(limit) = self.residual
            && residual > limit
        {
            missed.push(format!(
                "a residual of {} where {} are allowed",
                crate::units::Bytes(residual),
                crate::units::Bytes(limit)
            ));
        }
        (!missed.is_empty()).then(|| missed.join(", "))
    }

    /// The largest residual that holds both; `None` without limits.
    #[must_use]
    pub fn largest(&self, speeds: &Speeds) -> Option<u64> {
        let by_window = self.window.map(|window| speeds.residual_within(window));
        by_window.into_iter().chain(self.residual).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn debt(open: u64, live: u64) -> Debt {
        Debt {
            open: open * MIB,
            live: live * MIB,
            size: 100_000 * MIB,
            ..Debt::default()
        }
    }

    fn fit(hot: u64, steady: u64) -> Fit {
        Fit {
            hot: float(hot * MIB),
            within: 1.0,
            steady: float(steady * MIB),
        }
    }

    fn speeds() -> Speeds {
        let mut speeds = Speeds::default();
        speeds.copied(1000 * MIB, Duration::from_secs(10));
        speeds.froze(
            200 * MIB,
            Duration::from_secs(1),
            Duration::from_millis(1500),
        );
        speeds
    }

    #[test]
    fn with_time_only_the_hot_set_and_the_last_seconds_are_left() {
        let seen = |left| {
            Outlook::with_passes(
                &debt(10_000, 100),
                Some(fit(64, 1)),
                &speeds(),
                None,
                Duration::from_secs(left),
            )
        };
        let far = seen(600);
        assert_eq!(far.residual / MIB, 67);
        assert!(far.in_time);
        // 200 MiB a second, and half a second besides.
        assert_eq!(far.window_ms / 10, 83);
        let near = seen(50);
        assert!(!near.in_time);
        assert!(near.residual > 5_000 * MIB, "{near:?}");
        assert!(seen(20).residual > near.residual);
    }

    #[test]
    fn a_guest_that_is_faster_than_the_copy_gets_ahead() {
        let faster = Outlook::with_passes(
            &debt(10, 10),
            Some(fit(0, 150)),
            &speeds(),
            None,
            Duration::from_secs(100),
        );
        assert!(faster.residual > 4_900 * MIB, "{faster:?}");
        assert!(!faster.in_time);
        // So does one where the copy is told to be slow.
        let held = Outlook::with_passes(
            &debt(1000, 10),
            Some(fit(0, 1)),
            &speeds(),
            Some(2 * MIB),
            Duration::from_secs(100),
        );
        assert!(!held.in_time);
    }

    #[test]
    fn a_copy_that_gives_way_is_soon_known_to_be_slow_and_to_be_fast_again() {
        let mut speeds = Speeds::default();
        speeds.copied(4000 * MIB, Duration::from_secs(10));
        assert!(!speeds.copied(4 * MIB, Duration::from_secs(1)));
        assert_eq!(whole(speeds.copy(None)), 400 * MIB);
        for _ in 0..6 {
            speeds.copied(40 * MIB, Duration::from_secs(10));
        }
        let slow = speeds.copy(None);
        assert!(slow < float(6 * MIB), "{slow}");
        let due = Duration::from_secs(60);
        let late = Outlook::with_passes(&debt(1000, 0), Some(fit(0, 0)), &speeds, None, due);
        assert!(!late.in_time);
        assert!(late.residual > 600 * MIB, "{late:?}");
        for _ in 0..6 {
            speeds.copied(4000 * MIB, Duration::from_secs(10));
        }
        assert!(speeds.copy(None) > float(300 * MIB));
        // Where nothing was copied at all it is as slow as can be, not a division by zero.
        speeds.copied(0, Duration::from_secs(100));
        assert!(speeds.copy(None) >= 1.0);
    }

    #[test]
    fn a_window_and_a_residual_are_limits_of_the_same_thing() {
        let speeds = speeds();
        let limits = Limits {
            window: Some(Duration::from_secs(1)),
            residual: Some(500 * MIB),
            on_miss: OnMiss::Backup,
        };
        // Half a second of reading at 200 MiB a second.
        assert_eq!(
            limits.largest(&speeds).map(|largest| largest / MIB),
            Some(100)
        );
        assert_eq!(limits.missed(500 * MIB, 1000), None);
        assert!(
            limits
                .missed(501 * MIB, 1000)
                .is_some_and(|why| why.contains("residual"))
        );
        assert!(
            limits
                .missed(0, 1001)
                .is_some_and(|why| why.contains("window"))
        );
        assert_eq!(Limits::default().missed(u64::MAX, u64::MAX), None);
        assert_eq!(Limits::default().largest(&speeds), None);
    }

    #[test]
    fn where_nobody_copies_the_window_is_the_copy() {
        let speeds = speeds();
        let left = Duration::from_secs(100);
        let alone = Outlook::alone(&debt(1000, 0), Some(fit(0, 1)), &speeds, None, left);
        assert_eq!(alone.residual / MIB, 1100);
        assert!(alone.window_ms > 11_000, "{alone:?}");
    }
}
