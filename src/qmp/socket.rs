//! QMP over a UNIX socket.
//!
//! Each command carries an id; a line that is not its answer is skipped (events: every state that they tell is asked
//! for), so a late answer of an earlier command can never be taken for a later one's. A line is at most
//! `LINE_LIMIT` long. One client at a time is served: a second one connects and hears no greeting.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use super::command::{request, result};
use super::{Error, Handover, Monitor, Process, Result};
use crate::clock::Deadline;
use crate::unix_path::connect_now;

/// The longest line taken from QEMU (`query-qmp-schema` is about 200 KiB; block graphs of many disks reach megabytes).
const LINE_LIMIT: usize = 64 << 20;
/// How long a free socket takes at most to greet.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// A QMP session over a UNIX socket.
#[derive(Debug)]
pub struct QmpSocket {
    stream: UnixStream,
    process: Process,
    received: Vec<u8>,
    /// Up to here `received` holds no newline.
    scanned: usize,
    serial: u64,
    prefix: String,
}

impl QmpSocket {
    /// Connects, waits for the greeting and negotiates.
    pub fn connect(path: &Path) -> Result<Self> {
        let shown = path.display().to_string();
        let stream = connect_now(path).map_err(|source| match source.kind() {
            std::io::ErrorKind::WouldBlock => Error::Busy {
                path: shown.clone(),
            },
            _ => Error::Unreachable {
                path: shown.clone(),
                source,
            },
        })?;
        let mut socket = Self::over(stream, "forerun")?;
        let deadline = Deadline::after(GREETING_TIMEOUT);
        loop {
            match socket.line(deadline) {
                Ok(Some(line)) if line.get("QMP").is_some() => break,
                Ok(Some(_)) => {}
                Ok(None) => return Err(Error::Busy { path: shown }),
                Err(error) => return Err(error),
            }
        }
        socket.execute("qmp_capabilities", json!({}), None, GREETING_TIMEOUT)?;
        Ok(socket)
    }

    /// Takes over a connection that another process negotiated; whatever of its answers is still on the way is skipped.
    pub fn inherit(stream: UnixStream) -> Result<Self> {
        Self::over(stream, "guard")
    }

    fn over(stream: UnixStream, prefix: &str) -> Result<Self> {
        let io = |what: &str, source| Error::Io {
            what: what.to_owned(),
            source,
        };
        let credentials = rustix::net::sockopt::socket_peercred(&stream)
            .map_err(|error| io("ask for the QMP socket's peer", error.into()))?;
        let pid = credentials.pid.as_raw_nonzero().get();
        stream
            .set_nonblocking(true)
            .map_err(|error| io("set up the QMP socket", error))?;
        Ok(Self {
            stream,
            process: Process {
                pid,
                start: start_time(pid).unwrap_or(0),
            },
            received: Vec::new(),
            scanned: 0,
            serial: 0,
            prefix: format!("{prefix}-{}", std::process::id()),
        })
    }

    /// One parsed line, `None` when the deadline passes first. Lines that are no JSON are skipped.
    fn line(&mut self, deadline: Deadline) -> Result<Option<Value>> {
        loop {
            if let Some(found) = self.received[self.scanned..]
                .iter()
                .position(|&b| b == b'\n')
            {
                let end = self.scanned + found;
                let parsed = serde_json::from_slice(&self.received[..end]);
                self.received.drain(..=end);
                self.scanned = 0;
                match parsed {
                    Ok(value) => return Ok(Some(value)),
                    Err(_) => continue,
                }
            }
            self.scanned = self.received.len();
            if self.scanned > LINE_LIMIT {
                return Err(Error::Protocol(format!(
                    "a line of more than {LINE_LIMIT} bytes"
                )));
            }
            if !self.readable(deadline)? {
                return Ok(None);
            }
            let mut chunk = [0; 16384];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(Error::Closed),
                Ok(count) => self.received.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                    return Err(Error::Closed);
                }
                Err(source) => {
                    return Err(Error::Io {
                        what: "read from the monitor".to_owned(),
                        source,
                    });
                }
            }
        }
    }

    fn readable(&self, deadline: Deadline) -> Result<bool> {
        wait(self.stream.as_fd(), PollFlags::IN, deadline)
    }

    fn send(&mut self, bytes: &[u8], fd: Option<BorrowedFd<'_>>, deadline: Deadline) -> Result<()> {
        let mut sent = 0;
        while sent < bytes.len() {
            let fds: &[BorrowedFd<'_>] = match &fd {
                Some(fd) if sent == 0 => std::slice::from_ref(fd),
                _ => &[],
            };
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(fds));
            }
            let parts = [IoSlice::new(&bytes[sent..])];
            match sendmsg(&self.stream, &parts, &mut control, SendFlags::NOSIGNAL) {
                Ok(count) => sent += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    if !wait(self.stream.as_fd(), PollFlags::OUT, deadline)? {
                        return Err(Error::Timeout {
                            command: "a write".to_owned(),
                            seconds: 0,
                        });
                    }
                }
                Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => {
                    return Err(Error::Closed);
                }
                Err(error) => {
                    let what = "write to the monitor".to_owned();
                    return Err(Error::Io {
                        what,
                        source: error.into(),
                    });
                }
            }
        }
        Ok(())
    }
}

impl Monitor for QmpSocket {
    fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        timeout: Duration,
    ) -> Result<Value> {
        let deadline = Deadline::after(timeout);
        self.serial += 1;
        let id = format!("{}-{}", self.prefix, self.serial);
        tracing::debug!(command, %arguments, "qmp");
        crate::fault::step(&format!("qmp:{command}:before"));
        let mut request = request(command, arguments);
        request["id"] = id.as_str().into();
        let mut bytes = request.to_string().into_bytes();
        bytes.push(b'\n');
        self.send(&bytes, fd, deadline)?;
        crate::fault::step(&format!("qmp:{command}:sent"));
        loop {
            let Some(line) = self.line(deadline)? else {
                let seconds = timeout.as_secs();
                return Err(Error::Timeout {
                    command: command.to_owned(),
                    seconds,
                });
            };
            if line.get("id").and_then(Value::as_str) != Some(id.as_str()) {
                continue;
            }
            crate::fault::step(&format!("qmp:{command}:answered"));
            return result(command, line);
        }
    }

    fn process(&self) -> &Process {
        &self.process
    }

    fn handover(&self) -> Handover<'_> {
        Handover::Descriptor(self.stream.as_fd())
    }
}

/// Waits until a descriptor is ready; `false` when the deadline passes first.
pub(crate) fn wait(fd: BorrowedFd<'_>, flags: PollFlags, deadline: Deadline) -> Result<bool> {
    loop {
        let left = deadline.left();
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match poll(&mut [PollFd::from_borrowed_fd(fd, flags)], Some(&timeout)) {
            Ok(0) if deadline.passed() => return Ok(false),
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => {
                let what = "wait for the monitor".to_owned();
                return Err(Error::Io {
                    what,
                    source: error.into(),
                });
            }
        }
    }
}

/// The start time of a process, proc(5), `/proc/PID/stat`, field 22. The command's name in field 2 may hold anything,
/// a closing parenthesis too, so fields are counted from the last one.
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let rest = stat.get(stat.rfind(')')? + 2..)?;
    // One that has ended and that nobody has waited for is listed still (proc_pid_stat(5)).
    if rest.starts_with(['Z', 'X']) {
        return None;
    }
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}
