//! The index: which pack holds a block. A set of immutable sorted runs; a lookup asks the filter of each whose range holds the
//! block, and few runs themselves. Merging keeps their number small: what it writes is a group of runs, its parts. A block may have
//! several locations; none is ever dropped but by [`Index::rewrite_without`].
//!
//! A merged run is published before its inputs are deleted, so a crash in between leaves entries twice, which the next merge
//! drops. A reader that holds an older list of runs finds an input gone and reads the list anew. Nothing here is the truth: the
//! packs are, and [`Index::rebuild`] makes the runs from them.

mod audit;
mod filter;
mod merge;
mod page;
mod run;
mod snapshot;
mod spill;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use super::block::Location;
use super::bytes::wide;
use super::condemned::Condemned;
use super::error::{Error, Result};
use super::ids::{BlockId, ObjectId};
use super::pack;
use super::store::{Store, StoreLock};
use crate::clock::{self, Deadline};
pub(super) use audit::Audit;
use merge::{GroupWriter, Merged, PART, merge};
use run::{KnownPacks, PackTable, Run, RunWriter};
use snapshot::Snapshot;
use spill::Spill;

/// What is said of a block that is referred to and not in the index.
pub const NOT_INDEXED: &str = "no index run has it";
/// So many groups of runs are looked at, beyond them some are merged.
const GROUPS: usize = 8;
/// What a writer merges on its way at most, some ten seconds of work. Groups of half of that do not count for it: every prune merges
/// them, and without one there is one more for each 2 TiB of blocks of 64 KiB that are stored.
const QUICK_MERGE: u64 = 1 << 26;
/// Groups of fewer entries count as equally small.
const SMALL_RUN: u64 = 4096;
/// How often a question is asked again when runs vanish meanwhile.
const TRIES: usize = 10;
/// How long a merge of another process is waited for.
const LOCK_WAIT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 600 });
/// How often the lock is tried meanwhile.
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// What a rebuild of the index did.
#[derive(Debug, Default)]
pub struct Rebuilt {
    /// Places of blocks that the index has now.
    pub blocks: u64,
    /// Packs that were read.
    pub packs: u64,
    /// Packs that were left out, and why.
    pub damaged: Vec<Error>,
}

/// The index of a repository.
pub(super) struct Index {
    store: Arc<dyn Store>,
    /// Entries of a part of a merge.
    part: u64,
    snapshot: RwLock<Known>,
    /// One thread at a time takes a snapshot.
    loading: Mutex<()>,
    /// Packs that were gone when a block was to be read from them.
    gone: Mutex<HashSet<ObjectId>>,
}

/// The last snapshot.
#[derive(Default, Clone)]
struct Known {
    snapshot: Option<Arc<Snapshot>>,
    /// How much of what this process published it has.
    has: u64,
    /// How often this process has published.
    published: u64,
}

impl Index {
    pub(super) fn new(store: Arc<dyn Store>) -> Self {
        Self::with_parts(store, PART)
    }

    fn with_parts(store: Arc<dyn Store>, part: u64) -> Self {
        Self {
            store,
            part,
            snapshot: RwLock::default(),
            loading: Mutex::default(),
            gone: Mutex::default(),
        }
    }

    fn known(&self) -> Known {
        let known = self.snapshot.read();
        known.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn snapshot(&self) -> Result<Arc<Snapshot>> {
        match self.known() {
            Known {
                snapshot: Some(snapshot),
                has,
                published,
            } if has == published => Ok(snapshot),
            known => self.reload(known.snapshot.as_ref()),
        }
    }

    /// Takes a new snapshot, unless another thread has done so since `seen`.
    fn reload(&self, seen: Option<&Arc<Snapshot>>) -> Result<Arc<Snapshot>> {
        let _one = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.known();
        if let Some(known) = &known.snapshot
            && seen.is_none_or(|seen| !Arc::ptr_eq(seen, known))
        {
            return Ok(Arc::clone(known));
        }
        self.take(&known)
    }

    fn take(&self, known: &Known) -> Result<Arc<Snapshot>> {
        let taken = Snapshot::take(&*self.store, known.snapshot.as_deref())?;
        let taken = Arc::new(taken);
        let mut now = self
            .snapshot
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        now.snapshot = Some(Arc::clone(&taken));
        now.has = known.published;
        Ok(taken)
    }

    fn mark_stale(&self) {
        let known = self.snapshot.write();
        known.unwrap_or_else(PoisonError::into_inner).published += 1;
    }

    /// Whether there is not even a damaged run.
    pub(super) fn is_empty(&self) -> Result<bool> {
        let snapshot = self.snapshot()?;
        Ok(snapshot.runs.is_empty() && snapshot.broken.is_empty())
    }

    /// Takes a new snapshot, past any cache.
    pub(super) fn refresh(&self) -> Result<()> {
        self.fresh().map(|_| ())
    }

    fn fresh(&self) -> Result<Arc<Snapshot>> {
        let _one = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        self.take(&self.known())
    }

    /// A pack that the index names is not there: it was repacked, and a new snapshot knows where its blocks are now. One is taken
    /// once for each pack, since a pack that is lost stays named.
    pub(super) fn refresh_as_gone(&self, pack: ObjectId) -> Result<()> {
        let mut gone = self.gone.lock().unwrap_or_else(PoisonError::into_inner);
        if gone.insert(pack) {
            self.refresh()?;
        }
        Ok(())
    }

    /// The generation of the snapshot that questions are answered from. It may be a later one after any publication: a writer
    /// asks before the first block that it looks up, and compares that with the head.
    pub(super) fn generation(&self) -> Result<u64> {
        Ok(self.snapshot()?.generation)
    }

    /// Asks a snapshot, and a newer one when a run of it is gone.
    fn ask<T>(&self, question: impl Fn(&Snapshot) -> Result<T>) -> Result<T> {
        let mut snapshot = self.snapshot()?;
        let mut tries = 0;
        loop {
            match question(&snapshot) {
                Err(error) if error.is_not_found() && tries < TRIES => {
                    tries += 1;
                    snapshot = self.reload(Some(&snapshot))?;
                }
                other => return other,
            }
        }
    }

    /// Where a block is that others may refer to: not in a condemned pack, and not where it was found bad.
    pub(super) fn locate(&self, id: BlockId) -> Result<Option<Location>> {
        self.ask(|snapshot| snapshot.locate(&*self.store, id))
    }

    /// Every location of a block and whether it is excluded, those first that are not.
    pub(super) fn locate_all(&self, id: BlockId) -> Result<Vec<(Location, bool)>> {
        self.ask(|snapshot| snapshot.locate_all(&*self.store, id))
    }

    /// Where a block is that a point refers to: a location that is not excluded, or else any. What is not found is looked for in
    /// a new snapshot, then it is damage.
    pub(super) fn locate_stored(&self, id: BlockId) -> Result<Location> {
        let seen = self.snapshot()?;
        if let Ok(Some(location)) = self.locate(id) {
            return Ok(location);
        }
        if let Ok(Some((location, _))) = self.locate_all(id).map(|all| all.first().copied()) {
            return Ok(location);
        }
        self.reload(Some(&seen))?;
        self.locate_all(id)?
            .first()
            .map(|(location, _)| *location)
            .ok_or_else(|| Error::corrupt(format!("block {id}"), NOT_INDEXED))
    }

    /// Whether a block was found bad somewhere; quick, for every block of a backup.
    pub(super) fn is_quarantined(&self, id: BlockId) -> Result<bool> {
        Ok(self.snapshot()?.is_quarantined(id))
    }

    /// Takes the lock of those who delete runs, waiting for a merge to end.
    fn lock(&self, who: &str) -> Result<StoreLock> {
        let deadline = Deadline::after(LOCK_WAIT);
        loop {
            match self.store.lock("index", who) {
                Err(Error::Busy { .. }) if !deadline.passed() => clock::sleep(LOCK_PAUSE),
                other => return other,
            }
        }
    }

    /// Hands on every block with all its locations, in the order of the ids. Nothing is merged meanwhile: a list that is read
    /// while runs come and go may lack both a run and what it was merged into.
    pub(super) fn sweep(
        &self,
        each: &mut dyn FnMut(BlockId, &[Location]) -> Result<()>,
    ) -> Result<()> {
        let _lock = self.lock("reading the whole index")?;
        let snapshot = self.fresh()?;
        if let Some(error) = snapshot.broken.first() {
            return Err(error.repeat_damage());
        }
        let mut merged = Merged::new(&*self.store, &snapshot.runs)?;
        let mut block: Option<BlockId> = None;
        let mut locations = Vec::new();
        while let Some((id, location)) = merged.next()? {
            if let Some(before) = block
                && before != id
            {
                each(before, &locations)?;
                locations.clear();
            }
            block = Some(id);
            locations.push(location);
        }
        block.map_or(Ok(()), |id| each(id, &locations))
    }

    /// Writes every run anew that names one of these packs, without their entries.
    pub(super) fn rewrite_without(&self, packs: &HashSet<ObjectId>) -> Result<()> {
        let _lock = self.lock("taking deleted packs out of the index")?;
        let snapshot = self.fresh()?;
        // Parts of a group have the same packs.
        let mut table: Option<([u8; 32], PackTable)> = None;
        for run in &snapshot.runs {
            if !run.packs.iter().any(|pack| packs.contains(pack)) {
                continue;
            }
            let (_, table) = match &mut table {
                Some(known) if known.0 == run.packs_digest => known,
                other => {
                    let kept = run.packs.iter().filter(|pack| !packs.contains(pack));
                    let kept = PackTable::new(kept.copied().collect())?;
                    other.insert((run.packs_digest, kept))
                }
            };
            self.rewrite_run(run, table, packs)?;
        }
        self.compact_held(u64::MAX)?;
        self.refresh()
    }

    fn rewrite_run(
        &self,
        run: &Arc<Run>,
        table: &PackTable,
        packs: &HashSet<ObjectId>,
    ) -> Result<()> {
        let mut stream = run.stream();
        let mut writer = GroupWriter::new(&*self.store, run.group, table, u64::MAX, run.entries);
        while let Some((id, location)) = stream.next(&*self.store)? {
            if !packs.contains(&location.pack) {
                writer.add(id, &location)?;
            }
        }
        writer.finish()?;
        self.store.delete(std::slice::from_ref(&run.object))
    }

    /// Publishes a run of new blocks, whose packs are durable. Their order does not matter; of a block that comes twice one
    /// entry stays.
    pub(super) fn publish(&self, mut entries: Vec<(BlockId, Location)>) -> Result<()> {
        write_run(&*self.store, &mut entries)?;
        self.mark_stale();
        match self.compact() {
            // The blocks are found without the merge.
            Err(
                error @ (Error::Corrupt { .. }
                | Error::NotFound { .. }
                | Error::Busy { .. }
                | Error::NoSpace { .. }),
            ) => {
                tracing::warn!(%error, "the index runs are not merged");
                Ok(())
            }
            other => other,
        }
    }

    /// Merges groups until at most [`GROUPS`] are left, as far as that is little work. Only one process at a time merges; another
    /// one lets it.
    fn compact(&self) -> Result<()> {
        let groups = self.snapshot()?.groups();
        let sizes: Vec<u64> = groups.iter().map(|group| group.entries).collect();
        if choose_count(&sizes, QUICK_MERGE) == 0 {
            return Ok(());
        }
        let _lock = self.store.lock("index", "merging index runs")?;
        self.compact_held(QUICK_MERGE)
    }

    /// Merges groups until at most [`GROUPS`] are left, however long that takes.
    pub(super) fn merge_all(&self) -> Result<()> {
        if self.snapshot()?.groups().len() <= GROUPS {
            return Ok(());
        }
        let _lock = self.lock("merging index runs")?;
        self.compact_held(u64::MAX)
    }

    /// The merge itself, of at most `limit` entries, by whoever holds the lock.
    fn compact_held(&self, limit: u64) -> Result<()> {
        let groups = self.fresh()?.groups();
        let sizes: Vec<u64> = groups.iter().map(|group| group.entries).collect();
        let count = choose_count(&sizes, limit);
        if count > 0 {
            let chosen = groups.iter().rev().take(count);
            let inputs: Vec<Arc<Run>> = chosen.flat_map(|group| group.runs.clone()).collect();
            merge(&*self.store, self.part, &inputs)?;
            self.mark_stale();
        }
        Ok(())
    }

    /// Makes the index anew from the footers of all packs; the runs there were, damaged ones too, go at the end. What they know
    /// of packs whose footers are damaged is kept, and of packs that are lost: as long as they are named it is known that their
    /// blocks are bad, and who has those heals them.
    pub(super) fn rebuild(&self) -> Result<Rebuilt> {
        let _lock = self.lock("rebuilding the index")?;
        let before = self.store.list_fresh(run::PREFIX)?;
        let mut rebuilt = Rebuilt::default();
        let mut spill = Spill::new(&*self.store, self.part);
        // Packs that told themselves, and those that prune has taken away and will take out of the index.
        let mut told = HashSet::new();
        let mut left_out = HashSet::new();
        for object in self.store.list_fresh("packs/")? {
            match pack::open(&*self.store, &object) {
                Ok(pack) => {
                    rebuilt.packs += 1;
                    told.insert(pack.id);
                    spill.add(pack.entries)?;
                }
                // Pruned meanwhile.
                Err(error) if error.is_not_found() => {}
                Err(error @ Error::Corrupt { .. }) => {
                    tracing::warn!(%error, "a pack is left out of the index");
                    let id = object.rsplit('/').next();
                    left_out.extend(id.and_then(|id| id.parse::<ObjectId>().ok()));
                    rebuilt.damaged.push(error);
                }
                Err(error) => return Err(error),
            }
        }
        // Read after the packs: what prune took away meanwhile is in it until this lock is let go.
        if let (_, Ok(condemned)) = Condemned::read_head(&*self.store)? {
            told.extend(condemned.packs.difference(&left_out));
        }
        self.keep_known(&before, &told, &mut spill)?;
        rebuilt.blocks = spill.finish()?;
        self.store.delete(&before)?;
        self.mark_stale();
        Ok(rebuilt)
    }

    /// Makes an index of entries that belong to no packs; gives how many there are.
    #[cfg(test)]
    pub(super) fn fill(
        &self,
        packs: impl Iterator<Item = Vec<(BlockId, Location)>>,
    ) -> Result<u64> {
        let mut spill = Spill::new(&*self.store, self.part);
        for entries in packs {
            spill.add(entries)?;
        }
        let entries = spill.finish()?;
        self.mark_stale();
        Ok(entries)
    }

    /// Takes over what runs know of packs that do not tell themselves.
    fn keep_known(
        &self,
        runs: &[String],
        told: &HashSet<ObjectId>,
        spill: &mut Spill<'_>,
    ) -> Result<()> {
        let mut known = KnownPacks::new();
        for object in runs {
            let run = match Run::open(&*self.store, object, &mut known) {
                Ok(run) => Arc::new(run),
                Err(Error::Corrupt { .. } | Error::NotFound { .. }) => continue,
                Err(error) => return Err(error),
            };
            if run.packs.iter().all(|pack| told.contains(pack)) {
                continue;
            }
            let mut stream = run.stream();
            loop {
                match stream.next(&*self.store) {
                    Ok(Some(entry)) if !told.contains(&entry.1.pack) => spill.add(vec![entry])?,
                    Ok(Some(_)) => {}
                    // What comes after damage in a run cannot be told from it.
                    Ok(None) | Err(Error::Corrupt { .. }) => break,
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }
}

/// Publishes entries, whatever their order, as a group of one run; gives its name.
fn write_run(store: &dyn Store, entries: &mut Vec<(BlockId, Location)>) -> Result<String> {
    entries.sort_unstable_by_key(page::key);
    entries.dedup_by_key(|entry| page::key(entry));
    let mut packs: Vec<ObjectId> = entries.iter().map(|(_, location)| location.pack).collect();
    packs.sort_unstable();
    packs.dedup();
    let table = PackTable::new(packs)?;
    let count = wide(entries.len());
    let mut writer = RunWriter::create(store, ObjectId::random()?, &table, count)?;
    for (id, location) in entries.iter() {
        writer.add(*id, location)?;
    }
    writer.finish()
}

/// How many of the last groups to merge, given their sizes in falling order: as long as the next one is not of a higher tier than
/// what they make together, enough that at most [`GROUPS`] are left, but not more than `limit` entries. Groups of half the limit are
/// left alone and not counted: else each small group that comes would be merged at once with the one before.
fn choose_count(sizes: &[u64], limit: u64) -> usize {
    let large = sizes.partition_point(|size| *size >= limit / 2);
    let sizes = &sizes[large..];
    if sizes.len() <= GROUPS {
        return 0;
    }
    let needed = sizes.len() - GROUPS + 1;
    let mut count = 0;
    let mut sum = 0_u64;
    for size in sizes.iter().rev() {
        let enough = count >= needed && tier(*size) > tier(sum);
        if enough || sum.saturating_add(*size) > limit {
            break;
        }
        sum = sum.saturating_add(*size);
        count += 1;
    }
    if count < 2 { 0 } else { count }
}

/// Tiers are powers of eight, so that a billion entries have seven of them.
fn tier(entries: u64) -> u32 {
    (entries / SMALL_RUN)
        .checked_ilog2()
        .map_or(0, |log| log / 3 + 1)
}
