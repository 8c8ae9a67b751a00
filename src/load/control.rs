//! The controller: a pure function of its state, what was just seen, what the operator allows, and the time. It reads no
//! clock and no file, so that `tests/load_sim` can run it through days in a moment.
//!
//! ```text
//!                     nothing in sight                        a limit is passed
//!   start 64 MiB/s ---- doubles each 0.1 s ---> full speed ---- rate x (0.3 to 0.8) ---> slower
//!                                                   ^                                     |  4 times a limit, or
//!                     x 1.5 a second; x 1.05 near   |                                     v  no slower pace helps
//!                     the pace that was too much    +------- trickle <--- wait, look --- stop
//! ```
//!
//! A **score** is what was seen divided by what is allowed. Above 1 the pace falls, below 0.8 it rises, between the two it
//! stays. Whatever is ours is told from whatever is not by **pauses**: the guest's latency is compared with that of pauses, and
//! what others do to the host is what is seen in them. What was seen at one pace is forgotten when the pace falls: it tells
//! nothing of the new one.

use std::time::Duration;

use super::average::Average;
use super::baseline::{Cpus, Increase, Latency, Requests, SHORT, Slowness};
use super::config::{Config, Urgency};
use super::number::{real, whole};
pub use super::sample::{Cause, Decision, Doing, Guest, Host, Now, Sample};

/// What tells old times from now: a pace that was too much, a baseline, a stop.
const LONG: Duration = Duration::from_secs(60);
/// The promise on delays holds over a minute; what forgets in half of that sees it coming.
const PROMISE: Duration = Duration::from_secs(30);
/// What is aimed at, as a share of what is promised.
const AIM: f64 = 0.75;
/// The first pace, bytes a second.
const START: f64 = 64.0 * 1024.0 * 1024.0;
/// The slowest pace; when even that is too much we stop.
const TRICKLE: f64 = 4.0 * 1024.0 * 1024.0;
/// Beyond this a pace is no limit.
const FULL: f64 = 16.0 * 1024.0 * 1024.0 * 1024.0;
/// One request in flight for each so many bytes a second.
const EACH_IN_FLIGHT: f64 = 12.5 * 1024.0 * 1024.0;
/// Below this score the pace may rise.
const LOWER: f64 = 0.8;
/// Above this score we stop.
const STOP: f64 = 4.0;
/// A guest whose requests are in flight for less than this share of the time does not wait for its disks.
const IDLE: f64 = 0.02;
/// What differs by more than this by itself is not believed to.
const MOST_SPREAD: f64 = 0.25;
/// The promise is but for the time of a reaction: a second counts for no more than twice as long.
const REACTION_COUNTS: f64 = 1.0;
/// Between two steps down, so that the first one can show.
const REACT: Duration = Duration::from_secs(1);
/// A pause to measure what is without us, and its length where nobody seems to be there.
const MEASURE: Duration = Duration::from_secs(1);
const GLANCE: Duration = Duration::from_millis(500);
/// Between two such pauses.
const MEASURE_EACH: Duration = Duration::from_secs(20);
/// At the earliest after the last one, when something has changed.
const MEASURE_SOON: Duration = Duration::from_secs(5);
/// How long we stop: twice as long each time that it was in vain.
const STOP_FIRST: Duration = Duration::from_secs(1);
const STOP_LONGEST: Duration = Duration::from_secs(30);
/// How long it is tried at a trickle after the longest.
const TRIED: Duration = Duration::from_secs(2);
/// After so long without a stop the next one is short again.
const CALM: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Copying,
    /// Until then.
    Measuring(Duration),
    /// Until then, at least.
    Stopped(Duration, Cause),
}

/// What the controller remembers.
#[derive(Debug, Clone)]
pub struct State {
    rate: f64,
    phase: Phase,
    /// Nothing was ever too much: the pace doubles quickly.
    unhurt: bool,
    /// The pace that was too much last.
    knee: f64,
    fell_at: Option<Duration>,
    stop: Duration,
    resumed_at: Option<Duration>,
    stopped_at: Option<Duration>,
    measured_at: Option<Duration>,
    /// The guest's requests a second when that was measured.
    measured_rate: f64,
    latency: Latency,
    slowness: Slowness,
    /// The share by which requests took longer, whatever we did.
    delay: Average,
    own: Average,
    quiet: Quiet,
    stalled: Average,
    /// Nobody can tell what the guest feels.
    blind: bool,
    last: Option<(Cause, f64)>,
    /// What the pace fell for last.
    blamed: Option<Increase>,
}

/// What others do to the host, as seen in pauses; its CPUs and memory at all times.
#[derive(Debug, Clone)]
struct Quiet {
    io_pressure: Average,
    memory_pressure: Average,
    cpu: Average,
    disk_use: Average,
    /// I/O pressure while we copied; it is ours as well.
    io_pressure_copying: Average,
}

/// How the VM fared before we came.
#[derive(Debug, Clone, Copy, Default)]
pub struct Past {
    /// Its requests since it was started.
    pub requests: Option<Requests>,
    /// Its CPUs' time since then.
    pub cpus: Option<Cpus>,
}

impl State {
    /// The beginning.
    #[must_use]
    pub fn new(past: &Past) -> Self {
        let average = Average::new(SHORT);
        Self {
            rate: START,
            phase: Phase::Copying,
            unhurt: true,
            knee: f64::INFINITY,
            fell_at: None,
            stop: STOP_FIRST,
            resumed_at: None,
            stopped_at: None,
            measured_at: None,
            measured_rate: 0.0,
            latency: Latency::new(past.requests.as_ref()),
            slowness: Slowness::new(past.cpus.as_ref()),
            delay: Average::new(PROMISE),
            own: average,
            quiet: Quiet {
                io_pressure: average,
                memory_pressure: average,
                cpu: average,
                disk_use: average,
                io_pressure_copying: average,
            },
            stalled: average,
            blind: false,
            last: None,
            blamed: None,
        }
    }

    /// How the guest's latency compares with its baseline, now or when the pace fell last.
    #[must_use]
    pub fn increase(&self) -> Option<Increase> {
        self.latency.increase().or(self.blamed)
    }

    /// What the guest's requests, of the mix of its last pause, take when we do nothing: nanoseconds.
    #[must_use]
    pub fn baseline(&self) -> Option<f64> {
        self.latency.baseline()
    }

    /// The share by which the guest's requests took longer over the last minute.
    #[must_use]
    pub fn delay(&self) -> f64 {
        self.delay.integral()
    }

    /// The share by which the guest's CPUs take longer.
    #[must_use]
    pub fn slowness(&self) -> Option<f64> {
        self.slowness.increase().map(|(share, _)| share)
    }

    /// What a pass would have to do if it began now.
    #[must_use]
    pub fn outlook(&self, config: &Config, now: Now) -> Decision {
        let (cause, score) = self.worst(config, |_| true);
        let fixed = ceiling(self, config, now, None);
        if score <= 1.0 || !config.control {
            let rate = config.ceiling(now.minute);
            return Decision {
                rate,
                in_flight: config.in_flight,
                cause: fixed.cause.filter(|_| rate.is_some()),
                score,
            };
        }
        let stops = fixed.stops() || (may_stop(cause) && score > STOP);
        Decision {
            rate: Some(if stops { 0 } else { whole(TRICKLE) }),
            in_flight: 1,
            cause: Some(cause),
            score,
        }
    }

    fn take_in(&mut self, sample: &Sample, now: Duration) {
        let span = sample.span;
        let host = &sample.host;
        let see = |average: &mut Average, value: Option<f64>| {
            if let Some(value) = value {
                average.observe(value, span);
            }
        };
        let quiet = &mut self.quiet;
        see(&mut quiet.cpu, host.cpu);
        see(&mut quiet.memory_pressure, host.memory_pressure);
        match sample.doing {
            Doing::Copying => {
                see(&mut quiet.io_pressure_copying, host.io_pressure);
                self.own
                    .observe(real(sample.copied) / span.as_secs_f64().max(1e-9), span);
                self.stalled.observe(sample.stalled, span);
                if let Some(cpus) = &sample.cpus {
                    self.slowness.copying(cpus, span);
                }
            }
            Doing::Pausing => {
                see(&mut quiet.io_pressure, host.io_pressure);
                see(&mut quiet.disk_use, host.disk_use);
                if let Some(cpus) = &sample.cpus {
                    self.slowness.pause(now, cpus, span);
                }
            }
            Doing::Between => {}
        }
        self.take_in_guest(&sample.guest, now);
        let share = match self.latency.increase() {
            Some(increase) if sample.doing == Doing::Copying && self.guest_waits() => {
                increase.share.min(REACTION_COUNTS)
            }
            _ => 0.0,
        };
        self.delay.observe(share, span);
    }

    /// Whether the guest waits for its disks so much that it matters.
    fn guest_waits(&self) -> bool {
        self.latency.in_flight() >= IDLE
    }

    fn take_in_guest(&mut self, guest: &Guest, now: Duration) {
        self.blind = match guest {
            Guest::NotNow => self.blind,
            guest => matches!(guest, Guest::Unknown),
        };
        let Guest::Seen {
            requests,
            span,
            doing,
        } = guest
        else {
            return;
        };
        match doing {
            Doing::Copying => self.latency.copying(requests, *span),
            Doing::Pausing => {
                // What was blamed on us was the guest's own load.
                if self.latency.pause(now, requests) {
                    self.delay.clear();
                    self.latency.fresh();
                    // Nobody knows yet which pace a guest bears that has only begun.
                    if requests.in_flight(*span) >= IDLE {
                        self.rate = self.rate.min(START / 2.0);
                        self.unhurt = false;
                    }
                }
                self.measured_rate = real(requests.total()) / span.as_secs_f64();
                // Not a pause that was made for it, but the time before the first batch or between two passes.
                let long_ago = |at| now.saturating_sub(at) >= MEASURE;
                if *span >= MEASURE && self.measured_at.is_some_and(long_ago) {
                    self.measured_at = Some(now);
                }
            }
            Doing::Between => {}
        }
    }

    /// What was seen against what is allowed: the worst of what counts.
    fn worst(&self, config: &Config, counts: fn(Cause) -> bool) -> (Cause, f64) {
        let mean = |average: &Average| average.mean().unwrap_or(0.0);
        let of = |value: f64, limit: f64| {
            if limit >= 1.0 {
                0.0
            } else {
                value / limit.max(1e-6)
            }
        };
        // Without a sight of the guest what is seen of the host counts double.
        let more = if self.blind { 2.0 } else { 1.0 };
        let mut found = vec![
            (
                Cause::MemoryPressure,
                of(mean(&self.quiet.memory_pressure), config.memory_pressure),
            ),
            (Cause::Cpu, of(mean(&self.quiet.cpu), config.cpu)),
            (
                Cause::DiskUse,
                of(mean(&self.quiet.disk_use), config.disk_use),
            ),
            (
                Cause::IoPressure,
                more * of(mean(&self.quiet.io_pressure), config.io_pressure),
            ),
        ];
        if self.blind {
            found.push((
                Cause::IoPressure,
                of(mean(&self.quiet.io_pressure_copying), config.io_pressure),
            ));
        }
        let allowed = (config.latency_increase * AIM).max(1e-6);
        if self.guest_waits()
            && let Some(increase) = self.latency.increase()
        {
            // How much the guest's latency differs by itself is not ours; over a minute that evens out, and counts.
            let score = increase.share / allowed.max(increase.spread.min(MOST_SPREAD));
            found.push((Cause::Latency, score));
        }
        if self.delay.evidence() > 1.0 {
            found.push((Cause::Delay, self.delay.integral() / allowed));
        }
        if let Some((share, spread)) = self.slowness.increase() {
            found.push((Cause::Vcpu, share / allowed.max(spread.min(MOST_SPREAD))));
        }
        found
            .into_iter()
            .filter(|(cause, _)| counts(*cause))
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .unwrap_or((Cause::Latency, 0.0))
    }

    fn somebody_is_there(&self) -> bool {
        let busy = |average: &Average, floor| average.mean().is_some_and(|mean| mean >= floor);
        self.guest_waits()
            || busy(&self.quiet.io_pressure, 0.02)
            || busy(&self.quiet.disk_use, 0.05)
    }

    /// When the next pause to measure is due.
    fn measures(&self, now: Duration) -> bool {
        let since = now.saturating_sub(self.measured_at.unwrap_or(Duration::ZERO));
        if since >= MEASURE_EACH {
            return true;
        }
        if self.guest_waits() && !self.latency.measured() && since >= MEASURE {
            return true;
        }
        if since < MEASURE_SOON || !self.guest_waits() {
            return false;
        }
        let (then, rate) = (self.measured_rate.max(5.0), self.latency.rate().max(5.0));
        then.max(rate) > 2.0 * then.min(rate)
    }

    fn fall(&mut self, now: Duration, score: f64) {
        let own = self.own.mean().unwrap_or(self.rate).max(TRICKLE);
        self.knee = self.rate.min(own);
        self.rate = (self.knee * (1.0 / score).clamp(0.3, 0.8)).max(TRICKLE);
        self.unhurt = false;
        self.fell_at = Some(now);
        self.blamed = self.latency.increase().or(self.blamed);
        self.latency.fresh();
        self.slowness.fresh();
        self.own.clear();
    }

    fn halt(&mut self, now: Duration, cause: Cause) {
        let vain = self
            .resumed_at
            .is_some_and(|resumed| now.saturating_sub(resumed) < CALM);
        self.stop = if vain {
            (self.stop * 2).min(STOP_LONGEST)
        } else {
            STOP_FIRST
        };
        self.phase = Phase::Stopped(now + self.stop, cause);
        self.stopped_at = Some(now);
        self.latency.fresh();
        self.slowness.fresh();
    }

    fn rise(&mut self, now: Duration, span: Duration, score: f64) {
        let recently = self
            .fell_at
            .is_some_and(|fell| now.saturating_sub(fell) < SHORT);
        if recently || self.stalled.mean().is_some_and(|share| share > 0.5) {
            return;
        }
        if self
            .fell_at
            .is_some_and(|fell| now.saturating_sub(fell) > LONG)
        {
            self.knee = f64::INFINITY;
        }
        let near = (0.8..1.2).contains(&(self.rate / self.knee));
        let busy = self.latency.in_flight() >= 1.0 || self.blind;
        let growth = match (self.unhurt && !self.blind, near || busy) {
            (true, _) => 1024.0,
            (false, true) => 1.05,
            // The closer to what is allowed, the slower: what is seen comes late.
            (false, false) => 1.0 + 0.5 * (1.0 - score.max(0.0) / LOWER),
        };
        self.rate *= growth.powf(span.as_secs_f64().min(1.0));
        if self.rate >= FULL {
            self.rate = f64::INFINITY;
        }
        // A pace that is not reached anyway limits nothing.
        if !self.unhurt
            && self.own.evidence() > 1.0
            && let Some(own) = self.own.mean()
            && self.rate > 4.0 * own.max(START)
        {
            self.rate = f64::INFINITY;
        }
    }

    /// After a stop: whether to go on.
    fn resumes(&self, config: &Config, now: Duration, until: Duration) -> bool {
        let since = now.saturating_sub(self.stopped_at.unwrap_or(Duration::ZERO));
        if since < STOP_FIRST {
            return false;
        }
        // The guest's delays of the last minute are made up for by waiting, and by nothing else.
        if self.delay.integral() > config.latency_increase * AIM {
            return false;
        }
        // Never for ever: after the longest stop it is tried, at a trickle.
        if since >= STOP_LONGEST {
            return true;
        }
        let calm = |average: &Average| average.mean().is_some_and(|mean| mean < 0.1);
        let calm = calm(&self.quiet.disk_use) && calm(&self.quiet.io_pressure);
        // What does not stop it does not keep it stopped.
        let (_, score) = self.worst(config, may_stop);
        score < LOWER && (now >= until || (calm && since >= 2 * STOP_FIRST))
    }
}

/// Whether stopping helps against it: of CPU and of a busy disk a trickle takes next to nothing.
fn may_stop(cause: Cause) -> bool {
    !matches!(cause, Cause::Cpu | Cause::DiskUse)
}

/// Whether only a look without us tells whose fault it is.
fn of_the_guest(cause: Cause) -> bool {
    matches!(cause, Cause::Latency | Cause::Delay | Cause::Vcpu)
}

/// One step: what was seen goes in, what to do comes out.
#[must_use]
pub fn step(mut state: State, sample: &Sample, config: &Config, now: Now) -> (State, Decision) {
    state.take_in(sample, now.at);
    if !config.control {
        let decision = ceiling(&state, config, now, None);
        return (state, decision);
    }
    let worst = state.worst(config, |_| true);
    let at = now.at;
    state.measured_at.get_or_insert(at);
    if let Urgency::Hard(rate) = config.urgency
        && state.rate < real(rate)
    {
        state.rate = real(rate);
    }
    let hard = matches!(config.urgency, Urgency::Hard(rate) if rate > 0);
    match state.phase {
        Phase::Measuring(until) if at >= until => {
            state.phase = Phase::Copying;
            state.measured_at = Some(at);
        }
        Phase::Stopped(until, _) if hard || state.resumes(config, at, until) => {
            state.phase = Phase::Copying;
            state.resumed_at = Some(at);
            state.measured_at = Some(at);
            // Half of what was too much; after stops in vain, as little as there is.
            let back = if state.stop > 4 * STOP_FIRST {
                TRICKLE
            } else {
                state.knee / 2.0
            };
            state.rate = back.clamp(TRICKLE, state.rate.max(TRICKLE));
        }
        Phase::Measuring(_) | Phase::Stopped(..) => {}
        Phase::Copying => copying(&mut state, sample, config, worst, at),
    }
    let limited = (worst.1 > LOWER).then_some(worst);
    if limited.is_some() {
        state.last = limited;
    }
    let decision = ceiling(&state, config, now, state.last);
    (state, decision)
}

fn copying(state: &mut State, sample: &Sample, config: &Config, worst: (Cause, f64), at: Duration) {
    let (cause, score) = worst;
    let least = match config.urgency {
        Urgency::Hard(rate) => real(rate),
        Urgency::Usual => 0.0,
    };
    let may_fall = state
        .fell_at
        .is_none_or(|fell| at.saturating_sub(fell) >= REACT);
    if score > 1.0 && may_fall {
        let at_trickle = state.rate <= TRICKLE;
        state.fall(at, score);
        state.rate = state.rate.max(least);
        if least > 0.0 {
            return;
        }
        let unmeasured = state
            .measured_at
            .is_none_or(|measured| at.saturating_sub(measured) >= MEASURE_SOON);
        // Tried at a trickle after the longest stop, a batch gets its time.
        let tried = state.stop >= STOP_LONGEST
            && state
                .resumed_at
                .is_some_and(|resumed| at.saturating_sub(resumed) < TRIED);
        if tried && !of_the_guest(cause) {
            return;
        }
        if may_stop(cause) && (score > STOP || (at_trickle && score > 2.0)) {
            state.halt(at, cause);
        } else if unmeasured && of_the_guest(cause) {
            // It may be the guest's own load: a look without us tells.
            state.phase = Phase::Measuring(at + MEASURE);
        }
        return;
    }
    if state.measures(at) && least == 0.0 {
        let length = if state.somebody_is_there() {
            MEASURE
        } else {
            GLANCE
        };
        state.phase = Phase::Measuring(at + length);
        return;
    }
    if score < LOWER && sample.doing == Doing::Copying {
        state.rise(at, sample.span, score);
    }
}

/// The requests in flight of a slow pace.
fn few(rate: f64, config: &Config) -> usize {
    let few = usize::try_from(whole((rate / EACH_IN_FLIGHT).ceil())).unwrap_or(usize::MAX);
    few.clamp(1, config.in_flight)
}

/// The decision, under the operator's ceilings.
fn ceiling(state: &State, config: &Config, now: Now, seen: Option<(Cause, f64)>) -> Decision {
    let ceiling = config.ceiling(now.minute);
    let operator = if config.is_busy(now.minute) {
        Cause::BusyHours
    } else {
        Cause::Rate
    };
    let stop = |cause, score| Decision {
        rate: Some(0),
        in_flight: 1,
        cause: Some(cause),
        score,
    };
    if ceiling == Some(0) {
        return stop(operator, 0.0);
    }
    let fixed = Decision {
        rate: ceiling,
        in_flight: config.in_flight,
        cause: ceiling.map(|_| operator),
        score: 0.0,
    };
    if !config.control {
        return fixed;
    }
    let fixed = match config.needed {
        Some(needed) if ceiling.is_none_or(|ceiling| needed < ceiling) => Decision {
            rate: Some(needed),
            in_flight: few(real(needed), config),
            cause: Some(Cause::Schedule),
            ..fixed
        },
        _ => fixed,
    };
    match state.phase {
        Phase::Measuring(_) => return stop(Cause::Measuring, 0.0),
        Phase::Stopped(_, cause) => return stop(cause, seen.map_or(0.0, |(_, score)| score)),
        Phase::Copying => {}
    }
    if state.rate >= fixed.rate.map_or(FULL, real) {
        return fixed;
    }
    let (cause, score) = match seen {
        Some(seen) if !state.unhurt => seen,
        _ => (Cause::Rising, 0.0),
    };
    Decision {
        rate: Some(whole(state.rate)),
        in_flight: if state.unhurt {
            config.in_flight
        } else {
            few(state.rate, config)
        },
        cause: Some(cause),
        score,
    }
}
