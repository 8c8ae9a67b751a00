//! A chunk: runs of blocks as bytes, about 64 KiB of them, so that a lookup reads and checks little.
//!
//! ```text
//! record   first block, counted from the chunk's first 4 | kind (top 2 bits) and number of blocks (30 bits) 4 |
//!          for data: number of blocks x id 32
//! kind     0 zero, 1 data, 2 same as the base (in session segments only)
//! ```
//!
//! A scattered changed block costs 40 bytes.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::indexing_slicing
    )
)]

use super::super::bytes::{Cursor, wide};
use super::super::ids::BlockId;
use super::run::{BlockIds, Run, RunContent};

/// A chunk that has so many bytes is complete.
const FULL: usize = 64 << 10;
/// The most bytes of a chunk: its last record may go beyond [`FULL`] by one id.
pub(super) const LIMIT: u32 = 72 << 10;
/// The most blocks of one record.
const RECORD_BLOCKS: u64 = (1 << 30) - 1;
const ZERO: u32 = 0;
const DATA: u32 = 1;
const SAME: u32 = 2;

/// A chunk in the making. Runs come in ascending order.
#[derive(Debug, Default)]
pub(super) struct ChunkBuilder {
    pub(super) bytes: Vec<u8>,
    pub(super) first: u64,
    pub(super) end: u64,
    /// Where the last record begins, its kind and number of blocks.
    last: Option<(usize, u32, u64)>,
}

impl ChunkBuilder {
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Takes as many blocks of the run as fit and gives back the rest.
    pub(super) fn push(&mut self, mut run: Run) -> Option<Run> {
        if self.is_empty() {
            self.first = run.first;
            self.end = run.first;
        }
        let offset = run.first.saturating_sub(self.first);
        let room = FULL.saturating_sub(self.bytes.len()).div_ceil(40);
        // First block and number of blocks stay below 2^32.
        if room == 0 || offset >= u64::from(u32::MAX) {
            return Some(run);
        }
        let fits = match &run.content {
            RunContent::Data(_) => wide(room),
            _ => RECORD_BLOCKS.min(u64::from(u32::MAX).saturating_sub(offset)),
        };
        let cut = run.first.saturating_add(fits.min(RECORD_BLOCKS));
        let rest = if run.end() > cut {
            let taken = run.split_before(cut);
            Some(std::mem::replace(&mut run, taken))
        } else {
            None
        };
        self.append(&run, offset);
        rest
    }

    fn append(&mut self, run: &Run, offset: u64) {
        let kind = match &run.content {
            RunContent::Zero(_) => ZERO,
            RunContent::Data(_) => DATA,
            RunContent::Same(_) => SAME,
        };
        let joins = self.end == run.first;
        match self.last {
            Some((start, of, count))
                if joins && of == kind && count.saturating_add(run.count()) <= RECORD_BLOCKS =>
            {
                let count = count.saturating_add(run.count());
                self.last = Some((start, kind, count));
                let field = start.saturating_add(4)..start.saturating_add(8);
                if let Some(place) = self.bytes.get_mut(field) {
                    place.copy_from_slice(&field_of(kind, count));
                }
            }
            _ => {
                self.last = Some((self.bytes.len(), kind, run.count()));
                let offset = u32::try_from(offset).unwrap_or(u32::MAX);
                self.bytes.extend_from_slice(&offset.to_le_bytes());
                self.bytes.extend_from_slice(&field_of(kind, run.count()));
            }
        }
        if let RunContent::Data(ids) = &run.content {
            for id in ids.as_slice() {
                self.bytes.extend_from_slice(id.as_bytes());
            }
        }
        self.end = run.end();
    }
}

fn field_of(kind: u32, count: u64) -> [u8; 4] {
    let count = u32::try_from(count).unwrap_or(0);
    (kind.wrapping_shl(30) | count).to_le_bytes()
}

/// Reads a chunk that covers the blocks from `first` to before `end`.
pub(super) fn parse(bytes: &[u8], first: u64, end: u64) -> Option<Vec<Run>> {
    let mut cursor = Cursor::new(bytes);
    let mut runs = Vec::new();
    let mut at = first;
    while cursor.left() > 0 {
        let start = first.checked_add(u64::from(cursor.u32()?))?;
        let field = cursor.u32()?;
        let count = field & 0x3fff_ffff;
        if start < at || count == 0 {
            return None;
        }
        let content = match field.wrapping_shr(30) {
            ZERO => RunContent::Zero(u64::from(count)),
            SAME => RunContent::Same(u64::from(count)),
            DATA => {
                let length = usize::try_from(count).ok()?.checked_mul(32)?;
                let (ids, _) = cursor.take(length)?.as_chunks::<32>();
                RunContent::Data(BlockIds::new(
                    ids.iter().map(|id| BlockId::from_bytes(*id)).collect(),
                ))
            }
            _ => return None,
        };
        let run = Run {
            first: start,
            content,
        };
        at = start.checked_add(u64::from(count))?;
        runs.push(run);
    }
    let begins = runs.first().is_some_and(|run| run.first == first);
    (begins && at == end).then_some(runs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_scattered_block_costs_40_bytes_and_neighbours_share_a_record() {
        let mut chunk = ChunkBuilder::default();
        let data = |first| Run {
            first,
            content: RunContent::Data(BlockIds::new(vec![BlockId::of(b"x")])),
        };
        assert!(chunk.push(data(1 << 40)).is_none());
        assert!(chunk.push(data((1 << 40) + 1)).is_none());
        assert!(chunk.push(data((1 << 40) + 9)).is_none());
        assert_eq!(chunk.bytes.len(), 8 + 64 + 8 + 32);
        let runs = parse(&chunk.bytes, chunk.first, chunk.end).unwrap();
        assert_eq!(runs.len(), 2);
        assert_eq!(runs[0].count(), 2);
        // Too far from the chunk's first block: it begins another chunk.
        assert!(chunk.push(data(1 << 41)).is_some());
    }

    #[test]
    fn a_petabyte_of_zeros_is_a_few_records() {
        let mut rest = Some(Run {
            first: 0,
            content: RunContent::Zero(1 << 34),
        });
        let mut chunks = 0;
        let mut blocks = 0;
        while rest.is_some() {
            let mut chunk = ChunkBuilder::default();
            while let Some(run) = rest.take() {
                let before = chunk.bytes.len();
                rest = chunk.push(run);
                if chunk.bytes.len() == before {
                    break;
                }
            }
            let runs = parse(&chunk.bytes, chunk.first, chunk.end).unwrap();
            blocks += runs.iter().map(Run::count).sum::<u64>();
            chunks += 1;
        }
        assert_eq!(blocks, 1 << 34);
        assert!(chunks < 10);
    }

    proptest! {
        #[test]
        fn hostile_chunks_never_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200), first in any::<u64>(), end in any::<u64>()
        ) {
            parse(&bytes, first, end);
        }

        #[test]
        fn hostile_records_never_panic(
            records in proptest::collection::vec((any::<u32>(), 0_u32..4, 0_u32..4), 0..6), first in any::<u64>(), end in any::<u64>()
        ) {
            let mut bytes = Vec::new();
            for (start, kind, count) in records {
                bytes.extend_from_slice(&start.to_le_bytes());
                bytes.extend_from_slice(&(kind << 30 | count).to_le_bytes());
                bytes.extend(std::iter::repeat_n(7, count as usize * 32));
            }
            parse(&bytes, first, end);
        }
    }
}
