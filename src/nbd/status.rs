//! Block status: which bytes of an export are dirty, zero or holes, for a range of any size.
//!
//! A request covers less than 2 GiB and a server may answer less than it was asked, differently for each context; so
//! each context has its own cursor, the next request starts at the one that is furthest behind, and what a context
//! tells again is cut off:
//!
//! ```text
//! wanted   |----------------------------------------|
//! context a  [====][==]                               cursor of a
//! context b  [=========][=======]                     cursor of b
//! next request         |--------- ...                 from the cursor of a
//! ```
//!
//! Sources: the NBD protocol document, "Metadata querying", "`base:allocation` metadata context" and
//! `NBD_REPLY_TYPE_BLOCK_STATUS`; QEMU's `docs/interop/nbd.rst` for `qemu:dirty-bitmap:`.
#![deny(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use std::ops::ControlFlow;

use super::{
    client::{Client, Reply, stray},
    error::{Command, Error},
    wire::{self, Chunk, ChunkKind, Fields},
};
use crate::units::Extent;

/// The context that tells holes and zeros.
pub const ALLOCATION: &str = "base:allocation";
/// The context of a dirty bitmap is this and the bitmap's name.
pub const DIRTY_BITMAP_PREFIX: &str = "qemu:dirty-bitmap:";

/// In `base:allocation`: nothing is allocated. This does not say that it reads as zeros.
pub const STATE_HOLE: u32 = 1 << 0;
/// In `base:allocation`: it reads as zeros. Only this allows a reader to skip it.
pub const STATE_ZERO: u32 = 1 << 1;
/// In a dirty bitmap: changed since the bitmap was cleared.
pub const STATE_DIRTY: u32 = 1 << 0;

/// The longest range of one request; cut to a multiple of the export's block size.
const MAX_STATUS: u64 = (2 << 30) - (64 << 10);

/// Ranges in order, each with its flags.
pub type StatusList = Vec<(Extent, u32)>;

/// What one context answered: its id, then lengths and flags.
type Answer = (u32, Vec<(u32, u32)>);

/// The state of a range in one context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status<'a> {
    /// The full name of the context.
    pub context: &'a str,
    /// The range.
    pub extent: Extent,
    /// The context's flags.
    pub flags: u32,
}

impl Client {
    /// The state of a range in one context: the whole of it, in order, neighbours of equal state merged. For a range
    /// of many extents use [`Client::each_status`].
    pub fn block_status(&mut self, extent: Extent, context: &str) -> Result<StatusList, Error> {
        let mut out = Vec::new();
        self.each_status(extent, &[context], &mut |status| {
            out.push((status.extent, status.flags));
            ControlFlow::Continue(())
        })?;
        Ok(out)
    }

    /// The state of a range in all contexts that were granted, in the order of [`Client::contexts`].
    pub fn block_status_all(&mut self, extent: Extent) -> Result<Vec<(String, StatusList)>, Error> {
        let names: Vec<String> = self.contexts().map(str::to_owned).collect();
        let mut out: Vec<(String, StatusList)> = names
            .iter()
            .map(|name| (name.clone(), Vec::new()))
            .collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        self.each_status(extent, &names, &mut |status| {
            if let Some((_, list)) = out.iter_mut().find(|(name, _)| name == status.context) {
                list.push((status.extent, status.flags));
            }
            ControlFlow::Continue(())
        })?;
        Ok(out)
    }

    /// Hands on the dirty ranges of a bitmap, by its own name, within a range, as they come; memory does not grow with
    /// their number.
    pub fn dirty_extents(
        &mut self,
        bitmap: &str,
        within: Extent,
        on_extent: &mut dyn FnMut(Extent) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        let context = format!("{DIRTY_BITMAP_PREFIX}{bitmap}");
        self.extents_with(&context, STATE_DIRTY, within, on_extent)
    }

    /// Hands on the ranges that read as zeros, as they come.
    pub fn zero_extents(
        &mut self,
        within: Extent,
        on_extent: &mut dyn FnMut(Extent) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        self.extents_with(ALLOCATION, STATE_ZERO, within, on_extent)
    }

    /// Hands on the ranges that may hold something else than zeros, as they come.
    pub fn data_extents(
        &mut self,
        within: Extent,
        on_extent: &mut dyn FnMut(Extent) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        self.flagged_extents(ALLOCATION, STATE_ZERO, 0, within, on_extent)
    }

    fn extents_with(
        &mut self,
        context: &str,
        flag: u32,
        within: Extent,
        on_extent: &mut dyn FnMut(Extent) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        self.flagged_extents(context, flag, flag, within, on_extent)
    }

    /// The ranges whose flags under `mask` are `value`, merged.
    fn flagged_extents(
        &mut self,
        context: &str,
        mask: u32,
        value: u32,
        within: Extent,
        on_extent: &mut dyn FnMut(Extent) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        let mut merged = Merged::default();
        let mut stopped = false;
        self.each_status(within, &[context], &mut |status| {
            let flow = match merged.push(status.extent, status.flags & mask) {
                Some((extent, flags)) if flags == value => on_extent(extent),
                _ => ControlFlow::Continue(()),
            };
            stopped = flow.is_break();
            flow
        })?;
        if let Some((extent, flags)) = merged.take()
            && flags == value
            && !stopped
        {
            // Nothing is left to stop.
            let _ = on_extent(extent);
        }
        Ok(())
    }

    /// Hands on the state of a range in the named contexts: within a context in order, merged and without gaps. A
    /// callback that breaks ends it early.
    pub fn each_status(
        &mut self,
        extent: Extent,
        contexts: &[&str],
        on_status: &mut dyn FnMut(Status<'_>) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        let end = self.check_range(extent)?;
        let mut tracks = Vec::with_capacity(contexts.len());
        for name in contexts {
            let context = self.granted().iter().find(|context| context.name == *name);
            let Some(context) = context else {
                return Err(Error::NoContext {
                    export: self.export().to_owned(),
                    context: (*name).to_owned(),
                });
            };
            tracks.push(Track {
                name,
                id: context.id,
                cursor: extent.offset,
                end,
                merged: Merged::default(),
            });
        }
        while let Some(from) = tracks.iter().map(|track| track.cursor).min()
            && from < end
        {
            if self
                .status_step(from, end, &mut tracks, on_status)?
                .is_break()
            {
                return Ok(());
            }
        }
        for track in &mut tracks {
            if let Some((extent, flags)) = track.merged.take()
                && on_status(track.status(extent, flags)).is_break()
            {
                return Ok(());
            }
        }
        Ok(())
    }

    /// The end of a range that lies in the export.
    fn check_range(&self, extent: Extent) -> Result<u64, Error> {
        extent
            .offset
            .checked_add(extent.length)
            .filter(|end| *end <= self.size())
            .ok_or_else(|| {
                Error::Input(format!(
                    "block status of {} bytes at offset {:#x} of an export of {} bytes",
                    extent.length,
                    extent.offset,
                    self.size()
                ))
            })
    }

    /// One request from the block that holds `from`, and what it tells.
    fn status_step(
        &mut self,
        from: u64,
        end: u64,
        tracks: &mut [Track<'_>],
        on_status: &mut dyn FnMut(Status<'_>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, Error> {
        let request = aligned_request(from, end, self.info().min_block, self.size())?;
        let answers = self.exchange(|client| client.status_request(request))?;
        for track in tracks.iter_mut() {
            let (_, payload) = answers
                .iter()
                .find(|(id, _)| *id == track.id)
                .ok_or_else(|| Error::Protocol(format!("no status for `{}`", track.name)))?;
            if track.advance(request.offset, payload, on_status).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        // A server that tells less than the block of `from` up to `from` would be asked the same for ever.
        if tracks.iter().any(|track| track.cursor <= from) {
            return Err(Error::Protocol(format!(
                "no progress in block status at {from:#x}"
            )));
        }
        Ok(ControlFlow::Continue(()))
    }

    /// One request and all of its reply: the extents of each context.
    fn status_request(&mut self, request: Extent) -> Result<Vec<Answer>, Error> {
        let length = u32::try_from(request.length)
            .map_err(|_| Error::Input(format!("block status of {} bytes", request.length)))?;
        let cookie = self.send(0, Command::BlockStatus, request.offset, length, &[])?;
        let mut answers: Vec<Answer> = Vec::new();
        let mut failure = None;
        // A chunk a context, one for an error, one to end it.
        for _ in 0..self.granted().len().saturating_add(2) {
            let chunk = match self.next_reply()? {
                Reply::Chunk(chunk) if chunk.cookie == cookie => chunk,
                Reply::Chunk(Chunk { cookie, .. }) => return Err(stray(cookie)),
                Reply::Simple { .. } => {
                    return Err(Error::protocol("a simple reply to block status"));
                }
            };
            match chunk.kind {
                ChunkKind::Status => {
                    let (id, extents) = self.receive_status(chunk, length)?;
                    let known = self.granted().iter().any(|context| context.id == id);
                    if !known || answers.iter().any(|(had, _)| *had == id) {
                        return Err(Error::Protocol(format!("status for context {id}")));
                    }
                    answers.push((id, extents));
                }
                ChunkKind::Error | ChunkKind::ErrorOffset | ChunkKind::OtherError => {
                    failure.get_or_insert(self.receive_failure(chunk)?.0);
                }
                ChunkKind::None => {}
                ChunkKind::Data | ChunkKind::Hole => {
                    return Err(Error::protocol("data in reply to block status"));
                }
            }
            if chunk.done {
                return match failure {
                    Some(failure) => Err(failure.into_error(Command::BlockStatus, request)),
                    None => Ok(answers),
                };
            }
        }
        Err(Error::protocol("no end to the reply to block status"))
    }

    /// A chunk of status: the context's id, then lengths and flags.
    fn receive_status(&mut self, chunk: Chunk, requested: u32) -> Result<Answer, Error> {
        debug_assert!(chunk.length <= wire::MAX_STATUS_PAYLOAD);
        let size = usize::try_from(chunk.length)
            .map_err(|_| Error::protocol("a chunk does not fit in memory"))?;
        let mut payload = vec![0; size];
        self.stream
            .read_exact(&mut payload, "receiving block status")?;
        parse_status(&payload, requested)
    }
}

/// The payload of a chunk of status, for a request of `requested` bytes: at least one extent, none of them empty, none
/// that starts behind the request. The last may end behind it.
fn parse_status(payload: &[u8], requested: u32) -> Result<Answer, Error> {
    let mut fields = Fields(payload);
    let id = fields.u32()?;
    let mut extents = Vec::with_capacity(fields.rest().len().div_ceil(8));
    let mut told = 0u64;
    while !fields.rest().is_empty() {
        let (length, flags) = (fields.u32()?, fields.u32()?);
        if length == 0 || told >= u64::from(requested) {
            return Err(Error::Protocol(format!(
                "status of {length} bytes after {told} of {requested} bytes"
            )));
        }
        told = told.saturating_add(u64::from(length));
        extents.push((length, flags));
    }
    if extents.is_empty() {
        return Err(Error::protocol("status without an extent"));
    }
    Ok((id, extents))
}

/// The next request: from the start of `from`'s block to the end of `end`'s, within the export, of bounded length.
fn aligned_request(from: u64, end: u64, block: u32, size: u64) -> Result<Extent, Error> {
    let block = u64::from(block);
    let spare = from.checked_rem(block).unwrap_or(0);
    let offset = from.saturating_sub(spare);
    let last = end
        .checked_next_multiple_of(block)
        .unwrap_or(size)
        .min(size);
    let length = last.saturating_sub(offset).min(MAX_STATUS);
    if length == 0 {
        return Err(Error::Input(format!("empty block status at {from:#x}")));
    }
    Ok(Extent { offset, length })
}

/// How far one context has been told.
struct Track<'a> {
    name: &'a str,
    id: u32,
    cursor: u64,
    end: u64,
    merged: Merged,
}

impl Track<'_> {
    fn status(&self, extent: Extent, flags: u32) -> Status<'_> {
        Status {
            context: self.name,
            extent,
            flags,
        }
    }

    /// Takes what lies between the cursor and the end from the answer to a request at `offset`.
    fn advance(
        &mut self,
        offset: u64,
        extents: &[(u32, u32)],
        on_status: &mut dyn FnMut(Status<'_>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let mut at = offset;
        for (length, flags) in extents {
            let next = at.saturating_add(u64::from(*length)).min(self.end);
            at = next;
            if next <= self.cursor {
                continue;
            }
            let extent = Extent {
                offset: self.cursor,
                length: next.saturating_sub(self.cursor),
            };
            self.cursor = next;
            if let Some((extent, flags)) = self.merged.push(extent, *flags)
                && on_status(self.status(extent, flags)).is_break()
            {
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    }
}

/// Neighbours of equal state become one.
#[derive(Default)]
struct Merged(Option<(Extent, u32)>);

impl Merged {
    /// Adds what follows; gives the range before it when that is complete.
    fn push(&mut self, extent: Extent, flags: u32) -> Option<(Extent, u32)> {
        match &mut self.0 {
            Some((last, state))
                if *state == flags
                    && last.offset.checked_add(last.length) == Some(extent.offset) =>
            {
                last.length = last.length.saturating_add(extent.length);
                None
            }
            _ => self.0.replace((extent, flags)),
        }
    }

    fn take(&mut self) -> Option<(Extent, u32)> {
        self.0.take()
    }
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
