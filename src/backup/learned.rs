//! What runs measure of a target, kept in the host state for those that come later: how fast it changes, how fast it is
//! copied and spooled, which of its blocks are hot; and what a run that is alive has before it, for `status`.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Runner;
use crate::bitmap::track::Named;
use crate::clock;
use crate::hoststate::TargetState;
use crate::plan::outlook::OnMiss;
use crate::plan::{Change, Heat, Limits, Speeds};
use crate::qmp::socket::start_time;

/// Rotations closer together than this tell what changes just now.
const JUST_NOW: Duration = Duration::from_secs(10);

/// What was measured of a target.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Learned {
    /// How fast it changes.
    pub change: Change,
    /// How fast it is copied and spooled.
    pub speeds: Speeds,
}

fn learned_name(repository: &str) -> String {
    format!("{repository}.json")
}

fn heat_name(repository: &str, disk: &str) -> String {
    format!("{repository}-{disk}.heat")
}

fn note_name(repository: &str) -> String {
    format!("{repository}.run")
}

impl Learned {
    /// What is known of a target in a repository.
    #[must_use]
    pub fn recall(state: &TargetState, repository: &str) -> Self {
        let bytes = state.recall(&learned_name(repository));
        bytes
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default()
    }

    fn remember(&self, state: &TargetState, repository: &str) {
        if let Ok(bytes) = serde_json::to_vec(self) {
            state.remember(&learned_name(repository), &bytes);
        }
    }
}

/// What a run that is alive has before it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// When its backup is due.
    pub due: Timestamp,
    window_ms: Option<u64>,
    residual: Option<u64>,
    pid: i32,
    start: u64,
}

impl Note {
    /// What the live run of a repository on a target says.
    #[must_use]
    pub fn of_live_run(state: &TargetState, repository: &str) -> Option<Self> {
        let note: Self = serde_json::from_slice(&state.recall(&note_name(repository))?).ok()?;
        (start_time(note.pid) == Some(note.start)).then_some(note)
    }

    /// The limits that it was given.
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits {
            window: self.window_ms.map(Duration::from_millis),
            residual: self.residual,
            on_miss: OnMiss::default(),
        }
    }

    /// Notes that a run is due at this time, for as long as this process lives.
    pub fn leave(state: &TargetState, repository: &str, due: Timestamp, limits: &Limits) {
        let pid = i32::try_from(std::process::id()).unwrap_or(0);
        let Some(start) = start_time(pid) else { return };
        let window = limits.window.map(|window| window.as_millis());
        let note = Self {
            due,
            window_ms: window.map(|window| u64::try_from(window).unwrap_or(u64::MAX)),
            residual: limits.residual,
            pid,
            start,
        };
        if let Ok(bytes) = serde_json::to_vec(&note) {
            state.remember(&note_name(repository), &bytes);
        }
    }
}

impl Runner {
    /// How often the blocks of a disk changed, as far as that is known.
    pub(super) fn recall_heat(&self, blocks: u64, disk: &str, newest: Option<&Named>) -> Heat {
        let name = heat_name(&self.repo.id().short(), disk);
        let kept = self.vm.state.recall(&name);
        let kept = kept.and_then(|bytes| Heat::decode(&bytes, blocks));
        // Epochs that are yet to come are another history's.
        let ours = |heat: &Heat| newest.is_none_or(|newest| heat.epoch() < newest.epoch);
        let mut heat = kept.filter(ours).unwrap_or_else(|| Heat::new(blocks));
        heat.recalled(wall_seconds());
        heat
    }

    /// For how long this run has seen what changes.
    pub(super) fn watching_since(&self) -> Option<Duration> {
        self.first_rotated.map(|first| clock::now() - first)
    }

    /// Keeps what was measured.
    pub(super) fn keep_learned(&self) {
        let repository = self.repo.id().short();
        for disk in &self.disks {
            if let Some(heat) = &disk.heat {
                let name = heat_name(&repository, &disk.key);
                self.vm.state.remember(&name, &heat.encode());
            }
        }
        self.keep_measures();
    }

    /// Keeps how fast the target changes and is copied.
    pub(super) fn keep_measures(&self) {
        let repository = self.repo.id().short();
        self.learned.remember(&self.vm.state, &repository);
    }

    /// Lets `status` know when this run's backup is due.
    pub fn note_due(&self, due: Timestamp) {
        let repository = self.repo.id().short();
        Note::leave(&self.vm.state, &repository, due, &self.options.limits);
        self.tell_due(due);
    }

    /// Whether the bitmap that the last rotation ended tells of the last seconds only.
    pub(super) fn recently_rotated(&self) -> bool {
        let [Some(last), Some(before)] = self.rotated else {
            return false;
        };
        self.cooling && last - before <= JUST_NOW
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.vm.state.unlearn(&note_name(&self.repo.id().short()));
    }
}

/// The wall clock in seconds.
pub(super) fn wall_seconds() -> f64 {
    clock::utc_now().as_duration().as_secs_f64()
}
