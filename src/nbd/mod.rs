//! The data plane: a client of the NBD servers inside QEMU, `qemu-nbd` and others, over a UNIX socket.
//!
//! ```text
//! Endpoint -> Client    negotiated: size, flags, contexts; one request at a time: block status, reads
//!               |-> read_all          many reads in flight on one connection, answered in any order
//!               |-> Writer            many writes and zeros in flight, for a restore
//!             ReadPool  several connections to one export with one queue of work
//! ```
//!
//! Invariants: a length that the server names is bounded before memory is taken for it; every wait for the server ends
//! after a time without progress; when a call returns, no reply of it is outstanding; every byte handed out was
//! received, or zeroed because the server said hole. Offsets and lengths are bytes.
//!
//! Not here: TLS and TCP (the servers are on this host), extended headers, and whatever a block means.
//!
//! Sources: the NBD protocol document (`doc/proto.md` of the `NetworkBlockDevice` project; each file names its sections)
//! and QEMU's `docs/interop/nbd.rst` for the `qemu:` contexts.

mod buffer;
mod client;
mod error;
mod handshake;
mod read_pool;
mod reader;
mod reassembly;
mod status;
mod stream;
mod wire;
mod writer;

pub use buffer::Buffer;
pub use client::{Client, Endpoint, Line};
pub use error::{Command, Error};
pub use handshake::ExportInfo;
pub use read_pool::ReadPool;
pub use reader::{Permit, ReadDone, ReadOptions, ReadSummary};
pub use status::{
    ALLOCATION, DIRTY_BITMAP_PREFIX, STATE_DIRTY, STATE_HOLE, STATE_ZERO, Status, StatusList,
};
pub use writer::{Writer, ZeroMode};
