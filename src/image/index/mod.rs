//! The index: which pack holds a block. A set of immutable sorted runs; a lookup asks each, so their number is kept small by
//! merging.
//!
//! A merged run is published before its inputs are deleted, so a crash in between leaves entries twice, which the next merge
//! drops. A reader that holds an older list of runs finds an input gone and reads the list anew. Nothing here is the truth: the
//! packs are, and [`Index::rebuild`] makes the runs from them.

mod page;
mod run;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::block::Location;
use super::error::{Error, Result};
use super::ids::{BlockId, ObjectId};
use super::pack;
use super::store::Store;
use run::{Run, RunStream, RunWriter};

/// So many runs are looked at, beyond them some are merged.
const RUNS: usize = 8;
/// Runs of fewer entries count as equally small.
const SMALL_RUN: u64 = 4096;
/// How often the list is read again when runs vanish while it is opened.
const LIST_TRIES: usize = 10;
/// Entries that a rebuild sorts in memory.
const REBUILD_ENTRIES: usize = 1 << 20;

/// The runs as this process last saw them.
#[derive(Default)]
struct Runs {
    runs: Vec<Arc<Run>>,
    /// Runs that could not be opened. They hide nothing that another run has, but what is found nowhere may be in them.
    broken: Vec<Error>,
}

/// The index of a repository.
pub(super) struct Index {
    store: Arc<dyn Store>,
    runs: RwLock<Option<Arc<Runs>>>,
    /// One thread at a time reads the list.
    loading: Mutex<()>,
}

impl Index {
    pub(super) fn new(store: Arc<dyn Store>) -> Self {
        Self {
            store,
            runs: RwLock::default(),
            loading: Mutex::default(),
        }
    }

    fn runs(&self) -> Result<Arc<Runs>> {
        let known = self
            .runs
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        match known {
            Some(runs) => Ok(runs),
            None => self.reload(None),
        }
    }

    /// Reads the list anew, unless another thread has done so since `seen`.
    fn reload(&self, seen: Option<&Arc<Runs>>) -> Result<Arc<Runs>> {
        let _one = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self
            .runs
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(known) = known
            && seen.is_none_or(|seen| !Arc::ptr_eq(seen, &known))
        {
            return Ok(known);
        }
        let runs = Arc::new(self.list()?);
        *self.runs.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&runs));
        Ok(runs)
    }

    fn forget_list(&self) {
        *self.runs.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn list(&self) -> Result<Runs> {
        let mut tries = 0;
        'list: loop {
            let mut runs = Runs::default();
            for object in self.store.list("index/")? {
                match Run::open(&*self.store, &object) {
                    Ok(run) => runs.runs.push(Arc::new(run)),
                    Err(error) if error.is_not_found() && tries < LIST_TRIES => {
                        tries += 1;
                        continue 'list;
                    }
                    Err(error @ Error::Corrupt { .. }) => {
                        tracing::warn!(%error, "an index run is not used");
                        runs.broken.push(error);
                    }
                    Err(error) => return Err(error),
                }
            }
            // Big runs have most of the blocks.
            runs.runs.sort_by_key(|run| Reverse(run.entries));
            return Ok(runs);
        }
    }

    /// Where a block is; `None` when no run has it.
    pub(super) fn locate(&self, id: BlockId) -> Result<Option<Location>> {
        let mut runs = self.runs()?;
        let mut tries = 0;
        loop {
            match self.look_in(&runs, id) {
                Err(error) if error.is_not_found() && tries < LIST_TRIES => {
                    tries += 1;
                    runs = self.reload(Some(&runs))?;
                }
                other => return other,
            }
        }
    }

    /// Where a block is that a point refers to: what is not found is looked for in a fresh list, then it is damage.
    pub(super) fn locate_stored(&self, id: BlockId) -> Result<Location> {
        let seen = self.runs()?;
        if let Ok(Some(location)) = self.locate(id) {
            return Ok(location);
        }
        self.reload(Some(&seen))?;
        self.locate(id)?
            .ok_or_else(|| Error::corrupt(format!("block {id}"), "no index run has it"))
    }

    fn look_in(&self, runs: &Runs, id: BlockId) -> Result<Option<Location>> {
        let mut damage = None;
        for run in &runs.runs {
            match run.find(&*self.store, id) {
                Ok(None) => {}
                Err(error @ Error::Corrupt { .. }) => damage = Some(error),
                found => return found,
            }
        }
        match (damage, runs.broken.first()) {
            (Some(error), _) => Err(error),
            (None, Some(Error::Corrupt { object, what })) => Err(Error::corrupt(object, what)),
            _ => Ok(None),
        }
    }

    /// Publishes a run of new blocks, whose packs are durable. Their order does not matter; of a block that comes twice one
    /// entry stays.
    pub(super) fn publish(&self, mut entries: Vec<(BlockId, Location)>) -> Result<()> {
        self.write_run(&mut entries)?;
        self.forget_list();
        match self.compact() {
            // The blocks are found without the merge.
            Err(error @ (Error::Corrupt { .. } | Error::NotFound { .. } | Error::Busy { .. })) => {
                tracing::warn!(%error, "the index runs are not merged");
                Ok(())
            }
            other => other,
        }
    }

    fn write_run(&self, entries: &mut Vec<(BlockId, Location)>) -> Result<String> {
        entries.sort_unstable_by_key(|(id, _)| *id);
        entries.dedup_by_key(|(id, _)| *id);
        let mut writer = RunWriter::create(&*self.store)?;
        for (id, location) in entries.iter() {
            writer.add(*id, location)?;
        }
        writer.finish()
    }

    /// Merges runs until at most [`RUNS`] are left. Only one process at a time merges; another one lets it.
    fn compact(&self) -> Result<()> {
        if self.runs()?.runs.len() <= RUNS {
            return Ok(());
        }
        let _lock = self.store.lock("index", "merging index runs")?;
        self.forget_list();
        let runs = self.runs()?;
        let inputs = choose(&runs.runs);
        if inputs.is_empty() {
            return Ok(());
        }
        self.merge(inputs)?;
        self.forget_list();
        Ok(())
    }

    fn merge(&self, inputs: &[Arc<Run>]) -> Result<()> {
        let store = &*self.store;
        let mut streams: Vec<RunStream> = inputs.iter().map(Run::stream).collect();
        let mut heads = BinaryHeap::new();
        let mut pending = vec![None; streams.len()];
        for (number, stream) in streams.iter_mut().enumerate() {
            if let Some((id, location)) = stream.next(store)? {
                heads.push(Reverse((id, number)));
                pending[number] = Some(location);
            }
        }
        let mut writer = RunWriter::create(store)?;
        let mut last = None;
        while let Some(Reverse((id, number))) = heads.pop() {
            if let Some(location) = pending[number].take()
                && last != Some(id)
            {
                writer.add(id, &location)?;
                last = Some(id);
            }
            if let Some((id, location)) = streams[number].next(store)? {
                heads.push(Reverse((id, number)));
                pending[number] = Some(location);
            }
        }
        writer.finish()?;
        let names: Vec<_> = inputs.iter().map(|run| run.object.clone()).collect();
        store.delete(&names)
    }

    /// Makes the index anew from the footers of all packs; the runs there were, damaged ones too, go at the end.
    pub(super) fn rebuild(&self) -> Result<u64> {
        let _lock = self.store.lock("index", "rebuilding the index")?;
        let before = self.store.list("index/")?;
        let mut entries = Vec::new();
        let mut blocks = 0;
        for object in self.store.list("packs/")? {
            match pack::open(&*self.store, &object) {
                Ok(mut pack) => entries.append(&mut pack.entries),
                Err(error @ Error::Corrupt { .. }) => {
                    tracing::warn!(%error, "a pack is left out of the index");
                }
                Err(error) => return Err(error),
            }
            if entries.len() >= REBUILD_ENTRIES {
                blocks += entries.len() as u64;
                self.write_run(&mut entries)?;
                entries.clear();
            }
        }
        if !entries.is_empty() {
            blocks += entries.len() as u64;
            self.write_run(&mut entries)?;
        }
        self.store.delete(&before)?;
        self.forget_list();
        Ok(blocks)
    }

    /// Checks every page of every run, and that every entry lies within its pack. Gives one error for each damaged object.
    pub(super) fn verify(
        &self,
        pack_sizes: &dyn Fn(ObjectId) -> Option<u64>,
    ) -> Result<Vec<Error>> {
        let Runs {
            runs,
            broken: mut errors,
        } = self.list()?;
        for run in &runs {
            if let Err(error) = self.verify_run(run, pack_sizes) {
                match error {
                    // Merged by another process meanwhile.
                    Error::NotFound { .. } => {}
                    Error::Corrupt { .. } => errors.push(error),
                    other => return Err(other),
                }
            }
        }
        Ok(errors)
    }

    fn verify_run(
        &self,
        run: &Arc<Run>,
        pack_sizes: &dyn Fn(ObjectId) -> Option<u64>,
    ) -> Result<()> {
        let missing = run.packs.iter().find(|pack| pack_sizes(**pack).is_none());
        if let Some(missing) = missing {
            return Err(Error::corrupt(
                pack::name(*missing),
                format!("it is missing, {} refers to it", run.object),
            ));
        }
        let mut stream = run.stream();
        while let Some((id, location)) = stream.next(&*self.store)? {
            if pack_sizes(location.pack).is_none_or(|size| location.end() > size) {
                let what = format!("block {id} lies beyond the end of {}", location.pack);
                return Err(Error::corrupt(&*run.object, what));
            }
        }
        Ok(())
    }
}

/// Which runs to merge, given all of them, the big ones first: the smallest, as long as the next one is not of a higher tier
/// than what they make together, and enough that at most half of [`RUNS`] are left when they are all small.
fn choose(runs: &[Arc<Run>]) -> &[Arc<Run>] {
    let sizes: Vec<u64> = runs.iter().map(|run| run.entries).collect();
    let count = choose_count(&sizes);
    runs.get(runs.len().saturating_sub(count)..)
        .unwrap_or_default()
}

/// How many of the last runs to merge, given the sizes in falling order.
fn choose_count(sizes: &[u64]) -> usize {
    if sizes.len() <= RUNS {
        return 0;
    }
    let needed = sizes.len() - RUNS + 1;
    let mut count = 0;
    let mut sum = 0_u64;
    for size in sizes.iter().rev() {
        if count >= needed && tier(*size) > tier(sum) {
            break;
        }
        sum = sum.saturating_add(*size);
        count += 1;
    }
    count
}

/// Tiers are powers of eight, so that a billion entries have seven of them.
fn tier(entries: u64) -> u32 {
    (entries / SMALL_RUN)
        .checked_ilog2()
        .map_or(0, |log| log / 3 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_bounds_the_runs_and_does_not_rewrite_the_big_ones_each_time() {
        let mut sizes: Vec<u64> = Vec::new();
        let (mut written, mut total) = (0_u64, 0_u64);
        for round in 0..3000_u64 {
            let new = 1000 + round % 700;
            total += new;
            sizes.push(new);
            sizes.sort_by_key(|size| Reverse(*size));
            let count = choose_count(&sizes);
            if count > 0 {
                let merged: u64 = sizes.drain(sizes.len() - count..).sum();
                written += merged;
                sizes.push(merged);
                sizes.sort_by_key(|size| Reverse(*size));
            }
            assert!(sizes.len() <= RUNS, "{sizes:?}");
        }
        assert!(written < total * 12, "{written} of {total}");
    }
}
