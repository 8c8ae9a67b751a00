//! A layer: sorted runs of blocks in chunks, with the list of chunks in the footer, so that opening it and looking up a block
//! are a few ranged reads. Map layers and session segments have the same form and differ in their magic and in what they may
//! hold.
//!
//! ```text
//! body     chunk, chunk, ...                                    (chunk.rs)
//! footer   meta length 4 | meta (JSON, empty in map layers) | zero blocks 8 | data blocks 8 | same blocks 8 |
//!          chunk count 4 | 44 for each chunk:
//!          first block 8 | end block 8 | offset 8 | length 4 | first 16 bytes of the SHA-256 of the chunk
//! ```
//!
//! The footer's digest is in what refers to the layer, the chunks' digests are in the footer: what a point shows is proved
//! from its manifest down to the blocks.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::indexing_slicing
    )
)]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::super::bytes::{Cursor, narrow, wide};
use super::super::error::{Error, Result};
use super::super::ids::{Digest, sha256};
use super::super::sealed::{self, HEADER, Magic};
use super::super::store::{ObjectWriter, Store};
use super::chunk::{self, ChunkBuilder};
use super::run::{Run, RunContent, RunSource};

/// A map layer.
pub(in crate::image) const MAP: Magic = *b"fr-map\0\0";
/// A session segment.
pub(in crate::image) const SEGMENT: Magic = *b"fr-sgmt\0";

/// How many blocks of each kind a layer has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::image) struct Totals {
    pub(in crate::image) zero: u64,
    pub(in crate::image) data: u64,
    pub(in crate::image) same: u64,
}

impl Totals {
    fn add(&mut self, run: &Run) {
        let total = match &run.content {
            RunContent::Zero(_) => &mut self.zero,
            RunContent::Data(_) => &mut self.data,
            RunContent::Same(_) => &mut self.same,
        };
        *total = total.saturating_add(run.count());
    }

    pub(in crate::image) fn blocks(&self) -> u64 {
        self.zero
            .saturating_add(self.data)
            .saturating_add(self.same)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ChunkRef {
    first: u64,
    end: u64,
    offset: u64,
    length: u32,
    digest: [u8; 16],
}

/// Writes a layer from runs that come in ascending order.
pub(in crate::image) struct LayerWriter {
    writer: Box<dyn ObjectWriter>,
    magic: Magic,
    chunk: ChunkBuilder,
    chunks: Vec<ChunkRef>,
    length: u64,
    totals: Totals,
}

impl LayerWriter {
    pub(in crate::image) fn create(store: &dyn Store, object: &str, magic: Magic) -> Result<Self> {
        let mut writer = store.create(object)?;
        writer.write(&sealed::header(magic))?;
        Ok(Self {
            writer,
            magic,
            chunk: ChunkBuilder::default(),
            chunks: Vec::new(),
            length: HEADER,
            totals: Totals::default(),
        })
    }

    pub(in crate::image) fn push(&mut self, run: Run) -> Result<()> {
        self.totals.add(&run);
        let mut rest = Some(run);
        while let Some(run) = rest {
            let before = self.chunk.bytes.len();
            let whole = run.count();
            rest = self.chunk.push(run);
            let nothing_taken = rest.as_ref().is_some_and(|rest| rest.count() == whole);
            if nothing_taken && before > 0 {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let chunk = std::mem::take(&mut self.chunk);
        if chunk.is_empty() {
            return Ok(());
        }
        let length = u32::try_from(chunk.bytes.len())
            .map_err(|_| Error::Invalid(format!("a chunk of {} bytes", chunk.bytes.len())))?;
        self.writer.write(&chunk.bytes)?;
        self.chunks.push(ChunkRef {
            first: chunk.first,
            end: chunk.end,
            offset: self.length,
            length,
            digest: digest_of(&chunk.bytes),
        });
        self.length = self.length.saturating_add(u64::from(length));
        Ok(())
    }

    /// Publishes the layer: its digest, its totals and its size in bytes.
    pub(in crate::image) fn finish(mut self, meta: &[u8]) -> Result<(Digest, Totals, u64)> {
        self.flush()?;
        let footer = write_footer(meta, self.totals, &self.chunks)?;
        let bytes = self.length.saturating_add(wide(footer.len()));
        let digest = sealed::finish(self.writer, self.magic, &footer)?;
        let bytes = bytes.saturating_add(sealed::TRAILER);
        Ok((Digest::from_bytes(digest), self.totals, bytes))
    }
}

fn digest_of(bytes: &[u8]) -> [u8; 16] {
    let mut digest = [0; 16];
    for (place, byte) in digest.iter_mut().zip(sha256(bytes)) {
        *place = byte;
    }
    digest
}

fn write_footer(meta: &[u8], totals: Totals, chunks: &[ChunkRef]) -> Result<Vec<u8>> {
    let bad = |_| Error::Invalid(format!("a layer of {} chunks", chunks.len()));
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&u32::try_from(meta.len()).map_err(bad)?.to_le_bytes());
    bytes.extend_from_slice(meta);
    for total in [totals.zero, totals.data, totals.same] {
        bytes.extend_from_slice(&total.to_le_bytes());
    }
    bytes.extend_from_slice(&u32::try_from(chunks.len()).map_err(bad)?.to_le_bytes());
    for chunk in chunks {
        for field in [chunk.first, chunk.end, chunk.offset] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes.extend_from_slice(&chunk.length.to_le_bytes());
        bytes.extend_from_slice(&chunk.digest);
    }
    Ok(bytes)
}

struct Parsed {
    meta: Vec<u8>,
    totals: Totals,
    chunks: Vec<ChunkRef>,
}

/// Reads the footer of a layer whose chunks end at `body_end`.
fn parse_footer(bytes: &[u8], body_end: u64) -> Option<Parsed> {
    let mut cursor = Cursor::new(bytes);
    let meta_length = cursor.length()?;
    let meta = cursor.take(meta_length)?.to_vec();
    let totals = Totals {
        zero: cursor.u64()?,
        data: cursor.u64()?,
        same: cursor.u64()?,
    };
    let count = cursor.length()?;
    if cursor.left() != count.checked_mul(44)? {
        return None;
    }
    let mut chunks = Vec::with_capacity(count);
    let (mut block, mut offset) = (0, HEADER);
    for _ in 0..count {
        let chunk = ChunkRef {
            first: cursor.u64()?,
            end: cursor.u64()?,
            offset: cursor.u64()?,
            length: cursor.u32()?,
            digest: cursor.array()?,
        };
        let in_order = chunk.first >= block && chunk.end > chunk.first && chunk.offset == offset;
        if !in_order || chunk.length > chunk::LIMIT {
            return None;
        }
        block = chunk.end;
        offset = offset.checked_add(u64::from(chunk.length))?;
        chunks.push(chunk);
    }
    cursor.end()?;
    (offset == body_end).then_some(Parsed {
        meta,
        totals,
        chunks,
    })
}

/// The runs of one chunk, kept because the next lookup is often near.
type Kept = Option<(usize, Arc<Vec<Run>>)>;

/// An opened layer.
pub(in crate::image) struct Layer {
    store: Arc<dyn Store>,
    object: String,
    magic: Magic,
    chunks: Vec<ChunkRef>,
    pub(in crate::image) meta: Vec<u8>,
    pub(in crate::image) totals: Totals,
    /// Of its footer.
    pub(in crate::image) digest: [u8; 32],
    kept: Mutex<Kept>,
}

impl Layer {
    /// Opens a layer and compares it with the digest that what refers to it holds.
    pub(in crate::image) fn open(
        store: &Arc<dyn Store>,
        object: &str,
        magic: Magic,
        digest: Option<Digest>,
    ) -> Result<Self> {
        let footer = sealed::open(&**store, object, magic)?;
        if digest.is_some_and(|digest| *digest.as_bytes() != footer.digest) {
            return Err(Error::corrupt(
                object,
                "it is not the layer that the map names",
            ));
        }
        let parsed = parse_footer(&footer.bytes, footer.body_end)
            .ok_or_else(|| Error::corrupt(object, "its footer is damaged"))?;
        Ok(Self {
            store: Arc::clone(store),
            object: object.to_owned(),
            magic,
            chunks: parsed.chunks,
            meta: parsed.meta,
            totals: parsed.totals,
            digest: footer.digest,
            kept: Mutex::default(),
        })
    }

    fn read_chunk(&self, number: usize) -> Result<Vec<Run>> {
        let damaged = || Error::corrupt(&*self.object, format!("chunk {number} is damaged"));
        let chunk = self.chunks.get(number).ok_or_else(damaged)?;
        let mut bytes = vec![0; narrow(u64::from(chunk.length))];
        self.store
            .get_range(&self.object, chunk.offset, &mut bytes)?;
        if digest_of(&bytes) != chunk.digest {
            return Err(damaged());
        }
        let runs = chunk::parse(&bytes, chunk.first, chunk.end).ok_or_else(damaged)?;
        let may_be_same = self.magic == SEGMENT;
        let same = |run: &Run| matches!(run.content, RunContent::Same(_));
        if !may_be_same && runs.iter().any(same) {
            return Err(damaged());
        }
        Ok(runs)
    }

    fn chunk(&self, number: usize) -> Result<Arc<Vec<Run>>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, runs)) = &*kept
            && *of == number
        {
            return Ok(Arc::clone(runs));
        }
        let runs = Arc::new(self.read_chunk(number)?);
        *kept = Some((number, Arc::clone(&runs)));
        Ok(runs)
    }

    /// The run that holds a block, cut so that it begins with it.
    pub(in crate::image) fn get(&self, block: u64) -> Result<Option<Run>> {
        let number = self.chunks.partition_point(|chunk| chunk.end <= block);
        if self
            .chunks
            .get(number)
            .is_none_or(|chunk| chunk.first > block)
        {
            return Ok(None);
        }
        let runs = self.chunk(number)?;
        let position = runs.partition_point(|run| run.end() <= block);
        Ok(runs
            .get(position)
            .filter(|run| run.first <= block)
            .map(|run| {
                let mut run = run.clone();
                run.split_before(block);
                run
            }))
    }

    /// All runs in order, one chunk in memory at a time.
    pub(in crate::image) fn stream(self: &Arc<Self>) -> Box<dyn RunSource> {
        Box::new(LayerStream {
            layer: Arc::clone(self),
            next: 0,
            ready: VecDeque::new(),
        })
    }
}

struct LayerStream {
    layer: Arc<Layer>,
    next: usize,
    ready: VecDeque<Run>,
}

impl RunSource for LayerStream {
    fn next_run(&mut self) -> Result<Option<Run>> {
        if self.ready.is_empty() && self.next < self.layer.chunks.len() {
            self.ready = self.layer.read_chunk(self.next)?.into();
            self.next = self.next.saturating_add(1);
        }
        Ok(self.ready.pop_front())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chunk() -> ChunkRef {
        ChunkRef {
            first: 5,
            end: 9,
            offset: HEADER,
            length: 40,
            digest: [3; 16],
        }
    }

    #[test]
    fn a_footer_is_read_as_written() {
        let bytes = write_footer(b"meta", Totals::default(), &[chunk()]).unwrap();
        let parsed = parse_footer(&bytes, HEADER + 40).unwrap();
        assert_eq!(parsed.meta, b"meta");
        assert_eq!(parsed.chunks, [chunk()]);
        assert!(parse_footer(&bytes, HEADER + 41).is_none());
        for length in 0..bytes.len() {
            assert!(parse_footer(&bytes[..length], HEADER + 40).is_none());
        }
    }

    proptest! {
        #[test]
        fn a_hostile_footer_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300), end in any::<u64>()) {
            parse_footer(&bytes, end);
        }

        #[test]
        fn a_changed_footer_never_panics(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut bytes = write_footer(b"m", Totals::default(), &[chunk(), chunk()]).unwrap();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            parse_footer(&bytes, HEADER + 40);
        }
    }
}
