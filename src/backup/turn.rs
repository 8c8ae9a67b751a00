//! Turns: what runs on one host, in whichever process, do after each other. While a turn to copy is waited for
//! nothing is held; while one to freeze is, all is prepared for it.

use std::time::Duration;

use anyhow::Result;
use jiff::Timestamp;

use super::Runner;
use crate::budget::{Place, Turn};
use crate::clock::{self, Deadline};

/// Between two tries.
const LOOK: Duration = Duration::from_millis(50);
/// How long a freeze waits for its turn. A point is worth more than the budget.
pub(super) const FREEZE_WAIT: Duration = Duration::from_secs(60);
/// A wait as short as that of one batch is not worth telling.
const WORTH_TELLING: Duration = Duration::from_secs(10);

/// A turn that has come; without a budget there are none to wait for.
#[derive(Debug)]
pub(super) struct Turned(#[expect(dead_code, reason = "it is held")] Option<Place>);

impl Runner {
    /// The rate that this run may have at most.
    pub(super) fn rate(&self) -> Option<u64> {
        let host = self.rate_of_all();
        host.into_iter().chain(self.options.load.rate).min()
    }

    pub(super) fn rate_of_all(&self) -> Option<u64> {
        self.share.as_ref().and_then(|share| share.rate())
    }

    /// How many turns go round until this run has one again.
    pub(super) fn turns(&self) -> u32 {
        self.share.as_ref().map_or(1, |share| share.turns())
    }

    /// Tells the other runs whether this one would be too late.
    pub(super) fn note_urgent(&self, urgent: bool) {
        if let Some(share) = &self.share {
            share.note(|me| me.urgent = urgent);
        }
    }

    /// Tells the other runs when the backup of this one is due.
    pub(super) fn tell_due(&self, due: Timestamp) {
        if let Some(share) = &self.share {
            share.tell(|me| me.due = Some(due.as_millisecond()));
        }
    }

    /// So much can be read in half the time that a freeze has, by the rate of all runs.
    pub(super) fn readable(&self) -> u64 {
        let half = self.options.deadline.as_secs() / 2;
        let readable = self.rate_of_all().map(|rate| rate.saturating_mul(half));
        readable.unwrap_or(u64::MAX)
    }

    /// Whether a batch is to end since another run freezes.
    pub(super) fn yields(&self) -> bool {
        self.share.as_ref().is_some_and(|share| share.yields())
    }

    /// Waits until so much more may be read by the rate of all runs.
    pub(super) fn wait_for_rate(&self, bytes: u64, keep_on: &dyn Fn() -> bool) -> bool {
        self.share
            .as_ref()
            .is_none_or(|share| share.wait(bytes, keep_on))
    }

    /// Waits for the turn of a batch; `None` when the time is up before.
    pub(super) fn turn_to_copy(&self, until: Option<Deadline>) -> Result<Option<Turned>> {
        let Some(share) = &self.share else {
            return Ok(Some(Turned(None)));
        };
        let begun = clock::now();
        let mut asked = false;
        let mut told = false;
        let turn = loop {
            self.check_interrupt()?;
            // Guest and host may have less room when the turn comes than they had before.
            let stops = asked.then(|| self.watch().waits()).flatten();
            let words = if let Some(words) = stops {
                share.rest();
                words
            } else {
                match share.copy() {
                    Turn::Begun(place) => break Some(Turned(Some(place))),
                    Turn::NotYet(words) => words,
                }
            };
            asked = true;
            if !words.is_empty() {
                if !told && clock::now() - begun > WORTH_TELLING {
                    tracing::info!("{words}");
                    told = true;
                }
                self.progress.note(&words);
            }
            if until.is_some_and(Deadline::passed) {
                share.rest();
                break None;
            }
            clock::sleep(until.map_or(LOOK, |until| LOOK.min(until.left())));
        };
        self.progress.note("");
        Ok(turn)
    }

    /// Waits for the turn of a freeze, for a limited time. All is prepared then, and the guest feels nothing of it. Where it has
    /// to wait it says so first.
    pub(super) fn turn_to_freeze(&mut self, waits: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let Some(share) = &self.share else {
            return Ok(());
        };
        let begun = clock::now();
        let deadline = Deadline::after(FREEZE_WAIT);
        let residual = self.predicted.map_or(0, |outlook| outlook.residual);
        share.note(|me| me.residual = residual);
        let mut last = String::new();
        let place = loop {
            self.check_interrupt().inspect_err(|_| share.rest())?;
            match share.freeze() {
                Turn::Begun(place) => break place,
                Turn::NotYet(words) if words.is_empty() => {}
                Turn::NotYet(words) => {
                    if last.is_empty() {
                        waits().inspect_err(|_| share.rest())?;
                    }
                    self.progress.note(&words);
                    last = words;
                }
            }
            if deadline.passed() {
                self.warnings.push(format!(
                    "{last} for {} s already: freezing all the same",
                    FREEZE_WAIT.as_secs()
                ));
                break share.freeze_all_the_same();
            }
            clock::sleep(LOOK);
        };
        self.progress.note("");
        self.place = Some(Turned(Some(place)));
        self.waited += clock::now() - begun;
        Ok(())
    }
}
