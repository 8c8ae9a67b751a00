//! Packs: blocks appended in the order they were read, each entry self-describing, with an index of them in the footer.
//!
//! ```text
//! body     entry, entry, ...                                    (block.rs)
//! footer   pack id 16 | label length 2 | label | entry count 4 | 44 for each entry:
//!          id 32 | offset 4 | codec 1 and stored length 3 | plain length 4
//! ```
//!
//! A pack holds the blocks of one disk and one pass, so that superseded copies die together; its label says which. The global
//! index can be rebuilt from the footers alone.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::indexing_slicing
    )
)]

use std::collections::HashSet;

use super::block::{ENTRY_BYTES, Location, NewBlock};
use super::bytes::{Cursor, narrow, wide};
use super::codec::Codec;
use super::error::{Error, Result};
use super::ids::{BlockId, ObjectId};
use super::repo::{Encoded, Repository};
use super::sealed::{self, HEADER, Magic};
use super::session::Content;
use super::store::{ObjectWriter, Store};

pub(super) const MAGIC: Magic = *b"fr-pack\0";
/// A pack is sealed before it grows beyond this.
const PACK_LIMIT: u64 = 256 << 20;
/// So many new blocks are held in memory at most before an index run of them is published.
const RUN_LIMIT: usize = 1 << 18;
/// The longest label.
const LABEL_LIMIT: usize = 255;

/// The name of a pack.
pub(super) fn name(id: ObjectId) -> String {
    let id = id.to_string();
    format!("packs/{}/{id}", id.get(..2).unwrap_or_default())
}

/// What a pack writer did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PackStats {
    /// Packs written.
    pub packs: u64,
    /// Blocks written.
    pub new_blocks: u64,
    /// Their bytes before compression.
    pub plain_bytes: u64,
    /// Their bytes in the packs, without the packs' own overhead.
    pub stored_bytes: u64,
    /// Blocks that were put and are zero.
    pub zero_blocks: u64,
    /// Blocks that were put and are in the repository or were put before.
    pub known_blocks: u64,
}

/// Stores the new blocks of one disk and one pass. What it gave out is durable once [`PackWriter::seal`] has returned; dropped
/// before, the unfinished pack vanishes.
pub struct PackWriter {
    repo: Repository,
    label: String,
    current: Option<OpenPack>,
    /// New blocks that no published index run holds yet.
    fresh: HashSet<BlockId>,
    entries: Vec<(BlockId, Location)>,
    stats: PackStats,
    failed: bool,
}

struct OpenPack {
    id: ObjectId,
    writer: Box<dyn ObjectWriter>,
    entries: Vec<(BlockId, Location)>,
    length: u64,
}

impl PackWriter {
    pub(super) fn new(repo: &Repository, label: &str) -> Self {
        let mut label = label.to_owned();
        while label.len() > LABEL_LIMIT {
            label.pop();
        }
        Self {
            repo: repo.clone(),
            label,
            current: None,
            fresh: HashSet::new(),
            entries: Vec::new(),
            stats: PackStats::default(),
            failed: false,
        }
    }

    /// Takes a block and says how a map refers to it. After an error the writer refuses further work: what it gave out since
    /// the last seal may be lost.
    pub fn put(&mut self, block: Encoded) -> Result<Content> {
        if self.failed {
            return Err(Error::Invalid(
                "a pack writer is used after it failed".into(),
            ));
        }
        let stats = &mut self.stats;
        let block = match block {
            Encoded::Zero => {
                stats.zero_blocks = stats.zero_blocks.saturating_add(1);
                return Ok(Content::Zero);
            }
            Encoded::Known(id) => {
                stats.known_blocks = stats.known_blocks.saturating_add(1);
                return Ok(Content::Data(id));
            }
            Encoded::New(block) if self.fresh.contains(&block.id) => {
                stats.known_blocks = stats.known_blocks.saturating_add(1);
                return Ok(Content::Data(block.id));
            }
            Encoded::New(block) => block,
        };
        let appended = self.append(&block);
        self.failed = appended.is_err();
        appended.map(|()| Content::Data(block.id))
    }

    fn append(&mut self, block: &NewBlock) -> Result<()> {
        let length = wide(block.entry.len());
        if let Some(pack) = &self.current
            && pack.length.saturating_add(length) > PACK_LIMIT
        {
            self.close_pack()?;
            if self.entries.len() >= RUN_LIMIT {
                self.publish_run()?;
            }
        }
        let pack = match &mut self.current {
            Some(pack) => pack,
            none => none.insert(OpenPack::create(self.repo.store())?),
        };
        pack.append(block)?;
        self.fresh.insert(block.id);
        let stats = &mut self.stats;
        stats.new_blocks = stats.new_blocks.saturating_add(1);
        stats.plain_bytes = stats.plain_bytes.saturating_add(u64::from(block.plain));
        stats.stored_bytes = stats.stored_bytes.saturating_add(length);
        Ok(())
    }

    fn close_pack(&mut self) -> Result<()> {
        if let Some(pack) = self.current.take() {
            self.entries.append(&mut pack.finish(&self.label)?);
            self.stats.packs = self.stats.packs.saturating_add(1);
        }
        Ok(())
    }

    fn publish_run(&mut self) -> Result<()> {
        self.repo
            .index()
            .publish(std::mem::take(&mut self.entries))?;
        self.fresh.clear();
        Ok(())
    }

    /// Makes everything durable that was put: the packs, then the index run that lets others find them. Writes nothing when no
    /// new block came.
    pub fn seal(mut self) -> Result<PackStats> {
        if self.failed {
            return Err(Error::Invalid(
                "a pack writer is sealed after it failed".into(),
            ));
        }
        self.close_pack()?;
        if !self.entries.is_empty() {
            self.publish_run()?;
        }
        Ok(self.stats)
    }

    /// Gives up: packs that no index run names go.
    pub(super) fn abandon(self) -> Result<()> {
        let packs: HashSet<ObjectId> = self.entries.iter().map(|(_, at)| at.pack).collect();
        let names: Vec<String> = packs.into_iter().map(name).collect();
        self.repo.store().delete(&names)
    }

    /// What it did so far.
    pub fn stats(&self) -> PackStats {
        self.stats
    }
}

impl OpenPack {
    fn create(store: &dyn Store) -> Result<Self> {
        let id = ObjectId::random()?;
        let mut writer = store.create(&name(id))?;
        writer.write(&sealed::header(MAGIC))?;
        Ok(Self {
            id,
            writer,
            entries: Vec::new(),
            length: HEADER,
        })
    }

    fn append(&mut self, block: &NewBlock) -> Result<()> {
        let offset = u32::try_from(self.length)
            .map_err(|_| Error::Invalid(format!("a pack of {} bytes", self.length)))?;
        self.writer.write(&block.entry)?;
        self.length = self.length.saturating_add(wide(block.entry.len()));
        let location = Location {
            pack: self.id,
            offset,
            stored: block.stored,
            plain: block.plain,
            codec: block.codec,
        };
        self.entries.push((block.id, location));
        Ok(())
    }

    fn finish(self, label: &str) -> Result<Vec<(BlockId, Location)>> {
        let footer = write_footer(self.id, label, &self.entries)?;
        sealed::finish(self.writer, MAGIC, &footer)?;
        Ok(self.entries)
    }
}

fn write_footer(id: ObjectId, label: &str, entries: &[(BlockId, Location)]) -> Result<Vec<u8>> {
    let bad = |_| Error::Invalid(format!("a pack of {} entries", entries.len()));
    let mut footer = Vec::with_capacity(entries.len().saturating_mul(44).saturating_add(300));
    footer.extend_from_slice(id.as_bytes());
    footer.extend_from_slice(&u16::try_from(label.len()).map_err(bad)?.to_le_bytes());
    footer.extend_from_slice(label.as_bytes());
    footer.extend_from_slice(&u32::try_from(entries.len()).map_err(bad)?.to_le_bytes());
    for (block, location) in entries {
        footer.extend_from_slice(block.as_bytes());
        footer.extend_from_slice(&location.offset.to_le_bytes());
        footer.extend_from_slice(&stored_field(location));
        footer.extend_from_slice(&location.plain.to_le_bytes());
    }
    Ok(footer)
}

/// Codec and stored length in four bytes; a block has at most 2^20 bytes.
pub(super) fn stored_field(location: &Location) -> [u8; 4] {
    let [a, b, c, _] = location.stored.to_le_bytes();
    [location.codec.to_byte(), a, b, c]
}

/// The reverse of [`stored_field`].
pub(super) fn parse_stored_field([codec, a, b, c]: [u8; 4]) -> Option<(Codec, u32)> {
    Some((Codec::from_byte(codec)?, u32::from_le_bytes([a, b, c, 0])))
}

/// The footer of a pack.
#[derive(Debug)]
pub(super) struct PackIndex {
    pub(super) id: ObjectId,
    /// Whose it is: a session's id, its disk and its pass.
    pub(super) label: String,
    pub(super) entries: Vec<(BlockId, Location)>,
}

/// Opens a pack: its frame and its index, which must be that of the pack of this name.
pub(super) fn open(store: &dyn Store, object: &str) -> Result<PackIndex> {
    let footer = sealed::open(store, object, MAGIC)?;
    let index = parse_footer(&footer.bytes, footer.body_end)
        .ok_or_else(|| Error::corrupt(object, "its index is damaged"))?;
    if name(index.id) == object {
        Ok(index)
    } else {
        Err(Error::corrupt(
            object,
            format!("it is the pack {}", index.id),
        ))
    }
}

/// Reads the index of a pack whose entries end at `body_end`.
fn parse_footer(bytes: &[u8], body_end: u64) -> Option<PackIndex> {
    let mut cursor = Cursor::new(bytes);
    let id = ObjectId::from_bytes(cursor.array()?);
    let label_length = usize::from(cursor.u16()?);
    let label = std::str::from_utf8(cursor.take(label_length)?)
        .ok()?
        .to_owned();
    let count = cursor.length()?;
    if cursor.left() != count.checked_mul(44)? {
        return None;
    }
    let mut entries = Vec::with_capacity(count);
    let mut end = HEADER;
    for _ in 0..count {
        let block = BlockId::from_bytes(cursor.array()?);
        let offset = cursor.u32()?;
        let (codec, stored) = parse_stored_field(cursor.array()?)?;
        let plain = cursor.u32()?;
        let location = Location {
            pack: id,
            offset,
            stored,
            plain,
            codec,
        };
        // Entries follow one another without a gap.
        if u64::from(offset) != end || !location.is_possible() {
            return None;
        }
        end = location.end();
        entries.push((block, location));
    }
    cursor.end()?;
    (end == body_end).then_some(PackIndex { id, label, entries })
}

/// The bytes of an entry in its pack.
pub(super) fn entry_length(location: &Location) -> usize {
    narrow(u64::from(location.stored).saturating_add(ENTRY_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn footer() -> (Vec<u8>, u64) {
        let id = ObjectId::from_bytes([7; 16]);
        let entry = |offset| Location {
            pack: id,
            offset,
            stored: 10,
            plain: 20,
            codec: Codec::Lz4,
        };
        let entries = [
            (BlockId::of(b"a"), entry(16)),
            (BlockId::of(b"b"), entry(16 + 62)),
        ];
        (write_footer(id, "vda pass 1", &entries).unwrap(), 16 + 124)
    }

    #[test]
    fn a_footer_is_read_as_written() {
        let (bytes, end) = footer();
        let index = parse_footer(&bytes, end).unwrap();
        assert_eq!(index.label, "vda pass 1");
        assert_eq!(index.entries.len(), 2);
        assert!(parse_footer(&bytes, end + 1).is_none());
        for length in 0..bytes.len() {
            assert!(parse_footer(&bytes[..length], end).is_none());
        }
    }

    proptest! {
        #[test]
        fn a_hostile_footer_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400), end in any::<u64>()) {
            prop_assert!(parse_footer(&bytes, end).is_none());
        }

        #[test]
        fn a_changed_footer_never_panics(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let (mut bytes, end) = footer();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            parse_footer(&bytes, end);
        }
    }
}
