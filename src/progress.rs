//! How far a run is: numbers that the phases count up, and whoever shows them reads.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// The progress of a run.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes done in this phase.
    pub done: AtomicU64,
    /// Bytes to do in this phase, as far as it is known.
    pub total: AtomicU64,
    phase: Mutex<String>,
    note: Mutex<String>,
}

impl Progress {
    /// Begins a phase.
    pub fn begin(&self, phase: &str, total: u64) {
        self.done.store(0, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
        let mut name = self
            .phase
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        phase.clone_into(&mut name);
    }

    /// Says why nothing goes on just now; nothing when it does.
    pub fn note(&self, note: &str) {
        let mut held = self
            .note
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        note.clone_into(&mut held);
    }

    /// The phase, or why it does not go on.
    #[must_use]
    pub fn words(&self) -> String {
        let note = self
            .note
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone();
        if note.is_empty() { self.phase() } else { note }
    }

    /// What a part of the repository tells: a phase that begins and its total, or, without a name, how much more is done.
    pub fn told(&self, phase: &str, more: u64, total: u64) {
        if phase.is_empty() {
            self.done.fetch_add(more, Ordering::Relaxed);
        } else {
            self.begin(phase, total);
        }
    }

    /// What is being done.
    #[must_use]
    pub fn phase(&self) -> String {
        self.phase
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }
}
