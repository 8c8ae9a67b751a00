//! How fast a pass may read: a rate in bytes a second and a limit of requests in flight. What sets them is the seam for
//! a controller that watches the load; here they are fixed.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::clock;

/// The longest single wait, so that a caller can look at its deadline and at signals between.
const STEP: Duration = Duration::from_millis(50);
/// A pause may be made up for by a burst of this much time's worth.
const BURST: Duration = Duration::from_millis(100);

/// The pace that a pass keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Bytes a second, `None` for as fast as it goes.
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

/// Holds a rate over all that ask it.
#[derive(Debug)]
pub struct Throttle {
    rate: Option<u64>,
    free_at: Mutex<Instant>,
}

impl Throttle {
    /// A throttle of this many bytes a second.
    #[must_use]
    pub fn new(rate: Option<u64>) -> Self {
        Self {
            rate,
            free_at: Mutex::new(clock::now()),
        }
    }

    /// Waits until `bytes` more may go; `keep_on` is asked now and then whether to wait on. Returns whether they may.
    pub fn wait(&self, bytes: u64, keep_on: &dyn Fn() -> bool) -> bool {
        let Some(rate) = self.rate else {
            return keep_on();
        };
        let mine = {
            let mut free_at = self
                .free_at
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            let (begin, next) = schedule(*free_at, clock::now(), bytes, rate);
            *free_at = next;
            begin
        };
        loop {
            if !keep_on() {
                return false;
            }
            let left = mine.saturating_duration_since(clock::now());
            if left.is_zero() {
                return true;
            }
            clock::sleep(left.min(STEP));
        }
    }
}

/// When a request of `bytes` may begin, and when the one after it may.
fn schedule(free_at: Instant, now: Instant, bytes: u64, rate: u64) -> (Instant, Instant) {
    let earliest = now.checked_sub(BURST).unwrap_or(now);
    let begin = free_at.max(earliest);
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
    let takes = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
    (begin, begin + takes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_of_requests_takes_a_second_and_a_pause_earns_a_short_burst_only() {
        let start = clock::now();
        let mut free_at = start;
        for _ in 0..100 {
            free_at = schedule(free_at, start, 1 << 20, 100 << 20).1;
        }
        let taken = free_at - start;
        assert!((Duration::from_millis(999)..=Duration::from_millis(1001)).contains(&taken));
        let later = start + Duration::from_secs(60);
        let (begin, _) = schedule(free_at, later, 1, 100 << 20);
        assert_eq!(begin + BURST, later);
    }
}
