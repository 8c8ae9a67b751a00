//! Copying ahead: when a pass is made and when one sleeps, what is expected of the freeze, and whether its limits hold.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Result;
use jiff::Timestamp;

use super::freeze::GivenUp;
use super::{Bytes as Copied, Runner, SMALL};
use crate::budget;
use crate::clock::{self, Deadline};
use crate::exit::{Failure, Kind, classify};
use crate::plan::outlook::OnMiss;
use crate::plan::{Debt, Outlook, Patience, Situation, Step, ahead};
use crate::qmp;
use crate::vm::Hold;

/// So little is left alone when nothing is due.
const LITTLE: u64 = 16 << 20;
/// More live passes than this do not make a residual smaller.
const PASSES: u32 = 12;
/// Two rotations so far apart show what changes just now.
const PROBE: Duration = Duration::from_millis(500);
/// A rotation so shortly ago shows it, too.
const WATCHED: Duration = Duration::from_secs(3);
/// With less time than this nothing is found out first.
const NO_PROBE: Duration = Duration::from_millis(2500);
/// Commands to a VM are so far apart, but for the last moment.
const APART: Duration = Duration::from_millis(10);
const IN_A_HURRY: Duration = Duration::from_secs(1);
/// After trouble that passes by itself.
const AFTER_TROUBLE: Duration = Duration::from_secs(2);
/// The due time is looked for by the wall clock so often.
const LAST_WAIT: Duration = Duration::from_millis(20);
/// So long before the due time a freeze is prepared: what it needs in the VM is there, and the guard watches.
pub(super) const PREPARE: Duration = Duration::from_secs(1);
/// Idle time is used for an audit when there is so much of it.
const IDLE: Duration = Duration::from_secs(5);
const IDLE_BEFORE_DUE: Duration = Duration::from_secs(30);

impl Runner {
    /// Copies ahead until what is left no longer shrinks, or until one of the limits. Returns the bytes that a freeze would
    /// find now, and whether the limit was reached.
    pub fn precopy(
        &mut self,
        once: bool,
        until: Option<Deadline>,
        converge: Option<u64>,
    ) -> Result<(u64, bool)> {
        if let Some(due) = until {
            return self.precopy_until(due, converge);
        }
        // Who names a residual gets it, whatever of it is copied in vain.
        self.patience = match converge {
            Some(_) => Patience::None,
            None => Patience::Until(None),
        };
        let mut before = u64::MAX;
        let reached = |left| converge.is_none_or(|converge| left <= converge);
        for _ in 0..PASSES {
            self.pass(None)?;
            let debt = self.look()?;
            let left = debt.total();
            let useful = left.saturating_sub(debt.postponed);
            let shrinks = left < before / 10 * 8;
            before = left;
            if once || (converge.is_some() && reached(left)) || !shrinks || useful <= LITTLE {
                break;
            }
        }
        Ok((before, reached(before)))
    }

    /// Copies ahead until the backup that is due then is to be prepared.
    pub fn precopy_before(&mut self, due: Deadline) -> Result<()> {
        self.precopy_until(due.earlier(PREPARE), None)?;
        Ok(())
    }

    /// Copies ahead for as long as there is time. What passes by itself (somebody else's use of the VM, a restart) is
    /// waited for: the time that a backup is due has not come.
    fn precopy_until(&mut self, due: Deadline, converge: Option<u64>) -> Result<(u64, bool)> {
        self.ahead_until = Some(due);
        let done = self.steps_ahead(due, converge);
        self.ahead_until = None;
        done
    }

    /// Where there is time, what is asked of a VM in our hands is not asked in one go.
    pub(super) fn space(&self, hold: &mut Hold) {
        let time = self
            .ahead_until
            .is_some_and(|until| until.left() > IN_A_HURRY);
        hold.monitor
            .space(if time { APART } else { Duration::ZERO });
    }

    fn steps_ahead(&mut self, due: Deadline, converge: Option<u64>) -> Result<(u64, bool)> {
        let mut left = u64::MAX;
        let mut trouble = String::new();
        let reached = |left| converge.is_none_or(|converge| left <= converge);
        loop {
            let done = match self.step_ahead(due, due, converge) {
                Ok((found, nap)) => {
                    left = found;
                    if let Some(nap) = nap {
                        self.sleep_ahead(nap, due)?;
                    }
                    converge.is_some() && reached(left)
                }
                Err(error) if passes_by_itself(&error) => {
                    let words = format!("{error:#}");
                    if words != trouble {
                        tracing::warn!("{words}; trying again");
                        trouble = words;
                    }
                    self.pause(AFTER_TROUBLE.min(due.left()))?;
                    false
                }
                Err(error) => return Err(error),
            };
            if done || due.passed() {
                self.cooling = false;
                return Ok((left, reached(left)));
            }
        }
    }

    /// A pass, if one pays now, that ends at `until`; else the time for which there is nothing to do. With what a freeze would
    /// find.
    fn step_ahead(
        &mut self,
        until: Deadline,
        due: Deadline,
        converge: Option<u64>,
    ) -> Result<(u64, Option<Duration>)> {
        let (mut hold, mut debt) = self.look_and_hold()?;
        let outlook = loop {
            let total = debt.total();
            if converge.is_some_and(|converge| total <= converge) {
                return Ok((total, None));
            }
            let outlook = self.outlook(&debt, due.left());
            self.expect(outlook);
            let urgent = self.options.hard && !outlook.in_time;
            self.options.urgent.store(urgent, Ordering::Relaxed);
            self.note_urgent(self.is_urgent(&debt, &outlook, due.left()));
            let step = ahead::next(&Situation {
                left: due.left(),
                debt,
                fit: self.learned.change.fit(),
                copy: self.copy_speed(),
                since: self.rotated[0].map(|rotated| clock::now() - rotated),
                watched: self.watching_since().filter(|_| self.passes == 0),
                dull: self.dull,
            });
            tracing::debug!(?step, ?debt, ?outlook, left = ?due.left(), "ahead");
            match step {
                Step::Nap(nap) => return Ok((total, Some(nap))),
                // What it has looked at tells what comes next.
                Step::Watch if self.rotate_only(&mut hold)? => debt = self.debt(&hold),
                // A VM that is off changes nothing that could be watched.
                Step::Watch | Step::Pass | Step::LastPass => break outlook,
            }
        };
        let total = debt.total();
        self.choose_patience(&debt, &outlook, due, converge);
        self.probe(hold, until)?;
        let useful = |bytes: Copied| bytes.precopied - bytes.superseded;
        let before = useful(self.bytes);
        let owed = debt.useful(self.learned.change.fit());
        self.schedule = (!self.options.hard).then_some((due, owed));
        let done = self.pass(Some(until));
        self.schedule = None;
        self.watch().need(None);
        done?;
        let copied = useful(self.bytes) - before;
        self.dull = if ahead::is_dull(copied) {
            self.dull + 1
        } else {
            0
        };
        Ok((total, None))
    }

    /// Sleeps, or audits.
    fn sleep_ahead(&mut self, nap: Duration, due: Deadline) -> Result<()> {
        let asleep = due.at_most(nap);
        self.audit_if_idle(nap, due)?;
        self.pause(asleep.left())
    }

    fn audit_if_idle(&mut self, nap: Duration, due: Deadline) -> Result<()> {
        if nap < IDLE || due.left() < IDLE_BEFORE_DUE {
            return Ok(());
        }
        self.audit_idle(due.at_most(nap))
    }

    /// What the next pass may leave for later: nothing where that would miss a limit.
    fn choose_patience(
        &mut self,
        debt: &Debt,
        outlook: &Outlook,
        due: Deadline,
        converge: Option<u64>,
    ) {
        let largest = self.options.limits.largest(&self.learned.speeds);
        let most = largest.into_iter().chain(converge).min();
        let later = debt.postponed > 0;
        let impatient = most.is_some_and(|most| outlook.in_time && outlook.residual > most);
        self.patience = if later && impatient {
            Patience::None
        } else {
            Patience::Until(Some(due.left()))
        };
        self.cooling = self.patience != Patience::None;
    }

    /// Rotates a moment before the pass does, so that it knows what changes just now.
    fn probe(&mut self, mut hold: Hold, until: Deadline) -> Result<()> {
        let watched = self.rotated[0].is_some_and(|rotated| clock::now() - rotated < WATCHED);
        if !self.cooling || watched || until.left() < NO_PROBE {
            return Ok(());
        }
        let rotated = self.rotate_only(&mut hold)?;
        drop(hold);
        if rotated {
            self.pause(PROBE)?;
        }
        Ok(())
    }

    /// A rotation without a pass, to see what changes between two. Says whether one was made.
    fn rotate_only(&mut self, hold: &mut Hold) -> Result<bool> {
        if !hold.lasting()? || self.vm.offline() {
            return Ok(false);
        }
        if self.rotated[0].is_none() {
            // From here to the first batch nothing is copied: what guest and host do without us is known then.
            let machine = hold.machine_seen()?.clone();
            self.watch().begin(&mut hold.monitor, &machine, false);
            self.watch().rest();
        }
        self.rotate(hold, false)?;
        for disk in &mut self.disks {
            disk.open = None;
        }
        Ok(true)
    }

    /// Looks at what is not copied yet, and learns from it how fast that grows.
    fn look(&mut self) -> Result<Debt> {
        Ok(self.look_and_hold()?.1)
    }

    fn look_and_hold(&mut self) -> Result<(Hold, Debt)> {
        let mut hold = self.hold()?;
        self.sample_writes(&mut hold)?;
        let debt = self.debt(&hold);
        if let Some(rotated) = self.rotated[0] {
            let seconds = (clock::now() - rotated).as_secs_f64();
            #[allow(clippy::cast_precision_loss, reason = "a measure")]
            self.learned.change.looked(seconds, debt.live as f64);
        }
        Ok((hold, debt))
    }

    fn copy_speed(&self) -> f64 {
        self.learned.speeds.copy(self.rate())
    }

    fn outlook(&self, debt: &Debt, left: Duration) -> Outlook {
        let (fit, speeds) = (self.learned.change.fit(), &self.learned.speeds);
        Outlook::with_passes(debt, fit, speeds, self.rate(), left)
    }

    /// Before anything was measured it would be a guess.
    fn expect(&mut self, outlook: Outlook) {
        self.predicted = self.learned.change.fit().map(|_| outlook);
    }

    /// Within a pass before a due time: how fast it really goes changes what is to be expected, also for who asks `status`.
    pub(super) fn predict(&mut self, hold: &Hold) {
        let Some((due, _)) = self.schedule else {
            return;
        };
        let debt = self.debt(hold);
        let outlook = self.outlook(&debt, due.left());
        self.expect(outlook);
        self.note_urgent(self.is_urgent(&debt, &outlook, due.left()));
        self.keep_measures();
    }

    #[allow(clippy::cast_precision_loss, reason = "sizes for predictions")]
    fn is_urgent(&self, debt: &Debt, outlook: &Outlook, left: Duration) -> bool {
        let useful = debt.useful(self.learned.change.fit()) as f64;
        let needed = Duration::try_from_secs_f64(useful / self.copy_speed());
        budget::order::is_urgent(outlook.in_time, left, needed.unwrap_or(Duration::MAX))
    }

    /// How long it is until the instant may be.
    pub(super) fn until_due(&self) -> Duration {
        let until = self
            .not_before
            .map(|due| due.duration_since(clock::utc_now()));
        until
            .and_then(|until| Duration::try_from(until).ok())
            .unwrap_or_default()
    }

    /// Waits for that, or until so long before it, by the wall clock: nothing is frozen before its time.
    pub(super) fn wait_until_due(&self, before: Duration) -> Result<()> {
        loop {
            let left = self.until_due().saturating_sub(before);
            if left.is_zero() {
                return Ok(());
            }
            self.check_interrupt()?;
            clock::sleep(left.min(LAST_WAIT));
        }
    }

    /// Waits for that with the VM in our hands, which is never for long.
    pub(super) fn wait_prepared(&self) -> Result<()> {
        loop {
            let left = self.until_due();
            if left.is_zero() {
                return Ok(());
            }
            if left > PREPARE {
                return Err(GivenUp("the host's clock was set back".to_owned()).into());
            }
            self.check_interrupt()?;
            clock::sleep(left.min(LAST_WAIT));
        }
    }

    pub(super) fn pause(&self, pause: Duration) -> Result<()> {
        let deadline = Deadline::after(pause);
        while !deadline.passed() {
            self.check_interrupt()?;
            clock::sleep(deadline.left().min(Duration::from_millis(50)));
        }
        Ok(())
    }

    /// Live passes for as long as they make what the freeze will find smaller, down to what is not worth one.
    pub(super) fn converge(&mut self) -> Result<()> {
        let mut hold = self.hold()?;
        self.sample_writes(&mut hold)?;
        let debt = self.debt(&hold);
        if !hold.lasting()? {
            return Ok(());
        }
        drop(hold);
        if self.predicted.is_none() {
            let (fit, speeds) = (self.learned.change.fit(), &self.learned.speeds);
            let rate = self.rate();
            let mut outlook = Outlook::alone(&debt, fit, speeds, rate, Duration::ZERO);
            if debt.total() > SMALL {
                // Much is copied live before; what it comes to is the window, but not the residual.
                outlook.residual = self.outlook(&debt, Duration::MAX).residual;
            } else {
                outlook.window_ms = speeds.window_ms(outlook.residual);
            }
            self.predicted = Some(outlook);
        }
        self.options
            .urgent
            .store(self.options.hard, Ordering::Relaxed);
        self.note_urgent(true);
        let limit = self.options.limits.largest(&self.learned.speeds);
        // What the freeze reads in a moment makes a shorter window than a pass before it.
        let moment = if debt.whole > 0 {
            SMALL
        } else {
            let spooled = self.learned.speeds.spooled_in(self.options.deadline / 4);
            spooled.max(SMALL)
        };
        let small = limit.map_or(moment, |limit| limit.min(SMALL));
        let small = small.min(self.readable());
        self.patience = if limit.is_some_and(|limit| limit < debt.postponed) {
            Patience::None
        } else {
            Patience::Until(None)
        };
        // Who names no limit gets no live pass for what changes all the time: it would only make the window longer.
        let worth = |this: &Self, debt: &Debt| match limit {
            Some(_) => debt.total().saturating_sub(debt.postponed),
            None => debt.useful(this.learned.change.fit()),
        };
        let mut left = worth(self, &debt);
        let mut passes = 0;
        while left > small && passes < PASSES {
            self.progress.begin("copy ahead", debt.total());
            self.pass(None)?;
            passes += 1;
            let debt = self.look()?;
            let now = worth(self, &debt);
            let shrinks = now < left / 10 * 8;
            left = now;
            if !shrinks {
                break;
            }
        }
        Ok(())
    }

    /// Fails where the limits cannot be held by a freeze that begins now, and none is wanted then.
    pub(super) fn decide(&mut self, due: Timestamp) -> Result<()> {
        let limits = self.options.limits;
        if limits.on_miss == OnMiss::Backup {
            return Ok(());
        }
        let hold = self.hold()?;
        let left = self.debt(&hold).expected();
        drop(hold);
        let late = clock::utc_now().duration_since(due).as_millis();
        let late = u64::try_from(late).unwrap_or(0);
        let window = late + self.learned.speeds.window_ms(left);
        let Some(missed) = limits.missed(left, window) else {
            return Ok(());
        };
        Err(Failure::hinted(
            Kind::Missed,
            format!("no point is made: it would take {missed}"),
            "what is copied stays: begin earlier, run it when the guest writes less, or give `--on-miss backup`",
        ))
    }
}

/// Trouble that may be over in a while.
fn passes_by_itself(error: &anyhow::Error) -> bool {
    let (kind, _) = classify(error);
    let gone = error.chain().any(|cause| {
        matches!(
            cause.downcast_ref(),
            Some(
                qmp::Error::Unreachable { .. }
                    | qmp::Error::Unconnected { .. }
                    | qmp::Error::Closed
                    | qmp::Error::Lost { .. }
                    | qmp::Error::Timeout { .. }
            )
        )
    });
    kind == Kind::Busy || gone
}
