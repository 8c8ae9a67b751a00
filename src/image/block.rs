//! One stored block: the entry of a pack, and the way between plain and stored bytes.
//!
//! ```text
//! entry    magic 4 | version 1 | codec 1 | zero 2 | id 32 | plain length 4 | stored length 4 | crc32 4 | stored bytes
//! ```
//!
//! The id is the hash of the plain bytes (`hasher.rs`), the crc32 covers everything else of the entry. A block is checked twice when it is
//! read: the crc tells damage before anything is decompressed, the id that these are the bytes that were backed up.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::indexing_slicing
    )
)]

use super::bytes::Cursor;
use super::codec::{Codec, Compression};
use super::error::{Error, Result};
use super::hasher::Hasher;
use super::ids::{BlockId, ObjectId};
use crate::units::BlockSize;

const MAGIC: [u8; 4] = *b"fBlk";
const VERSION: u8 = 1;
/// Bytes of an entry before the stored bytes.
pub(super) const ENTRY_HEADER: usize = 52;

/// Where a block is stored, and how long it is there and in plain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Location {
    pub(super) pack: ObjectId,
    /// Of the entry in the pack.
    pub(super) offset: u32,
    pub(super) stored: u32,
    pub(super) plain: u32,
    pub(super) codec: Codec,
}

impl Location {
    /// Where the entry ends in the pack.
    pub(super) fn end(&self) -> u64 {
        u64::from(self.offset)
            .saturating_add(u64::from(self.stored))
            .saturating_add(ENTRY_BYTES)
    }

    /// Bytes of the entry.
    pub(super) fn length(&self) -> u64 {
        ENTRY_BYTES.saturating_add(self.stored.into())
    }

    /// Whether a block can have these lengths: bounded before anything is allocated by them.
    pub(super) fn is_possible(&self) -> bool {
        let plain_is_good = self.plain > 0 && self.plain <= BlockSize::MAX;
        plain_is_good
            && match self.codec {
                Codec::Raw => self.stored == self.plain,
                Codec::Lz4 | Codec::Zstd => self.stored > 0 && self.stored < self.plain,
            }
    }
}

/// [`ENTRY_HEADER`] in the type of offsets.
pub(super) const ENTRY_BYTES: u64 = 52;

/// A block that the repository does not hold yet, ready to be appended to a pack.
#[derive(Debug)]
pub struct NewBlock {
    pub(super) id: BlockId,
    pub(super) codec: Codec,
    pub(super) plain: u32,
    pub(super) stored: u32,
    /// The complete entry.
    pub(super) entry: Vec<u8>,
}

impl NewBlock {
    /// The name of the block.
    pub fn id(&self) -> BlockId {
        self.id
    }

    /// Compresses and frames a block, or stores it as it is when that is not longer.
    pub(super) fn encode(id: BlockId, plain: &[u8], compression: Compression) -> Result<Self> {
        let too_long = || Error::Invalid(format!("a block of {} bytes", plain.len()));
        let plain_length = u32::try_from(plain.len())
            .ok()
            .filter(|length| (1..=BlockSize::MAX).contains(length))
            .ok_or_else(too_long)?;
        compression.compress(plain, |codec, body| {
            let stored = u32::try_from(body.len()).map_err(|_| too_long())?;
            let mut entry = Vec::with_capacity(ENTRY_HEADER.saturating_add(body.len()));
            entry.extend_from_slice(&entry_header(id, codec, plain_length, stored, body));
            entry.extend_from_slice(body);
            Ok(Self {
                id,
                codec,
                plain: plain_length,
                stored,
                entry,
            })
        })
    }
}

fn entry_header(
    id: BlockId,
    codec: Codec,
    plain: u32,
    stored: u32,
    body: &[u8],
) -> [u8; ENTRY_HEADER] {
    let mut bytes = [0; ENTRY_HEADER];
    let (start, sum) = bytes.split_at_mut(48);
    let fields = MAGIC
        .into_iter()
        .chain([VERSION, codec.to_byte(), 0, 0])
        .chain(*id.as_bytes())
        .chain(plain.to_le_bytes())
        .chain(stored.to_le_bytes());
    for (place, byte) in start.iter_mut().zip(fields) {
        *place = byte;
    }
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(start);
    hasher.update(body);
    sum.copy_from_slice(&hasher.finalize().to_le_bytes());
    bytes
}

/// An entry whose crc is right.
#[derive(Debug)]
pub(super) struct Entry<'a> {
    pub(super) id: BlockId,
    pub(super) codec: Codec,
    pub(super) plain: u32,
    pub(super) stored: &'a [u8],
}

/// Reads one entry from the beginning of `bytes`.
pub(super) fn parse_entry(bytes: &[u8]) -> Option<Entry<'_>> {
    let mut cursor = Cursor::new(bytes);
    let start = cursor.take(ENTRY_HEADER)?;
    let mut fields = Cursor::new(start);
    let known = fields.array()? == MAGIC && fields.array()? == [VERSION];
    let [codec] = fields.array()?;
    let unused: [u8; 2] = fields.array()?;
    let id = BlockId::from_bytes(fields.array()?);
    let plain = fields.u32()?;
    let length = fields.length()?;
    let sum = fields.u32()?;
    let codec = Codec::from_byte(codec)?;
    if !known || unused != [0, 0] {
        return None;
    }
    let stored = cursor.take(length)?;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(start.get(..48)?);
    hasher.update(stored);
    (hasher.finalize() == sum).then_some(Entry {
        id,
        codec,
        plain,
        stored,
    })
}

/// Why a stored block is not the one that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Damage(pub(super) &'static str);

/// Puts the plain bytes of the entry that begins `bytes` into `plain`, which has exactly their length, and proves that they
/// hash to `id`.
pub(super) fn decode_entry(
    hasher: &Hasher,
    bytes: &[u8],
    id: BlockId,
    plain: &mut [u8],
) -> std::result::Result<(), Damage> {
    let entry = parse_entry(bytes).ok_or(Damage("its entry is damaged"))?;
    open_entry(hasher, &entry, id, plain)
}

/// As [`decode_entry`] of bytes that are the whole entry, which must be as its pack's footer or the index has it.
pub(super) fn decode_exactly(
    hasher: &Hasher,
    bytes: &[u8],
    id: BlockId,
    location: &Location,
    plain: &mut [u8],
) -> std::result::Result<(), Damage> {
    let entry = parse_entry(bytes).ok_or(Damage("its entry is damaged"))?;
    let as_listed = entry.codec == location.codec
        && u32::try_from(entry.stored.len()) == Ok(location.stored)
        && entry.plain == location.plain;
    if !as_listed {
        return Err(Damage("its entry is not as its pack lists it"));
    }
    open_entry(hasher, &entry, id, plain)
}

fn open_entry(
    hasher: &Hasher,
    entry: &Entry<'_>,
    id: BlockId,
    plain: &mut [u8],
) -> std::result::Result<(), Damage> {
    if entry.id != id {
        return Err(Damage("its entry holds another block"));
    }
    if usize::try_from(entry.plain).ok() != Some(plain.len()) {
        return Err(Damage("its entry has another length"));
    }
    entry
        .codec
        .decompress(entry.stored, plain)
        .map_err(Damage)?;
    if hasher.block(plain) == id {
        Ok(())
    } else {
        Err(Damage("its content does not match its id"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encode(plain: &[u8]) -> Result<NewBlock> {
        NewBlock::encode(BlockId::of(plain), plain, Compression::Lz4)
    }

    fn decode(bytes: &[u8], id: BlockId, plain: &mut [u8]) -> std::result::Result<(), Damage> {
        decode_entry(&Hasher::plain(), bytes, id, plain)
    }

    fn sample(length: usize) -> Vec<u8> {
        (0..length).map(|i| u8::try_from(i % 7).unwrap()).collect()
    }

    #[test]
    fn a_block_comes_back_and_no_flipped_bit_goes_unseen() {
        let plain = sample(200);
        let id = BlockId::of(&plain);
        let block = encode(&plain).unwrap();
        assert_eq!(block.codec, Codec::Lz4);
        let mut out = vec![0; plain.len()];
        decode(&block.entry, id, &mut out).unwrap();
        assert_eq!(out, plain);
        for position in 0..block.entry.len() {
            let mut bad = block.entry.clone();
            bad[position] ^= 4;
            assert!(decode(&bad, id, &mut out).is_err(), "{position}");
            assert!(decode(&block.entry[..position], id, &mut out).is_err());
        }
    }

    #[test]
    fn what_does_not_get_smaller_is_stored_as_it_is() {
        let plain = super::super::ids::random::<200>().unwrap();
        let block = encode(&plain).unwrap();
        assert_eq!(block.codec, Codec::Raw);
        assert_eq!(&block.entry[ENTRY_HEADER..], &plain);
        assert!(encode(b"").is_err());
    }

    proptest! {
        #[test]
        fn hostile_entries_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(parse_entry(&bytes).is_none());
        }

        /// A right checksum over hostile fields gets past the first gate; the others hold.
        #[test]
        fn hostile_fields_never_panic(
            codec in 0_u8..3, plain in any::<u32>(), body in proptest::collection::vec(any::<u8>(), 0..100)
        ) {
            let id = BlockId::of(&sample(64));
            let codec = Codec::from_byte(codec).unwrap();
            let length = u32::try_from(body.len()).unwrap();
            let mut entry = entry_header(id, codec, plain, length, &body).to_vec();
            entry.extend_from_slice(&body);
            let mut out = vec![0; 64];
            prop_assert!(decode(&entry, id, &mut out).is_err());
        }
    }
}
