//! Giving way between two batches: a pass goes on when the guest and the host have room again.

use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;

use super::Runner;
use crate::clock::{self, Deadline};
use crate::load::Load;

/// Between two looks at whether a pause is over.
const LOOK: Duration = Duration::from_millis(50);
/// A pause as short as those that measure is not.
const WORTH_TELLING: Duration = Duration::from_secs(2);

impl Runner {
    /// The watch over guest and host.
    pub(super) fn watch(&self) -> MutexGuard<'_, Load> {
        self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What giving way to the guest and the host came to, for reports.
    #[must_use]
    pub fn load_report(&self) -> serde_json::Value {
        self.watch().report().to_json()
    }

    /// Waits between two batches for as long as the guest or the host has no room for one, or until the time is up.
    pub(super) fn give_way(&self, until: Option<Deadline>) -> Result<()> {
        let begun = clock::now();
        let mut told = false;
        while !until.is_some_and(Deadline::passed) {
            self.check_interrupt()?;
            let Some(words) = self.watch().waits() else {
                break;
            };
            if !told && clock::now() - begun > WORTH_TELLING {
                tracing::info!("{words}");
                told = true;
            }
            self.progress.note(&words);
            clock::sleep(LOOK);
        }
        self.progress.note("");
        Ok(())
    }
}
