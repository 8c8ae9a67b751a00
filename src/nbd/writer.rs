//! Pipelined writes for a restore: data and zeros in flight, answered in any order, made durable by a flush.
//!
//! Data goes to the socket before a call returns, so the caller's memory is free at once. A write that fails is
//! reported by the call that receives its answer, a later one perhaps, and names its own range; the connection stays
//! good. Nothing is durable before [`Writer::flush`] has returned without an error.
//!
//! Answers are a few bytes, and as many as the depth fit in a socket's buffer; so a server never waits for them to be
//! read while this side waits to send.
//!
//! Source: the NBD protocol document, `NBD_CMD_WRITE`, `NBD_CMD_WRITE_ZEROES`, `NBD_CMD_FLUSH` and "Ordering of
//! messages and writes".

use super::{
    client::{Client, Reply, stray},
    error::{Command, Error},
    reader::Pieces,
    wire::{self, Chunk, ChunkKind, Failure},
};
use crate::units::Extent;

/// Writes in flight.
const MAX_DEPTH: usize = 64;
/// Zeros of one request: what a server without a fast way still writes well within a timeout.
const ZEROES_BYTES: u32 = 64 << 20;

/// How zeros are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroMode {
    /// The server may punch a hole.
    MayPunch,
    /// The range stays allocated.
    KeepAllocated,
    /// As [`ZeroMode::MayPunch`], but fails at once (`ENOTSUP`) where it would be no faster than writing.
    FastOnly,
}

impl ZeroMode {
    fn flags(self) -> u16 {
        match self {
            Self::MayPunch => 0,
            Self::KeepAllocated => wire::CMD_FLAG_NO_HOLE,
            Self::FastOnly => wire::CMD_FLAG_FAST_ZERO,
        }
    }
}

/// A connection that writes. Dropping it with writes in flight leaves them undecided: end with [`Writer::finish`].
#[derive(Debug)]
pub struct Writer {
    client: Client,
    depth: usize,
    flight: Vec<Pending>,
}

#[derive(Debug, Clone, Copy)]
struct Pending {
    cookie: u64,
    command: Command,
    extent: Extent,
}

impl Writer {
    /// Writes over a connection with up to `depth` requests in flight, 1 to 64.
    pub fn new(client: Client, depth: usize) -> Result<Self, Error> {
        if client.info().read_only() {
            return Err(refused(&client, "writes", "it is read-only"));
        }
        if !(1..=MAX_DEPTH).contains(&depth) {
            return Err(Error::Input(format!(
                "{depth} writes in flight are not 1 to {MAX_DEPTH}"
            )));
        }
        Ok(Self {
            client,
            depth,
            flight: Vec::new(),
        })
    }

    /// The connection's export.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Writes data; it is cut where it is longer than the server takes. An error may be that of an earlier request.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), Error> {
        let extent = Extent {
            offset,
            length: data.len() as u64,
        };
        self.check(extent)?;
        let most = self.client.info().max_request() as usize;
        let mut at = offset;
        for part in data.chunks(most) {
            let extent = Extent {
                offset: at,
                length: part.len() as u64,
            };
            self.submit(0, Command::Write, extent, part)?;
            at += extent.length;
        }
        Ok(())
    }

    /// Writes zeros without sending them; long ranges are cut.
    pub fn write_zeroes(&mut self, extent: Extent, mode: ZeroMode) -> Result<(), Error> {
        let info = self.client.info();
        if !info.can_write_zeroes() || (mode == ZeroMode::FastOnly && !info.can_fast_zero()) {
            return Err(refused(&self.client, "zeroes", "it does not take them"));
        }
        self.check(extent)?;
        for piece in Pieces::new([extent].into_iter(), ZEROES_BYTES) {
            self.submit(mode.flags(), Command::WriteZeroes, piece, &[])?;
        }
        Ok(())
    }

    /// Waits for all writes and makes them durable. Nothing is in flight when it returns.
    pub fn flush(&mut self) -> Result<(), Error> {
        self.wait_for_all()?;
        if !self.client.info().can_flush() {
            return Err(refused(&self.client, "flushes", "it does not take them"));
        }
        let nothing = Extent {
            offset: 0,
            length: 0,
        };
        self.submit(0, Command::Flush, nothing, &[])?;
        self.wait_for_all()
    }

    /// Waits for all writes, without making them durable, and gives the connection back.
    pub fn finish(mut self) -> Result<Client, Error> {
        self.wait_for_all()?;
        Ok(self.client)
    }

    /// Receives the answers of everything in flight; the first error.
    pub fn wait_for_all(&mut self) -> Result<(), Error> {
        let mut first = Ok(());
        while !self.flight.is_empty() {
            match self.collect() {
                Ok(()) => {}
                Err(error) if error.is_recoverable() => first = first.and(Err(error)),
                Err(error) => return Err(error),
            }
        }
        first
    }

    /// Refuses what would make a server drop the connection.
    fn check(&self, extent: Extent) -> Result<(), Error> {
        let info = self.client.info();
        let block = u64::from(info.min_block);
        let aligned = extent.offset.is_multiple_of(block) && extent.length.is_multiple_of(block);
        let inside = extent
            .offset
            .checked_add(extent.length)
            .is_some_and(|end| end <= info.size);
        if aligned && inside {
            return Ok(());
        }
        Err(Error::Input(format!(
            "write of {} bytes at offset {:#x} to an export of {} bytes in blocks of {block}",
            extent.length, extent.offset, info.size
        )))
    }

    fn submit(
        &mut self,
        flags: u16,
        command: Command,
        extent: Extent,
        payload: &[u8],
    ) -> Result<(), Error> {
        while self.flight.len() >= self.depth {
            self.collect()?;
        }
        let length = u32::try_from(extent.length)
            .map_err(|_| Error::Input(format!("a write of {} bytes", extent.length)))?;
        let cookie = self
            .client
            .exchange(|client| client.send(flags, command, extent.offset, length, payload))?;
        self.flight.push(Pending {
            cookie,
            command,
            extent,
        });
        Ok(())
    }

    /// Receives the answer to one request.
    fn collect(&mut self) -> Result<(), Error> {
        let flight = &mut self.flight;
        self.client.exchange(|client| collect(client, flight))
    }
}

fn refused(client: &Client, what: &str, reason: &str) -> Error {
    Error::Refused {
        what: format!("{what} to export `{}`", client.export()),
        reason: reason.to_owned(),
    }
}

fn collect(client: &mut Client, flight: &mut Vec<Pending>) -> Result<(), Error> {
    let mut failure = None;
    let mut current = None;
    // An error may come in a chunk of its own before the one that ends the reply.
    for _ in 0..MAX_DEPTH * 2 {
        let reply = client.next_reply()?;
        let cookie = match reply {
            Reply::Simple { cookie, .. } | Reply::Chunk(Chunk { cookie, .. }) => cookie,
        };
        let at = flight
            .iter()
            .position(|pending| pending.cookie == cookie)
            .ok_or_else(|| stray(cookie))?;
        if *current.get_or_insert(cookie) != cookie {
            return Err(Error::protocol("replies to two writes are interleaved"));
        }
        let done = match reply {
            Reply::Simple { errno: 0, .. } => true,
            Reply::Simple { errno, .. } => {
                failure = Some(Failure {
                    errno,
                    message: String::new(),
                });
                true
            }
            Reply::Chunk(chunk) => {
                match chunk.kind {
                    ChunkKind::None => {}
                    ChunkKind::Error | ChunkKind::ErrorOffset | ChunkKind::OtherError => {
                        failure = Some(client.receive_failure(chunk)?.0);
                    }
                    kind => {
                        return Err(Error::Protocol(format!("{kind:?} in reply to a write")));
                    }
                }
                chunk.done
            }
        };
        if done {
            let pending = flight.swap_remove(at);
            return match failure {
                None => Ok(()),
                Some(failure) => Err(failure.into_error(pending.command, pending.extent)),
            };
        }
    }
    Err(Error::protocol("no end to the reply to a write"))
}
