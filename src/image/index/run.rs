//! One index run: an immutable sorted list of blocks and where they are, looked up by interpolation with positioned reads of
//! single pages, so that memory does not grow with it.
//!
//! ```text
//! body     page, page, ...                                      (page.rs)
//! footer   entry count 8 | pack count 4 | pack ids 16 each | filter offset 8 | filter length 8
//! ```
//!
//! The filter is reserved: both fields are zero in version 1.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::indexing_slicing
    )
)]

use std::collections::HashMap;
use std::collections::VecDeque;
use std::sync::Arc;

use super::super::block::Location;
use super::super::bytes::{Cursor, narrow};
use super::super::error::{Error, Result};
use super::super::ids::{BlockId, ObjectId};
use super::super::sealed::{self, HEADER, Magic};
use super::super::store::{ObjectWriter, Store};
use super::page::{ENTRIES, ENTRY, PAGE, PAGE_HEADER, Page, key, write_entry, write_page};

const MAGIC: Magic = *b"fr-indx\0";
/// How many pages a merge reads at a time.
const STREAM_PAGES: u64 = 16;
/// After so many guesses the search halves what is left: ids that are not spread evenly cost a logarithm, not a scan.
const GUESSES: u32 = 6;

/// How the names of runs begin.
pub(super) const PREFIX: &str = "index/";

/// The name of a run.
fn name(id: ObjectId) -> String {
    format!("{PREFIX}{id}")
}

/// An opened run.
pub(super) struct Run {
    pub(super) object: String,
    pub(super) entries: u64,
    pub(super) packs: Vec<ObjectId>,
}

impl Run {
    /// Opens a run: its frame and its list of packs.
    pub(super) fn open(store: &dyn Store, object: &str) -> Result<Self> {
        let footer = sealed::open(store, object, MAGIC)?;
        let (entries, packs) = parse_footer(&footer.bytes)
            .filter(|(entries, _)| body_length(*entries) == Some(footer.body_end))
            .ok_or_else(|| Error::corrupt(object, "its footer is damaged"))?;
        Ok(Self {
            object: object.to_owned(),
            entries,
            packs,
        })
    }

    fn pages(&self) -> u64 {
        self.entries.div_ceil(ENTRIES)
    }

    fn damaged(&self, page: u64) -> Error {
        Error::corrupt(&*self.object, format!("page {page} is damaged"))
    }

    /// How many entries a page has.
    fn count(&self, page: u64) -> u64 {
        self.entries
            .saturating_sub(page.saturating_mul(ENTRIES))
            .min(ENTRIES)
    }

    /// Hands on where a block is, until `each` says that it is enough; gives whether it did.
    pub(super) fn find(
        &self,
        store: &dyn Store,
        id: BlockId,
        each: &mut dyn FnMut(Location) -> bool,
    ) -> Result<bool> {
        let mut buffer = [0; 4096];
        let (mut low, mut high) = (0, self.pages());
        let (mut low_key, mut high_key) = (0, u64::MAX);
        let mut guesses = 0_u32;
        while low < high {
            let number = if guesses < GUESSES {
                interpolate(low, high, low_key, high_key, id.leading())
            } else {
                low.midpoint(high)
            };
            guesses = guesses.saturating_add(1);
            let damaged = || self.damaged(number);
            let page = self.read_page(store, number, &mut buffer)?;
            let first = page.first().ok_or_else(damaged)?;
            let last = page.last().ok_or_else(damaged)?;
            if id < first {
                high = number;
                high_key = first.leading();
            } else if id > last {
                low = number.saturating_add(1);
                low_key = last.leading();
            } else {
                return self.around(store, number, page, id, each);
            }
        }
        Ok(false)
    }

    /// Hands on the entries of a block of a page and, as copies may lie on both sides of its ends, of its neighbours.
    fn around(
        &self,
        store: &dyn Store,
        number: u64,
        page: Page<'_>,
        id: BlockId,
        each: &mut dyn FnMut(Location) -> bool,
    ) -> Result<bool> {
        let (found, before, mut after) = self.of_page(number, page, id, each)?;
        if found {
            return Ok(true);
        }
        let mut buffer = [0; 4096];
        let mut next = number;
        while before && let Some(previous) = next.checked_sub(1) {
            next = previous;
            let page = self.read_page(store, previous, &mut buffer)?;
            match self.of_page(previous, page, id, each)? {
                (true, ..) => return Ok(true),
                (false, true, _) => {}
                (false, false, _) => break,
            }
        }
        next = number;
        while after && next.saturating_add(1) < self.pages() {
            next = next.saturating_add(1);
            let page = self.read_page(store, next, &mut buffer)?;
            let (found, _, more) = self.of_page(next, page, id, each)?;
            if found {
                return Ok(true);
            }
            after = more;
        }
        Ok(false)
    }

    /// Hands on the entries of a block of one page; gives whether that was enough, and whether they begin and end the page.
    fn of_page(
        &self,
        number: u64,
        page: Page<'_>,
        id: BlockId,
        each: &mut dyn FnMut(Location) -> bool,
    ) -> Result<(bool, bool, bool)> {
        let positions = page.find(id).map_err(|_| self.damaged(number))?;
        let some = !positions.is_empty();
        let ends = (
            some && positions.start == 0,
            some && positions.end == page.count(),
        );
        for position in positions {
            let (_, location) = page
                .at(position, &self.packs)
                .ok_or_else(|| self.damaged(number))?;
            if each(location) {
                return Ok((true, ends.0, ends.1));
            }
        }
        Ok((false, ends.0, ends.1))
    }

    fn read_page<'a>(
        &self,
        store: &dyn Store,
        number: u64,
        buffer: &'a mut [u8; 4096],
    ) -> Result<Page<'a>> {
        let count = self.count(number);
        let length = narrow(count.saturating_mul(ENTRY).saturating_add(PAGE_HEADER));
        let offset = number.saturating_mul(PAGE).saturating_add(HEADER);
        let place = buffer
            .get_mut(..length)
            .ok_or_else(|| self.damaged(number))?;
        store.get_range(&self.object, offset, place)?;
        Page::parse(place, count).ok_or_else(|| self.damaged(number))
    }

    /// All entries in order, checked.
    pub(super) fn stream(self: &Arc<Self>) -> RunStream {
        RunStream {
            run: Arc::clone(self),
            page: 0,
            ready: VecDeque::new(),
            last: None,
        }
    }
}

/// Between which pages a key that is spread evenly lies.
fn interpolate(low: u64, high: u64, low_key: u64, high_key: u64, key: u64) -> u64 {
    let span = u128::from(high_key.saturating_sub(low_key)).saturating_add(1);
    let part = u128::from(key.saturating_sub(low_key));
    let pages = u128::from(high.saturating_sub(low));
    let guess = part.saturating_mul(pages).checked_div(span).unwrap_or(0);
    low.saturating_add(u64::try_from(guess).unwrap_or(u64::MAX))
        .min(high.saturating_sub(1))
}

fn body_length(entries: u64) -> Option<u64> {
    let pages = entries.div_ceil(ENTRIES).checked_mul(PAGE_HEADER)?;
    entries
        .checked_mul(ENTRY)?
        .checked_add(pages)?
        .checked_add(HEADER)
}

fn parse_footer(bytes: &[u8]) -> Option<(u64, Vec<ObjectId>)> {
    let mut cursor = Cursor::new(bytes);
    let entries = cursor.u64()?;
    let count = cursor.length()?;
    if cursor.left() != count.checked_mul(16)?.checked_add(16)? {
        return None;
    }
    let packs = (0..count)
        .map(|_| cursor.array().map(ObjectId::from_bytes))
        .collect::<Option<_>>()?;
    let filter = (cursor.u64()?, cursor.u64()?);
    cursor.end()?;
    (filter == (0, 0)).then_some((entries, packs))
}

/// The entries of a run in order, a few pages in memory at a time.
pub(super) struct RunStream {
    run: Arc<Run>,
    page: u64,
    ready: VecDeque<(BlockId, Location)>,
    last: Option<(BlockId, ObjectId, u32)>,
}

impl RunStream {
    /// The next entry.
    pub(super) fn next(&mut self, store: &dyn Store) -> Result<Option<(BlockId, Location)>> {
        if self.ready.is_empty() && self.page < self.run.pages() {
            self.fill(store)?;
        }
        Ok(self.ready.pop_front())
    }

    fn fill(&mut self, store: &dyn Store) -> Result<()> {
        let run = &self.run;
        let end = self.page.saturating_add(STREAM_PAGES).min(run.pages());
        let start = self.page.saturating_mul(PAGE);
        let bytes_end = body_length(end.saturating_mul(ENTRIES).min(run.entries));
        let length = bytes_end.and_then(|end| end.checked_sub(HEADER)?.checked_sub(start));
        let mut bytes = vec![0; narrow(length.ok_or_else(|| run.damaged(self.page))?)];
        store.get_range(&run.object, start.saturating_add(HEADER), &mut bytes)?;
        for (number, page) in (self.page..end).zip(bytes.chunks(narrow(PAGE))) {
            let entries = Page::parse(page, run.count(number))
                .and_then(|page| page.all(&run.packs))
                .filter(|entries| self.last < entries.first().map(key))
                .ok_or_else(|| run.damaged(number))?;
            self.last = entries.last().map(key);
            self.ready.extend(entries);
        }
        self.page = end;
        Ok(())
    }
}

/// Writes a run from entries that come in order.
pub(super) struct RunWriter {
    object: String,
    writer: Box<dyn ObjectWriter>,
    page: Vec<u8>,
    in_page: u16,
    entries: u64,
    packs: Vec<ObjectId>,
    numbers: HashMap<ObjectId, u32>,
}

impl RunWriter {
    pub(super) fn create(store: &dyn Store) -> Result<Self> {
        let object = name(ObjectId::random()?);
        let mut writer = store.create(&object)?;
        writer.write(&sealed::header(MAGIC))?;
        Ok(Self {
            object,
            writer,
            page: Vec::new(),
            in_page: 0,
            entries: 0,
            packs: Vec::new(),
            numbers: HashMap::new(),
        })
    }

    /// Adds an entry that comes after the last one, by [`key`].
    pub(super) fn add(&mut self, id: BlockId, location: &Location) -> Result<()> {
        let number = if let Some(number) = self.numbers.get(&location.pack) {
            *number
        } else {
            let number = u32::try_from(self.packs.len())
                .map_err(|_| Error::Invalid("an index run of 2^32 packs".into()))?;
            self.packs.push(location.pack);
            self.numbers.insert(location.pack, number);
            number
        };
        write_entry(&mut self.page, id, number, location);
        self.in_page = self.in_page.saturating_add(1);
        self.entries = self.entries.saturating_add(1);
        if u64::from(self.in_page) == ENTRIES {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if self.in_page > 0 {
            self.writer.write(&write_page(self.in_page, &self.page))?;
            self.page.clear();
            self.in_page = 0;
        }
        Ok(())
    }

    /// Publishes the run and gives its name.
    pub(super) fn finish(mut self) -> Result<String> {
        self.flush()?;
        let count = u32::try_from(self.packs.len())
            .map_err(|_| Error::Invalid("an index run of 2^32 packs".into()))?;
        let mut footer = Vec::new();
        footer.extend_from_slice(&self.entries.to_le_bytes());
        footer.extend_from_slice(&count.to_le_bytes());
        for pack in &self.packs {
            footer.extend_from_slice(pack.as_bytes());
        }
        footer.extend_from_slice(&[0; 16]);
        sealed::finish(self.writer, MAGIC, &footer)?;
        Ok(self.object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_guess_lies_between_its_bounds() {
        for key in [0, 1, u64::MAX / 2, u64::MAX] {
            let guess = interpolate(3, 9, 0, u64::MAX, key);
            assert!((3..9).contains(&guess), "{key}");
            assert_eq!(interpolate(3, 4, key, key, key), 3);
        }
    }

    proptest! {
        #[test]
        fn a_hostile_footer_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some((entries, _)) = parse_footer(&bytes) {
                body_length(entries);
            }
        }
    }
}
