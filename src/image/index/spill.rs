//! An index made from entries that come in any order and do not fit into memory: they are sorted and written as runs, many runs
//! are merged into one group, many groups into one, until one is left. Every run is a run of the index from the beginning, so
//! a crash leaves what is found until somebody merges it.

use std::sync::Arc;

use super::super::block::Location;
use super::super::error::Result;
use super::super::ids::BlockId;
use super::super::store::Store;
use super::merge::merge;
use super::run::{KnownPacks, Run};
use super::write_run;

/// Entries that are sorted in memory.
const ENTRIES: usize = 1 << 21;
/// Groups that are merged at a time.
const FAN: usize = 64;

/// The parts of a group by their names.
type Names = Vec<String>;

/// An index in the making.
pub(super) struct Spill<'a> {
    store: &'a dyn Store,
    part: u64,
    sorted_at: usize,
    fan: usize,
    entries: Vec<(BlockId, Location)>,
    /// The groups that were merged so many times.
    levels: Vec<Vec<Names>>,
}

impl<'a> Spill<'a> {
    pub(super) fn new(store: &'a dyn Store, part: u64) -> Self {
        Self::with_limits(store, part, ENTRIES, FAN)
    }

    pub(super) fn with_limits(
        store: &'a dyn Store,
        part: u64,
        sorted_at: usize,
        fan: usize,
    ) -> Self {
        Self {
            store,
            part,
            sorted_at,
            fan,
            entries: Vec::new(),
            levels: Vec::new(),
        }
    }

    /// Takes entries, whose packs are durable.
    pub(super) fn add(&mut self, mut entries: Vec<(BlockId, Location)>) -> Result<()> {
        if self.entries.len().saturating_add(entries.len()) > self.sorted_at {
            self.spill()?;
        }
        self.entries.append(&mut entries);
        Ok(())
    }

    fn spill(&mut self) -> Result<()> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let mut group = vec![write_run(self.store, &mut self.entries)?];
        self.entries.clear();
        let mut level = 0;
        loop {
            if self.levels.len() == level {
                self.levels.push(Vec::new());
            }
            self.levels[level].push(group);
            if self.levels[level].len() < self.fan {
                return Ok(());
            }
            let full = std::mem::take(&mut self.levels[level]);
            group = self.merge(&full)?;
            level += 1;
        }
    }

    fn open(&self, groups: &[Names]) -> Result<Vec<Arc<Run>>> {
        let mut known = KnownPacks::new();
        groups
            .iter()
            .flatten()
            .map(|name| Run::open(self.store, name, &mut known).map(Arc::new))
            .collect()
    }

    fn merge(&self, groups: &[Names]) -> Result<Names> {
        merge(self.store, self.part, &self.open(groups)?)
    }

    /// Merges what there is into one group; gives the number of its entries.
    pub(super) fn finish(mut self) -> Result<u64> {
        self.spill()?;
        self.entries = Vec::new();
        let mut groups: Vec<Names> = std::mem::take(&mut self.levels)
            .into_iter()
            .flatten()
            .collect();
        if groups.len() > 1 {
            groups = vec![self.merge(&groups)?];
        }
        let entries = self.open(&groups)?.iter().map(|run| run.entries).sum();
        Ok(entries)
    }
}
