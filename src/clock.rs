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

/// A time as people read it: in the host's zone, to the second, with the offset. A point can be named by it.
#[must_use]
pub fn local(time: Timestamp) -> String {
    let zone = local_now().time_zone().clone();
    time.to_zoned_datetime(zone)
        .strftime("%Y-%m-%d %H:%M:%S%:z")
        .to_string()
}

/// The host's zone in words.
#[must_use]
pub fn local_zone() -> String {
    let now = local_now();
    let name = now
        .time_zone()
        .iana_name()
        .filter(|name| *name != "Etc/Unknown");
    name.map_or_else(|| now.strftime("UTC%:z").to_string(), str::to_owned)
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
