//! The guest agent over its own socket (virtio-serial), QEMU docs/interop/qemu-ga-ref: only what quiescing needs.
//!
//! Each call has a deadline. An agent that did not answer may still execute what is queued when it wakes: after any
//! failed or late freeze, thawing is repeated until the guest says `thawed`. Each session begins with a
//! `guest-sync-delimited`, so that an answer to somebody's earlier question is never taken for ours.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use qapi::Command;
use qapi::qga;
use rustix::event::PollFlags;
use serde::Serialize;
use serde_json::{Value, json};

use super::socket::wait;
use super::{Error, Result};
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

/// A session with a guest agent.
#[derive(Debug)]
pub struct Agent {
    stream: UnixStream,
    received: Vec<u8>,
}

impl Agent {
    /// Connects and proves within `PING` that the agent answers.
    pub fn connect(socket: &Path) -> Result<Self> {
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

    fn call<C: Command + Serialize>(&mut self, command: &C, timeout: Duration) -> Result<Value> {
        let deadline = Deadline::after(timeout);
        let arguments = serde_json::to_value(command)
            .map_err(|error| Error::Protocol(format!("arguments of {}: {error}", C::NAME)))?;
        let mut request = json!({ "execute": C::NAME });
        if arguments.as_object().is_some_and(|map| !map.is_empty()) {
            request["arguments"] = arguments;
        }
        self.send(format!("{request}\n").as_bytes(), deadline)?;
        let mut answer = self.line(C::NAME, deadline).map_err(|error| match error {
            Error::Timeout { command, .. } => Error::Timeout {
                command,
                seconds: timeout.as_secs(),
            },
            other => other,
        })?;
        if let Some(error) = answer.get("error") {
            return Err(Error::answered(C::NAME, error));
        }
        match answer.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => Err(Error::Protocol(format!(
                "the agent's answer to {} is none",
                C::NAME
            ))),
        }
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
        let request = json!({ "execute": qga::guest_fsfreeze_thaw::NAME });
        self.send(format!("{request}\n").as_bytes(), Deadline::after(PING))
    }

    /// Thaws what the agent froze; harmless when nothing is frozen.
    pub fn thaw(&mut self, timeout: Duration) -> Result<i64> {
        let answer = self.call(&qga::guest_fsfreeze_thaw {}, timeout)?;
        Ok(answer.as_i64().unwrap_or(0))
    }
}

/// Thaws until the agent says `thawed`, with new sessions, for at most `patience`. Returns whether it was frozen.
pub fn thaw_until_thawed(socket: &Path, patience: Duration) -> Result<bool> {
    let deadline = Deadline::after(patience);
    let mut was_frozen = false;
    loop {
        let tried = Agent::connect(socket).and_then(|mut agent| {
            was_frozen |= agent.thaw(PING)? > 0;
            agent.status()
        });
        match tried {
            Ok(Status::Thawed) => return Ok(was_frozen),
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
