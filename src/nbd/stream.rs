//! The socket: connecting, whole reads and writes, each wait bounded.
//!
//! Every wait for the server ends after `timeout` without a byte, or at the deadline when one is set, so that a hung
//! server never hangs its client. Payloads are received straight into the caller's memory; only the few bytes behind
//! them, the next header, pass through a small buffer in the same system call.

use std::{
    io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::retry_on_intr,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt},
};

use super::error::Error;
use crate::clock::Deadline;
use crate::unix_path::ShortPath;

/// A header of a data chunk and its offset; a longer buffer would only be copied twice.
const AHEAD: usize = 32;
/// What is asked of the kernel for the sending side; it caps it as the host is configured.
const SEND_BUFFER: usize = 2 << 20;

#[derive(Debug)]
pub(super) struct Stream {
    socket: UnixStream,
    ahead: [u8; AHEAD],
    /// The bytes of `ahead` that were received and not read yet.
    start: usize,
    end: usize,
    timeout: Duration,
    deadline: Option<Deadline>,
    /// What the socket's own timeouts are set to.
    armed: Option<Duration>,
}

impl Stream {
    /// Connects; a server that does not accept makes this time out as well.
    pub(super) fn connect(path: &Path, timeout: Duration) -> Result<Self, Error> {
        let doing = "connecting";
        let failed = |errno: rustix::io::Errno| Error::from_io(errno.into(), doing, timeout);
        let short = ShortPath::of(path).map_err(|error| Error::from_io(error, doing, timeout))?;
        let address = SocketAddrUnix::new(short.path())
            .map_err(|_| Error::Input(format!("socket path {} is too long", path.display())))?;
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(failed)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(timeout))
            .map_err(failed)?;
        // Larger than the default where the host allows it; a restore then needs fewer wake-ups.
        if sockopt::set_socket_send_buffer_size_force(&socket, SEND_BUFFER).is_err() {
            sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER).map_err(failed)?;
        }
        retry_on_intr(|| connect(&socket, &address)).map_err(failed)?;
        Ok(Self::new(UnixStream::from(socket), timeout))
    }

    pub(super) fn new(socket: UnixStream, timeout: Duration) -> Self {
        Self {
            socket,
            ahead: [0; AHEAD],
            start: 0,
            end: 0,
            timeout,
            deadline: None,
            armed: None,
        }
    }

    pub(super) fn line(&self) -> Result<UnixStream, Error> {
        let doing = "connecting";
        let line = self.socket.try_clone();
        line.map_err(|source| Error::Io { doing, source })
    }

    pub(super) fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    pub(super) fn set_deadline(&mut self, deadline: Option<Deadline>) {
        self.deadline = deadline;
    }

    /// Sets the socket's timeouts to what this wait may take.
    fn arm(&mut self, doing: &'static str) -> Result<Duration, Error> {
        let wait = match self.deadline {
            Some(deadline) => deadline.left().min(self.timeout),
            None => self.timeout,
        };
        if wait.is_zero() {
            return Err(Error::Timeout { doing, after: wait });
        }
        if self.armed != Some(wait) {
            self.socket
                .set_read_timeout(Some(wait))
                .and_then(|()| self.socket.set_write_timeout(Some(wait)))
                .map_err(|source| Error::Io { doing, source })?;
            self.armed = Some(wait);
        }
        Ok(wait)
    }

    /// Fills `out`.
    pub(super) fn read_exact(&mut self, out: &mut [u8], doing: &'static str) -> Result<(), Error> {
        let buffered = self.ahead.get(self.start..self.end).unwrap_or_default();
        let mut filled = buffered.len().min(out.len());
        out[..filled].copy_from_slice(&buffered[..filled]);
        self.start += filled;
        while filled < out.len() {
            let wait = self.arm(doing)?;
            let wanted = out.len() - filled;
            let mut parts = [
                IoSliceMut::new(&mut out[filled..]),
                IoSliceMut::new(&mut self.ahead),
            ];
            match (&self.socket).read_vectored(&mut parts) {
                Ok(0) => return Err(Error::Closed { doing }),
                Ok(count) => {
                    filled += count.min(wanted);
                    self.start = 0;
                    self.end = count.saturating_sub(wanted);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::from_io(error, doing, wait)),
            }
        }
        Ok(())
    }

    pub(super) fn read_array<const N: usize>(
        &mut self,
        doing: &'static str,
    ) -> Result<[u8; N], Error> {
        let mut out = [0; N];
        self.read_exact(&mut out, doing)?;
        Ok(out)
    }

    /// Sends a header and its payload with as few system calls as the socket allows.
    pub(super) fn write_all(
        &mut self,
        header: &[u8],
        payload: &[u8],
        doing: &'static str,
    ) -> Result<(), Error> {
        let mut sent = 0;
        while sent < header.len() + payload.len() {
            let wait = self.arm(doing)?;
            let parts = [
                IoSlice::new(header.get(sent..).unwrap_or_default()),
                IoSlice::new(&payload[sent.saturating_sub(header.len())..]),
            ];
            match (&self.socket).write_vectored(&parts) {
                Ok(0) => return Err(Error::Closed { doing }),
                Ok(count) => sent += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::from_io(error, doing, wait)),
            }
        }
        Ok(())
    }

    /// Whether a byte, or the end, can be read without waiting.
    pub(super) fn readable(&self) -> Result<bool, Error> {
        if self.start < self.end {
            return Ok(true);
        }
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        match poll(&mut fds, Some(&now)) {
            Ok(count) => Ok(count > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(errno) => Err(Error::Io {
                doing: "polling",
                source: errno.into(),
            }),
        }
    }

    /// Waits, for a short while at most, until the server has closed its end.
    pub(super) fn wait_for_end(&mut self, patience: Duration) -> io::Result<()> {
        let deadline = Deadline::after(patience);
        let mut rest = [0; 4096];
        loop {
            let left = deadline.left();
            if left.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            self.socket.set_read_timeout(Some(left))?;
            match self.socket.read(&mut rest) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_came_ahead_are_not_lost() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut stream = Stream::new(ours, Duration::from_secs(5));
        let sent: Vec<u8> = (0..200).collect();
        theirs.write_all(&sent).unwrap();
        let mut got = Vec::new();
        for length in [1, 7, 100, 3, 89] {
            let mut part = vec![0; length];
            stream.read_exact(&mut part, "testing").unwrap();
            got.extend(part);
        }
        assert_eq!(got, sent);
        assert!(!stream.readable().unwrap());
    }

    #[test]
    fn silence_is_a_timeout_and_an_end_is_closed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut stream = Stream::new(ours, Duration::from_millis(20));
        let silent = stream.read_array::<1>("testing").unwrap_err();
        assert!(matches!(silent, Error::Timeout { .. }), "{silent}");
        drop(theirs);
        let ended = stream.read_array::<1>("testing").unwrap_err();
        assert!(matches!(ended, Error::Closed { .. }), "{ended}");
    }

    #[test]
    fn a_deadline_bounds_every_wait() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut stream = Stream::new(ours, Duration::from_secs(600));
        stream.set_deadline(Some(Deadline::after(Duration::from_millis(20))));
        let late = stream.read_array::<1>("testing").unwrap_err();
        assert!(matches!(late, Error::Timeout { .. }), "{late}");
    }
}
