//! How fast a pass may read: a rate in bytes a second and a limit of requests in flight. Both may change at any time; `load`
//! sets them by what the guest and the host leave.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::clock;

/// The longest single wait, so that a caller can look at its deadline and at signals between.
pub(crate) const STEP: Duration = Duration::from_millis(50);
/// A pause may be made up for by a burst of this much time's worth.
const BURST: Duration = Duration::from_millis(100);

/// The pace that a pass keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Bytes a second, `None` for as fast as it goes, 0 for not at all.
    pub rate: Option<u64>,
    /// Requests in flight.
    pub in_flight: usize,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            rate: None,
            in_flight: 16,
        }
    }
}

/// Holds a pace over all that ask it.
#[derive(Debug)]
pub struct Throttle {
    began: Instant,
    held: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    pace: Pace,
    /// Since it began.
    free_at: Duration,
}

impl Throttle {
    /// A throttle of this many bytes a second.
    #[must_use]
    pub fn new(rate: Option<u64>) -> Self {
        Self {
            began: clock::now(),
            held: Mutex::new(Held {
                pace: Pace {
                    rate,
                    ..Pace::default()
                },
                free_at: Duration::ZERO,
            }),
        }
    }

    /// The pace just now.
    #[must_use]
    pub fn pace(&self) -> Pace {
        self.held().pace
    }

    /// Changes the pace, for those who wait, too.
    pub fn set(&self, pace: Pace) {
        self.held().pace = pace;
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `bytes` more may go; `keep_on` is asked now and then whether to wait on. Returns whether they may.
    pub fn wait(&self, bytes: u64, keep_on: &dyn Fn() -> bool) -> bool {
        while keep_on() {
            let left = {
                let mut held = self.held();
                let now = clock::now() - self.began;
                match held.pace.rate {
                    None => return true,
                    Some(0) => STEP,
                    Some(rate) => {
                        let (begin, next) = schedule(held.free_at, now, bytes, rate);
                        if begin <= now {
                            held.free_at = next;
                            return true;
                        }
                        begin.saturating_sub(now)
                    }
                }
            };
            clock::sleep(left.min(STEP));
        }
        false
    }
}

/// When a request of `bytes` may begin, and when the one after it may, on any clock.
pub(crate) fn schedule(
    free_at: Duration,
    now: Duration,
    bytes: u64,
    rate: u64,
) -> (Duration, Duration) {
    let begin = free_at.max(now.saturating_sub(BURST));
    (begin, begin + takes(bytes, rate))
}

/// How long so many bytes take.
pub(crate) fn takes(bytes: u64, rate: u64) -> Duration {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_of_requests_takes_a_second_and_a_pause_earns_a_short_burst_only() {
        let start = Duration::from_secs(5);
        let mut free_at = start;
        for _ in 0..100 {
            free_at = schedule(free_at, start, 1 << 20, 100 << 20).1;
        }
        let taken = free_at.saturating_sub(start);
        assert!((Duration::from_millis(999)..=Duration::from_millis(1001)).contains(&taken));
        let later = start + Duration::from_secs(60);
        let (begin, _) = schedule(free_at, later, 1, 100 << 20);
        assert_eq!(begin + BURST, later);
    }

    #[test]
    fn who_waits_goes_by_the_pace_that_is_set_meanwhile() {
        let throttle = Throttle::new(Some(0));
        let stopped = std::cell::Cell::new(3);
        let few = || stopped.replace(stopped.get() - 1) > 0;
        assert!(!throttle.wait(1, &few), "a rate of 0 is a stop");
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| throttle.wait(1, &|| true));
            throttle.set(Pace::default());
            assert!(waits.join().unwrap());
        });
        assert_eq!(throttle.pace(), Pace::default());
    }
}
