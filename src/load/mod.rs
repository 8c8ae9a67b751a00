//! Giving way: what the guest and the host feel is watched, and the pace of the passes follows.
//!
//! ```text
//! guest   QEMU: requests and their time   once a second, while a batch holds the monitor  \
//!         /proc: its CPUs ran, waited     five times a second                              } control --> Throttle
//! host    /proc: pressure, CPUs, disks    five times a second                             /  (pure)
//! ```
//!
//! A pause needs no question to QEMU: its counters before and after it are enough, and both are read in batches. What
//! cannot be seen is not known; it is reported, and without a sight of the guest the host's limits are half of what they are.

pub mod average;
pub mod baseline;
pub mod config;
pub mod control;
pub mod guest;
pub mod host;
mod number;
pub mod report;
pub mod sample;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use baseline::{Cpus, Increase, Requests};
use config::{Config, Urgency, minute_of};
use control::{Cause, Decision, Doing, Guest, Host, Now, Past, Sample, State, step};
use host::{Counters, Device};
use report::Report;

use crate::clock;
use crate::qmp::Monitor;
use crate::qmp::machine::Machine;
use crate::throttle::{Pace, Throttle};

/// Between two looks at what `/proc` tells.
const LOOK: Duration = Duration::from_millis(200);
/// Between two questions to QEMU.
const ASK: Duration = Duration::from_secs(1);
/// What a batch began is done by then: a pause is one from here on.
const SETTLE: Duration = Duration::from_millis(300);
/// A pause shorter than this tells nothing of the guest.
const TELLING: Duration = Duration::from_millis(600);

/// The controllers of targets whose turn it is not.
static KNOWN: OnceLock<Mutex<BTreeMap<String, State>>> = OnceLock::new();

fn known() -> std::sync::MutexGuard<'static, BTreeMap<String, State>> {
    let known = KNOWN.get_or_init(Mutex::default);
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The controllers' clock.
fn since_the_beginning() -> Duration {
    static BEGINNING: OnceLock<Instant> = OnceLock::new();
    clock::now().saturating_duration_since(*BEGINNING.get_or_init(clock::now))
}

fn now() -> Now {
    Now {
        at: since_the_beginning(),
        minute: minute_of(clock::local_now().time()).unwrap_or(0),
    }
}

/// What was seen last, for those who show it.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    /// The host.
    pub host: Host,
    /// The guest's CPUs, and over how long.
    pub cpus: Option<(Cpus, Duration)>,
    /// The guest's requests, and over how long.
    pub requests: Option<(Requests, Duration)>,
}

/// The load of one target and its host, and the pace that follows from it.
#[derive(Debug)]
pub struct Load {
    key: String,
    config: Config,
    throttle: Arc<Throttle>,
    state: Option<State>,
    decision: Decision,
    report: Report,
    repository: Option<Device>,
    devices: BTreeSet<Device>,
    /// QEMU and the threads of its virtual CPUs.
    process: i32,
    threads: Vec<i64>,
    off: bool,
    host: Counters,
    cpus: Option<Cpus>,
    requests: Option<(Instant, Requests)>,
    copied: u64,
    stalled: Duration,
    urgent: Arc<AtomicBool>,
    /// When the last batch ended; none ends while it runs.
    ended: Option<Instant>,
    /// The time since the last look is that of a batch, or of waiting for one.
    waited: bool,
    /// What was seen last.
    pub seen: Seen,
}

impl Load {
    /// For a target, going on from its last turn.
    #[must_use]
    pub fn new(key: &str, config: Config, repository: Option<&Path>) -> Self {
        let decision = Decision {
            rate: config.rate,
            in_flight: config.in_flight,
            cause: None,
            score: 0.0,
        };
        let throttle = Throttle::new(decision.rate);
        throttle.set(pace(&decision));
        Self {
            key: key.to_owned(),
            throttle: Arc::new(throttle),
            state: known().remove(key),
            decision,
            report: Report::default(),
            repository: repository.and_then(host::device_of),
            devices: BTreeSet::new(),
            process: 0,
            threads: Vec::new(),
            off: false,
            host: Counters::shared(),
            cpus: None,
            requests: None,
            copied: 0,
            stalled: Duration::ZERO,
            urgent: Arc::default(),
            ended: Some(clock::now()),
            waited: false,
            seen: Seen {
                host: Host::default(),
                cpus: None,
                requests: None,
            },
            config,
        }
    }

    /// What the pace is held by.
    #[must_use]
    pub fn throttle(&self) -> Arc<Throttle> {
        Arc::clone(&self.throttle)
    }

    /// What it came to so far.
    #[must_use]
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// What is to be done now.
    #[must_use]
    pub fn decision(&self) -> Decision {
        self.decision
    }

    /// What is to be done now, in words.
    #[must_use]
    pub fn words(&self) -> String {
        report::words(&self.decision, self.increase(), &self.config)
    }

    /// How the guest's latency compares with its baseline.
    #[must_use]
    pub fn increase(&self) -> Option<Increase> {
        self.state.as_ref().and_then(State::increase)
    }

    /// What the guest's requests take when we do nothing, nanoseconds.
    #[must_use]
    pub fn baseline(&self) -> Option<f64> {
        self.state.as_ref().and_then(State::baseline)
    }

    /// What a pass would do if it began now, and why.
    #[must_use]
    pub fn outlook(&self) -> (Decision, String) {
        let decision = match &self.state {
            Some(state) => state.outlook(&self.config, now()),
            None => self.decision,
        };
        let words = report::words(&decision, None, &self.config);
        (decision, words)
    }

    /// The VM is let go again, and nothing was read.
    pub fn rest(&mut self) {
        self.ended = Some(clock::now());
    }

    /// While this is raised the schedule overrides the guest, up to the operator's ceilings.
    pub fn heed(&mut self, urgent: Arc<AtomicBool>) {
        self.urgent = urgent;
    }

    /// No more than this is needed to be in time, bytes a second.
    pub fn need(&mut self, rate: Option<u64>) {
        self.config.needed = rate;
    }

    /// Whether nothing but that holds the pace.
    #[must_use]
    pub fn has_time(&self) -> bool {
        self.decision.cause == Some(Cause::Schedule)
    }

    /// The VM is in our hands: what happened since the last batch is taken in.
    pub fn begin(&mut self, monitor: &mut dyn Monitor, machine: &Machine, off: bool) {
        if !self.config.control {
            self.waited = false;
            self.look(Doing::Between, Guest::NotNow);
            self.ended = None;
            return;
        }
        self.off = off;
        let images = machine.disks.iter().flat_map(|disk| &disk.chain);
        self.devices = images
            .filter_map(|layer| host::device_of(Path::new(&layer.filename)))
            .chain(self.repository)
            .collect();
        if !off && machine.process.pid != self.process {
            self.process = machine.process.pid;
            self.threads = guest::threads(monitor).unwrap_or_default();
            self.cpus = None;
            self.requests = None;
        }
        let pause = self
            .ended
            .is_some_and(|ended| clock::now() - ended >= TELLING);
        let guest = self.ask(
            monitor,
            if pause {
                Doing::Pausing
            } else {
                Doing::Between
            },
        );
        if self.state.is_none() {
            self.state = Some(State::new(&Past {
                requests: self.requests.map(|(_, requests)| requests),
                cpus: guest::cpus(self.process, &self.threads),
            }));
        }
        let doing = self.pausing();
        self.waited = false;
        self.look(doing, guest);
        self.note_unknown(&guest);
        self.ended = None;
    }

    /// The exports of a batch are there. What the guest felt of that would be no other at another pace.
    pub fn prepared(&mut self, monitor: &mut dyn Monitor) {
        if self.config.control {
            let guest = self.ask(monitor, Doing::Between);
            self.look(Doing::Between, guest);
        }
    }

    /// A batch read so many bytes more.
    pub fn copied(&mut self, bytes: u64) {
        self.copied += bytes;
    }

    /// A batch waited so long for the repository.
    pub fn stalled(&mut self, waited: Duration) {
        self.stalled += waited;
    }

    /// Whether a batch should look now.
    #[must_use]
    pub fn is_due(&self) -> bool {
        clock::now() - self.host.at() >= LOOK
    }

    /// Within a batch: looks around. QEMU is asked once a second.
    pub fn within(&mut self, monitor: &mut dyn Monitor) {
        let due = self
            .requests
            .is_some_and(|(at, _)| clock::now() - at >= ASK);
        let guest = if due && self.config.control {
            self.ask(monitor, Doing::Copying)
        } else {
            Guest::NotNow
        };
        self.look(Doing::Copying, guest);
    }

    /// The last read of a batch was answered.
    pub fn end(&mut self, monitor: &mut dyn Monitor) {
        let guest = if self.config.control {
            self.ask(monitor, Doing::Copying)
        } else {
            Guest::NotNow
        };
        self.look(Doing::Copying, guest);
        self.ended = Some(clock::now());
    }

    /// Between two batches, again and again: whether the next one must wait, and why.
    pub fn waits(&mut self) -> Option<String> {
        if self.is_due() {
            let doing = self.pausing();
            self.waited = true;
            self.look(doing, Guest::NotNow);
        }
        self.decision.stops().then(|| self.words())
    }

    /// What we did since the last look, no batch being on.
    fn pausing(&self) -> Doing {
        match self.ended {
            Some(ended) if self.host.at() >= ended + SETTLE => Doing::Pausing,
            _ => Doing::Between,
        }
    }

    fn ask(&mut self, monitor: &mut dyn Monitor, doing: Doing) -> Guest {
        if self.off {
            return Guest::Off;
        }
        let now = clock::now();
        let requests = match guest::requests(monitor) {
            Ok(requests) => requests,
            Err(error) => {
                tracing::debug!("the guest's requests are not known: {error:#}");
                self.requests = None;
                return Guest::Unknown;
            }
        };
        let before = self.requests.replace((now, requests));
        let between = before.and_then(|(at, before)| Some((now - at, requests.since(&before)?)));
        match between {
            Some((span, requests)) if !span.is_zero() => {
                self.seen.requests = Some((requests, span));
                Guest::Seen {
                    requests,
                    span,
                    doing,
                }
            }
            _ => Guest::NotNow,
        }
    }

    fn look(&mut self, doing: Doing, guest: Guest) {
        let counters = Counters::shared();
        let span = counters.span_since(&self.host);
        let host = counters.since(&self.host, &self.devices);
        let cpus = guest::cpus(self.process, &self.threads);
        let ran = match (cpus, self.cpus) {
            (Some(now), Some(then)) => now
                .ran
                .checked_sub(then.ran)
                .zip(now.waited.checked_sub(then.waited)),
            _ => None,
        };
        let ran = ran.map(|(ran, waited)| Cpus { ran, waited });
        self.host = counters;
        self.cpus = cpus;
        self.seen.host = host;
        self.seen.cpus = ran.map(|ran| (ran, span));
        // What came before a batch that nobody waited for is no time of ours.
        if self.waited || self.ended.is_none() {
            self.report.held(&self.decision, span);
        }
        self.report.copied += self.copied;
        let sample = Sample {
            span,
            doing,
            copied: std::mem::take(&mut self.copied),
            stalled: std::mem::take(&mut self.stalled).as_secs_f64() / span.as_secs_f64().max(1e-9),
            guest,
            cpus: ran,
            host,
        };
        self.config.urgency = if self.urgent.load(Ordering::Relaxed) {
            Urgency::Hard(u64::MAX)
        } else {
            Urgency::Usual
        };
        let state = self
            .state
            .take()
            .unwrap_or_else(|| State::new(&Past::default()));
        let (state, decision) = step(state, &sample, &self.config, now());
        self.state = Some(state);
        if decision.cause != self.decision.cause {
            tracing::debug!(
                "pace: {}",
                report::words(&decision, self.increase(), &self.config)
            );
        }
        self.decision = decision;
        self.throttle.set(pace(&decision));
    }

    fn note_unknown(&mut self, guest: &Guest) {
        let counters = &self.host;
        let mut unknown = counters.unknown();
        if matches!(guest, Guest::Unknown) {
            unknown.push("guest I/O");
        }
        if !self.off && guest::cpus(self.process, &self.threads).is_none() {
            unknown.push("guest CPUs");
        }
        if self.devices.is_empty() {
            unknown.push("disks");
        }
        self.report.unknown = unknown;
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if let Some(state) = self.state.take() {
            known().insert(std::mem::take(&mut self.key), state);
        }
    }
}

fn pace(decision: &Decision) -> Pace {
    Pace {
        rate: decision.rate,
        in_flight: decision.in_flight,
    }
}
