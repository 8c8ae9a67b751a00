//! What comes next while a backup is not due yet: a pass where one pays, else sleep. First it is watched for a while what the
//! guest rewrites all the time, since copying that would be in vain. Shortly before the due time comes a last pass, so that the
//! residual is what was written since.
//!
//! ```text
//! watch   pass pass pass ..... nap ..... pass ........ nap ........ pass .......... nap ......... last pass | due
//!         while much is open   until a useful batch has come, or longer where passes bring little
//! ```

use std::time::Duration;

use super::change::Fit;
use super::outlook::{Debt, LAST_PASS};

/// A pass is worth its rotation and exports from so many bytes on.
const WORTH: u64 = 16 << 20;
/// Between two looks.
const SHORTEST_NAP: Duration = Duration::from_secs(2);
const LONGEST_NAP: Duration = Duration::from_secs(60);
/// Passes that bring little come no more often than this.
const RAREST: Duration = Duration::from_secs(600);
/// In the last moment nothing is begun.
const LAST: Duration = Duration::from_secs(1);
/// The last pass is begun this much earlier than it is thought to take.
const MARGIN: f64 = 1.25;
/// The guest is watched for this share of the time that is to spare, within these bounds, with so many rotations.
const WATCHED: f64 = 0.4;
const SHORTEST_WATCH: f64 = 4.0;
const LONGEST_WATCH: f64 = 60.0;
const LOOKS: f64 = 4.0;
/// Copying may take so many times as long as it is thought to.
const SPARE: f64 = 2.0;

/// A pass is not drawn out beyond what is hardly felt, bytes a second.
const SLOWEST: u64 = 8 << 20;

/// What is known when the next step is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Situation {
    /// Until the due time.
    pub left: Duration,
    /// What is not copied yet.
    pub debt: Debt,
    /// How the guest changes it.
    pub fit: Option<Fit>,
    /// Bytes a second that passes copy.
    pub copy: f64,
    /// Since the last rotation; `None` when there was none.
    pub since: Option<Duration>,
    /// For how long it has been seen what changes, while no pass was made.
    pub watched: Option<Duration>,
    /// How many passes in a row have brought little.
    pub dull: u32,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A rotation, to see what changes.
    Watch,
    /// A pass.
    Pass,
    /// The last one.
    LastPass,
    /// Look again after this time.
    Nap(Duration),
}

/// Whether a pass that copied so much was hardly worth it.
#[must_use]
pub fn is_dull(copied: u64) -> bool {
    copied < WORTH / 4
}

/// How fast passes need to be to have copied all in a part of the time that is left, bytes a second: whatever goes faster
/// hurts for nothing. `turns` is how many times as long it takes since others have their turns.
#[must_use]
pub fn pace(left: Duration, useful: u64, fit: Option<Fit>, turns: u32) -> u64 {
    let left = (left.as_secs_f64() - LAST_PASS).max(LAST_PASS);
    #[allow(clippy::cast_precision_loss, reason = "sizes for predictions")]
    let needed = useful as f64 / left + fit.map_or(0.0, |fit| fit.steady);
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a positive number is meant, and saturates"
    )]
    let needed = (needed * SPARE * f64::from(turns)) as u64;
    needed.max(SLOWEST)
}

/// The next step.
#[must_use]
pub fn next(now: &Situation) -> Step {
    let useful = now.debt.useful(now.fit);
    #[allow(clippy::cast_precision_loss, reason = "sizes for predictions")]
    let (copying, missing) = (
        useful as f64 / now.copy.max(1.0),
        WORTH.saturating_sub(useful) as f64,
    );
    if let Some(step) = watch(now, useful, copying) {
        return step;
    }
    let Some(since) = now.since else {
        return Step::Pass;
    };
    if now.left <= LAST {
        return Step::Nap(now.left);
    }
    let tail = Duration::from_secs_f64((LAST_PASS + copying) * MARGIN).min(RAREST);
    if now.left <= tail {
        // What was read a moment ago is not read better now.
        if since >= now.left.min(tail) && now.debt.total() > 0 {
            return Step::LastPass;
        }
        if useful < WORTH {
            return Step::Nap(now.left.min(SHORTEST_NAP));
        }
    }
    let patience = SHORTEST_NAP
        .saturating_mul(1 << now.dull.min(16))
        .min(RAREST);
    let wait = if useful >= WORTH {
        if now.dull == 0 || since >= patience {
            return Step::Pass;
        }
        patience.saturating_sub(since)
    } else {
        let steady = now.fit.map_or(0.0, |fit| fit.steady);
        if steady > 0.0 {
            Duration::try_from_secs_f64(missing / steady).unwrap_or(LONGEST_NAP)
        } else {
            LONGEST_NAP
        }
    };
    let until_tail = now
        .left
        .saturating_sub(tail)
        .max(Duration::from_millis(100));
    Step::Nap(wait.clamp(SHORTEST_NAP, LONGEST_NAP).min(until_tail))
}

/// What is done before the first pass. Where a disk is to be read in full there is work that nothing makes vain, where little is
/// to be copied little can be in vain, and where time is short there is none for it.
fn watch(now: &Situation, useful: u64, copying: f64) -> Option<Step> {
    let little = now.since.is_none() && useful < WORTH;
    if little || now.debt.whole > 0 || (now.since.is_some() && now.watched.is_none()) {
        return None;
    }
    let watched = now.watched.unwrap_or_default();
    let to_spare = (now.left + watched).as_secs_f64() - (LAST_PASS + copying) * SPARE;
    let time = (to_spare * WATCHED).min(LONGEST_WATCH);
    if time < SHORTEST_WATCH || watched.as_secs_f64() >= time {
        return None;
    }
    let Some(since) = now.since else {
        return Some(Step::Watch);
    };
    let next = Duration::from_secs_f64(time / LOOKS).saturating_sub(since);
    Some(if next.is_zero() {
        Step::Watch
    } else {
        Step::Nap(next)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A guest in virtual time: `hot` bytes rewritten all the time, `steady` bytes a second on top; a copy of 100 MiB/s.
    struct Guest {
        now: f64,
        hot: f64,
        steady: f64,
        open: f64,
        rotated: Option<f64>,
        dull: u32,
        passes: u32,
        looks: u32,
        copied: f64,
        last_pass: Option<f64>,
        first: Option<f64>,
        watches: u32,
        first_pass: Option<f64>,
    }

    impl Guest {
        fn run(hot: u64, steady: u64, open: u64, due: f64) -> Self {
            let float = |mib: u64| f64::from(u32::try_from(mib).unwrap()) * 1_048_576.0;
            let mut guest = Self {
                now: 0.0,
                hot: float(hot),
                steady: float(steady) / 16.0,
                open: float(open),
                rotated: None,
                dull: 0,
                passes: 0,
                looks: 0,
                copied: 0.0,
                last_pass: None,
                first: None,
                watches: 0,
                first_pass: None,
            };
            while guest.now < due {
                guest.looks += 1;
                let step = next(&guest.situation(due));
                match step {
                    Step::Watch => {
                        // What came since the last one is open now.
                        let since = guest.rotated.map_or(0.0, |since| guest.now - since);
                        guest.open += guest.steady * since;
                        guest.rotated = Some(guest.now);
                        guest.first = guest.first.or(guest.rotated);
                        guest.watches += 1;
                    }
                    Step::Nap(nap) => {
                        assert!(nap.as_secs_f64() <= due - guest.now + 0.001);
                        guest.now += nap.as_secs_f64().max(0.001);
                    }
                    Step::Pass => guest.pass(due),
                    Step::LastPass => {
                        guest.pass(due);
                        guest.last_pass = guest.rotated;
                    }
                }
                assert!(guest.looks < 10_000, "it does not come to an end");
            }
            guest
        }

        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "sizes"
        )]
        fn situation(&self, due: f64) -> Situation {
            let since = self.rotated.map(|rotated| self.now - rotated);
            let live = since.map_or(0.0, |since| self.hot + self.steady * since);
            Situation {
                left: Duration::from_secs_f64((due - self.now).max(0.0)),
                debt: Debt {
                    open: (self.open + self.hot) as u64,
                    postponed: self.hot as u64,
                    live: live as u64,
                    whole: 0,
                    size: 1 << 40,
                },
                fit: Some(Fit {
                    hot: self.hot,
                    within: 1.0,
                    steady: self.steady,
                }),
                copy: 100.0 * 1_048_576.0,
                since: since.map(Duration::from_secs_f64),
                watched: self
                    .first
                    .filter(|_| self.passes == 0)
                    .map(|first| Duration::from_secs_f64(self.now - first)),
                dull: self.dull,
            }
        }

        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "sizes"
        )]
        fn pass(&mut self, due: f64) {
            let since = self.rotated.map_or(0.0, |rotated| self.now - rotated);
            self.rotated = Some(self.now);
            self.first_pass = self.first_pass.or(self.rotated);
            let todo = self.open + self.steady * since;
            let takes = 1.0 + todo / (100.0 * 1_048_576.0);
            let done = todo * ((due - self.now) / takes).min(1.0);
            self.now += takes.min(due - self.now);
            self.open = todo - done;
            self.copied += done;
            self.passes += 1;
            self.dull = if is_dull(done as u64) {
                self.dull + 1
            } else {
                0
            };
        }
    }

    #[test]
    fn all_is_copied_first_then_a_pass_comes_when_a_batch_has_and_the_last_one_right_before() {
        // 1/16 MiB a second: 225 MiB in the hour.
        let guest = Guest::run(64, 1, 10_000, 3600.0);
        assert!(guest.open < 1.0);
        assert!((2..40).contains(&guest.passes), "{} passes", guest.passes);
        assert!(guest.looks < 200, "{} looks", guest.looks);
        let last = guest.last_pass.unwrap();
        assert!((3580.0..3600.0).contains(&last), "the last pass at {last}");
    }

    #[test]
    fn the_guest_is_watched_before_the_first_pass_where_there_is_time() {
        let guest = Guest::run(64, 1, 1000, 3600.0);
        assert_eq!(guest.watches, 4);
        let first = guest.first_pass.unwrap();
        assert!((59.0..65.0).contains(&first), "the first pass at {first}");
        // 10 s of copying in 30 s.
        let hurried = Guest::run(64, 1, 1000, 30.0);
        assert_eq!((hurried.watches, hurried.first_pass), (0, Some(0.0)));
        assert!(hurried.open < 1.0);
        let short = Guest::run(64, 1, 100, 30.0);
        assert_eq!(short.watches, 4);
        assert!((4.0..12.0).contains(&short.first_pass.unwrap()));
        assert!(short.open < 1.0);
    }

    #[test]
    fn an_idle_guest_is_left_alone() {
        let guest = Guest::run(0, 0, 0, 3600.0);
        assert_eq!(guest.passes, 1);
        assert!(guest.looks < 80, "{} looks", guest.looks);
    }

    #[test]
    fn passes_go_on_while_much_is_open() {
        let guest = Guest::run(0, 16, 100_000, 600.0);
        // 60,000 MiB at most can be copied.
        assert!(guest.copied > 55_000.0 * 1_048_576.0);
        assert!(guest.open > 0.0);
    }

    #[test]
    fn a_hot_set_alone_causes_no_busy_passes() {
        let guest = Guest::run(512, 0, 0, 3600.0);
        assert!(guest.passes <= 3, "{} passes", guest.passes);
        assert!(guest.last_pass.is_some());
    }

    #[test]
    fn passes_go_twice_as_fast_as_they_must() {
        let left = Duration::from_secs_f64(100.0 + LAST_PASS);
        assert_eq!(pace(left, 0, None, 1), SLOWEST);
        assert_eq!(pace(left, 1000 * MIB, None, 1), 20 * MIB);
        let fit = Fit {
            hot: 0.0,
            within: 1.0,
            steady: 1_048_576.0,
        };
        assert_eq!(pace(left, 1000 * MIB, Some(fit), 1), 22 * MIB);
        // Every third turn is this run's.
        assert_eq!(pace(left, 1000 * MIB, None, 3), 60 * MIB);
        assert!(pace(Duration::ZERO, 1000 * MIB, None, 1) > 600 * MIB);
    }

    #[test]
    fn dull_passes_become_rare() {
        let mut now = Guest::run(0, 0, 0, 0.0).situation(7200.0);
        now.since = Some(Duration::from_secs(30));
        now.debt.live = 100 * MIB;
        assert_eq!(next(&now), Step::Pass);
        now.dull = 8;
        assert!(matches!(next(&now), Step::Nap(_)));
        now.since = Some(RAREST);
        assert_eq!(next(&now), Step::Pass);
    }
}
