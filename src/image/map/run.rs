//! Runs of blocks with what they hold, streams of them, and the laying of one stream over another.
//!
//! ```text
//! above      |  AAAA        AA      |      later writing
//! below      |BBBBBBBBB  BBBBBB     |      earlier writing, or the base
//! overlay    |BBAAAABBB  BBBAAB     |
//! ```

use std::sync::Arc;

use super::super::error::Result;
use super::super::ids::BlockId;
use crate::units::BlockRun;

/// The ids of neighbouring blocks; splitting copies nothing.
#[derive(Debug, Clone)]
pub struct BlockIds {
    ids: Arc<Vec<BlockId>>,
    start: usize,
    end: usize,
}

impl BlockIds {
    pub(in crate::image) fn new(ids: Vec<BlockId>) -> Self {
        let end = ids.len();
        Self {
            ids: Arc::new(ids),
            start: 0,
            end,
        }
    }

    /// The ids, one a block.
    pub fn as_slice(&self) -> &[BlockId] {
        self.ids.get(self.start..self.end).unwrap_or_default()
    }

    fn split(&mut self, at: usize) -> Self {
        let middle = self.end.min(self.start.saturating_add(at));
        let left = Self {
            ids: Arc::clone(&self.ids),
            start: self.start,
            end: middle,
        };
        self.start = middle;
        left
    }
}

/// What all blocks of a run hold.
#[derive(Debug, Clone)]
pub enum RunContent {
    /// Zeros: so many blocks.
    Zero(u64),
    /// What the base holds there: so many blocks. Only in the segments of a session.
    Same(u64),
    /// Data, one id a block.
    Data(BlockIds),
}

/// A run of blocks with what it holds.
#[derive(Debug, Clone)]
pub struct Run {
    /// The first block.
    pub first: u64,
    /// What they hold.
    pub content: RunContent,
}

impl Run {
    /// How many blocks.
    pub fn count(&self) -> u64 {
        match &self.content {
            RunContent::Zero(count) | RunContent::Same(count) => *count,
            RunContent::Data(ids) => ids.as_slice().len() as u64,
        }
    }

    /// The first block after it.
    pub fn end(&self) -> u64 {
        self.first.saturating_add(self.count())
    }

    /// Which blocks.
    pub fn blocks(&self) -> BlockRun {
        BlockRun {
            first: self.first,
            count: self.count(),
        }
    }

    /// Cuts off the blocks before `block`, which lies inside, and gives them.
    pub(in crate::image) fn split_before(&mut self, block: u64) -> Self {
        let count = block.saturating_sub(self.first).min(self.count());
        let content = match &mut self.content {
            RunContent::Zero(all) => {
                *all -= count;
                RunContent::Zero(count)
            }
            RunContent::Same(all) => {
                *all -= count;
                RunContent::Same(count)
            }
            RunContent::Data(ids) => {
                RunContent::Data(ids.split(usize::try_from(count).unwrap_or(usize::MAX)))
            }
        };
        let left = Self {
            first: self.first,
            content,
        };
        self.first += count;
        left
    }
}

/// Runs in ascending order that do not overlap.
pub(in crate::image) trait RunSource: Send {
    /// The next run.
    fn next_run(&mut self) -> Result<Option<Run>>;
}

impl RunSource for Box<dyn RunSource> {
    fn next_run(&mut self) -> Result<Option<Run>> {
        (**self).next_run()
    }
}

/// One source over another: where both have a block, the upper one's counts.
struct Overlay {
    above: Peek,
    below: Peek,
}

/// A source with its next run in hand.
struct Peek {
    source: Box<dyn RunSource>,
    next: Option<Run>,
    ended: bool,
}

impl Peek {
    fn new(source: Box<dyn RunSource>) -> Self {
        Self {
            source,
            next: None,
            ended: false,
        }
    }

    fn peek(&mut self) -> Result<Option<&mut Run>> {
        while self.next.is_none() && !self.ended {
            self.next = self.source.next_run()?.filter(|run| run.count() > 0);
            self.ended = self.next.is_none();
        }
        Ok(self.next.as_mut())
    }

    /// Forgets the blocks before `block`.
    fn drop_before(&mut self, block: u64) -> Result<()> {
        while let Some(run) = self.peek()? {
            if run.first >= block {
                break;
            }
            if run.end() <= block {
                self.next = None;
            } else {
                run.split_before(block);
            }
        }
        Ok(())
    }
}

impl RunSource for Overlay {
    fn next_run(&mut self) -> Result<Option<Run>> {
        let Some(above) = self.above.peek()? else {
            self.below.peek()?;
            return Ok(self.below.next.take());
        };
        let (first, end) = (above.first, above.end());
        if let Some(below) = self.below.peek()?
            && below.first < first
        {
            if below.end() <= first {
                return Ok(self.below.next.take());
            }
            return Ok(Some(below.split_before(first)));
        }
        self.below.drop_before(end)?;
        Ok(self.above.next.take())
    }
}

/// Nothing.
struct Empty;

impl RunSource for Empty {
    fn next_run(&mut self) -> Result<Option<Run>> {
        Ok(None)
    }
}

/// Lays sources over each other, the first one on top, as a balanced tree: a block passes the logarithm of their number.
pub(super) fn overlay(mut sources: Vec<Box<dyn RunSource>>) -> Box<dyn RunSource> {
    match sources.len() {
        0 => Box::new(Empty),
        1 => sources.remove(0),
        count => {
            let below = sources.split_off(count / 2);
            Box::new(Overlay {
                above: Peek::new(overlay(sources)),
                below: Peek::new(overlay(below)),
            })
        }
    }
}

/// One source without the blocks that another one has, whatever it says of them.
pub(super) struct Without {
    source: Peek,
    hidden: Peek,
}

impl Without {
    pub(super) fn new(source: Box<dyn RunSource>, hidden: Box<dyn RunSource>) -> Self {
        Self {
            source: Peek::new(source),
            hidden: Peek::new(hidden),
        }
    }
}

impl RunSource for Without {
    fn next_run(&mut self) -> Result<Option<Run>> {
        loop {
            let Some(run) = self.source.peek()? else {
                return Ok(None);
            };
            let (first, end) = (run.first, run.end());
            self.hidden.drop_before(first)?;
            match self.hidden.peek()? {
                Some(hidden) if hidden.first <= first => {
                    let end = hidden.end();
                    self.source.drop_before(end)?;
                }
                Some(hidden) if hidden.first < end => {
                    let left = hidden.first;
                    return Ok(self.source.next.as_mut().map(|run| run.split_before(left)));
                }
                _ => return Ok(self.source.next.take()),
            }
        }
    }
}

/// The blocks that all of some sources have, as runs of zeros: what they say of them does not count.
struct Common {
    sources: Vec<Peek>,
}

impl Common {
    /// The first block from which on all may have some; `None` at the end of any.
    fn first(&mut self) -> Result<Option<u64>> {
        let mut first = 0;
        for source in &mut self.sources {
            let Some(run) = source.peek()? else {
                return Ok(None);
            };
            first = first.max(run.first);
        }
        Ok(Some(first))
    }
}

impl RunSource for Common {
    fn next_run(&mut self) -> Result<Option<Run>> {
        'next: loop {
            let Some(first) = self.first()? else {
                return Ok(None);
            };
            let mut end = u64::MAX;
            for source in &mut self.sources {
                source.drop_before(first)?;
                match source.peek()? {
                    None => return Ok(None),
                    Some(run) if run.first > first => continue 'next,
                    Some(run) => end = end.min(run.end()),
                }
            }
            for source in &mut self.sources {
                source.drop_before(end)?;
            }
            let content = RunContent::Zero(end.saturating_sub(first));
            return Ok(Some(Run { first, content }));
        }
    }
}

/// The blocks that all of some sources have; none of no sources.
pub(super) fn common(sources: Vec<Box<dyn RunSource>>) -> Box<dyn RunSource> {
    if sources.is_empty() {
        return Box::new(Empty);
    }
    let sources = sources.into_iter().map(Peek::new).collect();
    Box::new(Common { sources })
}

/// Only the blocks before `end`.
pub(super) struct Clip {
    pub(super) source: Box<dyn RunSource>,
    pub(super) end: u64,
}

impl RunSource for Clip {
    fn next_run(&mut self) -> Result<Option<Run>> {
        let run = self.source.next_run()?.filter(|run| run.first < self.end);
        Ok(run.map(|mut run| {
            if run.end() > self.end {
                run.split_before(self.end)
            } else {
                run
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    struct Listed(std::vec::IntoIter<Run>);

    impl RunSource for Listed {
        fn next_run(&mut self) -> Result<Option<Run>> {
            Ok(self.0.next())
        }
    }

    /// A layer as gap, length and kind of its runs.
    fn runs(layer: &[(u64, u64, bool)], tag: u8) -> Vec<Run> {
        let mut at = 0;
        let mut runs = Vec::new();
        for (gap, length, zero) in layer {
            at += gap;
            let content = if *zero {
                RunContent::Zero(*length)
            } else {
                let ids = (at..at + length)
                    .map(|block| BlockId::of(&[tag, u8::try_from(block).unwrap()]));
                RunContent::Data(BlockIds::new(ids.collect()))
            };
            runs.push(Run { first: at, content });
            at += length;
        }
        runs
    }

    fn blocks(run: &Run) -> Vec<(u64, Option<BlockId>)> {
        let id = |n: u64| match &run.content {
            RunContent::Data(ids) => Some(ids.as_slice()[usize::try_from(n).unwrap()]),
            _ => None,
        };
        (0..run.count()).map(|n| (run.first + n, id(n))).collect()
    }

    proptest! {
        #[test]
        fn an_overlay_is_what_writing_the_layers_in_turn_gives(
            layers in proptest::collection::vec(
                proptest::collection::vec((0_u64..5, 1_u64..6, any::<bool>()), 0..8), 0..6),
            end in 0_u64..60,
        ) {
            let mut model = BTreeMap::new();
            for (tag, layer) in (0_u8..).zip(&layers).collect::<Vec<_>>().into_iter().rev() {
                for run in runs(layer, tag) {
                    model.extend(blocks(&run));
                }
            }
            model.retain(|block, _| *block < end);
            let sources = (0_u8..).zip(&layers).map(|(tag, layer)| {
                Box::new(Listed(runs(layer, tag).into_iter())) as Box<dyn RunSource>
            }).collect();
            let mut merged = Clip { source: overlay(sources), end };
            let mut seen = Vec::new();
            while let Some(run) = merged.next_run().unwrap() {
                seen.extend(blocks(&run));
            }
            prop_assert_eq!(seen, model.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn what_all_have_is_taken_away(
            of in proptest::collection::vec((0_u64..5, 1_u64..6, any::<bool>()), 0..8),
            layers in proptest::collection::vec(
                proptest::collection::vec((0_u64..4, 1_u64..9, any::<bool>()), 0..8), 0..4),
        ) {
            let has = |layer: &[(u64, u64, bool)], block| {
                runs(layer, 1).iter().any(|run| (run.first..run.end()).contains(&block))
            };
            let expected: Vec<_> = runs(&of, 0).iter().flat_map(blocks)
                .filter(|(block, _)| layers.is_empty() || !layers.iter().all(|layer| has(layer, *block)))
                .collect();
            let listed = |layer: &Vec<_>| {
                Box::new(Listed(runs(layer, 1).into_iter())) as Box<dyn RunSource>
            };
            let hidden = common(layers.iter().map(listed).collect());
            let mut left = Without::new(listed(&of), hidden);
            let mut seen = Vec::new();
            while let Some(run) = left.next_run().unwrap() {
                prop_assert!(run.count() > 0);
                seen.extend(blocks(&run).into_iter().map(|(block, _)| block));
            }
            prop_assert_eq!(seen, expected.iter().map(|(block, _)| *block).collect::<Vec<_>>());
        }
    }
}
