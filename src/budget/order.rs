//! Who of a host's members may begin: pure functions of what the members say of themselves and the time.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Who has waited so long for a turn counts as urgent, so that urgent ones cannot keep the others waiting for ever.
const STARVED: Duration = Duration::from_secs(60);
/// Who says nothing for so long while it waits is stopped, and nobody waits for it.
const WAITS_SILENT: Duration = Duration::from_secs(10);
/// As well while it copies: a repository may keep it from saying anything for a while.
const COPIES_SILENT: Duration = Duration::from_secs(20);
/// As well while it freezes: hooks and agents take their time, and a guard ends what hangs.
const FREEZES_SILENT: Duration = Duration::from_secs(120);

/// What a member does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Doing {
    /// Nothing that others wait for.
    Idle,
    /// It waits for its turn to copy.
    Waits,
    /// A batch of a pass or of an audit.
    Copies,
    /// It waits for its turn to freeze.
    WaitsToFreeze,
    /// A freeze, from its preparation until the guest is free.
    Freezes,
}

impl Doing {
    /// As in the members' files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Waits => "waits",
            Self::Copies => "copies",
            Self::WaitsToFreeze => "waits-to-freeze",
            Self::Freezes => "freezes",
        }
    }
}

/// What all that copy on a host may do together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes a second.
    pub rate: Option<u64>,
    /// Batches at a time.
    pub passes: u32,
    /// Freezes at a time.
    pub freezes: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            rate: None,
            passes: 2,
            freezes: 1,
        }
    }
}

impl Limits {
    /// Of two the stricter one in everything.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            rate: self.rate.into_iter().chain(other.rate).min(),
            passes: self.passes.min(other.passes),
            freezes: self.freezes.min(other.freezes),
        }
    }
}

/// One run of a repository on a target, as it describes itself. Times are since the host's start, in nanoseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The target, as it was spelled.
    pub target: String,
    /// Its key.
    pub key: String,
    /// The repository's short id.
    pub repository: String,
    /// What it does.
    pub doing: Doing,
    /// When its backup is due, by the wall clock: milliseconds since 1970.
    pub due: Option<i64>,
    /// It would not be in time, or hardly.
    pub urgent: bool,
    /// What its freeze is expected to find, bytes.
    pub residual: u64,
    /// Those that freeze at a common instant share a place.
    pub group: Option<String>,
    /// When it last had a turn.
    pub served: u64,
    /// Since when it does what it does.
    pub since: u64,
    /// When it last said so.
    pub seen: u64,
    /// Bytes a second just now.
    pub rate: u64,
    /// What it was told that all may do together.
    pub limits: Limits,
}

impl Member {
    /// Whether it is to be reckoned with: one that was stopped neither goes on nor ends.
    fn is_awake(&self, now: u64) -> bool {
        let silent = match self.doing {
            Doing::Idle => return true,
            Doing::Waits | Doing::WaitsToFreeze => WAITS_SILENT,
            Doing::Copies => COPIES_SILENT,
            Doing::Freezes => FREEZES_SILENT,
        };
        u128::from(now.saturating_sub(self.seen)) < silent.as_nanos()
    }

    /// Who is served first: urgent ones, then who was served longest ago, then who waits longest. Each asks this by itself: it
    /// must be the same for all, whatever the order in which they see each other.
    fn rank(&self, now: u64) -> (bool, u64, u64, &str, &str) {
        let starved = u128::from(now.saturating_sub(self.since)) >= STARVED.as_nanos();
        let last = !(self.urgent || starved);
        (last, self.served, self.since, &self.key, &self.repository)
    }

    /// Whose freeze comes first: what is due earliest, then what takes the shortest.
    fn turn(&self) -> (i64, u64, u64, &str, &str) {
        let due = self.due.unwrap_or(i64::MAX);
        (due, self.residual, self.since, &self.key, &self.repository)
    }
}

/// Whether a backup is urgent: it would not be in time, or what is left over is less than a fifth of what it needs.
#[must_use]
pub fn is_urgent(in_time: bool, left: Duration, needed: Duration) -> bool {
    !in_time || left.saturating_sub(needed) < needed / 5
}

/// The strictest of what all were told counts for all.
#[must_use]
pub fn strictest(members: &[Member]) -> Limits {
    let all = members.iter().map(|member| member.limits);
    all.reduce(Limits::and).unwrap_or_default()
}

fn who(members: &[Member], now: u64, does: impl Fn(Doing) -> bool) -> Vec<usize> {
    let found = members.iter().enumerate();
    found
        .filter(|(_, member)| does(member.doing) && member.is_awake(now))
        .map(|(at, _)| at)
        .collect()
}

/// How many turns to copy go round until a member has one again.
pub fn turns(members: &[Member], now: u64) -> u32 {
    let wanted = who(members, now, |doing| {
        matches!(doing, Doing::Copies | Doing::Waits)
    });
    let wanted = u32::try_from(wanted.len()).unwrap_or(u32::MAX);
    wanted.div_ceil(strictest(members).passes.max(1)).max(1)
}

/// Those for whom a batch ends and none begins.
#[must_use]
pub fn freezing(members: &[Member], now: u64) -> Vec<usize> {
    who(members, now, |doing| {
        matches!(doing, Doing::WaitsToFreeze | Doing::Freezes)
    })
}

/// A rule: whether one of the members may begin at a time, or for whom it waits.
pub type May = fn(&[Member], usize, u64) -> Result<(), Vec<usize>>;

/// Whether a member that waits may begin a batch; else for whom it waits.
pub fn may_copy(members: &[Member], me: usize, now: u64) -> Result<(), Vec<usize>> {
    let freezing = freezing(members, now);
    if !freezing.is_empty() {
        return Err(freezing);
    }
    let mut before = who(members, now, |doing| doing == Doing::Copies);
    let mut waiting = who(members, now, |doing| doing == Doing::Waits);
    waiting.retain(|at| *at != me);
    let rank = |at: usize| members[at].rank(now);
    before.extend(waiting.into_iter().filter(|at| rank(*at) < rank(me)));
    let passes = strictest(members).passes.max(1) as usize;
    if before.len() < passes {
        Ok(())
    } else {
        Err(before)
    }
}

/// Whether a member that waits may freeze; else for whom it waits.
pub fn may_freeze(members: &[Member], me: usize, now: u64) -> Result<(), Vec<usize>> {
    // Those at a common instant have one place, that of the first of them.
    let place = |at: usize| match &members[at].group {
        Some(group) => (0..members.len())
            .find(|other| members[*other].group.as_ref() == Some(group))
            .unwrap_or(at),
        None => at,
    };
    let mut before = who(members, now, |doing| doing == Doing::Freezes);
    if before.iter().any(|at| place(*at) == place(me)) {
        return Ok(());
    }
    let mut waiting = who(members, now, |doing| doing == Doing::WaitsToFreeze);
    waiting.retain(|at| *at != me);
    waiting.push(me);
    let turn = |at: usize| {
        let together = waiting.iter().filter(|other| place(**other) == place(at));
        let turns = together.map(|other| members[*other].turn());
        turns.min()
    };
    let mine = turn(me);
    let others: Vec<usize> = waiting
        .iter()
        .copied()
        .filter(|at| turn(*at) < mine)
        .collect();
    before.extend(others);
    let places: BTreeSet<usize> = before.iter().map(|at| place(*at)).collect();
    let freezes = strictest(members).freezes.max(1) as usize;
    if places.len() < freezes {
        Ok(())
    } else {
        Err(before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn member(doing: Doing) -> Member {
        Member {
            target: "a".to_owned(),
            key: "k".to_owned(),
            repository: "r".to_owned(),
            doing,
            due: None,
            urgent: false,
            residual: 0,
            group: None,
            served: 0,
            since: 0,
            seen: 0,
            rate: 0,
            limits: Limits::default(),
        }
    }

    #[test]
    fn turns_go_round_among_those_that_copy_or_want_to() {
        let mut members = vec![member(Doing::Copies)];
        assert_eq!(turns(&members, 0), 1);
        members.resize(5, member(Doing::Waits));
        members.resize(9, member(Doing::Idle));
        // Five of them, two at a time.
        assert_eq!(turns(&members, 0), 3);
        assert_eq!(turns(&[], 0), 1);
    }

    #[test]
    fn the_strictest_of_all_limits_counts() {
        let mut members = vec![member(Doing::Idle), member(Doing::Idle)];
        members[0].limits.rate = Some(10);
        members[1].limits = Limits {
            rate: Some(20),
            passes: 1,
            freezes: 3,
        };
        let limits = strictest(&members);
        assert_eq!(
            (limits.rate, limits.passes, limits.freezes),
            (Some(10), 1, 1)
        );
        assert_eq!(strictest(&[]), Limits::default());
    }

    #[test]
    fn urgent_ones_come_first_then_who_was_served_longest_ago_and_nobody_beside_a_freeze() {
        let mut members = vec![member(Doing::Waits); 4];
        for (at, served) in [40, 20, 30, 10].into_iter().enumerate() {
            members[at].key = at.to_string();
            members[at].served = served;
        }
        let first = |members: &[Member]| -> Vec<usize> {
            let may = (0..members.len()).filter(|at| may_copy(members, *at, 0).is_ok());
            may.collect()
        };
        assert_eq!(first(&members), [1, 3]);
        members[0].urgent = true;
        assert_eq!(first(&members), [0, 3]);
        members[2].doing = Doing::Copies;
        assert_eq!(first(&members), [0]);
        assert_eq!(may_copy(&members, 3, 0), Err(vec![2, 0]));
        members[2].doing = Doing::WaitsToFreeze;
        assert_eq!(first(&members), Vec::<usize>::new());
        assert_eq!(may_copy(&members, 0, 0), Err(vec![2]));
    }

    #[test]
    fn who_is_stopped_is_not_waited_for() {
        for doing in [
            Doing::Waits,
            Doing::Copies,
            Doing::WaitsToFreeze,
            Doing::Freezes,
        ] {
            let mut members = vec![member(doing), member(Doing::Waits)];
            members[0].key = "a".to_owned();
            members[0].limits.passes = 1;
            members[0].urgent = true;
            let now = 300 * SECOND;
            members[1].seen = now;
            assert_eq!(may_copy(&members, 1, now), Ok(()), "{doing:?}");
            members[0].seen = now - SECOND;
            assert_eq!(may_copy(&members, 1, now), Err(vec![0]), "{doing:?}");
        }
    }

    #[test]
    fn the_earliest_due_freezes_first_among_equals_the_smallest_and_a_group_is_one() {
        let mut members = vec![member(Doing::WaitsToFreeze); 5];
        for (at, (due, residual)) in [(2, 5), (1, 9), (1, 3), (3, 1), (9, 9)]
            .into_iter()
            .enumerate()
        {
            members[at].key = at.to_string();
            members[at].due = Some(due);
            members[at].residual = residual;
        }
        let first = |members: &[Member]| -> Vec<usize> {
            let asks = (0..members.len()).filter(|at| members[*at].doing != Doing::Idle);
            let may = asks.filter(|at| may_freeze(members, *at, 0).is_ok());
            may.collect()
        };
        assert_eq!(first(&members), [2]);
        members[2].doing = Doing::Freezes;
        assert_eq!(first(&members), [2], "its place is its own");
        members[2].doing = Doing::Idle;
        // With the last one: both go with the earlier one's turn, in one place.
        members[1].group = Some("g".to_owned());
        members[4].group = Some("g".to_owned());
        members[2].group = Some("other".to_owned());
        assert_eq!(first(&members), [1, 4]);
        members[1].doing = Doing::Freezes;
        assert_eq!(first(&members), [1, 4]);
        for member in &mut members {
            member.limits.freezes = 2;
        }
        assert_eq!(first(&members), [0, 1, 4]);
        // One without a due time comes last.
        members[0].due = None;
        assert_eq!(first(&members), [1, 3, 4]);
    }

    #[test]
    fn urgent_is_what_has_less_than_a_fifth_to_spare() {
        let seconds = Duration::from_secs;
        assert!(!is_urgent(true, seconds(120), seconds(100)));
        assert!(is_urgent(true, seconds(119), seconds(100)));
        assert!(is_urgent(false, seconds(1000), seconds(1)));
        assert!(!is_urgent(true, seconds(0), seconds(0)));
    }

    /// A host in virtual time: members come, ask, copy, freeze, are stopped and die at random.
    struct World {
        random: u64,
        now: u64,
        members: Vec<Member>,
        /// When its batch or freeze ends; only of those that have one.
        ends: Vec<u64>,
        stopped: Vec<bool>,
        joined: u32,
    }

    impl World {
        fn random(&mut self, below: u64) -> u64 {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            self.random % below
        }

        fn join(&mut self, limits: Limits) {
            let mut new = member(Doing::Idle);
            new.limits = limits;
            self.joined += 1;
            new.key = self.joined.to_string();
            new.urgent = self.random(3) == 0;
            new.due = Some(i64::try_from(self.random(100)).unwrap());
            new.residual = self.random(100);
            new.group = (self.random(4) == 0).then(|| self.random(2).to_string());
            self.members.push(new);
            self.ends.push(0);
            self.stopped.push(false);
        }

        fn set(&mut self, at: usize, doing: Doing) {
            self.members[at].doing = doing;
            self.members[at].since = self.now;
        }

        /// Asks as a member does: it sees itself last.
        fn asks(&self, at: usize, may: May) -> bool {
            let mut seen = self.members.clone();
            let me = seen.remove(at);
            seen.push(me);
            may(&seen, seen.len() - 1, self.now).is_ok()
        }

        /// One look of a member.
        fn step(&mut self, at: usize, copied: &mut u64) {
            self.members[at].seen = self.now;
            match self.members[at].doing {
                Doing::Idle => {
                    let next = if self.random(20) == 0 {
                        Doing::WaitsToFreeze
                    } else {
                        Doing::Waits
                    };
                    self.set(at, next);
                }
                Doing::Waits => {
                    if self.asks(at, may_copy) {
                        self.set(at, Doing::Copies);
                        self.members[at].served = self.now;
                        self.ends[at] = self.now + SECOND + self.random(3 * SECOND);
                        *copied += 1;
                    }
                }
                Doing::Copies => {
                    let others = freezing(&self.members, self.now);
                    if self.ends[at] <= self.now || !others.is_empty() {
                        self.set(at, Doing::Idle);
                    }
                }
                Doing::WaitsToFreeze => {
                    if self.asks(at, may_freeze) {
                        self.set(at, Doing::Freezes);
                        self.ends[at] = self.now + self.random(SECOND);
                    }
                }
                Doing::Freezes => {
                    if self.ends[at] <= self.now {
                        self.set(at, Doing::Idle);
                    }
                }
            }
        }

        fn places(&self, doing: Doing) -> usize {
            let found = who(&self.members, self.now, |does| does == doing);
            let places = found.iter().map(|at| match &self.members[*at].group {
                Some(group) if doing == Doing::Freezes => group.clone(),
                _ => format!("member {at}"),
            });
            places.collect::<BTreeSet<_>>().len()
        }
    }

    #[test]
    fn in_any_history_the_limits_hold_and_nobody_waits_for_ever() {
        for seed in 1..=40 {
            let mut world = World {
                random: 0x9E37_79B9_7F4A_7C15_u64.wrapping_mul(seed),
                now: 1000 * SECOND,
                members: Vec::new(),
                ends: Vec::new(),
                stopped: Vec::new(),
                joined: 0,
            };
            let limits = Limits {
                passes: u32::try_from(1 + world.random(3)).unwrap(),
                freezes: u32::try_from(1 + world.random(2)).unwrap(),
                rate: None,
            };
            let count = 2 + world.random(12);
            for _ in 0..count {
                world.join(limits);
            }
            let mut copied = 0;
            let mut stops: Vec<u64> = Vec::new();
            for _ in 0..4000 {
                world.now += SECOND / 5;
                for at in 0..world.members.len() {
                    let before = world.members[at].doing;
                    if !world.stopped[at] {
                        world.step(at, &mut copied);
                    }
                    if world.members[at].doing == before {
                        continue;
                    }
                    // Whoever goes on after it was stopped is one too many until it looks.
                    assert!(
                        world.places(Doing::Copies) <= limits.passes as usize,
                        "seed {seed}"
                    );
                    assert!(
                        world.places(Doing::Freezes) <= limits.freezes as usize,
                        "seed {seed}"
                    );
                }
                let at = usize::try_from(world.random(world.members.len() as u64)).unwrap();
                match world.random(2000) {
                    // It dies, and so what it held is free; another one comes.
                    0..10 => {
                        world.members.remove(at);
                        world.ends.remove(at);
                        world.stopped.remove(at);
                        world.join(limits);
                    }
                    10..12 if world.stopped.iter().filter(|stopped| **stopped).count() < 2 => {
                        world.stopped[at] = true;
                        stops.push(world.now);
                    }
                    _ => {}
                }
                for (at, member) in world.members.iter().enumerate() {
                    let waits = matches!(member.doing, Doing::Waits | Doing::WaitsToFreeze);
                    let waited = world.now - member.since;
                    // A minute until it counts as urgent, a turn of everybody's, and what those cost that were stopped.
                    let lasts = FREEZES_SILENT.as_secs() * SECOND;
                    let stopped = stops
                        .iter()
                        .filter(|at| **at + lasts > member.since)
                        .count();
                    let most = (60 + 10 * count) * SECOND + stopped as u64 * lasts;
                    assert!(
                        !waits || world.stopped[at] || waited < most,
                        "seed {seed}: {member:?} waits for {} s",
                        waited / SECOND
                    );
                }
            }
            assert!(copied > 100, "seed {seed}: {copied} batches");
        }
    }
}
