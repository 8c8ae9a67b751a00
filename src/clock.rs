//! The only reader of time: monotonic instants for deadlines and rates, wall-clock time for manifests, and the only
//! place that sleeps.
#![expect(
    clippy::disallowed_methods,
    reason = "this is the place the rule points to"
)]

use std::time::{Duration, Instant};

use jiff::{Timestamp, ZonedDateTime};

/// The monotonic clock.
#[must_use]
pub fn now() -> Instant {
    Instant::now()
}

/// Since the host was started, suspended or not: the one clock that all processes of the host share and nobody sets.
#[must_use]
pub fn since_boot() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::try_from(time).unwrap_or(Duration::ZERO)
}

/// The wall clock, UTC.
#[must_use]
pub fn utc_now() -> Timestamp {
    Timestamp::now()
}

/// The wall clock in the host's zone.
#[must_use]
pub fn local_now() -> ZonedDateTime {
    ZonedDateTime::now()
}

/// Sleeps; callers that must stay interruptible wait on a channel or descriptor with a timeout instead.
pub fn sleep(duration: Duration) {
    std::thread::sleep(duration);
}

/// A point in monotonic time by which something must have happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// A deadline this far from now.
    #[must_use]
    pub fn after(duration: Duration) -> Self {
        Self(now() + duration)
    }

    /// Whether it has passed.
    #[must_use]
    pub fn passed(self) -> bool {
        self.left().is_zero()
    }

    /// What is left of it, zero when it has passed.
    #[must_use]
    pub fn left(self) -> Duration {
        self.0.saturating_duration_since(now())
    }

    /// A deadline so much before this one.
    #[must_use]
    pub fn earlier(self, by: Duration) -> Self {
        Self(self.0.checked_sub(by).unwrap_or(self.0))
    }

    /// The earlier of this deadline and one that far from now.
    #[must_use]
    pub fn at_most(self, duration: Duration) -> Self {
        self.min(Self::after(duration))
    }
}
