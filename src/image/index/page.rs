//! One page of an index run: up to 85 entries in the order of their ids.
//!
//! ```text
//! page     crc32 of what follows 4 | entry count 2 | zero 2 | 48 for each entry:
//!          id 32 | pack number 4 | offset 4 | codec 1 and stored length 3 | plain length 4
//! ```
//!
//! Every page but the last of a run is full, so that the place of a page follows from its number.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::indexing_slicing
    )
)]

use std::ops::Range;

use super::super::block::Location;
use super::super::bytes::Cursor;
use super::super::ids::{BlockId, ObjectId};
use super::super::pack::{parse_stored_field, stored_field};

/// Entries of a full page.
pub(super) const ENTRIES: u64 = 85;
/// Bytes before the entries.
pub(super) const PAGE_HEADER: u64 = 8;
/// Bytes of an entry.
pub(super) const ENTRY: u64 = 48;
/// Bytes of a full page.
pub(super) const PAGE: u64 = PAGE_HEADER + ENTRIES * ENTRY;

/// Appends one entry to the entries of a page.
pub(super) fn write_entry(entries: &mut Vec<u8>, id: BlockId, pack: u32, location: &Location) {
    entries.extend_from_slice(id.as_bytes());
    entries.extend_from_slice(&pack.to_le_bytes());
    entries.extend_from_slice(&location.offset.to_le_bytes());
    entries.extend_from_slice(&stored_field(location));
    entries.extend_from_slice(&location.plain.to_le_bytes());
}

/// What the entries of a run are sorted by; a block may have copies in several packs.
pub(super) fn key((id, location): &(BlockId, Location)) -> (BlockId, ObjectId, u32) {
    (*id, location.pack, location.offset)
}

/// A page of `count` entries.
pub(super) fn write_page(count: u16, entries: &[u8]) -> Vec<u8> {
    let mut page = vec![0; 4];
    page.extend_from_slice(&count.to_le_bytes());
    page.extend_from_slice(&[0, 0]);
    page.extend_from_slice(entries);
    let sum = page.get(4..).map_or(0, crc32fast::hash);
    if let Some(place) = page.get_mut(..4) {
        place.copy_from_slice(&sum.to_le_bytes());
    }
    page
}

/// An entry of a page cannot be one, although the page's checksum is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// A checked page: its entries, ids ascending.
#[derive(Debug, Clone, Copy)]
pub(super) struct Page<'a> {
    entries: &'a [u8],
}

impl<'a> Page<'a> {
    /// Reads a page that must hold `count` entries.
    pub(super) fn parse(bytes: &'a [u8], count: u64) -> Option<Self> {
        let mut cursor = Cursor::new(bytes);
        let sum = cursor.u32()?;
        if crc32fast::hash(bytes.get(4..)?) != sum {
            return None;
        }
        let found = u64::from(cursor.u16()?);
        let unused = cursor.u16()?;
        let length = usize::try_from(count.checked_mul(ENTRY)?).ok()?;
        let entries = cursor.take(length)?;
        cursor.end()?;
        (found == count && count > 0 && unused == 0).then_some(Self { entries })
    }

    fn id_at(&self, position: usize) -> Option<BlockId> {
        let start = position.checked_mul(48)?;
        let mut cursor = Cursor::new(self.entries.get(start..)?);
        Some(BlockId::from_bytes(cursor.array()?))
    }

    pub(super) fn count(&self) -> usize {
        self.entries.len().checked_div(48).unwrap_or(0)
    }

    pub(super) fn first(&self) -> Option<BlockId> {
        self.id_at(0)
    }

    pub(super) fn last(&self) -> Option<BlockId> {
        self.id_at(self.count().checked_sub(1)?)
    }

    /// The positions of the entries of a block.
    pub(super) fn find(&self, id: BlockId) -> Result<Range<usize>, Malformed> {
        let start = self.first_not(|other| other < id)?;
        let mut end = start;
        while end < self.count() && self.id_at(end) == Some(id) {
            end = end.saturating_add(1);
        }
        Ok(start..end)
    }

    /// The first position whose id is not `before`.
    fn first_not(&self, before: impl Fn(BlockId) -> bool) -> Result<usize, Malformed> {
        let (mut low, mut high) = (0, self.count());
        while low < high {
            let middle = low.midpoint(high);
            if before(self.id_at(middle).ok_or(Malformed)?) {
                low = middle.saturating_add(1);
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    /// The entry at a position; `None` when it cannot be one.
    pub(super) fn at(&self, position: usize, packs: &[ObjectId]) -> Option<(BlockId, Location)> {
        let start = position.checked_mul(48)?;
        let mut cursor = Cursor::new(self.entries.get(start..)?);
        let id = BlockId::from_bytes(cursor.array()?);
        let pack = *packs.get(cursor.length()?)?;
        let offset = cursor.u32()?;
        let (codec, stored) = parse_stored_field(cursor.array()?)?;
        let plain = cursor.u32()?;
        let location = Location {
            pack,
            offset,
            stored,
            plain,
            codec,
        };
        location.is_possible().then_some((id, location))
    }

    /// All entries; `None` when one is damaged or out of order.
    pub(super) fn all(&self, packs: &[ObjectId]) -> Option<Vec<(BlockId, Location)>> {
        let entries: Vec<_> = (0..self.count())
            .map(|position| self.at(position, packs))
            .collect::<Option<_>>()?;
        entries
            .is_sorted_by(|a, b| key(a) < key(b))
            .then_some(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::codec::Codec;
    use super::*;
    use proptest::prelude::*;

    fn packs() -> Vec<ObjectId> {
        vec![ObjectId::from_bytes([1; 16]), ObjectId::from_bytes([2; 16])]
    }

    fn page() -> (Vec<u8>, Vec<(BlockId, Location)>) {
        let mut ids: Vec<_> = (0_u8..5).map(|i| BlockId::of(&[i])).collect();
        ids.sort_unstable();
        let mut bytes = Vec::new();
        let mut expected = Vec::new();
        for (position, id) in (0_u32..).zip(ids) {
            let location = Location {
                pack: packs()[usize::try_from(position % 2).unwrap()],
                offset: position,
                stored: 100,
                plain: 100,
                codec: Codec::Raw,
            };
            write_entry(&mut bytes, id, position % 2, &location);
            expected.push((id, location));
        }
        (write_page(5, &bytes), expected)
    }

    #[test]
    fn a_page_is_read_as_written_and_no_flipped_bit_goes_unseen() {
        let (bytes, expected) = page();
        let read = Page::parse(&bytes, 5).unwrap();
        assert_eq!(read.all(&packs()).unwrap(), expected);
        assert_eq!(read.find(expected[3].0), Ok(3..4));
        assert!(read.find(BlockId::of(b"no")).unwrap().is_empty());
        assert!(read.all(&packs()[..1]).is_none());
        assert!(Page::parse(&bytes, 4).is_none());
        for position in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[position] ^= 16;
            assert!(Page::parse(&bad, 5).is_none(), "{position}");
        }
    }

    proptest! {
        #[test]
        fn a_hostile_page_never_panics(entries in proptest::collection::vec(any::<u8>(), 48 * 3)) {
            let bytes = write_page(3, &entries);
            if let Some(page) = Page::parse(&bytes, 3) {
                page.all(&packs());
                page.find(BlockId::of(b"x")).ok();
            }
        }
    }
}
