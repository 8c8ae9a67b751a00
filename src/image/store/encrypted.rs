//! A store whose objects are encrypted in another store.
//!
//! ```text
//! header   magic 8 | version 4 | salt 32 | crc32 of these 44 bytes 4
//! body     chunk, chunk, ...: each 16 KiB of the plain object, encrypted, and a tag of 16 bytes; the last may be shorter
//! ```
//!
//! Each object has a key of its own, derived from the master key, the salt and the object's name, so that an object under
//! another name does not open. Each chunk is sealed by AES-256-GCM-SIV with its number and whether it is the last as the
//! nonce and the header as associated data: the STREAM construction (Hoang, Reyhanitabar, Rogaway, Vizár: Online
//! authenticated-encryption and its nonce-reuse misuse-resistance, CRYPTO 2015). A chunk that is changed, moved, missing or
//! added is not opened, and a chunk is proved before any of it is handed out.
//!
//! `config`, `keys/` and `locks/` are as they are beneath.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::indexing_slicing
    )
)]

use std::cell::Cell;
use std::sync::Arc;

use aes_gcm_siv::aead::AeadInOut;
use aes_gcm_siv::aead::inout::InOutBuf;
use aes_gcm_siv::{Aes256GcmSiv, KeyInit, Nonce, Tag};

use super::super::bytes::{Cursor, narrow, wide};
use super::super::ids::random;
use super::super::secret::MasterKey;
use super::recent::Recent;
use super::{Error, ObjectWriter, Result, Store, StoreLock, kind};

const MAGIC: [u8; 8] = *b"fr-encr\0";
const VERSION: u32 = 1;
const PURPOSE: &str = "forerun object 1";
/// Bytes before the first chunk.
const HEADER: u64 = 48;
const HEADER_BYTES: usize = 48;
/// Plain bytes of a chunk.
const CHUNK: u64 = 16 << 10;
const CHUNK_BYTES: usize = 16 << 10;
const TAG: u64 = 16;
const TAG_BYTES: usize = 16;
/// Bytes of a whole chunk beneath.
const SEALED: u64 = CHUNK + TAG;
const SEALED_BYTES: usize = CHUNK_BYTES + TAG_BYTES;
/// Chunks that are read at once.
const WINDOW: u64 = 64;

thread_local! {
    /// Where a thread reads encrypted bytes: allocating them for every read costs as much as decrypting them.
    static SCRATCH: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// A store over another one, which sees only encrypted objects, their names and their sizes.
pub(in crate::image) struct EncryptedStore {
    inner: Arc<dyn Store>,
    master: Arc<MasterKey>,
    objects: Recent<Object>,
}

impl EncryptedStore {
    pub(in crate::image) fn new(inner: Arc<dyn Store>, master: Arc<MasterKey>) -> Self {
        Self {
            inner,
            master,
            objects: Recent::default(),
        }
    }
}

/// Objects that whoever opens the repository must read before there is a key.
fn is_plain(name: &str) -> bool {
    matches!(kind(name), "config" | "keys" | "locks")
}

/// What is encrypted how much longer, and back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    stored: u64,
    plain: u64,
    /// The number of the last chunk; there is always one.
    last: u64,
}

impl Layout {
    /// That of an object of so many bytes beneath. Only an empty object has an empty chunk.
    fn of_stored(stored: u64) -> Option<Self> {
        let body = stored.checked_sub(HEADER)?;
        let (whole, rest) = (body.checked_div(SEALED)?, body.checked_rem(SEALED)?);
        let (last, plain_rest) = match rest.checked_sub(TAG) {
            Some(plain) if plain > 0 || whole == 0 => (whole, plain),
            None if rest == 0 => (whole.checked_sub(1)?, 0),
            _ => return None,
        };
        let plain = whole.checked_mul(CHUNK)?.checked_add(plain_rest)?;
        Some(Self {
            stored,
            plain,
            last,
        })
    }

    /// Where a chunk lies beneath; at most the end of the object.
    fn start(&self, chunk: u64) -> u64 {
        chunk
            .saturating_mul(SEALED)
            .saturating_add(HEADER)
            .min(self.stored)
    }
}

/// Seals and opens the chunks of one object.
struct Chunks {
    cipher: Aes256GcmSiv,
    header: [u8; HEADER_BYTES],
}

impl Chunks {
    fn new(master: &MasterKey, name: &str, salt: [u8; 32]) -> Result<Self> {
        let mut header = [0; HEADER_BYTES];
        let (start, sum) = header.split_at_mut(44);
        let fields = MAGIC.into_iter().chain(VERSION.to_le_bytes()).chain(salt);
        for (place, byte) in start.iter_mut().zip(fields) {
            *place = byte;
        }
        sum.copy_from_slice(&crc32fast::hash(start).to_le_bytes());
        let key = master.derive(&salt, PURPOSE, name.as_bytes())?;
        Ok(Self {
            cipher: Aes256GcmSiv::new((&*key).into()),
            header,
        })
    }

    /// For a new object.
    fn create(master: &MasterKey, name: &str) -> Result<Self> {
        Self::new(master, name, random()?)
    }

    /// For an object with this header.
    fn open(master: &MasterKey, name: &str, header: &[u8]) -> Result<Self> {
        let salt = parse_header(name, header)?;
        Self::new(master, name, salt)
    }

    /// Encrypts a chunk in its place and adds the tag.
    fn seal(&self, name: &str, number: u64, last: bool, chunk: &mut Vec<u8>) -> Result<()> {
        let tag = self
            .cipher
            .encrypt_inout_detached(
                &nonce(number, last),
                &self.header,
                InOutBuf::from(chunk.as_mut_slice()),
            )
            .map_err(|_| Error::Invalid(format!("cannot encrypt {name}")))?;
        chunk.extend_from_slice(&tag);
        Ok(())
    }

    /// Decrypts a chunk to `plain`, which has the length of the chunk without its tag.
    fn open_to(&self, number: u64, last: bool, sealed: &[u8], plain: &mut [u8]) -> Option<()> {
        let (body, tag) = sealed.split_last_chunk::<TAG_BYTES>()?;
        let buffer = InOutBuf::new(body, plain).ok()?;
        self.cipher
            .decrypt_inout_detached(&nonce(number, last), &self.header, buffer, &Tag::from(*tag))
            .ok()
    }
}

fn nonce(number: u64, last: bool) -> Nonce {
    let mut nonce = [0; 12];
    if let Some((start, [.., flag])) = nonce.split_first_chunk_mut::<8>() {
        *start = number.to_le_bytes();
        *flag = u8::from(last);
    }
    Nonce::from(nonce)
}

/// The salt of an object; a sound header of a later version is told from damage.
fn parse_header(name: &str, header: &[u8]) -> Result<[u8; 32]> {
    let fields = || {
        let mut cursor = Cursor::new(header);
        let sum = crc32fast::hash(header.get(..44)?);
        let magic: [u8; 8] = cursor.array()?;
        let version = cursor.u32()?;
        let salt = cursor.array()?;
        (cursor.u32()? == sum && magic == MAGIC).then_some((version, salt))
    };
    match fields() {
        Some((VERSION, salt)) => Ok(salt),
        Some((version, _)) if version > VERSION => Err(Error::Unsupported(format!(
            "{name} is encrypted in format version {version}, this build reads {VERSION}: use a newer forerun"
        ))),
        _ => Err(Error::corrupt(
            name,
            "the header of its encryption is damaged",
        )),
    }
}

fn damaged(name: &str, chunk: u64) -> Error {
    Error::corrupt(
        name,
        format!("chunk {chunk} of its encryption is not what was written"),
    )
}

/// What is remembered of an object.
struct Object {
    chunks: Chunks,
    layout: Layout,
}

impl Object {
    fn is(&self, other: &Self) -> bool {
        self.chunks.header == other.chunks.header && self.layout == other.layout
    }

    /// Fills `buffer` from `offset`, both within the plain object.
    fn read(&self, inner: &dyn Store, name: &str, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let end = offset.saturating_add(wide(buffer.len()));
        if end > self.layout.plain {
            return Err(Error::corrupt(name, format!("it ends before byte {end}")));
        }
        let mut scratch = SCRATCH.take();
        let mut at = offset;
        let mut rest = buffer;
        let mut read = Ok(());
        while !rest.is_empty() && read.is_ok() {
            let first = at.checked_div(CHUNK).unwrap_or_default();
            let bound = first.saturating_add(WINDOW).saturating_mul(CHUNK).min(end);
            let (window, after) =
                std::mem::take(&mut rest).split_at_mut(narrow(bound.saturating_sub(at)));
            read = self.read_window(inner, name, at, window, &mut scratch);
            rest = after;
            at = bound;
        }
        SCRATCH.set(scratch);
        read
    }

    /// The same of no more than [`WINDOW`] chunks.
    fn read_window(
        &self,
        inner: &dyn Store,
        name: &str,
        offset: u64,
        buffer: &mut [u8],
        scratch: &mut Vec<u8>,
    ) -> Result<()> {
        let end = offset.saturating_add(wide(buffer.len()));
        let first = offset.checked_div(CHUNK).unwrap_or_default();
        let start = self.layout.start(first);
        let stored_end = self.layout.start(end.div_ceil(CHUNK));
        scratch.resize(narrow(stored_end.saturating_sub(start)), 0);
        inner.get_range(name, start, scratch)?;
        let mut skip = narrow(offset.checked_rem(CHUNK).unwrap_or_default());
        let mut rest = buffer;
        for (number, sealed) in (first..).zip(scratch.chunks_mut(SEALED_BYTES)) {
            let length = sealed.len().saturating_sub(TAG_BYTES);
            let wanted = length.saturating_sub(skip).min(rest.len());
            let (place, after) = std::mem::take(&mut rest).split_at_mut(wanted);
            rest = after;
            let last = number == self.layout.last;
            let opened = if wanted == length {
                self.chunks.open_to(number, last, sealed, place)
            } else {
                let mut plain = [0; CHUNK_BYTES];
                plain.get_mut(..length).and_then(|plain| {
                    self.chunks.open_to(number, last, sealed, plain)?;
                    place.copy_from_slice(plain.get(skip..)?.get(..wanted)?);
                    Some(())
                })
            };
            opened.ok_or_else(|| damaged(name, number))?;
            skip = 0;
        }
        Ok(())
    }
}

impl EncryptedStore {
    fn load(&self, name: &str) -> Result<Object> {
        let stored = self.inner.size(name)?;
        let layout = layout(name, stored)?;
        let mut header = [0; HEADER_BYTES];
        self.inner.get_range(name, 0, &mut header)?;
        Ok(Object {
            chunks: Chunks::open(&self.master, name, &header)?,
            layout,
        })
    }
}

fn layout(name: &str, stored: u64) -> Result<Layout> {
    Layout::of_stored(stored).ok_or_else(|| {
        Error::corrupt(
            name,
            format!("no encrypted object has {stored} bytes, it was cut or added to"),
        )
    })
}

impl Store for EncryptedStore {
    fn put(&self, name: &str, bytes: &[u8]) -> Result<()> {
        if is_plain(name) {
            return self.inner.put(name, bytes);
        }
        let mut sealer = Sealer::new(Chunks::create(&self.master, name)?, name);
        let mut object = sealer.chunks.header.to_vec();
        sealer.write(bytes, |chunk| {
            object.extend_from_slice(chunk);
            Ok(())
        })?;
        object.extend_from_slice(sealer.finish()?);
        self.inner.put(name, &object)
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        let mut inner = self.inner.create(name)?;
        if is_plain(name) {
            return Ok(inner);
        }
        let sealer = Sealer::new(Chunks::create(&self.master, name)?, name);
        inner.write(&sealer.chunks.header)?;
        Ok(Box::new(EncryptedWriter { inner, sealer }))
    }

    fn get(&self, name: &str) -> Result<Vec<u8>> {
        let sealed = self.inner.get(name)?;
        if is_plain(name) {
            return Ok(sealed);
        }
        let layout = layout(name, wide(sealed.len()))?;
        let (header, body) = sealed
            .split_at_checked(HEADER_BYTES)
            .ok_or_else(|| damaged(name, 0))?;
        let chunks = Chunks::open(&self.master, name, header)?;
        let mut plain = vec![0; narrow(layout.plain)];
        let mut rest = plain.as_mut_slice();
        for (number, sealed) in (0..).zip(body.chunks(SEALED_BYTES)) {
            let length = sealed.len().saturating_sub(TAG_BYTES).min(rest.len());
            let (place, after) = std::mem::take(&mut rest).split_at_mut(length);
            rest = after;
            chunks
                .open_to(number, number == layout.last, sealed, place)
                .ok_or_else(|| damaged(name, number))?;
        }
        Ok(plain)
    }

    fn get_range(&self, name: &str, offset: u64, buffer: &mut [u8]) -> Result<()> {
        if is_plain(name) {
            return self.inner.get_range(name, offset, buffer);
        }
        let object = self.objects.get(name, || self.load(name))?;
        let read = object.read(&*self.inner, name, offset, buffer);
        if !matches!(read, Err(Error::Corrupt { .. })) {
            return read;
        }
        // Another process may have deleted the object and put another one under its name.
        self.objects.forget(name);
        let now = self.objects.get(name, || self.load(name))?;
        if now.is(&object) {
            return read;
        }
        now.read(&*self.inner, name, offset, buffer)
    }

    fn size(&self, name: &str) -> Result<u64> {
        let stored = self.inner.size(name)?;
        if is_plain(name) {
            return Ok(stored);
        }
        layout(name, stored).map(|layout| layout.plain)
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>> {
        self.inner.list(prefix)
    }

    fn list_fresh(&self, prefix: &str) -> Result<Vec<String>> {
        self.inner.list_fresh(prefix)
    }

    fn delete(&self, names: &[String]) -> Result<()> {
        for name in names {
            self.objects.forget(name);
        }
        self.inner.delete(names)
    }

    fn lock(&self, name: &str, who: &str) -> Result<StoreLock> {
        self.inner.lock(name, who)
    }

    fn held(&self, prefix: &str) -> Result<Vec<(String, String)>> {
        self.inner.held(prefix)
    }
}

/// Cuts what is written into chunks. The last one is known only at the end, so one is always held back.
struct Sealer {
    chunks: Chunks,
    name: String,
    number: u64,
    held: Vec<u8>,
}

impl Sealer {
    fn new(chunks: Chunks, name: &str) -> Self {
        Self {
            chunks,
            name: name.to_owned(),
            number: 0,
            held: Vec::with_capacity(SEALED_BYTES),
        }
    }

    fn write(&mut self, bytes: &[u8], mut out: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            if self.held.len() >= CHUNK_BYTES {
                self.chunks
                    .seal(&self.name, self.number, false, &mut self.held)?;
                out(&self.held)?;
                self.held.clear();
                self.number = self.number.saturating_add(1);
            }
            let room = CHUNK_BYTES.saturating_sub(self.held.len()).min(rest.len());
            let (taken, after) = rest.split_at(room);
            self.held.extend_from_slice(taken);
            rest = after;
        }
        Ok(())
    }

    /// The last chunk.
    fn finish(&mut self) -> Result<&[u8]> {
        self.chunks
            .seal(&self.name, self.number, true, &mut self.held)?;
        Ok(&self.held)
    }
}

struct EncryptedWriter {
    inner: Box<dyn ObjectWriter>,
    sealer: Sealer,
}

impl ObjectWriter for EncryptedWriter {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let inner = &mut self.inner;
        self.sealer.write(bytes, |chunk| inner.write(chunk))
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        let last = self.sealer.finish()?;
        self.inner.write(last)?;
        self.inner.finish()
    }
}
