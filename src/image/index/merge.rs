//! All entries of several runs in one order: a heap of their streams, so that memory does not grow with them.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use super::super::block::Location;
use super::super::error::Result;
use super::super::ids::{BlockId, ObjectId};
use super::super::store::Store;
use super::page::key;
use super::run::{Run, RunStream};

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
