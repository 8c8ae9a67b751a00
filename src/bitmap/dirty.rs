//! Which blocks are not safe yet: each pending bitmap against the proofs that the session holds.
//!
//! A block read while epoch E was live, and durable, is proved for every bitmap older than E. So a block of the pending
//! bitmap p is unsafe unless a proof newer than p covers it:
//!
//! ```text
//! bitmaps    p1 ....... p2 ....... p3                 (epochs, oldest first; a whole-disk marker is one of them)
//! proof            ^E                                 rank(E) = how many pending epochs are older than E = 1
//! ```
//!
//! so a byte a block, the rank of its newest proof, answers for all pending bitmaps at once.

use super::blocks::BlockSet;
use crate::units::BlockRun;

/// The most pending epochs of a disk: a rank is a byte.
pub const MOST_PENDING: usize = 254;

/// The ranks of the proofs of one disk's blocks.
#[derive(Debug)]
pub struct Proofs {
    ranks: Vec<u8>,
    pending: Vec<u64>,
}

impl Proofs {
    /// No proof yet, for a disk of this many blocks against these pending epochs.
    ///
    /// # Errors
    /// More than [`MOST_PENDING`] epochs.
    pub fn new(blocks: u64, mut pending: Vec<u64>) -> Result<Self, String> {
        pending.sort_unstable();
        pending.dedup();
        if pending.len() > MOST_PENDING {
            return Err(format!("{} pending bitmaps on one disk", pending.len()));
        }
        let blocks = usize::try_from(blocks).map_err(|_| "a disk of too many blocks".to_owned())?;
        Ok(Self {
            ranks: vec![0; blocks],
            pending,
        })
    }

    /// These blocks were read while `epoch` was live, and are durable.
    pub fn prove(&mut self, epoch: u64, run: BlockRun) {
        let rank = self.rank(epoch);
        for known in self.of(run) {
            *known = (*known).max(rank);
        }
    }

    /// How many pending epochs are older: at most 254.
    fn rank(&self, epoch: u64) -> u8 {
        u8::try_from(self.pending.partition_point(|older| *older < epoch)).unwrap_or(u8::MAX)
    }

    /// Adds those blocks of a run of the pending bitmap `epoch` that are not safe.
    pub fn unsafe_of(&self, epoch: u64, run: BlockRun, found: &mut BlockSet) {
        let needed = self.rank(epoch) + 1;
        let end = usize::try_from(run.end())
            .unwrap_or(usize::MAX)
            .min(self.ranks.len());
        let first = usize::try_from(run.first).unwrap_or(usize::MAX).min(end);
        let mut at = first;
        while at < end {
            let span = self.ranks[at..end].iter().position(|rank| *rank >= needed);
            let stop = span.map_or(end, |span| at + span);
            found.insert(BlockRun {
                first: at as u64,
                count: (stop - at) as u64,
            });
            let safe = self.ranks[stop..end].iter().position(|rank| *rank < needed);
            at = safe.map_or(end, |safe| stop + safe);
        }
    }

    fn of(&mut self, run: BlockRun) -> &mut [u8] {
        let end = usize::try_from(run.end())
            .unwrap_or(usize::MAX)
            .min(self.ranks.len());
        let first = usize::try_from(run.first).unwrap_or(usize::MAX).min(end);
        &mut self.ranks[first..end]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// A block of bitmap p is unsafe unless some proof of an epoch newer than p covers it.
        #[test]
        fn a_block_is_safe_only_by_a_proof_newer_than_its_bitmap(
            pending in prop::collection::vec(0u64..8, 1..4),
            proofs in prop::collection::vec((0u64..9, 0u64..40, 1u64..40), 0..8),
            bitmaps in prop::collection::vec((0usize..4, 0u64..40, 1u64..40), 0..8),
        ) {
            let blocks = 40;
            let mut ranks = Proofs::new(blocks, pending.clone()).unwrap();
            for (epoch, first, count) in &proofs {
                ranks.prove(*epoch, BlockRun { first: *first, count: *count });
            }
            let mut found = BlockSet::new(blocks);
            let mut model = BlockSet::new(blocks);
            for (index, first, count) in &bitmaps {
                let epoch = pending[index % pending.len()];
                let run = BlockRun { first: *first, count: *count };
                ranks.unsafe_of(epoch, run, &mut found);
                for block in run.first..run.end().min(blocks) {
                    let safe = proofs.iter().any(|(proof, first, count)| {
                        *proof > epoch && (*first..first + count).contains(&block)
                    });
                    if !safe {
                        model.insert(BlockRun { first: block, count: 1 });
                    }
                }
            }
            prop_assert_eq!(found, model);
        }
    }
}
