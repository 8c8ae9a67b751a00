//! A small NBD client over a UNIX socket: enough to write to an export, to read many extents of one, and to ask for a bitmap.
//!
//! Every reply must come within the connection's timeout; after an error the connection is of no more use.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::block::{BlockDevice, Page, SLOT};

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const STRUCTURED_REPLY: u32 = 0x668e_33ef;

const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_SET_META_CONTEXT: u32 = 10;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;

const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;
const CMD_TRIM: u16 = 4;
const CMD_WRITE_ZEROES: u16 = 6;
const CMD_BLOCK_STATUS: u16 = 7;

/// Bytes of a read request at most.
pub const MAX_READ: u64 = 1 << 20;
/// Bytes of a chunk that is not read data at most.
const MAX_CHUNK: usize = 64 << 20;

/// A range of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
}

/// A connection to one export.
#[derive(Debug)]
pub struct Nbd {
    stream: UnixStream,
    size: u64,
    cookie: u64,
    structured: bool,
    /// The ids of the contexts asked for, in their order.
    contexts: Vec<u32>,
}

impl Nbd {
    /// Connects to an export, with the meta contexts (as `qemu:dirty-bitmap:NAME` or `base:allocation`) to ask for.
    pub fn connect(
        socket: &Path,
        export: &str,
        contexts: &[&str],
        timeout: Duration,
    ) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        let mut nbd = Self {
            stream,
            size: 0,
            cookie: 0,
            structured: false,
            contexts: Vec::new(),
        };
        let mut hello = [0; 18];
        nbd.stream.read_exact(&mut hello)?;
        if &hello[..8] != b"NBDMAGIC" || &hello[8..16] != b"IHAVEOPT" {
            return Err(io::Error::other("no NBD server of the new style"));
        }
        nbd.stream.write_all(&3_u32.to_be_bytes())?;
        if !contexts.is_empty() {
            nbd.structured = nbd.option(OPT_STRUCTURED_REPLY, &[], &mut |_, _| {})?;
            nbd.ask_contexts(export, contexts)?;
        }
        let mut go = prefixed(export);
        go.extend([0, 0]);
        let mut size = None;
        let accepted = nbd.option(OPT_GO, &go, &mut |kind, data| {
            if kind == REP_INFO && data.len() >= 12 && data[..2] == [0, 0] {
                size = Some(be64(&data[2..10]));
            }
        })?;
        match size {
            Some(size) if accepted => nbd.size = size,
            _ => return Err(io::Error::other(format!("no export {export}"))),
        }
        Ok(nbd)
    }

    /// The export's size in bytes.
    pub fn export_size(&self) -> u64 {
        self.size
    }

    fn ask_contexts(&mut self, export: &str, contexts: &[&str]) -> io::Result<()> {
        let mut data = prefixed(export);
        data.extend(
            u32::try_from(contexts.len())
                .map_err(io::Error::other)?
                .to_be_bytes(),
        );
        for context in contexts {
            data.extend(prefixed(context));
        }
        let mut names = Vec::new();
        self.option(OPT_SET_META_CONTEXT, &data, &mut |kind, data| {
            if kind == REP_META_CONTEXT && data.len() > 4 {
                names.push((String::from_utf8_lossy(&data[4..]).into_owned(), be32(data)));
            }
        })?;
        for context in contexts {
            let id = names
                .iter()
                .find(|(name, _)| name == context)
                .map(|(_, id)| *id);
            let missing = || io::Error::other(format!("no context {context}"));
            self.contexts.push(id.ok_or_else(missing)?);
        }
        Ok(())
    }

    fn option(
        &mut self,
        option: u32,
        data: &[u8],
        reply: &mut dyn FnMut(u32, &[u8]),
    ) -> io::Result<bool> {
        let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
        message.extend(option.to_be_bytes());
        message.extend(
            u32::try_from(data.len())
                .map_err(io::Error::other)?
                .to_be_bytes(),
        );
        message.extend(data);
        self.stream.write_all(&message)?;
        loop {
            let mut head = [0; 20];
            self.stream.read_exact(&mut head)?;
            if be64(&head) != OPTION_REPLY || be32(&head[8..]) != option {
                return Err(io::Error::other("a reply to no option of ours"));
            }
            let kind = be32(&head[12..]);
            let data = self.bytes(be32(&head[16..]) as usize)?;
            reply(kind, &data);
            if kind == REP_ACK || kind & 0x8000_0000 != 0 {
                return Ok(kind == REP_ACK);
            }
        }
    }

    fn bytes(&mut self, len: usize) -> io::Result<Vec<u8>> {
        if len > MAX_CHUNK {
            return Err(io::Error::other(format!("a chunk of {len} bytes")));
        }
        let mut data = vec![0; len];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    fn request(&mut self, command: u16, offset: u64, len: u64, data: &[u8]) -> io::Result<u64> {
        self.cookie += 1;
        let mut message = Vec::with_capacity(28 + data.len());
        message.extend(REQUEST.to_be_bytes());
        message.extend(0_u16.to_be_bytes());
        message.extend(command.to_be_bytes());
        message.extend(self.cookie.to_be_bytes());
        message.extend(offset.to_be_bytes());
        message.extend(u32::try_from(len).map_err(io::Error::other)?.to_be_bytes());
        message.extend(data);
        self.stream.write_all(&message)?;
        Ok(self.cookie)
    }

    /// One command without data in its reply.
    fn command(&mut self, command: u16, offset: u64, len: u64, data: &[u8]) -> io::Result<()> {
        self.request(command, offset, len, data)?;
        self.reply(&mut |_| Ok(())).map(drop)
    }

    /// Receives chunks until one request is answered in full; returns its cookie.
    fn reply(&mut self, chunk: &mut dyn FnMut(Chunk) -> io::Result<()>) -> io::Result<u64> {
        loop {
            let magic = be32(&self.bytes(4)?);
            let (cookie, done) = match magic {
                SIMPLE_REPLY => self.simple_reply(chunk)?,
                STRUCTURED_REPLY if self.structured => self.structured_reply(chunk)?,
                _ => return Err(io::Error::other("no reply of the NBD protocol")),
            };
            if done {
                return Ok(cookie);
            }
        }
    }

    fn simple_reply(
        &mut self,
        chunk: &mut dyn FnMut(Chunk) -> io::Result<()>,
    ) -> io::Result<(u64, bool)> {
        let head = self.bytes(12)?;
        let (error, cookie) = (be32(&head), be64(&head[4..]));
        if error != 0 {
            return Err(server_error(error, ""));
        }
        if !self.structured {
            chunk(Chunk::Simple(cookie, &mut self.stream))?;
        }
        Ok((cookie, true))
    }

    fn structured_reply(
        &mut self,
        chunk: &mut dyn FnMut(Chunk) -> io::Result<()>,
    ) -> io::Result<(u64, bool)> {
        let head = self.bytes(16)?;
        let (flags, kind) = (be16(&head), be16(&head[2..]));
        let (cookie, len) = (be64(&head[4..]), be32(&head[12..]) as usize);
        let data = self.bytes(len)?;
        match kind {
            0 => {}
            1 if len > 8 => chunk(Chunk::Data(be64(&data), &data[8..]))?,
            2 if len == 12 => chunk(Chunk::Hole(be64(&data), u64::from(be32(&data[8..]))))?,
            5 if len >= 4 => chunk(Chunk::Status(be32(&data), &data[4..]))?,
            _ if kind & 0x8000 != 0 && len >= 6 => {
                return Err(server_error(
                    be32(&data),
                    &String::from_utf8_lossy(&data[6..]),
                ));
            }
            _ => {
                return Err(io::Error::other(format!(
                    "a chunk of kind {kind} with {len} bytes"
                )));
            }
        }
        Ok((cookie, flags & 1 != 0))
    }

    /// Reads all of the extents, `depth` requests in flight, and hands over what arrives in the order that it does.
    pub fn read_extents(
        &mut self,
        extents: &[Extent],
        depth: usize,
        take: &mut dyn FnMut(u64, &[u8]),
    ) -> io::Result<()> {
        let mut parts = split(extents).into_iter();
        let mut in_flight = std::collections::HashMap::new();
        loop {
            while in_flight.len() < depth.max(1) {
                let Some(part) = parts.next() else { break };
                in_flight.insert(self.request(CMD_READ, part.offset, part.len, &[])?, part);
            }
            if in_flight.is_empty() {
                return Ok(());
            }
            let cookie = self.reply(&mut |chunk| {
                match chunk {
                    Chunk::Data(offset, data) => take(offset, data),
                    Chunk::Hole(offset, len) => take(
                        offset,
                        &vec![0; usize::try_from(len).map_err(io::Error::other)?],
                    ),
                    Chunk::Simple(cookie, stream) => {
                        let part = in_flight.get(&cookie).ok_or_else(stray)?;
                        let mut data =
                            vec![0; usize::try_from(part.len).map_err(io::Error::other)?];
                        stream.read_exact(&mut data)?;
                        take(part.offset, &data);
                    }
                    Chunk::Status(..) => {
                        return Err(io::Error::other("a status in the reply to a read"));
                    }
                }
                Ok(())
            })?;
            in_flight.remove(&cookie).ok_or_else(stray)?;
        }
    }

    /// The extents of each context asked for at connecting, with their flags (1 is dirty, for a bitmap).
    pub fn block_status(&mut self) -> io::Result<Vec<Vec<(Extent, u32)>>> {
        let mut all: Vec<Vec<(Extent, u32)>> = vec![Vec::new(); self.contexts.len()];
        let mut offset = 0;
        while offset < self.size {
            let len = (self.size - offset).min(1 << 30);
            self.request(CMD_BLOCK_STATUS, offset, len, &[])?;
            let contexts = self.contexts.clone();
            let mut ends = vec![offset; contexts.len()];
            self.reply(&mut |chunk| {
                let Chunk::Status(id, data) = chunk else {
                    return Err(stray());
                };
                let which = contexts
                    .iter()
                    .position(|context| *context == id)
                    .ok_or_else(stray)?;
                for pair in data.chunks_exact(8) {
                    let extent = Extent {
                        offset: ends[which],
                        len: u64::from(be32(pair)),
                    };
                    all[which].push((extent, be32(&pair[4..])));
                    ends[which] += extent.len;
                }
                Ok(())
            })?;
            let next = ends.iter().copied().min().unwrap_or(self.size);
            if next <= offset {
                return Err(io::Error::other("a status of nothing"));
            }
            // Where one context went further than another its tail is asked for again.
            for list in &mut all {
                trim_to(list, next);
            }
            offset = next;
        }
        Ok(all)
    }
}

/// Cuts a list of extents off at an offset.
fn trim_to(list: &mut Vec<(Extent, u32)>, end: u64) {
    while let Some((extent, _)) = list.last_mut() {
        if extent.offset >= end {
            list.pop();
        } else {
            extent.len = extent.len.min(end - extent.offset);
            break;
        }
    }
}

fn split(extents: &[Extent]) -> Vec<Extent> {
    let mut parts = Vec::new();
    for extent in extents {
        let end = extent.offset + extent.len;
        let mut offset = extent.offset;
        while offset < end {
            let len = (end - offset).min(MAX_READ);
            parts.push(Extent { offset, len });
            offset += len;
        }
    }
    parts
}

enum Chunk<'a> {
    Simple(u64, &'a mut UnixStream),
    Data(u64, &'a [u8]),
    Hole(u64, u64),
    Status(u32, &'a [u8]),
}

fn stray() -> io::Error {
    io::Error::other("a reply to no request of ours")
}

fn server_error(number: u32, words: &str) -> io::Error {
    let error = io::Error::from_raw_os_error(i32::try_from(number).unwrap_or(i32::MAX));
    io::Error::new(
        error.kind(),
        format!("the NBD server says: {error} {words}"),
    )
}

fn prefixed(text: &str) -> Vec<u8> {
    let mut data = u32::try_from(text.len())
        .unwrap_or(u32::MAX)
        .to_be_bytes()
        .to_vec();
    data.extend(text.as_bytes());
    data
}

fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes([bytes[0], bytes[1]])
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from(be32(bytes)) << 32 | u64::from(be32(&bytes[4..]))
}

impl BlockDevice for Nbd {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&mut self, slot: u64, page: &mut Page) -> io::Result<()> {
        let extent = Extent {
            offset: slot * SLOT,
            len: SLOT,
        };
        self.read_extents(&[extent], 1, &mut |offset, data| {
            let start = usize::try_from(offset - extent.offset).unwrap_or(usize::MAX);
            page.0[start..start + data.len()].copy_from_slice(data);
        })
    }

    fn write(&mut self, slot: u64, page: &Page) -> io::Result<()> {
        self.command(CMD_WRITE, slot * SLOT, SLOT, &page.0)
    }

    fn zero(&mut self, slot: u64, count: u64) -> io::Result<()> {
        self.command(CMD_WRITE_ZEROES, slot * SLOT, count * SLOT, &[])
    }

    fn discard(&mut self, slot: u64, count: u64) -> io::Result<()> {
        self.command(CMD_TRIM, slot * SLOT, count * SLOT, &[])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.command(CMD_FLUSH, 0, 0, &[])
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        // A server that is gone needs no farewell.
        let _gone = self.request(CMD_DISC, 0, 0, &[]);
    }
}
