//! All entries of several runs in one order, a heap of their streams, and the writing of entries in order as the parts of a
//! group. Memory does not grow with them but for the filter of one part and the list of packs.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;

use super::super::block::Location;
use super::super::error::Result;
use super::super::ids::{BlockId, ObjectId};
use super::super::store::Store;
use super::page::key;
use super::run::{PackTable, Packs, Run, RunStream, RunWriter};

type Key = (BlockId, ObjectId, u32);

/// The entries of several runs in the order of [`key`], each once.
pub(super) struct Merged<'a> {
    store: &'a dyn Store,
    streams: Vec<RunStream>,
    /// The next entry of each stream that has one.
    next: Vec<Option<(BlockId, Location)>>,
    heads: BinaryHeap<Reverse<(Key, usize)>>,
    last: Option<Key>,
}

impl<'a> Merged<'a> {
    pub(super) fn new(store: &'a dyn Store, runs: &[Arc<Run>]) -> Result<Self> {
        let streams: Vec<RunStream> = runs.iter().map(Run::stream).collect();
        let mut merged = Self {
            store,
            next: vec![None; streams.len()],
            heads: BinaryHeap::with_capacity(streams.len()),
            streams,
            last: None,
        };
        for number in 0..merged.streams.len() {
            merged.advance(number)?;
        }
        Ok(merged)
    }

    fn advance(&mut self, number: usize) -> Result<()> {
        let entry = self.streams[number].next(self.store)?;
        if let Some(entry) = &entry {
            self.heads.push(Reverse((key(entry), number)));
        }
        self.next[number] = entry;
        Ok(())
    }

    /// The next entry.
    pub(super) fn next(&mut self) -> Result<Option<(BlockId, Location)>> {
        while let Some(Reverse((key, number))) = self.heads.pop() {
            let entry = self.next[number].take();
            self.advance(number)?;
            if self.last != Some(key) {
                self.last = Some(key);
                return Ok(entry);
            }
        }
        Ok(None)
    }
}

/// Entries of a part, but for the copies of its last block.
pub(super) const PART: u64 = 1 << 25;

/// Writes entries that come in order as the parts of one group.
pub(super) struct GroupWriter<'a> {
    store: &'a dyn Store,
    group: ObjectId,
    table: &'a PackTable,
    part: u64,
    /// Entries that may still come.
    expected: u64,
    current: Option<RunWriter<'a>>,
    parts: Vec<String>,
}

impl<'a> GroupWriter<'a> {
    /// A group of at most `expected` entries in parts of `part`.
    pub(super) fn new(
        store: &'a dyn Store,
        group: ObjectId,
        table: &'a PackTable,
        part: u64,
        expected: u64,
    ) -> Self {
        Self {
            store,
            group,
            table,
            part,
            expected,
            current: None,
            parts: Vec::new(),
        }
    }

    /// Adds the next entry. Gives the last block that is published, when that has changed: all copies of a block are in one part.
    pub(super) fn add(&mut self, id: BlockId, location: &Location) -> Result<Option<BlockId>> {
        let full = |run: &RunWriter<'_>| run.entries() >= self.part && run.last() != Some(id);
        let published = match self.current.take_if(|run| full(run)) {
            Some(run) => {
                let last = run.last();
                self.parts.push(run.finish()?);
                last
            }
            None => None,
        };
        let run = match &mut self.current {
            Some(run) => run,
            none => {
                let entries = self.part.min(self.expected);
                none.insert(RunWriter::create(
                    self.store, self.group, self.table, entries,
                )?)
            }
        };
        run.add(id, location)?;
        self.expected = self.expected.saturating_sub(1);
        Ok(published)
    }

    /// Publishes the last part and gives the names of all.
    pub(super) fn finish(mut self) -> Result<Vec<String>> {
        if let Some(run) = self.current.take() {
            self.parts.push(run.finish()?);
        }
        Ok(self.parts)
    }
}

/// Merges runs into one new group and gives the names of its parts. An input goes as soon as everything of it is published, so
/// that a merge takes little more room than its inputs.
pub(super) fn merge(store: &dyn Store, part: u64, inputs: &[Arc<Run>]) -> Result<Vec<String>> {
    let lists: HashMap<[u8; 32], &Packs> = inputs
        .iter()
        .map(|run| (run.packs_digest, &run.packs))
        .collect();
    let packs = lists.values().flat_map(|packs| packs.iter().copied());
    let table = PackTable::new(packs.collect())?;
    let expected = inputs.iter().map(|run| run.entries).sum();
    let mut writer = GroupWriter::new(store, ObjectId::random()?, &table, part, expected);
    let mut merged = Merged::new(store, inputs)?;
    let mut left: Vec<&Arc<Run>> = inputs.iter().collect();
    while let Some((id, location)) = merged.next()? {
        if let Some(published) = writer.add(id, &location)? {
            let done = left.extract_if(.., |run| run.last <= published);
            let names: Vec<String> = done.map(|run| run.object.clone()).collect();
            store.delete(&names)?;
        }
    }
    let parts = writer.finish()?;
    let names: Vec<String> = left.iter().map(|run| run.object.clone()).collect();
    store.delete(&names)?;
    Ok(parts)
}
