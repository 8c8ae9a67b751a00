//! The negotiation: from the greeting of a server to an export that answers with structured replies.
//!
//! ```text
//! server   NBDMAGIC IHAVEOPT flags
//! client   flags
//!          STRUCTURED_REPLY     -> ACK                                 required
//!          SET_META_CONTEXT ... -> META_CONTEXT (id, name) ..., ACK    when contexts are wanted: all or none
//!          GO (BLOCK_SIZE)      -> INFO (EXPORT, BLOCK_SIZE) ..., ACK
//! ```
//!
//! Sources: the NBD protocol document, sections "Fixed newstyle negotiation", "Option types", "Option reply types",
//! "Transmission flags" and "Block size constraints".
#![deny(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use super::{
    error::Error,
    stream::Stream,
    wire::{self, Fields},
};

const DOING: &str = "negotiating";
/// Replies to one option: each context asked for gives one, and a server may add some information.
const MAX_EXTRA_REPLIES: usize = 64;
/// Contexts of one connection.
pub(super) const MAX_CONTEXTS: usize = 256;

/// What a server said of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportInfo {
    /// Bytes; below 2^63.
    pub size: u64,
    /// Offsets and lengths of requests are multiples of this power of two, at most 64 KiB.
    pub min_block: u32,
    /// The size that the server likes best.
    pub preferred_block: u32,
    /// The longest payload of a read or write.
    pub max_payload: u32,
    flags: u16,
}

impl ExportInfo {
    fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Writes are refused.
    pub fn read_only(self) -> bool {
        self.has(wire::EXPORT_READ_ONLY)
    }

    /// Reads may ask for their data in one chunk.
    pub(super) fn can_read_whole(self) -> bool {
        self.has(wire::EXPORT_SEND_DF)
    }

    /// Several connections see one another's writes, and a flush on one covers all.
    pub fn multi_conn(self) -> bool {
        self.has(wire::EXPORT_CAN_MULTI_CONN)
    }

    /// Flushes are understood.
    pub fn can_flush(self) -> bool {
        self.has(wire::EXPORT_SEND_FLUSH)
    }

    /// Writes may ask to be durable when they are answered.
    pub fn can_fua(self) -> bool {
        self.has(wire::EXPORT_SEND_FUA)
    }

    /// Trims are understood.
    pub fn can_trim(self) -> bool {
        self.has(wire::EXPORT_SEND_TRIM)
    }

    /// Zeros can be written without sending them.
    pub fn can_write_zeroes(self) -> bool {
        self.has(wire::EXPORT_SEND_WRITE_ZEROES)
    }

    /// Zeros can be asked for only where they are faster than writing.
    pub fn can_fast_zero(self) -> bool {
        self.has(wire::EXPORT_SEND_FAST_ZERO)
    }

    /// The longest read or write that is a multiple of the smallest block.
    pub(super) fn max_request(self) -> u32 {
        let spare = self.max_payload.checked_rem(self.min_block).unwrap_or(0);
        self.max_payload.saturating_sub(spare)
    }
}

/// A meta context that the server granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Context {
    pub(super) name: String,
    pub(super) id: u32,
}

/// Negotiates; on success the connection is in the transmission phase.
pub(super) fn negotiate(
    stream: &mut Stream,
    export: &str,
    contexts: &[String],
) -> Result<(ExportInfo, Vec<Context>), Error> {
    if contexts.len() > MAX_CONTEXTS {
        return Err(Error::Input(format!(
            "{} meta contexts are more than {MAX_CONTEXTS}",
            contexts.len()
        )));
    }
    greet(stream)?;
    structured_reply(stream)?;
    let granted = if contexts.is_empty() {
        Vec::new()
    } else {
        set_contexts(stream, export, contexts)?
    };
    let info = go(stream, export)?;
    Ok((info, granted))
}

/// Tells the server that the negotiation ends here, so that it logs no broken connection.
pub(super) fn abort(stream: &mut Stream) -> Result<(), Error> {
    stream.write_all(&wire::option(wire::OPT_ABORT, &[])?, &[], DOING)
}

fn greet(stream: &mut Stream) -> Result<(), Error> {
    let bytes: [u8; 18] = stream.read_array(DOING)?;
    let mut fields = Fields(&bytes);
    if fields.u64()? != wire::INIT_MAGIC {
        return Err(Error::protocol("the server's greeting is not NBD's"));
    }
    if fields.u64()? != wire::OPTION_MAGIC {
        return Err(refused("newstyle negotiation", "it speaks oldstyle only"));
    }
    let flags = fields.u16()?;
    if flags & wire::FLAG_FIXED_NEWSTYLE == 0 {
        return Err(refused("fixed newstyle negotiation", "not offered"));
    }
    let ours = u32::from(flags & (wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES));
    stream.write_all(&ours.to_be_bytes(), &[], DOING)
}

fn refused(what: &str, reason: &str) -> Error {
    Error::Refused {
        what: what.to_owned(),
        reason: reason.to_owned(),
    }
}

/// The next reply to an option; an error reply becomes an error that says `what` was asked for.
fn reply(stream: &mut Stream, option: u32, what: &str) -> Result<(u32, Vec<u8>), Error> {
    let head = wire::option_reply(stream.read_array(DOING)?, option)?;
    let length = usize::try_from(head.length)
        .map_err(|_| Error::protocol("a reply does not fit in memory"))?;
    let mut data = vec![0; length];
    stream.read_exact(&mut data, DOING)?;
    if head.kind & wire::REP_ERROR_BIT == 0 {
        return Ok((head.kind, data));
    }
    let why = match head.kind & !wire::REP_ERROR_BIT {
        1 => "not supported",
        2 => "forbidden by policy",
        3 => "invalid",
        4 => "not supported on its platform",
        5 => "TLS required",
        6 => "no such export",
        7 => "shutting down",
        8 => "block sizes must be negotiated",
        9 => "too big",
        _ => "unknown error",
    };
    let words = wire::printable(&data);
    let separator = if words.is_empty() { "" } else { ": " };
    Err(refused(what, &format!("{why}{separator}{words}")))
}

fn structured_reply(stream: &mut Stream) -> Result<(), Error> {
    let option = wire::OPT_STRUCTURED_REPLY;
    stream.write_all(&wire::option(option, &[])?, &[], DOING)?;
    match reply(stream, option, "structured replies")? {
        (wire::REP_ACK, _) => Ok(()),
        (kind, _) => Err(unexpected(option, kind)),
    }
}

fn unexpected(option: u32, kind: u32) -> Error {
    Error::Protocol(format!("reply of type {kind} to option {option}"))
}

fn set_contexts(
    stream: &mut Stream,
    export: &str,
    wanted: &[String],
) -> Result<Vec<Context>, Error> {
    let option = wire::OPT_SET_META_CONTEXT;
    let count = u32::try_from(wanted.len()).map_err(|_| Error::protocol("too many contexts"))?;
    let mut data = Vec::new();
    wire::push_string(&mut data, export)?;
    data.extend(count.to_be_bytes());
    for name in wanted {
        wire::push_string(&mut data, name)?;
    }
    stream.write_all(&wire::option(option, &data)?, &[], DOING)?;

    let mut granted: Vec<Context> = Vec::new();
    let what = format!("meta contexts of export `{export}`");
    for _ in 0..=wanted.len() {
        let (kind, data) = reply(stream, option, &what)?;
        match kind {
            wire::REP_META_CONTEXT => granted.push(context(&data, wanted, &granted)?),
            wire::REP_ACK => return all_granted(export, wanted, granted),
            kind => return Err(unexpected(option, kind)),
        }
    }
    Err(Error::protocol("more meta contexts granted than asked for"))
}

fn context(data: &[u8], wanted: &[String], granted: &[Context]) -> Result<Context, Error> {
    let mut fields = Fields(data);
    let id = fields.u32()?;
    let name = wanted
        .iter()
        .find(|name| name.as_bytes() == fields.rest())
        .ok_or_else(|| Error::protocol("a meta context was granted that was not asked for"))?;
    if granted.iter().any(|had| had.id == id || had.name == *name) {
        return Err(Error::Protocol(format!(
            "meta context `{name}` ({id}) was granted twice"
        )));
    }
    Ok(Context {
        name: name.clone(),
        id,
    })
}

fn all_granted(
    export: &str,
    wanted: &[String],
    granted: Vec<Context>,
) -> Result<Vec<Context>, Error> {
    match wanted
        .iter()
        .find(|name| !granted.iter().any(|had| had.name == **name))
    {
        None => Ok(granted),
        Some(missing) => Err(Error::NoContext {
            export: export.to_owned(),
            context: missing.clone(),
        }),
    }
}

fn go(stream: &mut Stream, export: &str) -> Result<ExportInfo, Error> {
    let option = wire::OPT_GO;
    let mut data = Vec::new();
    wire::push_string(&mut data, export)?;
    data.extend(1u16.to_be_bytes());
    data.extend(wire::INFO_BLOCK_SIZE.to_be_bytes());
    stream.write_all(&wire::option(option, &data)?, &[], DOING)?;

    let mut size_and_flags = None;
    let mut sizes = None;
    let what = format!("export `{export}`");
    for _ in 0..MAX_EXTRA_REPLIES {
        let (kind, data) = reply(stream, option, &what)?;
        let mut fields = Fields(&data);
        match kind {
            wire::REP_INFO => match fields.u16()? {
                wire::INFO_EXPORT => size_and_flags = Some((fields.u64()?, fields.u16()?)),
                wire::INFO_BLOCK_SIZE => {
                    sizes = Some((fields.u32()?, fields.u32()?, fields.u32()?));
                }
                _ => {}
            },
            wire::REP_ACK => {
                let (size, flags) = size_and_flags
                    .ok_or_else(|| Error::protocol("export accepted without its size"))?;
                return export_info(size, flags, sizes);
            }
            kind => return Err(unexpected(option, kind)),
        }
    }
    Err(Error::protocol("no end to the information about an export"))
}

/// Believes a server's numbers, or not: with these bounds no sum of an offset and a length in the export overflows.
fn export_info(size: u64, flags: u16, sizes: Option<(u32, u32, u32)>) -> Result<ExportInfo, Error> {
    if i64::try_from(size).is_err() {
        return Err(Error::Protocol(format!("export of {size} bytes")));
    }
    let (min_block, preferred_block, max_payload) = sizes.unwrap_or((1, 4096, wire::MAX_PAYLOAD));
    let good = min_block.is_power_of_two()
        && min_block <= 64 << 10
        && preferred_block >= min_block
        && max_payload >= min_block;
    if !good {
        return Err(Error::Protocol(format!(
            "block sizes {min_block}, {preferred_block}, {max_payload}"
        )));
    }
    Ok(ExportInfo {
        size,
        min_block,
        preferred_block,
        max_payload: max_payload.min(wire::MAX_PAYLOAD),
        flags,
    })
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
