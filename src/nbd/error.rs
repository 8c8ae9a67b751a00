//! What can go wrong between this client and an NBD server, and whether the connection can be used afterwards.
//!
//! Only [`Error::Server`], [`Error::Refused`] and [`Error::Input`] leave a connected client in a known place in the
//! stream ([`Error::is_recoverable`]); after every other error the connection is spent. Error numbers are those of the
//! NBD protocol document, "Error values", which are Linux's.

use std::{fmt, io, time::Duration};

use crate::units::Extent;

/// An error of the NBD client.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server, or what it offers, does not allow what was asked.
    #[error("nbd server refused {what}: {reason}")]
    Refused {
        /// What was asked for.
        what: String,
        /// The server's reason.
        reason: String,
    },
    /// The export does not have a meta context, or it was not asked for when connecting.
    #[error("nbd export `{export}` offers no meta context `{context}`")]
    NoContext {
        /// The export.
        export: String,
        /// The full name of the context.
        context: String,
    },
    /// The server made no progress for this long.
    #[error("nbd server made no progress for {} ms while {doing}", after.as_millis())]
    Timeout {
        /// What was waited for.
        doing: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
    /// The server closed the connection, or the connection was given up after an earlier error.
    #[error("nbd connection closed while {doing}")]
    Closed {
        /// What was being done.
        doing: &'static str,
    },
    /// The server answered a request with an error. The connection is still good.
    #[error(
        "nbd server failed to {command} {} bytes at offset {:#x}: {}{message}",
        extent.length, extent.offset, ErrnoName(*errno)
    )]
    Server {
        /// What was asked.
        command: Command,
        /// The range of the request.
        extent: Extent,
        /// The error number.
        errno: u32,
        /// The server's words, with a separator in front, or nothing.
        message: String,
    },
    /// The server broke the protocol.
    #[error("nbd protocol violated: {0}")]
    Protocol(String),
    /// The socket failed.
    #[error("socket failed while {doing}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The caller asked for something that no server could do; nothing was sent.
    #[error("{0}")]
    Input(String),
}

impl Error {
    /// Whether the connection can still be used.
    pub fn is_recoverable(&self) -> bool {
        matches!(
            self,
            Self::Server { .. } | Self::Refused { .. } | Self::NoContext { .. } | Self::Input(_)
        )
    }

    /// The errno of a request that the server answered with an error.
    pub fn server_errno(&self) -> Option<u32> {
        match self {
            Self::Server { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    pub(super) fn protocol(what: impl Into<String>) -> Self {
        Self::Protocol(what.into())
    }

    /// Sorts an error of the socket: the timeouts of a socket show as `WouldBlock`.
    pub(super) fn from_io(source: io::Error, doing: &'static str, after: Duration) -> Self {
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Timeout { doing, after },
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::UnexpectedEof => Self::Closed { doing },
            _ => Self::Io { doing, source },
        }
    }
}

/// The commands of the transmission phase that this client uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// `NBD_CMD_READ`
    Read = 0,
    /// `NBD_CMD_WRITE`
    Write = 1,
    /// `NBD_CMD_DISC`
    Disconnect = 2,
    /// `NBD_CMD_FLUSH`
    Flush = 3,
    /// `NBD_CMD_WRITE_ZEROES`
    WriteZeroes = 6,
    /// `NBD_CMD_BLOCK_STATUS`
    BlockStatus = 7,
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Disconnect => "disconnect",
            Self::Flush => "flush",
            Self::WriteZeroes => "zero",
            Self::BlockStatus => "tell the status of",
        })
    }
}

struct ErrnoName(u32);

impl fmt::Display for ErrnoName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            1 => "EPERM",
            5 => "EIO",
            12 => "ENOMEM",
            22 => "EINVAL",
            28 => "ENOSPC",
            75 => "EOVERFLOW",
            95 => "ENOTSUP",
            108 => "ESHUTDOWN",
            other => return write!(f, "error {other}"),
        };
        f.write_str(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_error_names_the_range_and_the_number() {
        let error = Error::Server {
            command: Command::Read,
            extent: Extent {
                offset: 0x10000,
                length: 65536,
            },
            errno: 5,
            message: String::new(),
        };
        assert_eq!(
            error.to_string(),
            "nbd server failed to read 65536 bytes at offset 0x10000: EIO"
        );
        assert!(error.is_recoverable());
        assert_eq!(error.server_errno(), Some(5));
    }
}
