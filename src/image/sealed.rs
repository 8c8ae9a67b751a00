//! The frame of all binary objects: a header that says what it is, a body, and at the end a footer with its checksum, so that
//! an object is opened with one or two ranged reads and no length inside it is trusted before its checksum is.
//!
//! ```text
//! header   magic 8 | version 4 | crc32 of these 12 bytes 4
//! body     ...
//! footer   ...
//! trailer  footer length 4 | version 4 | SHA-256 of the footer 32 | magic 8
//! ```
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::indexing_slicing
    )
)]

use super::bytes::{Cursor, narrow, wide};
use super::error::{Error, Result};
use super::ids::sha256;
use super::store::{ObjectWriter, Store};

/// Eight bytes that begin and end an object.
pub(super) type Magic = [u8; 8];

/// The version of all binary objects so far.
const VERSION: u32 = 1;
/// Bytes before the body.
pub(super) const HEADER: u64 = 16;
/// Bytes after the footer.
pub(super) const TRAILER: u64 = 48;
/// What is read from the end at first; most footers fit.
const TAIL: u64 = 64 << 10;
/// The longest footer: that of a map with 10^9 changed blocks is well below.
const FOOTER_LIMIT: u64 = 1 << 30;

/// The end of an opened object.
#[derive(Debug)]
pub(super) struct Footer {
    /// Its bytes, as they were written.
    pub(super) bytes: Vec<u8>,
    /// Where the body ends.
    pub(super) body_end: u64,
    /// SHA-256 of the bytes.
    pub(super) digest: [u8; 32],
}

/// The header of an object.
pub(super) fn header(magic: Magic) -> [u8; 16] {
    let mut bytes = [0; 16];
    let (start, crc) = bytes.split_at_mut(12);
    let (name, version) = start.split_at_mut(8);
    name.copy_from_slice(&magic);
    version.copy_from_slice(&VERSION.to_le_bytes());
    let sum = crc32fast::hash(start);
    crc.copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// Writes footer and trailer and publishes the object. Gives the digest of the footer.
pub(super) fn finish(
    mut writer: Box<dyn ObjectWriter>,
    magic: Magic,
    footer: &[u8],
) -> Result<[u8; 32]> {
    writer.write(footer)?;
    writer.write(&trailer(magic, footer)?)?;
    writer.finish()?;
    Ok(sha256(footer))
}

/// The bytes that follow a footer.
pub(super) fn trailer(magic: Magic, footer: &[u8]) -> Result<Vec<u8>> {
    let length = u32::try_from(footer.len())
        .ok()
        .filter(|length| u64::from(*length) <= FOOTER_LIMIT)
        .ok_or_else(|| Error::Invalid(format!("a footer of {} bytes", footer.len())))?;
    let mut bytes = Vec::with_capacity(narrow(TRAILER));
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&sha256(footer));
    bytes.extend_from_slice(&magic);
    Ok(bytes)
}

/// Reads and checks the frame of an object.
pub(super) fn open(store: &dyn Store, object: &str, magic: Magic) -> Result<Footer> {
    let corrupt = |what: &str| Error::corrupt(object, what);
    let size = store.size(object)?;
    if size < HEADER.saturating_add(TRAILER) {
        return Err(corrupt(&format!("its {size} bytes are too few")));
    }
    let tail_start = size.saturating_sub(TAIL);
    let mut tail = vec![0; narrow(size.saturating_sub(tail_start))];
    store.get_range(object, tail_start, &mut tail)?;
    let mut first = [0; 16];
    match tail.get(..16) {
        Some(start) if tail_start == 0 => first.copy_from_slice(start),
        _ => store.get_range(object, 0, &mut first)?,
    }
    check_header(object, magic, &first)?;

    let trailer_start = tail.len().saturating_sub(narrow(TRAILER));
    let (before, trailer) = tail.split_at(trailer_start);
    let (length, digest) =
        parse_trailer(trailer, magic).ok_or_else(|| corrupt("its trailer is damaged"))?;
    let body_end = size
        .checked_sub(TRAILER)
        .and_then(|end| end.checked_sub(length))
        .filter(|end| *end >= HEADER && length <= FOOTER_LIMIT)
        .ok_or_else(|| corrupt("its footer has an impossible length"))?;
    let bytes = if let Some(skip) = body_end.checked_sub(tail_start) {
        before.get(narrow(skip)..).unwrap_or_default().to_vec()
    } else {
        let mut bytes = vec![0; narrow(length)];
        store.get_range(object, body_end, &mut bytes)?;
        bytes
    };
    if wide(bytes.len()) != length || sha256(&bytes) != digest {
        return Err(corrupt("its footer does not match its checksum"));
    }
    Ok(Footer {
        bytes,
        body_end,
        digest,
    })
}

fn parse_trailer(bytes: &[u8], magic: Magic) -> Option<(u64, [u8; 32])> {
    let mut cursor = Cursor::new(bytes);
    let length = cursor.u32()?;
    let version = cursor.u32()?;
    let digest = cursor.array()?;
    let sound = cursor.array()? == magic && version == VERSION;
    cursor.end()?;
    sound.then_some((u64::from(length), digest))
}

/// Checks the header; a sound one of a later version is told apart from damage.
pub(super) fn check_header(object: &str, magic: Magic, bytes: &[u8; 16]) -> Result<()> {
    if *bytes == header(magic) {
        return Ok(());
    }
    let mut cursor = Cursor::new(bytes);
    let (name, version) = (cursor.array::<8>(), cursor.u32());
    let sum = cursor.u32();
    let sound = bytes.get(..12).map(crc32fast::hash) == sum && name == Some(magic);
    match version {
        Some(version) if sound && version > VERSION => Err(Error::Unsupported(format!(
            "{object} has format version {version}, this build reads {VERSION}: use a newer forerun"
        ))),
        _ => Err(Error::corrupt(object, "its header is damaged")),
    }
}
