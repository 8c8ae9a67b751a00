//! The budget of a host: all runs that copy on it, in whichever process, share its passes, its freezes and one rate.
//!
//! ```text
//! <state>/budget/members.lock      held for the reading of all members and the writing of one, never while anybody waits
//! <state>/budget/<pid>-<n>.member  what a run does and was told; locked for as long as it lives
//! <state>/budget/rate              when the next request of anybody may begin
//! ```
//!
//! Nobody is in charge: each member reads what the others do and decides by the same rule (`order`) whether it may begin. A
//! member that dies lets go of everything with its locks. One that is stopped is not waited for, and where the files cannot
//! be used a member goes on as if it were alone: a backup is worth more than the budget.

mod files;
pub mod order;
mod rate;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

use crate::clock;
use crate::throttle::STEP;
use files::Files;
pub use order::{Doing, Limits, Member};
use rate::Bucket;

/// The directory in the host state.
pub const BUDGET: &str = "budget";
/// How long the members' lock is waited for; who holds it does so for microseconds.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two looks at what the others do.
const LOOK: Duration = Duration::from_millis(200);
/// As well while others freeze: they take milliseconds.
const FREEZE_LOOK: Duration = Duration::from_millis(50);
/// A rate is measured over so much at least.
const MEASURE: Duration = Duration::from_millis(500);
/// Names that are listed of those who are waited for.
const NAMED: usize = 3;

/// This run's part in the budget.
#[derive(Debug)]
pub struct Share {
    held: Mutex<Held>,
    copied: AtomicU64,
    /// The rate of all together, 0 for none.
    rate: AtomicU64,
    /// Somebody freezes or is about to.
    yields: AtomicBool,
    /// How many turns to copy go round.
    turns: AtomicU32,
    /// This run freezes.
    freezes: AtomicBool,
    /// When it looks next, in nanoseconds since the host's start.
    next: AtomicU64,
    bucket: Mutex<Option<Bucket>>,
}

#[derive(Debug)]
struct Held {
    files: Option<Files>,
    me: Member,
    told: bool,
    measured: (u64, u64),
}

/// What a turn came to.
#[derive(Debug)]
pub enum Turn {
    /// It has begun and lasts until this is dropped.
    Begun(Place),
    /// It has not come, and why.
    NotYet(String),
}

/// A place among those that copy or freeze. Dropped, it is free.
#[derive(Debug)]
pub struct Place(Arc<Share>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.rest();
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn now() -> u64 {
    nanos(clock::since_boot())
}

impl Share {
    /// Joins the members of a host, whose state is in `root`.
    #[must_use]
    pub fn join(
        root: &Path,
        target: &str,
        key: &str,
        repository: &str,
        limits: Limits,
    ) -> Arc<Self> {
        let directory = root.join(BUDGET);
        let failed = |error: std::io::Error| {
            tracing::warn!(
                "{}: {error}: this run takes no part in the host's budget",
                directory.display()
            );
        };
        let files = Files::open(&directory).map_err(failed).ok();
        let bucket = files
            .as_ref()
            .and_then(|_| Bucket::open(&directory.join("rate")).ok());
        let share = Arc::new(Self {
            held: Mutex::new(Held {
                files,
                me: Member {
                    target: target.to_owned(),
                    key: key.to_owned(),
                    repository: repository.to_owned(),
                    doing: Doing::Idle,
                    due: None,
                    urgent: false,
                    residual: 0,
                    group: None,
                    served: 0,
                    since: now(),
                    seen: now(),
                    rate: 0,
                    limits,
                },
                told: false,
                measured: (now(), 0),
            }),
            copied: AtomicU64::new(0),
            rate: AtomicU64::new(limits.rate.unwrap_or(0)),
            yields: AtomicBool::new(false),
            turns: AtomicU32::new(1),
            freezes: AtomicBool::new(false),
            next: AtomicU64::new(0),
            bucket: Mutex::new(bucket),
        });
        share.exchange(PATIENCE, |_, _| {});
        share
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the others what there is to know of this run.
    pub fn tell(&self, tell: impl FnOnce(&mut Member)) {
        self.exchange(PATIENCE, |me, _| tell(me));
    }

    /// Changes what the others are told at the next look.
    pub fn note(&self, note: impl FnOnce(&mut Member)) {
        note(&mut self.held().me);
    }

    /// The rate of all together.
    #[must_use]
    pub fn rate(&self) -> Option<u64> {
        Some(self.rate.load(Ordering::Relaxed)).filter(|rate| *rate > 0)
    }

    /// Asks for the turn of a batch.
    pub fn copy(self: &Arc<Self>) -> Turn {
        self.turn(Doing::Waits, Doing::Copies, order::may_copy)
    }

    /// Asks for the turn of a freeze.
    pub fn freeze(self: &Arc<Self>) -> Turn {
        self.turn(Doing::WaitsToFreeze, Doing::Freezes, order::may_freeze)
    }

    /// Begins a freeze whose turn has not come.
    pub fn freeze_all_the_same(self: &Arc<Self>) -> Place {
        self.tell(|me| me.doing = Doing::Freezes);
        Place(Arc::clone(self))
    }

    fn turn(self: &Arc<Self>, waits: Doing, begins: Doing, may: order::May) -> Turn {
        let due = self.next.load(Ordering::Relaxed);
        let waiting = self.held().me.doing == waits;
        if waiting && now() < due {
            return Turn::NotYet(String::new());
        }
        let asked = self.exchange(PATIENCE, |me, others| {
            if me.doing != waits {
                me.doing = waits;
                me.since = now();
            }
            let mut all = others.to_vec();
            all.push(me.clone());
            let before = may(&all, others.len(), now());
            let Err(before) = before else {
                me.doing = begins;
                if begins == Doing::Copies {
                    me.served = now();
                }
                return None;
            };
            Some(words(begins, &all, &before))
        });
        match asked {
            Some(words) => Turn::NotYet(words),
            None => Turn::Begun(Place(Arc::clone(self))),
        }
    }

    /// Does nothing now that others wait for.
    pub fn rest(&self) {
        if self.held().me.doing != Doing::Idle {
            self.tell(|me| me.doing = Doing::Idle);
        }
    }

    /// How many turns to copy go round until this member has one again.
    #[must_use]
    pub fn turns(&self) -> u32 {
        self.turns.load(Ordering::Relaxed)
    }

    /// Within a batch, again and again: whether it should end, since somebody freezes.
    pub fn yields(&self) -> bool {
        self.look();
        self.yields.load(Ordering::Relaxed)
    }

    /// Looks at the others, if it is time to, and does not wait for that. While a guest is held nothing is looked at.
    fn look(&self) {
        if self.freezes.load(Ordering::Relaxed) {
            return;
        }
        let due = self.next.load(Ordering::Relaxed);
        if now() < due {
            return;
        }
        let later = now() + nanos(LOOK);
        // One thread looks.
        let mine = self
            .next
            .compare_exchange(due, later, Ordering::Relaxed, Ordering::Relaxed);
        if mine.is_ok() {
            self.exchange(Duration::ZERO, |_, _| {});
        }
    }

    /// Waits until `bytes` more may go by the rate of all together; `keep_on` is asked now and then whether to wait on. Returns
    /// whether they may.
    pub fn wait(&self, bytes: u64, keep_on: &dyn Fn() -> bool) -> bool {
        while keep_on() {
            self.look();
            let wait = self.rate().and_then(|rate| {
                let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
                bucket.as_mut()?.take(bytes, rate)
            });
            match wait {
                None => {
                    self.copied.fetch_add(bytes, Ordering::Relaxed);
                    return true;
                }
                Some(wait) => clock::sleep(wait.min(STEP)),
            }
        }
        false
    }

    /// Reads the others, changes this member, and writes it. Where that cannot be it is as if it were alone.
    fn exchange<T>(&self, patience: Duration, act: impl FnOnce(&mut Member, &[Member]) -> T) -> T {
        let mut held = self.held();
        let Held {
            files,
            me,
            told,
            measured,
        } = &mut *held;
        let before = me.doing;
        // Who has waited for it in vain once does not do so again.
        let patience = if *told { Duration::ZERO } else { patience };
        let (mut act, mut result) = (Some(act), None);
        let exchanged = files.as_mut().map(|files| {
            files.exchange(patience, |others| {
                result = act.take().map(|act| act(me, &others));
                me.seen = now();
                if me.doing != before {
                    me.since = me.seen;
                    crate::fault::step_of("budget", "locked", me.doing.name());
                }
                self.measure(me, measured);
                let freezing = order::freezing(&others, me.seen);
                self.yields.store(!freezing.is_empty(), Ordering::Relaxed);
                let mut all = others;
                all.push(me.clone());
                let turns = order::turns(&all, me.seen);
                self.turns.store(turns, Ordering::Relaxed);
                let rate = order::strictest(&all).rate;
                self.rate.store(rate.unwrap_or(0), Ordering::Relaxed);
                me.clone()
            })
        });
        let why = match exchanged {
            Some(Ok(true)) => {
                *told = false;
                None
            }
            Some(Ok(false)) if patience.is_zero() => None,
            Some(Ok(false)) => Some("another run has held its lock for 2 s".to_owned()),
            Some(Err(error)) => Some(error.to_string()),
            None => None,
        };
        if let Some(why) = why
            && !std::mem::replace(told, true)
        {
            tracing::warn!(
                "the host's budget cannot be used: {why}: going on as if no other run were on this host"
            );
        }
        if *told {
            self.yields.store(false, Ordering::Relaxed);
            self.turns.store(1, Ordering::Relaxed);
        }
        let result = match (result, act) {
            (Some(result), _) => result,
            (None, Some(act)) => act(me, &[]),
            // It was either called or it was not.
            (None, None) => unreachable!("what is done is done once"),
        };
        if me.doing != before {
            crate::fault::step_of("budget", "did", me.doing.name());
        }
        self.freezes
            .store(me.doing == Doing::Freezes, Ordering::Relaxed);
        let look = if matches!(me.doing, Doing::WaitsToFreeze | Doing::Freezes) {
            FREEZE_LOOK
        } else {
            LOOK
        };
        self.next.store(now() + nanos(look), Ordering::Relaxed);
        result
    }

    fn measure(&self, me: &mut Member, measured: &mut (u64, u64)) {
        let copied = self.copied.load(Ordering::Relaxed);
        let passed = me.seen.saturating_sub(measured.0);
        if !matches!(me.doing, Doing::Copies | Doing::Freezes) {
            me.rate = 0;
            *measured = (me.seen, copied);
        } else if passed >= nanos(MEASURE) {
            let bytes = u128::from(copied - measured.1) * 1_000_000_000 / u128::from(passed);
            me.rate = u64::try_from(bytes).unwrap_or(u64::MAX);
            *measured = (me.seen, copied);
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let patience = if self.held().told {
            Duration::ZERO
        } else {
            PATIENCE
        };
        if let Some(files) = &mut self.held().files {
            files.leave(patience);
        }
    }
}

/// Who is waited for, in words: `waits for its turn: web-1 and db-2 copy`.
fn words(begins: Doing, all: &[Member], before: &[usize]) -> String {
    let what = match begins {
        Doing::Freezes => "waits for its turn to freeze",
        _ => "waits for its turn",
    };
    let names = |does: fn(Doing) -> bool| {
        let found = before.iter().filter(|at| does(all[**at].doing));
        let names: Vec<&str> = found.map(|at| all[*at].target.as_str()).collect();
        let more = names.len().saturating_sub(NAMED);
        let mut listed = names
            .iter()
            .take(NAMED)
            .copied()
            .collect::<Vec<_>>()
            .join(", ");
        if more > 0 {
            listed = format!("{listed} and {more} more");
        } else if let Some((before, last)) = listed.rsplit_once(", ") {
            listed = format!("{before} and {last}");
        }
        (listed, names.len())
    };
    let say = |(who, count): (String, usize), one: &str, several: &str| match count {
        0 => None,
        1 => Some(format!("{who} {one}")),
        _ => Some(format!("{who} {several}")),
    };
    let parts = [
        say(names(|doing| doing == Doing::Copies), "copies", "copy"),
        say(
            names(|doing| matches!(doing, Doing::Freezes | Doing::WaitsToFreeze)),
            "freezes",
            "freeze",
        ),
        say(
            names(|doing| doing == Doing::Waits),
            "comes first",
            "come first",
        ),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    format!("{what}: {}", parts.join(", "))
}

/// What the members of a host do just now, for those who look on.
#[derive(Debug, Clone)]
pub struct Overview {
    members: Vec<Member>,
}

impl Overview {
    /// Looks at the members of the host whose state is in `root`.
    #[must_use]
    pub fn of(root: &Path) -> Self {
        let directory = root.join(BUDGET);
        let look = || Files::open(&directory)?.look(PATIENCE);
        let members = if directory.is_dir() {
            look().ok().flatten().unwrap_or_default()
        } else {
            Vec::new()
        };
        Self { members }
    }

    /// The members.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    fn does(&self, doing: Doing) -> impl Iterator<Item = &Member> {
        self.members
            .iter()
            .filter(move |member| member.doing == doing)
    }

    fn rate(&self) -> u64 {
        self.members.iter().map(|member| member.rate).sum()
    }

    /// As a line: `1 of 2 passes, 37 MiB/s of 100 MiB/s; db-2 waits`. `None` where there are no members.
    #[must_use]
    pub fn line(&self, bytes: impl Fn(u64) -> String) -> Option<String> {
        if self.members.is_empty() {
            return None;
        }
        let limits = order::strictest(&self.members);
        let mut line = format!(
            "{} of {} passes",
            self.does(Doing::Copies).count(),
            limits.passes
        );
        let rate = bytes(self.rate());
        line = match limits.rate {
            Some(limit) => format!("{line}, {rate}/s of {}/s", bytes(limit)),
            None => format!("{line}, {rate}/s"),
        };
        for (doing, one, several) in [
            (Doing::Freezes, "freezes", "freeze"),
            (Doing::WaitsToFreeze, "waits to freeze", "wait to freeze"),
            (Doing::Waits, "waits", "wait"),
        ] {
            let names: Vec<&str> = self
                .does(doing)
                .map(|member| member.target.as_str())
                .collect();
            let listed = names
                .iter()
                .take(NAMED)
                .copied()
                .collect::<Vec<_>>()
                .join(", ");
            line = match names.len() {
                0 => line,
                1 => format!("{line}; {listed} {one}"),
                count if count <= NAMED => format!("{line}; {listed} {several}"),
                count => format!("{line}; {listed} and {} more {several}", count - NAMED),
            };
        }
        Some(line)
    }

    /// As a report.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let limits = order::strictest(&self.members);
        let member = |member: &Member| {
            let since = now().saturating_sub(member.since) / 1_000_000;
            let due = member
                .due
                .and_then(|due| jiff::Timestamp::from_millisecond(due).ok());
            json!({
                "target": member.target, "key": member.key, "repository": member.repository,
                "doing": member.doing.name(), "for_ms": since, "due": due, "urgent": member.urgent,
                "rate": member.rate, "limits": member.limits,
            })
        };
        json!({
            "passes": self.does(Doing::Copies).count(), "passes_limit": limits.passes,
            "freezes": self.does(Doing::Freezes).count(), "freezes_limit": limits.freezes,
            "rate": self.rate(), "rate_limit": limits.rate,
            "members": self.members.iter().map(member).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn join(root: &Path, name: &str, limits: Limits) -> Arc<Share> {
        Share::join(root, name, name, "r", limits)
    }

    fn begun(turn: Turn) -> Place {
        match turn {
            Turn::Begun(place) => place,
            Turn::NotYet(words) => panic!("{words}"),
        }
    }

    fn not_yet(turn: &Turn) -> &str {
        match turn {
            Turn::NotYet(words) => words,
            Turn::Begun(_) => panic!("it begins"),
        }
    }

    #[test]
    fn a_third_one_waits_until_a_place_is_free_and_a_freeze_ends_batches() {
        let root = tempfile::tempdir().unwrap();
        let limits = Limits::default();
        let names = ["web-1", "db-2", "c", "d"];
        let [a, b, c, d] = names.map(|name| join(root.path(), name, limits));
        let pipe = root.path().join(BUDGET).join("0-0.member");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, 0o600.into()).unwrap();
        let first = begun(a.copy());
        let second = begun(b.copy());
        let asked = c.copy();
        assert_eq!(not_yet(&asked), "waits for its turn: web-1 and db-2 copy");
        assert_eq!(not_yet(&c.copy()), "", "it looks only now and then");
        let seen = Overview::of(root.path());
        let line = seen.line(|bytes| format!("{bytes} B")).unwrap();
        assert_eq!(line, "2 of 2 passes, 0 B/s; c waits");
        assert_eq!(seen.to_json()["members"][2]["doing"], "waits");
        drop(first);
        clock::sleep(LOOK);
        let third = begun(c.copy());
        assert!(!c.yields());
        let freeze = begun(d.freeze());
        assert!(
            matches!(a.freeze(), Turn::NotYet(_)),
            "one freeze is the strictest"
        );
        clock::sleep(LOOK);
        assert!(c.yields());
        drop(third);
        drop(freeze);
        drop(begun_in(FREEZE_LOOK * 3, || a.freeze()));
        assert_eq!(Overview::of(root.path()).members().len(), 4);
        drop((second, a, b, c));
        assert_eq!(Overview::of(root.path()).members().len(), 1);
        let left = std::fs::read_dir(root.path().join(BUDGET)).unwrap().count();
        assert_eq!(left, 4, "a member, the lock, the rate, and the pipe");
    }

    fn begun_in(time: Duration, ask: impl Fn() -> Turn) -> Place {
        let end = clock::Deadline::after(time);
        loop {
            match ask() {
                Turn::Begun(place) => return place,
                Turn::NotYet(words) => assert!(!end.passed(), "{words}"),
            }
            clock::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn one_that_is_stopped_with_the_lock_stops_nobody() {
        let root = tempfile::tempdir().unwrap();
        let limits = Limits {
            passes: 1,
            ..Limits::default()
        };
        let a = join(root.path(), "a", limits);
        let _copies = begun(a.copy());
        let b = join(root.path(), "b", limits);
        let stopped = std::fs::File::open(root.path().join(BUDGET).join("members.lock")).unwrap();
        let stop = rustix::fs::FlockOperation::NonBlockingLockExclusive;
        rustix::fs::flock(&stopped, stop).unwrap();
        let begin = clock::now();
        drop(begun(b.copy()));
        assert!(clock::now() - begin >= PATIENCE);
        let begin = clock::now();
        drop(begun(b.copy()));
        assert!(clock::now() - begin < PATIENCE, "it waits only once");
        drop(stopped);
        assert!(matches!(b.copy(), Turn::NotYet(_)), "it takes part again");
    }

    #[test]
    fn the_rate_of_all_is_the_lowest() {
        let root = tempfile::tempdir().unwrap();
        let limits = |rate| Limits {
            rate,
            ..Limits::default()
        };
        let a = join(root.path(), "a", limits(Some(1 << 20)));
        let b = join(root.path(), "b", limits(None));
        assert_eq!(b.rate(), Some(1 << 20));
        let begin = clock::now();
        for _ in 0..4 {
            assert!(b.wait(256 << 10, &|| true));
        }
        assert!(clock::now() - begin >= Duration::from_millis(600));
        drop(a);
        clock::sleep(LOOK);
        b.yields();
        assert_eq!(b.rate(), None);
    }
}
