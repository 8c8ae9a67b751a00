//! The guest agent (QEMU docs/interop/qemu-ga-ref): only what quiescing needs. It is reached over its own socket
//! (virtio-serial), or by way of libvirt, which holds that socket for a domain.
//!
//! Each call has a deadline. An agent that did not answer may still execute what is queued when it wakes: after any
//! failed or late freeze, thawing is repeated until the guest says `thawed`. Each session begins with a
//! `guest-sync-delimited`, so that an answer to somebody's earlier question is never taken for ours.

use std::fmt;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use qapi::Command;
use qapi::qga;
use rustix::event::PollFlags;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::command::{request, result};
use super::socket::wait;
use super::{Error, Monitor, Result};
use crate::clock::{self, Deadline};
use crate::unix_path::connect_now;

/// How long the agent may take to show that it is there.
const PING: Duration = Duration::from_secs(3);
/// How long a thaw is tried for where nobody waits for it.
pub const THAW_FOR: Duration = Duration::from_secs(60);
/// The longest answer taken.
const LINE_LIMIT: usize = 1 << 20;

/// The state of the guest's file systems as the agent tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Writable.
    Thawed,
    /// Frozen, by us or by somebody else.
    Frozen,
}

/// Where a guest's agent is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Address {
    /// At a socket of its own.
    Socket(PathBuf),
    /// By way of who holds the VM's monitor: libvirt.
    Domain,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(path) => write!(f, "at {}", path.display()),
            Self::Domain => f.write_str("of the domain"),
        }
    }
}

/// What carries a session with an agent.
pub trait Channel: Send + fmt::Debug {
    /// Runs one command within a time and returns what the agent returned.
    fn call(&mut self, command: &str, arguments: Value, timeout: Duration) -> Result<Value>;

    /// Asks for something and does not wait for it.
    fn post(&mut self, command: &str) -> Result<()>;
}

/// A session with a guest agent.
#[derive(Debug)]
pub struct Agent {
    channel: Box<dyn Channel>,
}

impl Agent {
    /// Connects and proves within `PING` that the agent answers.
    pub fn connect(address: &Address, monitor: &dyn Monitor) -> Result<Self> {
        let channel = match address {
            Address::Socket(socket) => Box::new(Socket::connect(socket)?),
            Address::Domain => monitor.agent()?,
        };
        let mut agent = Self { channel };
        if *address == Address::Domain {
            agent.call(&qga::guest_ping {}, PING)?;
        }
        Ok(agent)
    }

    fn call<C: Command + Serialize>(&mut self, command: &C, timeout: Duration) -> Result<Value> {
        let arguments = serde_json::to_value(command)
            .map_err(|error| Error::Protocol(format!("arguments of {}: {error}", C::NAME)))?;
        self.channel.call(C::NAME, arguments, timeout)
    }

    /// Whether the guest's file systems are frozen.
    pub fn status(&mut self) -> Result<Status> {
        let answer = self.call(&qga::guest_fsfreeze_status {}, PING)?;
        match answer.as_str() {
            Some("thawed") => Ok(Status::Thawed),
            Some("frozen") => Ok(Status::Frozen),
            _ => Err(Error::Protocol(format!("a freeze status of {answer}"))),
        }
    }

    /// Freezes all the guest's file systems; returns how many.
    pub fn freeze(&mut self, timeout: Duration) -> Result<i64> {
        let answer = self.call(&qga::guest_fsfreeze_freeze {}, timeout)?;
        Ok(answer.as_i64().unwrap_or(0))
    }

    /// Asks for a thaw and does not wait for it: an agent that wakes later executes it after what it was asked before.
    pub fn thaw_later(&mut self) -> Result<()> {
        self.channel.post(qga::guest_fsfreeze_thaw::NAME)
    }

    /// Thaws what the agent froze; harmless when nothing is frozen.
    pub fn thaw(&mut self, timeout: Duration) -> Result<i64> {
        let answer = self.call(&qga::guest_fsfreeze_thaw {}, timeout)?;
        Ok(answer.as_i64().unwrap_or(0))
    }
}

/// The agent's own socket.
#[derive(Debug)]
struct Socket {
    stream: UnixStream,
    received: Vec<u8>,
}

impl Socket {
    fn connect(socket: &Path) -> Result<Self> {
        let path = socket.display().to_string();
        let stream = connect_now(socket).map_err(|source| match source.kind() {
            std::io::ErrorKind::WouldBlock => Error::Busy { path },
            _ => Error::Unreachable { path, source },
        })?;
        let mut agent = Self {
            stream,
            received: Vec::new(),
        };
        agent.synchronise(Deadline::after(PING))?;
        Ok(agent)
    }

    fn synchronise(&mut self, deadline: Deadline) -> Result<()> {
        let token =
            i64::from(std::process::id()) << 20 | (clock::utc_now().as_microsecond() & 0xf_ffff);
        // 0xFF makes the agent drop a half-read request of a client before us.
        self.send(b"\xff", deadline)?;
        let request = json!({ "execute": "guest-sync-delimited", "arguments": { "id": token } });
        self.send(format!("{request}\n").as_bytes(), deadline)?;
        loop {
            let answer = self.line("guest-sync-delimited", deadline)?;
            if answer.get("return").and_then(Value::as_i64) == Some(token) {
                return Ok(());
            }
        }
    }

    fn send(&mut self, mut bytes: &[u8], deadline: Deadline) -> Result<()> {
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    if !wait(self.stream.as_fd(), PollFlags::OUT, deadline)? {
                        let command = "a write to the guest agent".to_owned();
                        return Err(Error::Timeout {
                            command,
                            seconds: PING.as_secs(),
                        });
                    }
                }
                Err(source) => {
                    return Err(Error::Io {
                        what: "write to the guest agent".to_owned(),
                        source,
                    });
                }
            }
        }
        Ok(())
    }

    fn line(&mut self, command: &str, deadline: Deadline) -> Result<Value> {
        loop {
            if let Some(end) = self.received.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                let start = line
                    .iter()
                    .rposition(|&byte| byte == 0xff)
                    .map_or(0, |at| at + 1);
                match serde_json::from_slice(&line[start..]) {
                    Ok(value) => return Ok(value),
                    Err(_) => continue,
                }
            }
            if self.received.len() > LINE_LIMIT {
                return Err(Error::Protocol(
                    "an endless line from the guest agent".to_owned(),
                ));
            }
            if !wait(self.stream.as_fd(), PollFlags::IN, deadline)? {
                return Err(Error::Timeout {
                    command: command.to_owned(),
                    seconds: PING.as_secs(),
                });
            }
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(Error::Closed),
                Ok(count) => self.received.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(Error::Io {
                        what: "read from the guest agent".to_owned(),
                        source,
                    });
                }
            }
        }
    }
}

impl Channel for Socket {
    fn call(&mut self, command: &str, arguments: Value, timeout: Duration) -> Result<Value> {
        let deadline = Deadline::after(timeout);
        let request = request(command, arguments);
        self.send(format!("{request}\n").as_bytes(), deadline)?;
        let answer = self.line(command, deadline).map_err(|error| match error {
            Error::Timeout { command, .. } => Error::Timeout {
                command,
                seconds: timeout.as_secs(),
            },
            other => other,
        })?;
        result(command, answer)
    }

    fn post(&mut self, command: &str) -> Result<()> {
        let request = request(command, Value::Null);
        self.send(format!("{request}\n").as_bytes(), Deadline::after(PING))
    }
}

/// Thaws until the agent says `thawed`, with new sessions, for at most `patience`. Returns whether it was frozen.
pub fn thaw_until_thawed(
    address: &Address,
    monitor: &dyn Monitor,
    patience: Duration,
) -> Result<bool> {
    let deadline = Deadline::after(patience);
    let mut was_frozen = false;
    loop {
        let tried = Agent::connect(address, monitor).and_then(|mut agent| {
            was_frozen |= agent.thaw(PING)? > 0;
            agent.status()
        });
        match tried {
            // A VM that is gone took its freeze with it.
            Ok(Status::Thawed) | Err(Error::Closed) => return Ok(was_frozen),
            Ok(Status::Frozen) => was_frozen = true,
            // Nobody listens: the guest has gone, and its freeze with it.
            Err(Error::Unreachable { source, .. })
                if matches!(
                    source.kind(),
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused
                ) =>
            {
                return Ok(was_frozen);
            }
            Err(error) if deadline.passed() => return Err(error),
            Err(_) => {}
        }
        if deadline.passed() {
            return Err(Error::Timeout {
                command: "guest-fsfreeze-thaw".to_owned(),
                seconds: patience.as_secs(),
            });
        }
        clock::sleep(Duration::from_millis(100));
    }
}
