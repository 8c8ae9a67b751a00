//! A raw client of QEMU's monitor: JSON values in and out, nothing hidden.
//!
//! One socket serves one client at a time. Events that arrive while a reply is awaited are kept, unknown ones too.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

/// How long a reply may take unless told otherwise.
const REPLY: Duration = Duration::from_secs(60);
/// Bytes of a line at most.
const MAX_LINE: usize = 64 << 20;

/// A connection that has negotiated its capabilities.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    buffer: Vec<u8>,
    events: VecDeque<Value>,
    next_id: u64,
    timeout: Duration,
}

/// What QEMU answered instead of a return value.
#[derive(Debug, Clone)]
pub struct QmpError {
    /// Its class.
    pub class: String,
    /// Its words.
    pub desc: String,
}

impl std::fmt::Display for QmpError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.class, self.desc)
    }
}

impl std::error::Error for QmpError {}

impl Qmp {
    /// Connects, waiting until the socket is there and greets.
    pub fn connect(path: &Path, wait: Duration) -> Result<Self> {
        let deadline = Instant::now() + wait;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                Err(error) => return Err(error).context(format!("connect to {}", path.display())),
            }
        };
        let (buffer, events) = (Vec::new(), VecDeque::new());
        let mut qmp = Self {
            stream,
            buffer,
            events,
            next_id: 0,
            timeout: REPLY,
        };
        let greeting = qmp.line(deadline.max(Instant::now() + Duration::from_secs(1)))?;
        if greeting.get("QMP").is_none() {
            bail!("no QMP greeting: {greeting}");
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Sets how long a reply may take.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Runs a command and gives its return value. QEMU's own refusal is a [`QmpError`] inside.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let arguments = if arguments.is_null() {
            json!({})
        } else {
            arguments
        };
        self.next_id += 1;
        let id = self.next_id;
        let mut line = json!({"execute": command, "arguments": arguments, "id": id}).to_string();
        line.push('\n');
        self.stream
            .write_all(line.as_bytes())
            .with_context(|| format!("send {command}"))?;
        let deadline = Instant::now() + self.timeout;
        loop {
            let mut value = self
                .line(deadline)
                .with_context(|| format!("reply to {command}"))?;
            if value.get("event").is_some() {
                self.events.push_back(value);
            } else if value.get("id") == Some(&json!(id)) {
                if let Some(error) = value.get("error") {
                    let text = |key| error[key].as_str().unwrap_or_default().to_owned();
                    let error = QmpError {
                        class: text("class"),
                        desc: text("desc"),
                    };
                    return Err(anyhow!(error).context(format!("{command} {arguments}")));
                }
                return Ok(value["return"].take());
            }
        }
    }

    /// Runs one `transaction` of these actions, each a type and its data.
    pub fn transaction(&mut self, actions: Vec<(&str, Value)>) -> Result<()> {
        let actions: Vec<Value> = actions
            .into_iter()
            .map(|(kind, data)| json!({"type": kind, "data": data}))
            .collect();
        self.execute("transaction", json!({ "actions": actions }))
            .map(drop)
    }

    /// Runs a command of the human monitor.
    pub fn human(&mut self, line: &str) -> Result<String> {
        let text = self.execute("human-monitor-command", json!({"command-line": line}))?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    }

    /// The oldest event that fits, kept or yet to come; those before it that do not fit stay kept.
    pub fn wait_event(
        &mut self,
        fits: &dyn Fn(&Value) -> bool,
        timeout: Duration,
    ) -> Result<Value> {
        if let Some(at) = self.events.iter().position(fits) {
            return self
                .events
                .remove(at)
                .context("an event that was just seen");
        }
        let deadline = Instant::now() + timeout;
        loop {
            let value = self.line(deadline)?;
            if fits(&value) {
                return Ok(value);
            }
            self.events.push_back(value);
        }
    }

    /// Takes all events kept so far.
    pub fn take_events(&mut self) -> Vec<Value> {
        self.events.drain(..).collect()
    }

    fn line(&mut self, deadline: Instant) -> Result<Value> {
        let mut searched = 0;
        loop {
            if let Some(at) = self.buffer[searched..]
                .iter()
                .position(|byte| *byte == b'\n')
            {
                let line: Vec<u8> = self.buffer.drain(..=searched + at).collect();
                return serde_json::from_slice(&line).context("a line of the monitor");
            }
            searched = self.buffer.len();
            if searched > MAX_LINE {
                bail!("a line of the monitor is longer than {MAX_LINE} bytes");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("the monitor did not answer in time");
            }
            self.stream
                .set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            let mut chunk = [0; 16384];
            match self.stream.read(&mut chunk) {
                Ok(0) => bail!("the monitor closed the connection"),
                Ok(count) => self.buffer.extend_from_slice(&chunk[..count]),
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("read from the monitor"),
            }
        }
    }
}
