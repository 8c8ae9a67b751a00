//! The filter of a run: tells of most blocks that a run does not have them, with one read of 64 bytes. A Bloom filter in
//! blocks, so that one cache line and one read decide.
//!
//! ```text
//! filter   block, block, ...
//! block    crc32 of what follows 4 | 480 bits
//! ```
//!
//! Ids are spread evenly, so their own bytes are the hashes: bytes 8 to 15 choose the block, 16 to 27 six bits of it. A damaged
//! block says nothing, so it never hides an entry.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::indexing_slicing
    )
)]

use super::super::bytes::{Cursor, narrow};
use super::super::ids::BlockId;

/// Bytes of a block.
pub(super) const BLOCK: usize = 64;
/// [`BLOCK`] in the type of offsets.
pub(super) const BLOCK_BYTES: u64 = 64;
/// Bits of a block that ids set.
const BITS: u32 = 480;
/// Entries for each block: 10 bits an id besides the checksums, which 1.2 % of the others pass.
const ENTRIES: u64 = 48;
/// Bits that an id sets.
const HASHES: usize = 6;

/// How many blocks a filter for so many entries has.
pub(super) fn blocks_for(entries: u64) -> u64 {
    entries.div_ceil(ENTRIES).max(1)
}

/// The number of the block of an id among so many.
pub(super) fn place(id: BlockId, blocks: u64) -> u64 {
    let mut cursor = Cursor::new(id.as_bytes());
    cursor.take(8);
    let hash = cursor.array().map_or(0, u64::from_be_bytes);
    let place = u128::from(hash).saturating_mul(u128::from(blocks)) >> 64;
    u64::try_from(place).unwrap_or(0)
}

/// The bits of an id: byte in the block and mask.
fn bits(id: BlockId) -> [(usize, u8); HASHES] {
    let mut cursor = Cursor::new(id.as_bytes());
    cursor.take(16);
    [(); HASHES].map(|()| {
        let hash = u32::from(cursor.u16().unwrap_or(0));
        let bit = hash.wrapping_mul(BITS) >> 16;
        let byte = usize::try_from(bit >> 3).unwrap_or(0).saturating_add(4);
        (byte, 1_u8.wrapping_shl(bit & 7))
    })
}

fn sum(block: &[u8]) -> [u8; 4] {
    block.get(4..).map_or(0, crc32fast::hash).to_le_bytes()
}

/// Whether a block may hold an id; `None` when it is damaged and nobody can tell.
pub(super) fn probe(block: &[u8], id: BlockId) -> Option<bool> {
    if block.len() != BLOCK || block.get(..4)? != sum(block) {
        return None;
    }
    let set = |(byte, mask): (usize, u8)| block.get(byte).is_some_and(|bits| bits & mask != 0);
    Some(bits(id).into_iter().all(set))
}

/// The block of an id in a whole filter.
pub(super) fn block_of(filter: &[u8], id: BlockId, blocks: u64) -> &[u8] {
    let start = narrow(place(id, blocks)).saturating_mul(BLOCK);
    filter
        .get(start..start.saturating_add(BLOCK))
        .unwrap_or_default()
}

/// A filter in the making.
pub(super) struct FilterBuilder {
    blocks: u64,
    bytes: Vec<u8>,
}

impl FilterBuilder {
    /// For at most so many entries.
    pub(super) fn new(entries: u64) -> Self {
        let blocks = blocks_for(entries);
        Self {
            blocks,
            bytes: vec![0; narrow(blocks).saturating_mul(BLOCK)],
        }
    }

    pub(super) fn insert(&mut self, id: BlockId) {
        let start = narrow(place(id, self.blocks)).saturating_mul(BLOCK);
        for (byte, mask) in bits(id) {
            if let Some(place) = self.bytes.get_mut(start.saturating_add(byte)) {
                *place |= mask;
            }
        }
    }

    /// The bytes of the filter.
    pub(super) fn finish(mut self) -> Vec<u8> {
        for block in self.bytes.chunks_exact_mut(BLOCK) {
            let sum = sum(block);
            if let Some(place) = block.get_mut(..4) {
                place.copy_from_slice(&sum);
            }
        }
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(number: u32) -> BlockId {
        BlockId::of(&number.to_le_bytes())
    }

    fn filter(ids: u32) -> (Vec<u8>, u64) {
        let mut filter = FilterBuilder::new(u64::from(ids));
        (0..ids).for_each(|number| filter.insert(id(number)));
        (filter.finish(), blocks_for(u64::from(ids)))
    }

    #[test]
    fn every_id_passes_and_few_others_do() {
        let (bytes, blocks) = filter(20_000);
        let passes = |number| probe(block_of(&bytes, id(number), blocks), id(number)).unwrap();
        assert!((0..20_000).all(passes));
        let others = (20_000..120_000).filter(|number| passes(*number)).count();
        assert!(others < 2000, "{others} of 100000");
        assert!(bytes.len() * 8 < 20_000 * 11);
    }

    #[test]
    fn a_flipped_bit_says_nothing_instead_of_no() {
        let (bytes, blocks) = filter(40);
        assert_eq!(blocks, 1);
        for bit in 0..BLOCK * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(probe(&bad, id(1)), None, "{bit}");
        }
        assert_eq!(probe(&bytes[..60], id(1)), None);
        assert_eq!(probe(&[], id(1)), None);
    }

    proptest! {
        #[test]
        fn a_hostile_filter_never_panics(
            bytes in proptest::collection::vec(any::<u8>(), 0..200), blocks in any::<u64>(), number in any::<u32>()
        ) {
            let block = block_of(&bytes, id(number), blocks);
            prop_assert_eq!(probe(block, id(number)), None);
        }
    }
}
