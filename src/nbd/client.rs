//! One connection to an export: how it is made, its bookkeeping, how it ends.
//!
//! A connection is *spent* after an error that leaves it in an unknown place of the stream, and while a pipelined call
//! is under way: whatever leaves such a call early, a panic of a callback included, leaves a client that refuses to go
//! on and closes without a word, since replies may still be under way.
//!
//! Source: the NBD protocol document, sections "Transmission phase" and "Terminating the transmission phase".

use std::{
    net::Shutdown,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    buffer::BufferPool,
    error::{Command, Error},
    handshake::{self, Context, ExportInfo},
    status::{ALLOCATION, DIRTY_BITMAP_PREFIX},
    stream::Stream,
    wire::{self, Chunk, Failure, ReplyHead},
};
use crate::clock::Deadline;

/// How long a server may take to notice that its client has said goodbye.
const GOODBYE: Duration = Duration::from_secs(2);

/// Where an export is and what is wanted of it.
#[derive(Debug, Clone)]
pub struct Endpoint {
    socket: PathBuf,
    export: String,
    contexts: Vec<String>,
    timeout: Duration,
}

impl Endpoint {
    /// How long a server may do nothing.
    pub const TIMEOUT: Duration = Duration::from_secs(30);

    /// An export of the server at a UNIX socket.
    pub fn new(socket: impl Into<PathBuf>, export: impl Into<String>) -> Self {
        Self {
            socket: socket.into(),
            export: export.into(),
            contexts: Vec::new(),
            timeout: Self::TIMEOUT,
        }
    }

    /// Asks for a meta context by its full name; an export without it is an error.
    #[must_use]
    pub fn context(mut self, name: impl Into<String>) -> Self {
        let name = name.into();
        if !self.contexts.contains(&name) {
            self.contexts.push(name);
        }
        self
    }

    /// Asks for `base:allocation`, where holes and zeros are.
    #[must_use]
    pub fn allocation(self) -> Self {
        self.context(ALLOCATION)
    }

    /// Asks for a dirty bitmap of QEMU's by its own name.
    #[must_use]
    pub fn bitmap(self, name: &str) -> Self {
        self.context(format!("{DIRTY_BITMAP_PREFIX}{name}"))
    }

    /// How long the server may make no progress, instead of [`Endpoint::TIMEOUT`].
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The name of the export.
    pub fn export(&self) -> &str {
        &self.export
    }

    /// Connects and negotiates; the whole of it must be done within the timeout.
    pub fn connect(&self) -> Result<Client, Error> {
        self.negotiate(Stream::connect(&self.socket, self.timeout)?)
    }

    /// Negotiates on a socket that is connected already; the endpoint's path is not used.
    pub fn connect_on(&self, socket: UnixStream) -> Result<Client, Error> {
        self.negotiate(Stream::new(socket, self.timeout))
    }

    fn negotiate(&self, mut stream: Stream) -> Result<Client, Error> {
        stream.set_deadline(Some(Deadline::after(self.timeout)));
        match handshake::negotiate(&mut stream, &self.export, &self.contexts) {
            Ok((info, contexts)) => {
                stream.set_deadline(None);
                Ok(Client {
                    stream,
                    export: self.export.clone(),
                    info,
                    contexts,
                    next_cookie: 1,
                    spent: false,
                    buffers: None,
                })
            }
            Err(error) => {
                if error.is_recoverable() {
                    // A courtesy; the error is what the caller is told.
                    handshake::abort(&mut stream).ok();
                }
                Err(error)
            }
        }
    }
}

/// A connection to an export, ready for requests. Dropping it says goodbye without waiting for the server.
#[derive(Debug)]
pub struct Client {
    pub(super) stream: Stream,
    export: String,
    info: ExportInfo,
    contexts: Vec<Context>,
    next_cookie: u64,
    spent: bool,
    /// The buffers of the last [`Client::read_all`], for the next.
    pub(super) buffers: Option<BufferPool>,
}

/// The line of a connection.
#[derive(Debug)]
pub struct Line(UnixStream);

impl Line {
    /// Ends the connection at once, whatever it waits for.
    pub fn hang_up(&self) {
        // A connection that has ended is what is wanted.
        self.0.shutdown(Shutdown::Both).ok();
    }
}

/// A reply's head, its payload still to be read.
#[derive(Debug, Clone, Copy)]
pub(super) enum Reply {
    Simple { cookie: u64, errno: u32 },
    Chunk(Chunk),
}

impl Client {
    /// The export's size, flags and block sizes.
    pub fn info(&self) -> ExportInfo {
        self.info
    }

    /// The bytes of the export.
    pub fn size(&self) -> u64 {
        self.info.size
    }

    /// The export's name.
    pub fn export(&self) -> &str {
        &self.export
    }

    /// The full names of the meta contexts that were granted.
    pub fn contexts(&self) -> impl Iterator<Item = &str> {
        self.contexts.iter().map(|context| context.name.as_str())
    }

    pub(super) fn granted(&self) -> &[Context] {
        &self.contexts
    }

    /// A handle on the connection that another thread can end it by.
    pub fn line(&self) -> Result<Line, Error> {
        self.stream.line().map(Line)
    }

    /// How long the server may make no progress.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.stream.set_timeout(timeout);
    }

    /// Bounds every further wait by a point in time as well; one that has passed makes the next wait time out.
    pub fn set_deadline(&mut self, deadline: Option<Deadline>) {
        self.stream.set_deadline(deadline);
    }

    /// Whether an error has made the connection useless.
    pub fn is_spent(&self) -> bool {
        self.spent
    }

    /// Says goodbye and waits, two seconds at most, until the server has taken notice, so that its export can be
    /// removed.
    pub fn disconnect(mut self) -> Result<(), Error> {
        if self.spent {
            return Err(Error::Closed {
                doing: "disconnecting",
            });
        }
        self.goodbye()?;
        let doing = "disconnecting";
        self.stream
            .wait_for_end(GOODBYE)
            .map_err(|source| Error::from_io(source, doing, GOODBYE))
    }

    fn goodbye(&mut self) -> Result<(), Error> {
        self.spent = true;
        self.stream.set_deadline(Some(Deadline::after(GOODBYE)));
        self.send(0, Command::Disconnect, 0, 0, &[]).map(drop)
    }

    /// Runs an exchange with the server. The client is spent while it runs, and stays so unless it ends at a known
    /// place of the stream.
    pub(super) fn exchange<T>(
        &mut self,
        run: impl FnOnce(&mut Self) -> Result<T, Error>,
    ) -> Result<T, Error> {
        if self.spent {
            return Err(Error::Closed {
                doing: "starting a request",
            });
        }
        self.spent = true;
        let result = run(self);
        self.spent = result.as_ref().is_err_and(|error| !error.is_recoverable());
        result
    }

    /// Sends a request and returns its cookie.
    pub(super) fn send(
        &mut self,
        flags: u16,
        command: Command,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> Result<u64, Error> {
        let cookie = self.next_cookie;
        self.next_cookie = self.next_cookie.wrapping_add(1);
        let header = wire::request(flags, command, cookie, offset, length);
        self.stream
            .write_all(&header, payload, "sending a request")?;
        Ok(cookie)
    }

    /// Receives the head of the next reply.
    pub(super) fn next_reply(&mut self) -> Result<Reply, Error> {
        let doing = "waiting for a reply";
        match wire::reply_head(self.stream.read_array(doing)?)? {
            ReplyHead::Simple { cookie, errno } => Ok(Reply::Simple { cookie, errno }),
            ReplyHead::Structured {
                cookie,
                flags,
                kind,
            } => {
                let length = u32::from_be_bytes(self.stream.read_array(doing)?);
                wire::chunk(flags, kind, cookie, length).map(Reply::Chunk)
            }
        }
    }

    /// Receives the payload of an error chunk: what failed, and where if it says.
    pub(super) fn receive_failure(
        &mut self,
        chunk: Chunk,
    ) -> Result<(Failure, Option<u64>), Error> {
        let mut payload = vec![0; chunk.length as usize];
        self.stream.read_exact(&mut payload, "receiving an error")?;
        match chunk.kind {
            wire::ChunkKind::ErrorOffset => {
                let (failure, offset) = wire::Failure::parse_with_offset(&payload)?;
                Ok((failure, Some(offset)))
            }
            _ => Ok((Failure::parse(&payload)?, None)),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if !self.spent {
            // There is nobody to tell, and the server notices the closed socket as well.
            self.goodbye().ok();
        }
    }
}

/// A reply that no request in flight can have.
pub(super) fn stray(cookie: u64) -> Error {
    Error::Protocol(format!(
        "a reply to request {cookie}, which is not in flight"
    ))
}
