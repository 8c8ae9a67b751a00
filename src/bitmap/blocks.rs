//! A set of blocks of one disk, one bit a block.

use crate::units::BlockRun;

/// Which blocks of a disk; 2 KiB for each GiB of 64 KiB blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockSet {
    words: Vec<u64>,
    blocks: u64,
    count: u64,
}

impl BlockSet {
    /// The empty set of a disk of this many blocks.
    #[must_use]
    pub fn new(blocks: u64) -> Self {
        let words = usize::try_from(blocks.div_ceil(64)).unwrap_or(usize::MAX);
        Self {
            words: vec![0; words],
            blocks,
            count: 0,
        }
    }

    /// All blocks of the disk.
    #[must_use]
    pub fn full(blocks: u64) -> Self {
        let mut set = Self::new(blocks);
        set.insert(BlockRun {
            first: 0,
            count: blocks,
        });
        set
    }

    /// How many blocks the disk has.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// How many are in the set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether a block is in it.
    #[must_use]
    pub fn contains(&self, block: u64) -> bool {
        let (word, bit) = place(block);
        self.words
            .get(word)
            .is_some_and(|bits| bits >> bit & 1 == 1)
    }

    /// How many blocks of a run are in it.
    #[must_use]
    pub fn count_in(&self, run: BlockRun) -> u64 {
        let end = run.end().min(self.blocks);
        let inside = self
            .runs_from(run.first, u64::MAX)
            .take_while(|found| found.first < end);
        inside.map(|found| found.end().min(end) - found.first).sum()
    }

    /// Adds a run; what lies beyond the disk is ignored.
    pub fn insert(&mut self, run: BlockRun) {
        self.change(run, |bits, mask| bits | mask);
    }

    /// Takes a run out.
    pub fn remove(&mut self, run: BlockRun) {
        self.change(run, |bits, mask| bits & !mask);
    }

    /// Adds all of another set of the same disk.
    pub fn union(&mut self, other: &Self) {
        for run in other.runs() {
            self.insert(run);
        }
    }

    /// Takes all of another set of the same disk out.
    pub fn subtract(&mut self, other: &Self) {
        self.combine(other, |mine, others| mine & !others);
    }

    /// Keeps what another set of the same disk has, too.
    pub fn intersect(&mut self, other: &Self) {
        self.combine(other, |mine, others| mine & others);
    }

    fn combine(&mut self, other: &Self, with: impl Fn(u64, u64) -> u64) {
        let others = other.words.iter().copied().chain(std::iter::repeat(0));
        for (word, others) in self.words.iter_mut().zip(others) {
            *word = with(*word, others);
        }
        self.count = self
            .words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum();
    }

    fn change(&mut self, run: BlockRun, apply: impl Fn(u64, u64) -> u64) {
        let end = run.end().min(self.blocks);
        let mut at = run.first;
        while at < end {
            let (word, bit) = place(at);
            let span = (64 - u64::from(bit)).min(end - at);
            let mask = if span == 64 {
                u64::MAX
            } else {
                ((1u64 << span) - 1) << bit
            };
            let before = self.words[word];
            let after = apply(before, mask);
            self.words[word] = after;
            self.count =
                self.count + u64::from(after.count_ones()) - u64::from(before.count_ones());
            at += span;
        }
    }

    /// The runs of the set from block `from` on, in order, each at most `limit` blocks long.
    pub fn runs_from(&self, from: u64, limit: u64) -> impl Iterator<Item = BlockRun> + '_ {
        let mut at = from;
        std::iter::from_fn(move || {
            let first = self.next_in(at)?;
            let mut end = first;
            while end < self.blocks && end - first < limit && self.contains(end) {
                let (word, bit) = place(end);
                // Whole words of ones are stepped over at once.
                if bit == 0 && self.words[word] == u64::MAX && limit - (end - first) >= 64 {
                    end += 64;
                } else {
                    end += 1;
                }
            }
            at = end.min(self.blocks);
            Some(BlockRun {
                first,
                count: at - first,
            })
        })
    }

    /// The maximal runs of the set in order.
    pub fn runs(&self) -> impl Iterator<Item = BlockRun> + '_ {
        self.runs_from(0, u64::MAX)
    }

    fn next_in(&self, from: u64) -> Option<u64> {
        if from >= self.blocks {
            return None;
        }
        let (mut word, bit) = place(from);
        let mut bits = self.words[word] & (u64::MAX << bit);
        while bits == 0 {
            word += 1;
            bits = *self.words.get(word)?;
        }
        Some(word as u64 * 64 + u64::from(bits.trailing_zeros()))
    }
}

fn place(block: u64) -> (usize, u32) {
    (
        usize::try_from(block / 64).unwrap_or(usize::MAX),
        (block % 64) as u32,
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_set_is_the_model_set(
            blocks in 1u64..400,
            changes in prop::collection::vec((any::<bool>(), 0u64..450, 0u64..200), 0..20),
            limit in 1u64..130,
        ) {
            let mut set = BlockSet::new(blocks);
            let mut model = BTreeSet::new();
            for (insert, first, count) in changes {
                let run = BlockRun { first, count };
                if insert {
                    set.insert(run);
                    model.extend((first..run.end()).filter(|block| *block < blocks));
                } else {
                    set.remove(run);
                    model.retain(|block| !(first..run.end()).contains(block));
                }
            }
            prop_assert_eq!(set.count(), model.len() as u64);
            let mut listed = Vec::new();
            for run in set.runs_from(0, limit) {
                prop_assert!(run.count >= 1 && run.count <= limit);
                listed.extend(run.first..run.end());
            }
            prop_assert_eq!(listed, model.iter().copied().collect::<Vec<_>>());
            let mut other = BlockSet::new(blocks);
            other.insert(BlockRun { first: blocks / 4, count: limit });
            let (mut without, mut both) = (set.clone(), set.clone());
            without.subtract(&other);
            both.intersect(&other);
            for block in 0..blocks {
                prop_assert_eq!(without.contains(block), set.contains(block) && !other.contains(block));
                prop_assert_eq!(both.contains(block), set.contains(block) && other.contains(block));
            }
            prop_assert_eq!(without.count() + both.count(), set.count());
            let run = BlockRun { first: blocks / 3, count: limit };
            let inside = model.iter().filter(|block| (run.first..run.end()).contains(block));
            prop_assert_eq!(set.count_in(run), inside.count() as u64);
            for block in 0..blocks {
                prop_assert_eq!(set.contains(block), model.contains(&block));
            }
        }
    }
}
