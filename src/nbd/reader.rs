//! Pipelined reads: many requests in flight on one connection, replies in any order, each put together in its own
//! recycled buffer and handed to the caller as soon as it is whole.
//!
//! One thread sends and receives. A request is a few bytes, so sending never waits for the server's replies to be
//! read; the depth is bounded to keep it so. Between two receives at most two requests are sent while replies wait, so
//! that a permit which takes its time does not hold up what has arrived.
//!
//! What ends a run early: the end of the work, a `Break` of the permit or of the consumer, an error that the server
//! answers. In each case the replies of everything in flight are received before the call returns, and reads that
//! were good are handed on.
//!
//! Source: the NBD protocol document, `NBD_CMD_READ` and "Structured reply types".

use std::ops::ControlFlow;

use super::{
    buffer::{Buffer, BufferPool},
    client::{Client, Reply, stray},
    error::{Command, Error},
    reassembly::{Outcome, Reassembly},
    wire::{self, Chunk, ChunkKind},
};
use crate::units::Extent;

/// Requests in flight on one connection: all of them fit in the smallest socket buffer.
const MAX_DEPTH: usize = 64;

/// How a run of reads is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadOptions {
    /// Extents are cut at multiples of this many bytes of the disk. A power of two.
    pub request_bytes: u32,
    /// Requests in flight on each connection, 1 to 64. QEMU works on 16 of them at a time.
    pub depth: usize,
    /// Buffers beyond those in flight, for a consumer that keeps some while it works on them. When all are out, the
    /// reader waits: a consumer that never lets one go stops it for ever.
    pub spare_buffers: usize,
    /// Lets the server leave out the zeros that it knows of. Its price with QEMU: it looks up the block status for
    /// every read, and answers a read error by closing the connection. Without it, where the server can, a read comes
    /// in one piece and its error is an answer; so skip what block status calls zero instead.
    pub holes: bool,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self {
            request_bytes: 256 << 10,
            depth: 16,
            spare_buffers: 16,
            holes: false,
        }
    }
}

impl ReadOptions {
    fn check(self, client: &Client) -> Result<(), Error> {
        let info = client.info();
        let good = self.request_bytes.is_power_of_two()
            && (info.min_block..=info.max_request()).contains(&self.request_bytes);
        if !good {
            return Err(Error::Input(format!(
                "reads of {} bytes from an export that takes multiples of {} up to {}",
                self.request_bytes,
                info.min_block,
                info.max_request()
            )));
        }
        if !(1..=MAX_DEPTH).contains(&self.depth) {
            return Err(Error::Input(format!(
                "{} reads in flight are not 1 to {MAX_DEPTH}",
                self.depth
            )));
        }
        Ok(())
    }

    /// The buffers for `connections` connections.
    pub(super) fn pool(self, connections: usize) -> BufferPool {
        BufferPool::new(self.buffers(connections), self.request_bytes as usize)
    }

    pub(super) fn buffers(self, connections: usize) -> usize {
        self.depth * connections + self.spare_buffers
    }

    pub(super) fn fit(self, pool: &BufferPool, connections: usize) -> bool {
        pool.fits(self.buffers(connections), self.request_bytes as usize)
    }
}

/// A read that was answered.
#[derive(Debug)]
pub struct ReadDone {
    /// Its range.
    pub extent: Extent,
    /// Its bytes; none when all of them are zeros.
    pub data: Option<Buffer>,
    /// The ranges that the server called holes, as far as it did; they read as zeros.
    pub holes: Vec<Extent>,
}

/// What a run of reads came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReadSummary {
    /// Requests answered and handed on.
    pub requests: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Whether the permit or the consumer ended it before the work did.
    pub stopped: bool,
}

/// Asked before every request with its bytes: it may wait, to hold a rate, or end the run.
pub type Permit<'a> = dyn Fn(u64) -> ControlFlow<()> + 'a;

impl Client {
    /// Reads all extents, handing each piece to `on_done` as it comes, in any order. When it returns without an error
    /// every reply has been received. An [`Error::Server`] ends the run, its other requests in flight are received
    /// first, and the connection stays good.
    pub fn read_all(
        &mut self,
        extents: impl IntoIterator<Item = Extent>,
        options: ReadOptions,
        permit: &Permit<'_>,
        on_done: &mut dyn FnMut(ReadDone) -> ControlFlow<()>,
    ) -> Result<ReadSummary, Error> {
        let pool = match self.buffers.take() {
            Some(pool) if options.fit(&pool, 1) => pool,
            _ => options.pool(1),
        };
        let mut pieces = Pieces::new(extents.into_iter(), options.request_bytes);
        let work = Work {
            options,
            pool: &pool,
            next: &mut || pieces.next(),
            permit,
            on_done,
        };
        let result = self.run_reads(work);
        self.buffers = Some(pool);
        result
    }

    /// Reads into a buffer and waits for it: for a header or a test, not for a copy.
    pub fn read_at(&mut self, offset: u64, out: &mut [u8]) -> Result<(), Error> {
        let extent = Extent {
            offset,
            length: out.len() as u64,
        };
        let options = ReadOptions {
            request_bytes: self.info().min_block.max(64 << 10),
            depth: 4,
            spare_buffers: 0,
            holes: false,
        };
        self.read_all(
            [extent],
            options,
            &|_| ControlFlow::Continue(()),
            &mut |done| {
                let start = usize::try_from(done.extent.offset - offset).unwrap_or(usize::MAX);
                let part = out.iter_mut().skip(start);
                match done.data {
                    Some(data) => part.zip(data.iter()).for_each(|(to, from)| *to = *from),
                    None => part.zip(0..done.extent.length).for_each(|(to, _)| *to = 0),
                }
                ControlFlow::Continue(())
            },
        )
        .map(drop)
    }

    pub(super) fn run_reads(&mut self, work: Work<'_>) -> Result<ReadSummary, Error> {
        work.options.check(self)?;
        let whole = !work.options.holes && self.info().can_read_whole();
        let flags = if whole { wire::CMD_FLAG_DF } else { 0 };
        self.exchange(|client| {
            Run {
                client,
                work,
                flags,
                flight: Vec::new(),
                ended: false,
                failed: None,
                summary: ReadSummary::default(),
            }
            .run()
        })
    }
}

/// What one connection is to do.
pub(super) struct Work<'a> {
    pub(super) options: ReadOptions,
    pub(super) pool: &'a BufferPool,
    pub(super) next: &'a mut dyn FnMut() -> Option<Extent>,
    pub(super) permit: &'a Permit<'a>,
    pub(super) on_done: &'a mut dyn FnMut(ReadDone) -> ControlFlow<()>,
}

/// A request in flight.
struct Slot {
    cookie: u64,
    extent: Extent,
    buffer: Buffer,
    reassembly: Reassembly,
}

struct Run<'c, 'w> {
    client: &'c mut Client,
    work: Work<'w>,
    /// Of every request.
    flags: u16,
    flight: Vec<Slot>,
    /// No more is sent.
    ended: bool,
    failed: Option<Error>,
    summary: ReadSummary,
}

impl Run<'_, '_> {
    fn run(mut self) -> Result<ReadSummary, Error> {
        loop {
            self.fill()?;
            if self.flight.is_empty() {
                break;
            }
            self.receive()?;
        }
        match self.failed {
            Some(error) => Err(error),
            None => Ok(self.summary),
        }
    }

    /// Sends until the pipe is full, or replies wait.
    fn fill(&mut self) -> Result<(), Error> {
        let mut sent = 0;
        while !self.ended && self.flight.len() < self.work.options.depth {
            if sent >= 2 && self.client.stream.readable()? {
                return Ok(());
            }
            // The buffer first: work that was taken from a queue cannot be put back.
            let buffer = if self.flight.is_empty() {
                self.work.pool.take()
            } else {
                match self.work.pool.try_take() {
                    Some(buffer) => buffer,
                    None => return Ok(()),
                }
            };
            let Some(extent) = (self.work.next)() else {
                self.ended = true;
                return Ok(());
            };
            if (self.work.permit)(extent.length).is_break() {
                self.stop();
                return Ok(());
            }
            self.send(extent, buffer)?;
            sent += 1;
        }
        Ok(())
    }

    fn stop(&mut self) {
        self.ended = true;
        self.summary.stopped = true;
    }

    fn send(&mut self, extent: Extent, mut buffer: Buffer) -> Result<(), Error> {
        let length = u32::try_from(extent.length)
            .map_err(|_| Error::Protocol(format!("a piece of {} bytes", extent.length)))?;
        buffer.set_length(length as usize);
        let cookie = self
            .client
            .send(self.flags, Command::Read, extent.offset, length, &[])?;
        self.flight.push(Slot {
            cookie,
            extent,
            buffer,
            reassembly: Reassembly::new(extent),
        });
        Ok(())
    }

    /// Receives one chunk; hands the read on if it was its last.
    fn receive(&mut self) -> Result<(), Error> {
        let chunk = match self.client.next_reply()? {
            Reply::Chunk(chunk) => chunk,
            Reply::Simple { .. } => return Err(Error::protocol("a simple reply to a read")),
        };
        let at = self
            .flight
            .iter()
            .position(|slot| slot.cookie == chunk.cookie)
            .ok_or_else(|| stray(chunk.cookie))?;
        self.flight[at].receive(self.client, chunk)?;
        if chunk.done {
            let slot = self.flight.swap_remove(at);
            self.finish(slot)?;
        }
        Ok(())
    }

    fn finish(&mut self, slot: Slot) -> Result<(), Error> {
        let extent = slot.extent;
        let (data, holes) = match slot.reassembly.finish()? {
            Outcome::Data { holes } => (Some(slot.buffer), holes),
            Outcome::Zeros => {
                drop(slot.buffer);
                (None, vec![extent])
            }
            Outcome::Failed(failure) => {
                self.ended = true;
                self.failed
                    .get_or_insert(failure.into_error(Command::Read, extent));
                return Ok(());
            }
        };
        self.summary.requests += 1;
        self.summary.bytes += extent.length;
        let done = ReadDone {
            extent,
            data,
            holes,
        };
        if (self.work.on_done)(done).is_break() {
            self.stop();
        }
        Ok(())
    }
}

impl Slot {
    /// Receives the payload of a chunk into its place.
    fn receive(&mut self, client: &mut Client, chunk: Chunk) -> Result<(), Error> {
        let doing = "receiving data";
        match chunk.kind {
            ChunkKind::Data => {
                let offset = u64::from_be_bytes(client.stream.read_array(doing)?);
                let range = self.reassembly.data(offset, chunk.length - 8)?;
                client.stream.read_exact(&mut self.buffer[range], doing)
            }
            ChunkKind::Hole => {
                let offset = u64::from_be_bytes(client.stream.read_array(doing)?);
                let length = u32::from_be_bytes(client.stream.read_array(doing)?);
                let range = self.reassembly.hole(offset, length)?;
                self.buffer[range].fill(0);
                Ok(())
            }
            ChunkKind::Error | ChunkKind::ErrorOffset | ChunkKind::OtherError => {
                let (failure, offset) = client.receive_failure(chunk)?;
                self.reassembly.failed(failure, offset)
            }
            ChunkKind::None => Ok(()),
            ChunkKind::Status => Err(Error::protocol("block status in reply to a read")),
        }
    }
}

/// Extents cut at multiples of `size` bytes.
///
/// ```text
/// size   |       |       |       |
/// extent     |==============|
/// pieces     |===|=======|==|
/// ```
pub(super) struct Pieces<I> {
    extents: I,
    rest: Extent,
    size: u64,
}

impl<I: Iterator<Item = Extent>> Pieces<I> {
    pub(super) fn new(extents: I, size: u32) -> Self {
        Self {
            extents,
            rest: Extent {
                offset: 0,
                length: 0,
            },
            size: u64::from(size.max(1)),
        }
    }
}

impl<I: Iterator<Item = Extent>> Iterator for Pieces<I> {
    type Item = Extent;

    fn next(&mut self) -> Option<Extent> {
        while self.rest.length == 0 {
            self.rest = self.extents.next()?;
        }
        let piece = Extent {
            offset: self.rest.offset,
            length: (self.size - self.rest.offset % self.size).min(self.rest.length),
        };
        self.rest = Extent {
            offset: piece.offset.saturating_add(piece.length),
            length: self.rest.length - piece.length,
        };
        Some(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent((offset, length): (u64, u64)) -> Extent {
        Extent { offset, length }
    }

    #[test]
    fn extents_are_cut_at_multiples_of_the_request() {
        let extents = [(100, 1000), (4096, 0), (8192, 512)].map(extent);
        let pieces: Vec<_> = Pieces::new(extents.into_iter(), 512).collect();
        assert_eq!(
            pieces,
            [(100, 412), (512, 512), (1024, 76), (8192, 512)].map(extent)
        );
    }
}
