//! How long a batch of a pass goes on, and the pause after it: who waits for the VM gets it soon, and the guest, which feels
//! the beginning and the end of a batch, gets few of them.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Runner;
use crate::clock::{self, Deadline};
use crate::hoststate::TargetState;

/// How long a batch holds the VM's exports at most where somebody waits for it: another command, or a run of another repository,
/// which gets no longer ones either.
const BATCH: Duration = Duration::from_secs(3);
/// As [`BATCH`], of a domain that is copied before its time.
const BATCH_AHEAD: Duration = Duration::from_secs(10);
/// Between two looks at whether one waits.
const LOOK: Duration = Duration::from_millis(100);
/// Between two batches, so that an operator's command that waits gets its turn.
const BETWEEN: Duration = Duration::from_millis(50);
/// As [`BETWEEN`], where libvirt refuses at once what a batch stands in the way of, and the operator tries again.
const BETWEEN_DOMAIN: Duration = Duration::from_millis(200);
/// As [`BETWEEN_DOMAIN`], after a batch of much more than [`BATCH`].
const BETWEEN_AHEAD: Duration = Duration::from_secs(1);
/// Between two batches over the images of a VM that is off: whoever starts it fails while they are held, and tries again.
const BETWEEN_OFF: Duration = Duration::from_secs(1);

/// A batch's end, while it goes on.
pub(super) struct End<'a> {
    begun: Instant,
    until: Option<Deadline>,
    state: &'a TargetState,
    /// When it is to be looked at next, and what was found.
    awaited: Mutex<(Instant, bool)>,
}

impl<'a> End<'a> {
    /// That of a batch which begins now and may not take longer than `until`.
    pub(super) fn of(state: &'a TargetState, until: Option<Deadline>) -> Self {
        let begun = clock::now();
        Self {
            begun,
            until,
            state,
            awaited: Mutex::new((begun + BATCH, false)),
        }
    }

    /// Whether it has come for a batch that takes so long at most.
    pub(super) fn has_come(&self, longest: Duration) -> bool {
        let now = clock::now();
        now - self.begun >= longest
            || self.until.is_some_and(Deadline::passed)
            || self.is_awaited(now)
    }

    fn is_awaited(&self, now: Instant) -> bool {
        let mut awaited = self.awaited.lock().unwrap_or_else(PoisonError::into_inner);
        if now >= awaited.0 {
            *awaited = (now + LOOK, self.state.is_awaited());
        }
        awaited.1
    }
}

impl Runner {
    /// How long a batch may go on that nobody waits for.
    pub(super) fn longest_batch(&self) -> Duration {
        let domain = self.vm.domain.is_some() && !self.vm.offline();
        let ahead = self.schedule.is_some() && self.options.load.control;
        if domain && ahead && self.turns() == 1 {
            BATCH_AHEAD
        } else {
            BATCH
        }
    }

    /// The pause after a batch that took so long.
    pub(super) fn between_batches(&self, took: Duration) -> Duration {
        match (self.vm.offline(), &self.vm.domain) {
            (true, _) => BETWEEN_OFF,
            (_, Some(_)) if took > BATCH * 2 => BETWEEN_AHEAD,
            (_, Some(_)) => BETWEEN_DOMAIN,
            (_, None) => BETWEEN,
        }
    }
}
