//! How long the guest's requests and CPUs take when we do nothing: what was measured in pauses.

use std::time::Duration;

use super::average::Average;
use super::number::real;

/// Reads, writes and flushes.
pub const KINDS: usize = 3;
/// Within so long, what was measured counts for an answer now.
pub const SHORT: Duration = Duration::from_secs(2);
/// Pauses that are remembered.
const PAUSES: usize = 5;
/// A pause older than this is not.
const OLD: Duration = Duration::from_secs(600);
/// With so many requests a pause speaks for itself.
const PLENTY: u64 = 20;
/// A request's delay of this is nobody's pain, nanoseconds: it keeps the shares of very short ones from being noise.
const GRAIN: f64 = 50_000.0;

/// Requests of each kind, and the time that they took together, in an interval.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Requests {
    /// How many.
    pub count: [u64; KINDS],
    /// Nanoseconds.
    pub nanos: [u64; KINDS],
}

impl Requests {
    /// All kinds together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.count.iter().sum()
    }

    /// Mean requests in flight over an interval.
    #[must_use]
    pub fn in_flight(&self, span: Duration) -> f64 {
        real(self.nanos.iter().sum()) / 1e9 / span.as_secs_f64().max(1e-9)
    }

    /// The mean time of a request, nanoseconds.
    #[must_use]
    pub fn mean(&self) -> Option<f64> {
        let total = self.total();
        (total > 0).then(|| real(self.nanos.iter().sum()) / real(total))
    }

    /// What came between an earlier look and this one; `None` when the counts went back.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Option<Self> {
        let mut between = Self::default();
        for kind in 0..KINDS {
            between.count[kind] = self.count[kind].checked_sub(earlier.count[kind])?;
            between.nanos[kind] = self.nanos[kind].checked_sub(earlier.nanos[kind])?;
        }
        Some(between)
    }
}

/// A value in pauses: the last few, and what they are worth together.
#[derive(Debug, Clone, Default)]
struct Pauses {
    /// When, the value, and whether the pause speaks for itself. Oldest first.
    seen: Vec<(Duration, f64, bool)>,
}

impl Pauses {
    fn add(&mut self, now: Duration, value: f64, sure: bool) {
        if self.seen.len() == PAUSES {
            self.seen.remove(0);
        }
        self.seen.push((now, value, sure));
        self.seen.retain(|(at, ..)| now.saturating_sub(*at) < OLD);
    }

    fn sorted(&self) -> Vec<f64> {
        let mut values: Vec<f64> = self.seen.iter().map(|(_, value, _)| *value).collect();
        values.sort_by(f64::total_cmp);
        values
    }

    /// The median; or the newest, when that is lower: a guest whose load has gone must not be measured by its old one.
    fn value(&self) -> Option<f64> {
        let values = self.sorted();
        let median = *values.get(values.len().checked_sub(1)? / 2)?;
        match self.seen.last() {
            Some((_, newest, true)) => Some(median.min(*newest)),
            _ => Some(median),
        }
    }

    /// How much the values differ by themselves, as a share of their median.
    fn spread(&self) -> f64 {
        let values = self.sorted();
        let Some(median) = values.get(values.len() / 2).filter(|_| values.len() > 2) else {
            return 0.0;
        };
        let mut off: Vec<f64> = values.iter().map(|value| (value - median).abs()).collect();
        off.sort_by(f64::total_cmp);
        (off[off.len() / 2] / median.max(1e-9)).min(1.0)
    }
}

/// How much longer requests take while we copy than while we do not.
#[derive(Debug, Clone)]
pub struct Latency {
    count: [Average; KINDS],
    nanos: [Average; KINDS],
    pauses: [Pauses; KINDS],
    /// Means over the whole life of the VM, until a pause was measured.
    before: [Option<f64>; KINDS],
    measured: bool,
    /// The requests of the last pause.
    mix: [u64; KINDS],
}

/// What [`Latency`] says of now.
#[derive(Debug, Clone, Copy)]
pub struct Increase {
    /// By which share requests take longer than without us. May be negative.
    pub share: f64,
    /// How much that share differs by itself from pause to pause.
    pub spread: f64,
    /// The mean time of a request now, nanoseconds.
    pub now: f64,
    /// What the same requests would take without us, nanoseconds.
    pub baseline: f64,
}

impl Latency {
    /// With means of the past for a beginning.
    #[must_use]
    pub fn new(past: Option<&Requests>) -> Self {
        let mut before = [None; KINDS];
        if let Some(past) = past {
            for (kind, mean) in before.iter_mut().enumerate() {
                *mean =
                    (past.count[kind] > 0).then(|| real(past.nanos[kind]) / real(past.count[kind]));
            }
        }
        Self {
            count: [Average::new(SHORT); KINDS],
            nanos: [Average::new(SHORT); KINDS],
            pauses: Default::default(),
            before,
            measured: false,
            mix: past.map_or([0; KINDS], |past| past.count),
        }
    }

    /// What was seen while we copied.
    pub fn copying(&mut self, seen: &Requests, span: Duration) {
        let seconds = span.as_secs_f64();
        for kind in 0..KINDS {
            self.count[kind].observe(real(seen.count[kind]) / seconds, span);
            self.nanos[kind].observe(real(seen.nanos[kind]) / seconds, span);
        }
    }

    /// What was seen in a pause. Says whether that moved what is expected by much.
    pub fn pause(&mut self, now: Duration, seen: &Requests) -> bool {
        let mut moved = false;
        if seen.total() > 0 {
            self.mix = seen.count;
        }
        for kind in 0..KINDS {
            if seen.count[kind] == 0 {
                continue;
            }
            let before = self.expected(kind);
            let mean = real(seen.nanos[kind]) / real(seen.count[kind]);
            self.pauses[kind].add(now, mean, seen.count[kind] >= PLENTY);
            self.measured |= seen.count[kind] >= 2;
            let after = self.expected(kind).unwrap_or(mean);
            moved |= before.is_none_or(|before| {
                let (low, high) = (before.min(after) + GRAIN, before.max(after) + GRAIN);
                high > low * 1.33
            });
        }
        moved
    }

    /// The mean time of a request of the last pause's mix when we do nothing, nanoseconds.
    #[must_use]
    pub fn baseline(&self) -> Option<f64> {
        let known =
            (0..KINDS).filter_map(|kind| Some((real(self.mix[kind]), self.expected(kind)?)));
        let (count, nanos) = known.fold((0.0, 0.0), |(count, nanos), (n, each)| {
            (count + n, nanos + n * each)
        });
        (count > 0.0).then(|| nanos / count)
    }

    /// Whether any pause was measured.
    #[must_use]
    pub fn measured(&self) -> bool {
        self.measured
    }

    fn expected(&self, kind: usize) -> Option<f64> {
        self.pauses[kind].value().or(self.before[kind])
    }

    /// The mean requests in flight while we copied, lately.
    #[must_use]
    pub fn in_flight(&self) -> f64 {
        self.nanos.iter().filter_map(Average::mean).sum::<f64>() / 1e9
    }

    /// Requests a second while we copied, lately.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.count.iter().filter_map(Average::mean).sum()
    }

    /// How much longer requests take now; `None` while too little is known.
    #[must_use]
    pub fn increase(&self) -> Option<Increase> {
        let (mut count, mut took, mut expected, mut spread) = (0.0, 0.0, 0.0, 0.0_f64);
        for kind in 0..KINDS {
            let (Some(n), Some(nanos)) = (self.count[kind].mean(), self.nanos[kind].mean()) else {
                continue;
            };
            let Some(each) = self.expected(kind) else {
                continue;
            };
            count += n;
            took += nanos;
            expected += n * each;
            spread += n * each * self.pauses[kind].spread();
        }
        let seen = count * self.count[0].evidence();
        (seen >= 4.0).then(|| Increase {
            share: (took + count * GRAIN) / (expected + count * GRAIN) - 1.0,
            spread: spread / expected.max(1.0),
            now: took / count,
            baseline: expected / count,
        })
    }

    /// Forgets what was seen at another pace.
    pub fn fresh(&mut self) {
        for average in self.count.iter_mut().chain(&mut self.nanos) {
            average.clear();
        }
    }
}

/// Time of the guest's virtual CPUs in an interval, nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cpus {
    /// They ran.
    pub ran: u64,
    /// They could have, and waited for a CPU of the host.
    pub waited: u64,
}

/// How much longer the guest's CPUs take for their work while we copy than while we do not.
#[derive(Debug, Clone)]
pub struct Slowness {
    ran: Average,
    waited: Average,
    pauses: Pauses,
    before: Option<f64>,
}

/// So little CPU time, as a share of one CPU, tells nothing.
const IDLE_CPU: f64 = 0.02;

fn slowness(ran: f64, waited: f64) -> Option<f64> {
    (ran > 0.0).then(|| (ran + waited) / ran)
}

impl Slowness {
    /// With the past for a beginning.
    #[must_use]
    pub fn new(past: Option<&Cpus>) -> Self {
        Self {
            ran: Average::new(SHORT),
            waited: Average::new(SHORT),
            pauses: Pauses::default(),
            before: past.and_then(|past| slowness(real(past.ran), real(past.waited))),
        }
    }

    /// What was seen while we copied.
    pub fn copying(&mut self, seen: &Cpus, span: Duration) {
        let seconds = span.as_secs_f64() * 1e9;
        self.ran.observe(real(seen.ran) / seconds, span);
        self.waited.observe(real(seen.waited) / seconds, span);
    }

    /// What was seen in a pause.
    pub fn pause(&mut self, now: Duration, seen: &Cpus, span: Duration) {
        let busy = real(seen.ran + seen.waited) / 1e9 / span.as_secs_f64().max(1e-9);
        if let Some(value) = slowness(real(seen.ran), real(seen.waited))
            && busy >= IDLE_CPU
        {
            self.pauses.add(now, value, busy >= 0.2);
        }
    }

    /// By which share the guest's work takes longer, and how much that differs by itself.
    #[must_use]
    pub fn increase(&self) -> Option<(f64, f64)> {
        let (ran, waited) = (self.ran.mean()?, self.waited.mean()?);
        if ran + waited < IDLE_CPU || self.ran.evidence() < 0.5 {
            return None;
        }
        let expected = self.pauses.value().or(self.before)?;
        Some((
            slowness(ran, waited)? / expected - 1.0,
            self.pauses.spread(),
        ))
    }

    /// Forgets what was seen at another pace.
    pub fn fresh(&mut self) {
        self.ran.clear();
        self.waited.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writes(count: u64, micros: u64) -> Requests {
        Requests {
            count: [0, count, 0],
            nanos: [0, count * micros * 1000, 0],
        }
    }

    #[test]
    fn the_increase_is_that_of_the_same_requests() {
        let mut latency = Latency::new(None);
        let pause = Requests {
            count: [100, 100, 0],
            nanos: [100 * 10_000_000, 100 * 1_000_000, 0],
        };
        latency.pause(Duration::from_secs(1), &pause);
        // Ten times as many of the slow kind are no increase.
        let copying = Requests {
            count: [1000, 100, 0],
            nanos: [1000 * 10_000_000, 100 * 1_000_000, 0],
        };
        latency.copying(&copying, Duration::from_secs(1));
        assert!(latency.increase().unwrap().share.abs() < 0.001);
    }

    #[test]
    fn one_odd_pause_does_not_move_the_baseline_up_and_a_lower_one_does_at_once() {
        let mut latency = Latency::new(None);
        for (second, micros) in [(1, 1000), (2, 1000), (3, 9000)] {
            latency.pause(Duration::from_secs(second), &writes(50, micros));
        }
        assert!((latency.expected(1).unwrap() - 1e6).abs() < 1.0);
        latency.pause(Duration::from_secs(4), &writes(50, 200));
        assert!((latency.expected(1).unwrap() - 2e5).abs() < 1.0);
    }

    #[test]
    fn the_life_of_the_vm_stands_in_until_a_pause_was_measured() {
        let mut latency = Latency::new(Some(&writes(1000, 500)));
        latency.copying(&writes(100, 1000), Duration::from_secs(1));
        let increase = latency.increase().unwrap();
        assert!((0.8..1.0).contains(&increase.share), "{increase:?}");
        assert!(!latency.measured());
    }

    #[test]
    fn what_was_not_seen_is_not_known() {
        let mut latency = Latency::new(None);
        assert!(latency.increase().is_none());
        latency.copying(&writes(100, 1000), Duration::from_secs(1));
        assert!(latency.increase().is_none(), "without a baseline");
        assert!(Slowness::new(None).increase().is_none());
    }
}
