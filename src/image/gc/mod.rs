//! Garbage collection. Writers never wait for it, also on other hosts, and there are no clocks in it: the two-phase protocol of
//! `look.rs`, seen from the side of the deleter.
//!
//! ```text
//! packs, layers listed -> mark -> census of the index -> repack -> CONDEMN -> mark again -> spare -> delete -> index -> empty list
//!                         (mark.rs)  (plan.rs)          (repack.rs)         (sweep.rs)
//! ```
//!
//! The list of condemned packs is put *before* the second mark: who refers to one of them later sees the list, who referred before is
//! seen by the mark. A prune that dies anywhere after it leaves the list, and the next one goes on from there.

mod litter;
mod live;
mod mark;
mod plan;
mod prune;
mod repack;
mod sweep;

use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use super::error::{Error, Result};

/// How to prune.
#[derive(Debug, Clone, Copy)]
pub struct PruneOptions<'a> {
    /// Only says what would go.
    pub dry_run: bool,
    /// Bytes of live blocks that are copied out of packs that are mostly dead, at most.
    pub max_repack: u64,
    /// Set by whoever wants it to end at the next safe place.
    pub interrupted: Option<&'a AtomicBool>,
}

impl Default for PruneOptions<'_> {
    fn default() -> Self {
        Self {
            dry_run: false,
            max_repack: u64::MAX,
            interrupted: None,
        }
    }
}

/// Some packs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Packs {
    /// How many.
    pub packs: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Packs {
    fn add(&mut self, bytes: u64) {
        self.packs += 1;
        self.bytes += bytes;
    }
}

/// What a prune found and did; with a dry run, what one would do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PruneReport {
    /// Blocks that roots refer to, without what newer layers hide in all maps; those of shared layers counted once.
    pub references: u64,
    /// Packs that are there, before.
    pub packs: u64,
    /// Packs that are gone.
    pub deleted: Packs,
    /// Packs of whom the live blocks were copied; they are among the deleted ones.
    pub repacked: Packs,
    /// Bytes written for that.
    pub rewritten_bytes: u64,
    /// Packs that somebody referred to at the last moment.
    pub spared: Packs,
    /// Packs without a live block that a session may be about to refer to.
    pub kept_for_sessions: Packs,
    /// Packs that are not worth it, or for which there was no room in the limit.
    pub kept_partly_dead: Packs,
    /// Damaged packs, which stay.
    pub kept_damaged: Packs,
    /// Map layers that no point has any more.
    pub layers: u64,
    /// Sessions whose removal had been cut short.
    pub sessions: u64,
    /// Leases of dead readers.
    pub leases: u64,
    /// Records of bad blocks in packs that are gone.
    pub quarantine: u64,
    /// An earlier prune had been cut short after it condemned packs.
    pub finished_earlier: bool,
    /// There was no room to repack.
    pub no_room: bool,
    /// What is damaged and was met, in words.
    pub damaged: Vec<String>,
}

impl PruneReport {
    /// How much less the repository takes: negative when more was written than deleted.
    #[must_use]
    pub fn freed_bytes(&self) -> i64 {
        let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        signed(self.deleted.bytes) - signed(self.rewritten_bytes)
    }
}

/// Who watches: progress, and the wish to end.
pub(in crate::image) struct Watch<'a> {
    interrupted: Option<&'a AtomicBool>,
    progress: &'a dyn Fn(&str, u64, u64),
}

impl Watch<'_> {
    fn begin(&self, phase: &str, total: u64) {
        (self.progress)(phase, 0, total);
    }

    /// So much more of the phase is done.
    fn done(&self, more: u64) {
        (self.progress)("", more, 0);
    }

    fn go_on(&self) -> Result<()> {
        if self
            .interrupted
            .is_some_and(|flag| flag.load(Ordering::Relaxed))
        {
            return Err(Error::Interrupted);
        }
        Ok(())
    }
}
