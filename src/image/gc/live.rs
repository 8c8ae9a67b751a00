//! The live filter: which blocks any root refers to, as a blocked Bloom filter. It never forgets a block that is live; a few that
//! are dead look alive, others with every seed, so that what stays by chance goes next time.

use super::super::error::Result;
use super::super::ids::{BlockId, random};

/// Bits for each block.
const BITS: u64 = 12;
/// The most bytes of a filter; beyond, there are fewer bits for each block.
const LIMIT: u64 = 2 << 30;
/// Bits of a block that are set.
const PROBES: u32 = 7;

/// The blocks that are referred to.
pub(in crate::image) struct Live {
    /// Each a cache line.
    lines: Vec<[u64; 8]>,
    seed: [u64; 2],
}

impl Live {
    /// A filter for about so many blocks.
    pub(in crate::image) fn new(blocks: u64) -> Result<Self> {
        let bytes = (blocks.saturating_mul(BITS) / 8).clamp(4096, LIMIT);
        let lines = usize::try_from(bytes.div_ceil(64)).unwrap_or(usize::MAX);
        let seed = random::<16>()?;
        let (halves, _) = seed.as_chunks::<8>();
        Ok(Self {
            lines: vec![[0; 8]; lines],
            seed: [
                halves.first().map_or(0, |half| u64::from_le_bytes(*half)),
                halves.last().map_or(0, |half| u64::from_le_bytes(*half)),
            ],
        })
    }

    /// Which line, and nine bits of its number for each probe. Ids are hashes, but who writes blocks may choose them: the seed
    /// keeps collisions from being made on purpose.
    fn place(&self, id: BlockId) -> (usize, u64) {
        let (words, _) = id.as_bytes().as_chunks::<8>();
        let mut hash = self.seed[0];
        for word in words {
            hash = mix(hash ^ u64::from_le_bytes(*word));
        }
        let line = (u128::from(hash) * self.lines.len() as u128) >> 64;
        let probes = mix(hash ^ self.seed[1]);
        (usize::try_from(line).unwrap_or(0), probes)
    }

    /// Takes in a block.
    pub(in crate::image) fn insert(&mut self, id: BlockId) {
        let (line, mut probes) = self.place(id);
        let Some(line) = self.lines.get_mut(line) else {
            return;
        };
        for _ in 0..PROBES {
            line[(probes >> 6) as usize & 7] |= 1 << (probes & 63);
            probes >>= 9;
        }
    }

    /// Whether a block may be among those that were taken in.
    pub(in crate::image) fn has(&self, id: BlockId) -> bool {
        let (line, mut probes) = self.place(id);
        let Some(line) = self.lines.get(line) else {
            return true;
        };
        (0..PROBES).all(|_| {
            let set = line[(probes >> 6) as usize & 7] & (1 << (probes & 63)) != 0;
            probes >>= 9;
            set
        })
    }
}

/// A mixture in which every bit of the input moves every bit of the output (the end of `MurmurHash3`).
fn mix(mut bits: u64) -> u64 {
    bits ^= bits >> 33;
    bits = bits.wrapping_mul(0xff51_afd7_ed55_8ccd);
    bits ^= bits >> 33;
    bits = bits.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    bits ^ (bits >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u32) -> BlockId {
        BlockId::of(&number.to_le_bytes())
    }

    #[test]
    fn no_live_block_is_missing_and_few_dead_ones_seem_alive() {
        let mut live = Live::new(20_000).unwrap();
        let other = Live::new(20_000).unwrap();
        (0..20_000).for_each(|number| live.insert(id(number)));
        assert!((0..20_000).all(|number| live.has(id(number))));
        let false_ones = (20_000..120_000)
            .filter(|number| live.has(id(*number)))
            .count();
        assert!(false_ones < 1500, "{false_ones} of 100,000");
        assert_ne!(live.place(id(1)), other.place(id(1)));
    }
}
