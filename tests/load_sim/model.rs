//! A guest and we on one disk, in virtual time. The disk is a queue: the busier it is, the longer a request takes, the
//! guest's and ours alike.

use std::time::Duration;

use forerun::load::baseline::{Cpus, Requests};
use forerun::load::config::Config;
use forerun::load::control::{Decision, Doing, Guest, Host, Now, Past, Sample, State, step};

pub(crate) const MIB: f64 = 1024.0 * 1024.0;
/// The guest's requests a second at full load.
const REQUESTS: f64 = 2000.0;
/// A request on an idle disk, seconds.
const SERVICE: f64 = 0.0005;

/// The world's course: functions of seconds.
pub(crate) struct World {
    /// How much of the disk the guest uses.
    pub(crate) load: Box<dyn Fn(f64) -> f64>,
    /// What the repository takes, bytes a second.
    pub(crate) repository: Box<dyn Fn(f64) -> f64>,
    /// How much of the host's CPUs others use.
    pub(crate) cpu: Box<dyn Fn(f64) -> f64>,
    /// The disk, bytes a second.
    pub(crate) disk: f64,
    /// By how much a measured latency is off, at most.
    pub(crate) noise: f64,
    pub(crate) guest_seen: bool,
    pub(crate) host_seen: bool,
    /// Bytes that there are to copy.
    pub(crate) work: f64,
    pub(crate) tick: f64,
}

impl World {
    pub(crate) fn new(load: impl Fn(f64) -> f64 + 'static) -> Self {
        Self {
            load: Box::new(load),
            repository: Box::new(|_| f64::INFINITY),
            cpu: Box::new(|_| 0.1),
            disk: 400.0 * MIB,
            noise: 0.05,
            guest_seen: true,
            host_seen: true,
            work: f64::INFINITY,
            tick: 0.1,
        }
    }
}

/// An instant of a run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Point {
    pub(crate) at: f64,
    pub(crate) load: f64,
    /// What we copied, bytes a second.
    pub(crate) speed: f64,
    /// The guest's latency, seconds, and what it would have been without us.
    pub(crate) latency: f64,
    pub(crate) alone: f64,
    pub(crate) decision: Decision,
}

impl Point {
    /// By which share the guest's requests took longer; a guest that does next to nothing has no delay.
    pub(crate) fn added(&self) -> f64 {
        if self.load * REQUESTS * self.alone < 0.02 {
            0.0
        } else {
            self.latency / self.alone - 1.0
        }
    }
}

pub(crate) struct Run {
    pub(crate) points: Vec<Point>,
    pub(crate) copied: f64,
    pub(crate) finished: Option<f64>,
}

/// Numbers that look random and are the same every time.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    /// From -1 to 1.
    pub(crate) fn roll(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        f64::from(u32::try_from(self.0 >> 32).unwrap()) / f64::from(u32::MAX) * 2.0 - 1.0
    }
}

/// What the guest's counters grew by since they were looked at last.
fn close(seen: &mut Requests, since: &mut f64, copying: bool) -> Guest {
    let span = Duration::from_secs_f64(std::mem::take(since));
    Guest::Seen {
        requests: std::mem::take(seen),
        span,
        doing: if copying {
            Doing::Copying
        } else if span >= Duration::from_millis(600) {
            Doing::Pausing
        } else {
            Doing::Between
        },
    }
}

/// Runs the controller through it.
pub(crate) fn run(world: &World, config: &Config, seconds: f64) -> Run {
    let mut state = State::new(&Past::default());
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let mut run = Run {
        points: Vec::new(),
        copied: 0.0,
        finished: None,
    };
    let mut decision = Decision {
        rate: Some(0),
        in_flight: 1,
        cause: None,
        score: 0.0,
    };
    // What the guest's counters grew by since they were last looked at, and for how long we have done what we do.
    let (mut seen, mut since, mut doing_since) = (Requests::default(), 0.0, 0.0);
    let mut copying = false;
    let mut at = 0.0;
    while at < seconds && run.finished.is_none() {
        let now_copying = !decision.stops();
        // A batch begins or ends: the guest is looked at before it, and after it.
        let closed =
            (now_copying != copying && since > 0.0).then(|| close(&mut seen, &mut since, copying));
        if now_copying != copying {
            copying = now_copying;
            doing_since = at;
        }
        let load = (world.load)(at).clamp(0.0, 0.97);
        let pace = decision.rate.map_or(f64::INFINITY, |rate| {
            f64::from(u32::try_from(rate >> 10).unwrap_or(u32::MAX)) * 1024.0
        });
        let speed = pace
            .min((world.repository)(at))
            .min(world.disk * (0.97 - load).max(0.01));
        let latency = SERVICE / (1.0 - (load + speed / world.disk).min(0.97));
        let alone = SERVICE / (1.0 - load);
        run.points.push(Point {
            at,
            load,
            speed,
            latency,
            alone,
            decision,
        });
        run.copied += speed * world.tick;
        if run.copied >= world.work {
            run.finished = Some(at);
        }
        at += world.tick;
        since += world.tick;
        let requests = load * REQUESTS * world.tick;
        seen.count[1] += requests as u64;
        seen.nanos[1] += (requests * latency * 1e9 * (1.0 + world.noise * dice.roll())) as u64;
        let settled = at - doing_since >= 0.35;
        let doing = match (now_copying, settled) {
            (true, _) => Doing::Copying,
            (false, true) => Doing::Pausing,
            (false, false) => Doing::Between,
        };
        let guest = match closed {
            _ if !world.guest_seen => Guest::Unknown,
            Some(closed) => closed,
            None if now_copying && since >= 0.95 => close(&mut seen, &mut since, true),
            None => Guest::NotNow,
        };
        let (cpu, used) = ((world.cpu)(at), load + speed / world.disk);
        let ran = 0.5 * world.tick * 1e9;
        let waited = ran * (cpu + speed / world.disk * 0.1 - 1.0).max(0.0);
        let sample = Sample {
            span: Duration::from_secs_f64(world.tick),
            doing,
            copied: (speed * world.tick) as u64,
            stalled: if speed < pace && speed < 1.0 {
                1.0
            } else {
                0.0
            },
            guest,
            cpus: world.guest_seen.then_some(Cpus {
                ran: ran as u64,
                waited: waited as u64,
            }),
            host: if world.host_seen {
                Host {
                    io_pressure: Some((used * used).min(1.0) * 0.5),
                    cpu_pressure: Some(0.0),
                    memory_pressure: Some(0.0),
                    cpu: Some(cpu.min(1.0)),
                    disk_use: Some(used.min(1.0)),
                }
            } else {
                Host::default()
            },
        };
        let minute = (at / 60.0) as u16 % 1440;
        let now = Now {
            at: Duration::from_secs_f64(at),
            minute,
        };
        (state, decision) = step(state, &sample, config, now);
    }
    run
}

impl Run {
    /// The worst minute's mean added delay, what came in the seconds of reaction after a rise of the load left out.
    pub(crate) fn worst_minute(&self, reaction: f64) -> (f64, f64) {
        let tick = self.points[1].at - self.points[0].at;
        let mut rose = f64::NEG_INFINITY;
        let mut low = -1.0;
        let added: Vec<f64> = self
            .points
            .iter()
            .map(|point| {
                low = f64::min(low, point.load);
                if point.load > low + 0.1 {
                    (rose, low) = (point.at, point.load);
                }
                if point.load < low + 0.02 {
                    low = point.load;
                }
                if point.at - rose < reaction {
                    0.0
                } else {
                    point.added()
                }
            })
            .collect();
        let mut window = 0.0;
        let mut worst = (0.0, 0.0);
        for (index, share) in added.iter().enumerate() {
            window += share * tick;
            let left = (index as f64 - 60.0 / tick).round();
            if left >= 0.0 {
                window -= added[left as usize] * tick;
            }
            if window / 60.0 > worst.1 {
                worst = (self.points[index].at, window / 60.0);
            }
        }
        worst
    }

    /// How often the pace turned between rising and falling by more than a fifth; pauses to measure are none.
    pub(crate) fn reversals(&self) -> usize {
        let (mut turns, mut up, mut extreme) = (0, true, None::<f64>);
        for point in &self.points {
            let Decision { rate, cause, .. } = point.decision;
            if cause == Some(forerun::load::control::Cause::Measuring) {
                continue;
            }
            let rate = rate.map_or(1e12, |rate| rate as f64).max(MIB);
            let last = extreme.get_or_insert(rate);
            if (up && rate > *last) || (!up && rate < *last) {
                *last = rate;
            } else if (up && rate < *last / 1.2) || (!up && rate > *last * 1.2) {
                (turns, up) = (turns + 1, !up);
                *last = rate;
            }
        }
        turns
    }

    /// The mean speed between two times.
    pub(crate) fn speed(&self, from: f64, to: f64) -> f64 {
        let within = self
            .points
            .iter()
            .filter(|point| (from..to).contains(&point.at));
        let (count, sum) = within.fold((0.0, 0.0), |(count, sum), point| {
            (count + 1.0, sum + point.speed)
        });
        sum / count
    }
}
