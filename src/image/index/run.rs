//! One index run: an immutable sorted list of blocks and where they are, looked up by interpolation with positioned reads of
//! single pages, so that memory does not grow with it. A merge writes its output as several runs, the parts of one group.
//!
//! ```text
//! body     page, page, ... | pack ids 16 each, ascending | filter          (page.rs, filter.rs)
//! footer   group 16 | entry count 8 | first id 32 | last id 32 |
//!          pack count 4 | SHA-256 of the pack ids 32 | blocks of the filter 4
//! ```
//!
//! All parts of a group have the same pack ids, which are in memory once.
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
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, OnceLock};

use super::super::block::Location;
use super::super::bytes::{Cursor, narrow, wide};
use super::super::error::{Error, Result};
use super::super::ids::{BlockId, ObjectId, sha256};
use super::super::sealed::{self, HEADER, Magic};
use super::super::store::{ObjectWriter, Store};
use super::filter::{self, FilterBuilder};
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

/// Pack ids, ascending; the number of a pack is its place.
pub(super) type Packs = Arc<[ObjectId]>;
/// Lists of pack ids that are in memory, by the SHA-256 of their bytes.
pub(super) type KnownPacks = HashMap<[u8; 32], Packs>;

/// An opened run.
pub(super) struct Run {
    pub(super) object: String,
    pub(super) entries: u64,
    /// Runs of the same group are parts of one merge.
    pub(super) group: ObjectId,
    pub(super) first: BlockId,
    pub(super) last: BlockId,
    pub(super) packs: Packs,
    pub(super) packs_digest: [u8; 32],
    filter_blocks: u32,
    /// The whole filter, of a small run.
    filter: OnceLock<Vec<u8>>,
}

impl Run {
    /// Opens a run: its frame and its list of packs, which is read only when it is not known.
    pub(super) fn open(store: &dyn Store, object: &str, known: &mut KnownPacks) -> Result<Self> {
        let sealed = sealed::open(store, object, MAGIC)?;
        let footer = parse_footer(&sealed.bytes)
            .filter(|footer| footer.body_length() == Some(sealed.body_end))
            .ok_or_else(|| Error::corrupt(object, "its footer is damaged"))?;
        let packs = if let Some(packs) = known.get(&footer.packs_digest) {
            Arc::clone(packs)
        } else {
            let start = pages_end(footer.entries).unwrap_or(u64::MAX);
            let mut bytes = vec![0; narrow(u64::from(footer.packs).saturating_mul(16))];
            store.get_range(object, start, &mut bytes)?;
            if sha256(&bytes) != footer.packs_digest {
                return Err(Error::corrupt(object, "its list of packs is damaged"));
            }
            let (ids, _) = bytes.as_chunks::<16>();
            let packs: Packs = ids.iter().map(|id| ObjectId::from_bytes(*id)).collect();
            known.insert(footer.packs_digest, Arc::clone(&packs));
            packs
        };
        Ok(Self {
            object: object.to_owned(),
            entries: footer.entries,
            group: footer.group,
            first: footer.first,
            last: footer.last,
            packs,
            packs_digest: footer.packs_digest,
            filter_blocks: footer.filter_blocks,
            filter: OnceLock::new(),
        })
    }

    /// Whether a block lies between the first and the last one.
    pub(super) fn covers(&self, id: BlockId) -> bool {
        self.first <= id && id <= self.last
    }

    /// Bytes of the filter.
    pub(super) fn filter_bytes(&self) -> u64 {
        u64::from(self.filter_blocks).saturating_mul(filter::BLOCK_BYTES)
    }

    /// Whether the filter is in memory.
    pub(super) fn has_filter(&self) -> bool {
        self.filter.get().is_some()
    }

    /// Takes the filter into memory.
    pub(super) fn load_filter(&self, store: &dyn Store) -> Result<()> {
        let filter = self.read_filter(store)?;
        self.filter.get_or_init(|| filter);
        Ok(())
    }

    fn filter_start(&self) -> u64 {
        let packs = wide(self.packs.len()).saturating_mul(16);
        pages_end(self.entries).map_or(u64::MAX, |end| end.saturating_add(packs))
    }

    fn read_filter(&self, store: &dyn Store) -> Result<Vec<u8>> {
        let mut filter = vec![0; narrow(self.filter_bytes())];
        store.get_range(&self.object, self.filter_start(), &mut filter)?;
        Ok(filter)
    }

    /// Whether the run may have a block. A damaged filter knows nothing, and then it may.
    pub(super) fn may_have(&self, store: &dyn Store, id: BlockId) -> Result<bool> {
        if !self.covers(id) {
            return Ok(false);
        }
        let blocks = u64::from(self.filter_blocks);
        let answer = if let Some(filter) = self.filter.get() {
            filter::probe(filter::block_of(filter, id, blocks), id)
        } else {
            let mut block = [0; filter::BLOCK];
            let place = filter::place(id, blocks).saturating_mul(filter::BLOCK_BYTES);
            let offset = self.filter_start().saturating_add(place);
            store.get_range(&self.object, offset, &mut block)?;
            filter::probe(&block, id)
        };
        Ok(answer.unwrap_or(true))
    }

    /// Reads everything: the pages, which `each` gets the entries of, the filter, and that they are what the footer says.
    pub(super) fn check(
        self: &Arc<Self>,
        store: &dyn Store,
        each: &mut dyn FnMut(BlockId, &Location) -> Result<()>,
    ) -> Result<()> {
        let filter = self.read_filter(store)?;
        let blocks = u64::from(self.filter_blocks);
        let (mut first, mut last) = (None, None);
        let mut stream = self.stream();
        while let Some((id, location)) = stream.next(store)? {
            first = first.or(Some(id));
            last = Some(id);
            if filter::probe(filter::block_of(&filter, id, blocks), id) != Some(true) {
                return Err(Error::corrupt(&*self.object, "its filter is damaged"));
            }
            each(id, &location)?;
        }
        if (first, last) != (Some(self.first), Some(self.last)) {
            return Err(Error::corrupt(
                &*self.object,
                "its entries are not in the range that its footer names",
            ));
        }
        let sound = |block: &[u8]| filter::probe(block, self.first).is_some();
        if !filter.chunks(filter::BLOCK).all(sound) {
            return Err(Error::corrupt(&*self.object, "its filter is damaged"));
        }
        Ok(())
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
        let (mut low_key, mut high_key) = (self.first.leading(), self.last.leading());
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

/// Where the pages end.
fn pages_end(entries: u64) -> Option<u64> {
    let pages = entries.div_ceil(ENTRIES).checked_mul(PAGE_HEADER)?;
    entries
        .checked_mul(ENTRY)?
        .checked_add(pages)?
        .checked_add(HEADER)
}

#[derive(Debug)]
struct Footer {
    group: ObjectId,
    entries: u64,
    first: BlockId,
    last: BlockId,
    packs: u32,
    packs_digest: [u8; 32],
    filter_blocks: u32,
}

impl Footer {
    /// Where the body ends by what the footer says.
    fn body_length(&self) -> Option<u64> {
        let packs = u64::from(self.packs).checked_mul(16)?;
        let filter = u64::from(self.filter_blocks).checked_mul(filter::BLOCK_BYTES)?;
        pages_end(self.entries)?
            .checked_add(packs)?
            .checked_add(filter)
    }
}

fn parse_footer(bytes: &[u8]) -> Option<Footer> {
    let mut cursor = Cursor::new(bytes);
    let footer = Footer {
        group: ObjectId::from_bytes(cursor.array()?),
        entries: cursor.u64()?,
        first: BlockId::from_bytes(cursor.array()?),
        last: BlockId::from_bytes(cursor.array()?),
        packs: cursor.u32()?,
        packs_digest: cursor.array()?,
        filter_blocks: cursor.u32()?,
    };
    cursor.end()?;
    let some = footer.entries > 0 && footer.packs > 0 && footer.filter_blocks > 0;
    (some && footer.first <= footer.last).then_some(footer)
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
        let bytes_end = pages_end(end.saturating_mul(ENTRIES).min(run.entries));
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

/// Numbers of packs by their random ids, which need no hashing.
#[derive(Default)]
struct RandomId(u64);

impl Hasher for RandomId {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk() {
            self.0 = u64::from_le_bytes(*first);
        }
    }

    fn write_usize(&mut self, _length: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}

/// The packs that the entries of a run, or of all parts of a group, may be in.
pub(super) struct PackTable {
    packs: Packs,
    digest: [u8; 32],
    numbers: HashMap<ObjectId, u32, BuildHasherDefault<RandomId>>,
}

impl PackTable {
    /// From packs in any order, some of them perhaps more than once.
    pub(super) fn new(mut packs: Vec<ObjectId>) -> Result<Self> {
        packs.sort_unstable();
        packs.dedup();
        if u32::try_from(packs.len()).is_err() {
            return Err(Error::Invalid("an index run of 2^32 packs".into()));
        }
        let numbers = packs.iter().copied().zip(0..).collect();
        let bytes: Vec<u8> = packs.iter().flat_map(|pack| *pack.as_bytes()).collect();
        Ok(Self {
            packs: packs.into(),
            digest: sha256(&bytes),
            numbers,
        })
    }
}

/// Writes a run from entries that come in order.
pub(super) struct RunWriter<'a> {
    object: String,
    writer: Box<dyn ObjectWriter>,
    group: ObjectId,
    table: &'a PackTable,
    page: Vec<u8>,
    in_page: u16,
    entries: u64,
    range: Option<(BlockId, BlockId)>,
    filter: FilterBuilder,
}

impl<'a> RunWriter<'a> {
    /// For about so many entries; the filter is made for them.
    pub(super) fn create(
        store: &dyn Store,
        group: ObjectId,
        table: &'a PackTable,
        entries: u64,
    ) -> Result<Self> {
        let object = name(ObjectId::random()?);
        let mut writer = store.create(&object)?;
        writer.write(&sealed::header(MAGIC))?;
        Ok(Self {
            object,
            writer,
            group,
            table,
            page: Vec::new(),
            in_page: 0,
            entries: 0,
            range: None,
            filter: FilterBuilder::new(entries),
        })
    }

    pub(super) fn entries(&self) -> u64 {
        self.entries
    }

    /// The last block so far.
    pub(super) fn last(&self) -> Option<BlockId> {
        self.range.map(|(_, last)| last)
    }

    /// Adds an entry that comes after the last one, by [`key`].
    pub(super) fn add(&mut self, id: BlockId, location: &Location) -> Result<()> {
        let number =
            self.table.numbers.get(&location.pack).ok_or_else(|| {
                Error::Invalid(format!("pack {} is not of this run", location.pack))
            })?;
        write_entry(&mut self.page, id, *number, location);
        self.filter.insert(id);
        self.range = Some((self.range.map_or(id, |(first, _)| first), id));
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

    /// Publishes the run, which must have entries, and gives its name.
    pub(super) fn finish(mut self) -> Result<String> {
        self.flush()?;
        let empty = || Error::Invalid("an index run without entries".into());
        let (first, last) = self.range.ok_or_else(empty)?;
        for pack in &*self.table.packs {
            self.writer.write(pack.as_bytes())?;
        }
        let filter = self.filter.finish();
        self.writer.write(&filter)?;
        let too_big = |_| Error::Invalid(format!("an index run of {} entries", self.entries));
        let packs = u32::try_from(self.table.packs.len()).map_err(too_big)?;
        let blocks = filter.len().checked_div(filter::BLOCK).unwrap_or(0);
        let blocks = u32::try_from(blocks).map_err(too_big)?;
        let mut footer = Vec::new();
        footer.extend_from_slice(self.group.as_bytes());
        footer.extend_from_slice(&self.entries.to_le_bytes());
        footer.extend_from_slice(first.as_bytes());
        footer.extend_from_slice(last.as_bytes());
        footer.extend_from_slice(&packs.to_le_bytes());
        footer.extend_from_slice(&self.table.digest);
        footer.extend_from_slice(&blocks.to_le_bytes());
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
        fn a_hostile_footer_never_panics(bytes in proptest::collection::vec(any::<u8>(), 120..136)) {
            if let Some(footer) = parse_footer(&bytes) {
                footer.body_length();
            }
        }
    }
}
