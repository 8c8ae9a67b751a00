//! The bytes of the NBD protocol: constants, requests out, replies in. Pure; nothing here does I/O.
//!
//! Sources: the NBD protocol document, sections "Fixed newstyle negotiation", "Option haggling", "Request message",
//! "Simple reply message", "Structured reply chunk message", "Structured reply types" and "Error values".
//! All numbers are big-endian. Every length that a server names is bounded here, before anything is allocated for it.
#![deny(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use super::error::{Command, Error};
use crate::units::Extent;

/// `NBDMAGIC`, the first bytes of every server.
pub(super) const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, before the server's handshake flags and every option.
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(super) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags of the server; the client's have the same values.
pub(super) const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
pub(super) const FLAG_NO_ZEROES: u16 = 1 << 1;

pub(super) const OPT_ABORT: u32 = 2;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPT_SET_META_CONTEXT: u32 = 10;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_META_CONTEXT: u32 = 4;
/// Set in the type of every option reply that is an error.
pub(super) const REP_ERROR_BIT: u32 = 1 << 31;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// The export cannot be written.
pub(super) const EXPORT_READ_ONLY: u16 = 1 << 1;
pub(super) const EXPORT_SEND_FLUSH: u16 = 1 << 2;
pub(super) const EXPORT_SEND_FUA: u16 = 1 << 3;
pub(super) const EXPORT_SEND_TRIM: u16 = 1 << 5;
pub(super) const EXPORT_SEND_WRITE_ZEROES: u16 = 1 << 6;
pub(super) const EXPORT_SEND_DF: u16 = 1 << 7;
pub(super) const EXPORT_CAN_MULTI_CONN: u16 = 1 << 8;
pub(super) const EXPORT_SEND_FAST_ZERO: u16 = 1 << 11;

pub(super) const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// The data of a read comes in one chunk.
pub(super) const CMD_FLAG_DF: u16 = 1 << 2;
pub(super) const CMD_FLAG_FAST_ZERO: u16 = 1 << 4;

/// The last chunk of a reply.
const REPLY_FLAG_DONE: u16 = 1 << 0;

/// Names of exports and contexts are at most this long ("Values", on strings).
pub(super) const MAX_STRING: usize = 4096;
/// What a server may send with an option's reply or an error chunk.
pub(super) const MAX_MESSAGE: u32 = 64 << 10;
/// What a server may send in one chunk of block status: a million extents; QEMU stops at an eighth of it.
pub(super) const MAX_STATUS_PAYLOAD: u32 = 4 + 8 * (1 << 20);
/// The longest payload of a read or write, for servers that name no limit ("Block size constraints").
pub(super) const MAX_PAYLOAD: u32 = 32 << 20;

pub(super) const REQUEST_BYTES: usize = 28;

/// The message of a request, without its payload.
pub(super) fn request(
    flags: u16,
    command: Command,
    cookie: u64,
    offset: u64,
    length: u32,
) -> [u8; REQUEST_BYTES] {
    #[expect(clippy::as_conversions, reason = "the enum is declared as u16")]
    let command = command as u16;
    let mut out = [0; REQUEST_BYTES];
    let fields = REQUEST_MAGIC
        .to_be_bytes()
        .into_iter()
        .chain(flags.to_be_bytes())
        .chain(command.to_be_bytes())
        .chain(cookie.to_be_bytes())
        .chain(offset.to_be_bytes())
        .chain(length.to_be_bytes());
    for (byte, field) in out.iter_mut().zip(fields) {
        *byte = field;
    }
    out
}

/// An option with its data, as the client sends it.
pub(super) fn option(option: u32, data: &[u8]) -> Result<Vec<u8>, Error> {
    let length = u32::try_from(data.len())
        .map_err(|_| Error::Input(format!("option of {} bytes is too long", data.len())))?;
    let mut out = Vec::with_capacity(data.len().saturating_add(16));
    out.extend(OPTION_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(length.to_be_bytes());
    out.extend(data);
    Ok(out)
}

/// Appends a string as options carry it: its length in 32 bits, then its bytes.
pub(super) fn push_string(out: &mut Vec<u8>, text: &str) -> Result<(), Error> {
    let length = u32::try_from(text.len())
        .ok()
        .filter(|_| text.len() <= MAX_STRING)
        .ok_or_else(|| {
            Error::Input(format!(
                "an nbd name has {} bytes, more than {MAX_STRING}",
                text.len()
            ))
        })?;
    out.extend(length.to_be_bytes());
    out.extend(text.as_bytes());
    Ok(())
}

/// The fields of a message, taken one after the other.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let (head, rest) = self
            .0
            .split_first_chunk::<N>()
            .ok_or_else(|| Error::protocol("a message is shorter than its fields"))?;
        self.0 = rest;
        Ok(*head)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Error> {
        self.take().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Error> {
        self.take().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Error> {
        self.take().map(u64::from_be_bytes)
    }

    pub(super) fn rest(&self) -> &'a [u8] {
        self.0
    }
}

pub(super) const OPTION_REPLY_BYTES: usize = 20;

/// The head of an option's reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OptionReply {
    pub(super) kind: u32,
    pub(super) length: u32,
}

/// Reads the head of a reply to `option`.
pub(super) fn option_reply(
    bytes: [u8; OPTION_REPLY_BYTES],
    option: u32,
) -> Result<OptionReply, Error> {
    let mut fields = Fields(&bytes);
    let magic = fields.u64()?;
    if magic != OPTION_REPLY_MAGIC {
        return Err(Error::Protocol(format!("option reply magic is {magic:#x}")));
    }
    let answered = fields.u32()?;
    if answered != option {
        return Err(Error::Protocol(format!(
            "option {option} was answered as option {answered}"
        )));
    }
    let reply = OptionReply {
        kind: fields.u32()?,
        length: fields.u32()?,
    };
    if reply.length > MAX_MESSAGE {
        return Err(Error::Protocol(format!(
            "reply to option {option} has {} bytes, more than {MAX_MESSAGE}",
            reply.length
        )));
    }
    Ok(reply)
}

pub(super) const SIMPLE_REPLY_BYTES: usize = 16;

/// The head of a reply. The two kinds share their first 16 bytes in length only: a chunk has four more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReplyHead {
    Simple { cookie: u64, errno: u32 },
    Structured { cookie: u64, flags: u16, kind: u16 },
}

/// Reads the first 16 bytes of a reply.
pub(super) fn reply_head(bytes: [u8; SIMPLE_REPLY_BYTES]) -> Result<ReplyHead, Error> {
    let mut fields = Fields(&bytes);
    match fields.u32()? {
        SIMPLE_REPLY_MAGIC => Ok(ReplyHead::Simple {
            errno: fields.u32()?,
            cookie: fields.u64()?,
        }),
        STRUCTURED_REPLY_MAGIC => Ok(ReplyHead::Structured {
            flags: fields.u16()?,
            kind: fields.u16()?,
            cookie: fields.u64()?,
        }),
        magic => Err(Error::Protocol(format!("reply magic is {magic:#x}"))),
    }
}

/// A chunk of a structured reply, its payload still to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) cookie: u64,
    pub(super) done: bool,
    pub(super) kind: ChunkKind,
    /// Bytes of payload.
    pub(super) length: u32,
}

/// What a chunk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChunkKind {
    None,
    Data,
    Hole,
    Status,
    Error,
    ErrorOffset,
    /// An error of a type that this client does not know; it starts like [`ChunkKind::Error`].
    OtherError,
}

/// Checks a chunk's type against the length of its payload.
pub(super) fn chunk(flags: u16, kind: u16, cookie: u64, length: u32) -> Result<Chunk, Error> {
    let done = flags & REPLY_FLAG_DONE != 0;
    let (kind, fits) = match kind {
        0 => (ChunkKind::None, length == 0 && done),
        1 => (
            ChunkKind::Data,
            length > 8 && length <= MAX_PAYLOAD.saturating_add(8),
        ),
        2 => (ChunkKind::Hole, length == 12),
        5 => (
            ChunkKind::Status,
            length >= 12 && length % 8 == 4 && length <= MAX_STATUS_PAYLOAD,
        ),
        0x8001 => (ChunkKind::Error, (6..=MAX_MESSAGE).contains(&length)),
        0x8002 => (ChunkKind::ErrorOffset, (14..=MAX_MESSAGE).contains(&length)),
        error if error & 0x8000 != 0 => {
            (ChunkKind::OtherError, (6..=MAX_MESSAGE).contains(&length))
        }
        other => {
            return Err(Error::Protocol(format!(
                "reply chunk of unknown type {other}"
            )));
        }
    };
    if !fits {
        return Err(Error::Protocol(format!(
            "reply chunk {kind:?} has flags {flags:#x} and {length} bytes"
        )));
    }
    Ok(Chunk {
        cookie,
        done,
        kind,
        length,
    })
}

/// What a server says with an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) errno: u32,
    pub(super) message: String,
}

impl Failure {
    /// From the payload of an error chunk.
    pub(super) fn parse(payload: &[u8]) -> Result<Self, Error> {
        Self::split(payload).map(|(failure, _)| failure)
    }

    /// From the payload of an error chunk that ends with an offset.
    pub(super) fn parse_with_offset(payload: &[u8]) -> Result<(Self, u64), Error> {
        let (failure, rest) = Self::split(payload)?;
        Ok((failure, Fields(rest).u64()?))
    }

    fn split(payload: &[u8]) -> Result<(Self, &[u8]), Error> {
        let mut fields = Fields(payload);
        let errno = fields.u32()?;
        let length = usize::from(fields.u16()?);
        let (message, rest) = fields
            .rest()
            .split_at_checked(length)
            .ok_or_else(|| Error::protocol("an error's message is longer than its chunk"))?;
        if errno == 0 {
            return Err(Error::protocol("an error chunk has error number 0"));
        }
        let message = match printable(message) {
            text if text.is_empty() => text,
            text => format!(": {text}"),
        };
        Ok((Self { errno, message }, rest))
    }

    pub(super) fn into_error(self, command: Command, extent: Extent) -> Error {
        Error::Server {
            command,
            extent,
            errno: self.errno,
            message: self.message,
        }
    }
}

/// A server's words as they may be shown: one line, no control characters, bounded.
pub(super) fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(500)
        .collect()
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
