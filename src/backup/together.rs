//! Several targets at one instant: each has its run in a thread of its own, and the runs meet before every step that is to
//! be taken by all at once.
//!
//! ```text
//! copied, close    nothing is held: whoever is slow is waited for, and copies ahead in turn
//! prepared         scratches, connections, guards are ready
//! ready            the hooks before the freeze have run: nobody's guest is frozen yet
//! frozen           every guest's file systems are frozen, then the transactions, each in its thread
//! cut              all transactions are done, then the thaws
//! released         all guests are free of their snapshots, then one commit after the other
//! ```
//!
//! A run that fails leaves and is not waited for. From `prepared` to `cut` nobody waits for longer than a limit: whoever is
//! late then is left out, and finds that when it comes.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;

use crate::clock::Deadline;
use crate::exit::{Failure, Kind};

/// How often a run that waits looks whether it is interrupted.
const LOOK: Duration = Duration::from_millis(50);

/// How many groups this process had.
static GROUPS: AtomicU32 = AtomicU32::new(0);

/// Where the runs meet, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::backup) enum Stage {
    /// All has been copied ahead once.
    Copied,
    /// And what the guest wrote during the others' turns.
    Close,
    /// Everything of the freeze is prepared.
    Prepared,
    /// Nothing comes before the freeze of the file systems.
    Ready,
    /// The file systems are frozen.
    Frozen,
    /// The transaction is done.
    Cut,
    /// The guest is free.
    Released,
}

/// The targets whose points are of one instant, as a point keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Common {
    /// The targets, as they were spelled.
    pub targets: Vec<String>,
    /// From the beginning of the first transaction to the end of the last, milliseconds: no two of their instants are
    /// farther apart.
    pub spread_ms: u64,
    /// Whether all guests' file systems were frozen during all transactions: then it is one instant to the guests.
    pub one_instant: bool,
}

#[derive(Debug)]
struct Member {
    name: String,
    at: Option<Stage>,
    gone: bool,
    cut: Option<Transaction>,
}

#[derive(Debug, Clone, Copy)]
struct Transaction {
    begin: Instant,
    end: Instant,
    quiesced: bool,
}

#[derive(Debug)]
struct Group {
    members: Mutex<Vec<Member>>,
    changed: Condvar,
    turn: Arc<Mutex<()>>,
    name: String,
}

/// One run's seat in a group. Dropped, the run has left.
#[derive(Debug)]
pub struct Seat {
    group: Arc<Group>,
    index: usize,
}

/// A seat for each of these targets.
#[must_use]
pub fn seats(names: Vec<String>) -> Vec<Seat> {
    let count = names.len();
    let members = names.into_iter().map(|name| Member {
        name,
        at: None,
        gone: false,
        cut: None,
    });
    let group = Arc::new(Group {
        members: Mutex::new(members.collect()),
        changed: Condvar::new(),
        turn: Arc::default(),
        name: format!(
            "{}-{}",
            std::process::id(),
            GROUPS.fetch_add(1, Ordering::Relaxed)
        ),
    });
    let seat = |index| Seat {
        group: Arc::clone(&group),
        index,
    };
    (0..count).map(seat).collect()
}

impl Seat {
    /// Waits until all who are left have come to this stage. After `limit` those who have not are left out.
    pub(in crate::backup) fn meet(
        &self,
        stage: Stage,
        limit: Option<Duration>,
        stop: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        let deadline = limit.map(Deadline::after);
        let mut members = self.members();
        if members[self.index].gone {
            return Err(late(stage));
        }
        members[self.index].at = Some(stage);
        self.group.changed.notify_all();
        loop {
            let missing = |member: &Member| !member.gone && member.at < Some(stage);
            if !members.iter().any(missing) {
                return Ok(());
            }
            stop()?;
            let left = deadline.map_or(LOOK, Deadline::left).min(LOOK);
            if left.is_zero() {
                for member in members.iter_mut().filter(|member| missing(member)) {
                    tracing::warn!(target = member.name, "left out of the common instant");
                    member.gone = true;
                }
                self.group.changed.notify_all();
                return Ok(());
            }
            let waited = self.group.changed.wait_timeout(members, left);
            members = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A name that no other group of this host has.
    pub(in crate::backup) fn group_name(&self) -> String {
        self.group.name.clone()
    }

    /// What only one of the runs does at a time.
    pub(in crate::backup) fn turn(&self) -> Arc<Mutex<()>> {
        Arc::clone(&self.group.turn)
    }

    /// Notes the transaction of this run.
    pub(in crate::backup) fn note(&self, begin: Instant, end: Instant, quiesced: bool) {
        self.members()[self.index].cut = Some(Transaction {
            begin,
            end,
            quiesced,
        });
    }

    /// Who has come to the end, once all have met there.
    pub(in crate::backup) fn common(&self) -> Option<Common> {
        let members = self.members();
        let cut: Vec<(&str, Transaction)> = members
            .iter()
            .filter(|member| member.at == Some(Stage::Released))
            .filter_map(|member| Some((member.name.as_str(), member.cut?)))
            .collect();
        let begin = cut.iter().map(|(_, cut)| cut.begin).min()?;
        let end = cut.iter().map(|(_, cut)| cut.end).max()?;
        Some(Common {
            targets: cut.iter().map(|(name, _)| (*name).to_owned()).collect(),
            spread_ms: u64::try_from((end - begin).as_millis()).unwrap_or(u64::MAX),
            one_instant: cut.iter().all(|(_, cut)| cut.quiesced),
        })
    }

    fn members(&self) -> MutexGuard<'_, Vec<Member>> {
        let members = self.group.members.lock();
        members.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut members = self.members();
        // Who has come to the end is counted; it leaves to commit.
        members[self.index].gone = true;
        drop(members);
        self.group.changed.notify_all();
    }
}

fn late(stage: Stage) -> anyhow::Error {
    let what = match stage {
        Stage::Frozen => "the guest's file systems were frozen too late",
        Stage::Cut => "the transaction took too long",
        _ => "the freeze was prepared too late",
    };
    Failure::hinted(
        Kind::Missed,
        format!("left out of the common instant: {what} for the others"),
        "run the command again when the host is less busy, or back this target up by itself",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    const SOON: Option<Duration> = Some(Duration::from_millis(200));
    const LONG: Option<Duration> = Some(Duration::from_secs(60));

    fn three() -> [Seat; 3] {
        let names = ["a", "b", "c"].map(str::to_owned);
        seats(names.to_vec()).try_into().unwrap()
    }

    /// Nobody interrupts.
    const GO_ON: fn() -> Result<()> = || Ok(());

    #[test]
    fn nobody_passes_before_all_have_come() {
        let came = Mutex::new(0);
        std::thread::scope(|scope| {
            for (number, seat) in three().into_iter().enumerate() {
                let came = &came;
                scope.spawn(move || {
                    for round in [Stage::Prepared, Stage::Frozen, Stage::Cut] {
                        clock::sleep(Duration::from_millis(20 * number as u64));
                        *came.lock().unwrap() += 1;
                        seat.meet(round, LONG, &GO_ON).unwrap();
                        let all = match round {
                            Stage::Prepared => 3,
                            Stage::Frozen => 6,
                            _ => 9,
                        };
                        assert!(*came.lock().unwrap() >= all);
                    }
                });
            }
        });
    }

    #[test]
    fn who_fails_is_not_waited_for_and_who_is_late_is_left_out() {
        let [a, b, c] = three();
        drop(c);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| a.meet(Stage::Prepared, LONG, &GO_ON));
            b.meet(Stage::Prepared, LONG, &GO_ON).unwrap();
            waits.join().unwrap().unwrap();
        });
        let begin = clock::now();
        a.meet(Stage::Frozen, SOON, &GO_ON).unwrap();
        assert!(clock::now() - begin >= SOON.unwrap());
        let error = b.meet(Stage::Frozen, LONG, &GO_ON).unwrap_err();
        assert!(error.to_string().contains("left out"), "{error}");
        // Alone now: there is nobody to wait for.
        a.meet(Stage::Cut, None, &GO_ON).unwrap();
    }

    #[test]
    fn an_interrupted_run_waits_no_longer() {
        let [a, _b, _c] = three();
        let stopped = || Err(anyhow::anyhow!("interrupted"));
        a.meet(Stage::Copied, None, &stopped).unwrap_err();
    }

    #[test]
    fn the_instant_is_of_those_who_came_to_the_end() {
        let [a, b, c] = three();
        let begin = clock::now();
        let at = |millis| begin + Duration::from_millis(millis);
        a.note(at(0), at(5), true);
        b.note(at(2), at(9), true);
        c.note(at(3), at(70), false);
        drop(c);
        assert_eq!(a.common(), None);
        std::thread::scope(|scope| {
            let other = scope.spawn(|| b.meet(Stage::Released, None, &GO_ON));
            a.meet(Stage::Released, None, &GO_ON).unwrap();
            other.join().unwrap().unwrap();
        });
        // The first commits and goes; it counts all the same.
        drop(b);
        let common = a.common().unwrap();
        assert_eq!(common.targets, ["a", "b"]);
        assert_eq!(common.spread_ms, 9);
        assert!(common.one_instant);
    }
}
