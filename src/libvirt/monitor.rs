//! A domain's monitor: QMP through libvirt's passthrough (`virDomainQemuMonitorCommand`).
//!
//! The passthrough finds a domain by its UUID, whichever QEMU process that is by now. libvirt starts another one only when the
//! last one is gone; so an answer counts if the process that this monitor is of lives when it has come. Before a command that
//! changes something the domain's id, which is new at every start, is compared, too; nothing that was read is relied upon
//! before such a command has followed it, if only to take back what a batch or a freeze put into the VM.
//!
//! A restart of libvirt's daemon leaves QEMU alone. The connection is then made anew; a command that was on its way is
//! asked again when it only asks ([`Error::Lost`] otherwise: nobody knows whether it was executed).

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use virt::domain::Domain;
use virt::error::ErrorNumber;

use super::snapshot::DomainSnapshots;
use super::{ANSWER, Connection, RESTART, forget, kept, open, open_patiently, within};
use crate::clock::{self, Deadline};
use crate::qmp::agent::Channel;
use crate::qmp::command::{request, result};
use crate::qmp::managed::Manager;
use crate::qmp::socket::start_time;
use crate::qmp::{Error, Handover, Monitor, Process, Result};

/// What an agent's command may take beyond its own time, for libvirt's own synchronisation with the agent.
const AGENT_GRACE: Duration = Duration::from_secs(10);

/// Of each domain, by its daemon's URI and its UUID, its id, its QEMU and its own directory, as they were found last: they are
/// asked for once in its life.
static SEEN: Mutex<BTreeMap<[String; 2], (u32, Process, PathBuf)>> = Mutex::new(BTreeMap::new());

/// A monitor of a domain that runs.
pub(super) struct DomainMonitor {
    connection: Connection,
    domain: Domain,
    uri: String,
    uuid: String,
    id: u32,
    process: Process,
    place: PathBuf,
    /// How far commands are apart at least, and when the last one was answered.
    apart: Duration,
    answered: Option<Instant>,
}

impl std::fmt::Debug for DomainMonitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { uri, uuid, id, .. } = self;
        write!(f, "DomainMonitor({uri}, {uuid}, id {id})")
    }
}

impl DomainMonitor {
    /// Connects to a domain that runs.
    pub(super) fn connect(uri: &str, uuid: &str) -> Result<Self> {
        let mut connection = kept(uri)?;
        let found = match look_up(&connection, uuid) {
            // The daemon was restarted since.
            Err(_) if !connection.connect.is_alive().unwrap_or(false) => {
                forget(uri);
                connection = kept(uri)?;
                look_up(&connection, uuid)
            }
            found => found,
        };
        let (domain, id) = found?;
        let id = id.ok_or(Error::Closed)?;
        let mut monitor = Self {
            connection,
            domain,
            uri: uri.to_owned(),
            uuid: uuid.to_owned(),
            id,
            process: Process { pid: 0, start: 0 },
            place: PathBuf::new(),
            apart: Duration::ZERO,
            answered: None,
        };
        let known = || SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        let key = [uri.to_owned(), uuid.to_owned()];
        let seen = known().get(&key).cloned();
        if let Some((_, process, place)) = seen.filter(|(of, ..)| *of == id) {
            (monitor.process, monitor.place) = (process, place);
            if monitor.process_lives() {
                return Ok(monitor);
            }
            monitor.process = Process { pid: 0, start: 0 };
        }
        monitor.process = monitor.find_process()?;
        monitor.place = monitor.find_place()?;
        let (process, place) = (monitor.process.clone(), monitor.place.clone());
        known().insert(key, (id, process, place));
        Ok(monitor)
    }

    /// QEMU's process, by a thread of it: libvirt does not tell.
    fn find_process(&mut self) -> Result<Process> {
        let cpus = self.ask("query-cpus-fast")?;
        let thread = cpus.pointer("/0/thread-id").and_then(Value::as_i64);
        let found = thread.and_then(|thread| {
            let status = std::fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
            let group = status
                .lines()
                .find_map(|line| line.strip_prefix("Tgid:"))?
                .trim();
            let pid = group.parse().ok()?;
            Some(Process {
                pid,
                start: start_time(pid)?,
            })
        });
        found.ok_or_else(|| {
            Error::Libvirt("the process of the domain's QEMU cannot be found in /proc".to_owned())
        })
    }

    /// The domain's own directory, where QEMU may make sockets and open files whatever confines it: its monitor's socket
    /// is there.
    fn find_place(&mut self) -> Result<PathBuf> {
        let chardevs = self.ask("query-chardev")?;
        let monitor = chardevs
            .as_array()
            .into_iter()
            .flatten()
            .find_map(|device| {
                let label = device.get("label")?.as_str()?;
                (label == "charmonitor").then_some(device.get("filename")?.as_str()?)
            });
        let path = monitor.and_then(|shown| {
            let (_, path) = shown.split_once("unix:")?;
            let path = path.split_once(",server").map_or(path, |(path, _)| path);
            Path::new(path).parent()
        });
        path.map(Path::to_path_buf)
            .ok_or_else(|| Error::Libvirt("the domain's own directory cannot be found".to_owned()))
    }

    fn ask(&mut self, command: &str) -> Result<Value> {
        self.execute(command, json!({}), None, ANSWER)
    }

    /// Whether the same QEMU is behind the domain; a broken connection is made anew.
    fn still_there(&mut self) -> Result<()> {
        match look_up(&self.connection, &self.uuid) {
            Ok((_, Some(id))) if id == self.id => Ok(()),
            Ok(_) | Err(Error::Closed) => Err(Error::Closed),
            Err(error) if self.alive() => Err(error),
            Err(_) => self.connect_again(),
        }
    }

    fn alive(&self) -> bool {
        self.connection.connect.is_alive().unwrap_or(false)
    }

    /// libvirt's daemon was restarted: the same domain by a new connection.
    fn connect_again(&mut self) -> Result<()> {
        tracing::info!(
            domain = self.uuid,
            "the connection to libvirt broke: connecting again"
        );
        let deadline = Deadline::after(RESTART);
        loop {
            let found = open(Some(&self.uri)).and_then(|connection| {
                let (domain, id) = look_up(&connection, &self.uuid)?;
                Ok((connection, domain, id))
            });
            match found {
                Ok((connection, domain, Some(id))) if id == self.id => {
                    self.domain = domain;
                    self.connection = connection;
                    break;
                }
                Ok(_) | Err(Error::Closed) if !self.process_lives() => return Err(Error::Closed),
                // A daemon that has just come up may not have found its domains yet.
                found if deadline.passed() => return found.and(Err(Error::Closed)),
                _ => clock::sleep(Duration::from_millis(100)),
            }
        }
        if self.process_lives() {
            Ok(())
        } else {
            Err(Error::Closed)
        }
    }

    fn process_lives(&self) -> bool {
        self.process.pid == 0 || start_time(self.process.pid) == Some(self.process.start)
    }

    /// What makes one picture is asked at once.
    fn keep_apart(&self, command: &str) {
        if let Some(answered) = self.answered
            && !["query-named-block-nodes", "x-debug-query-block-graph"].contains(&command)
        {
            clock::sleep(self.apart.saturating_sub(clock::now() - answered));
        }
    }

    fn send(&mut self, command: &str, request: &str, timeout: Duration) -> Result<Value> {
        let (domain, text) = (self.domain.clone(), request.to_owned());
        let answer = within(command, timeout, move || {
            domain.qemu_monitor_command(&text, 0)
        })?;
        match answer {
            Ok(answer) => serde_json::from_str(&answer)
                .map_err(|error| Error::Protocol(format!("an answer to {command}: {error}"))),
            Err(_) if !self.alive() => {
                self.connect_again()?;
                Err(Error::Lost {
                    command: command.to_owned(),
                })
            }
            Err(error) => Err(self.explain(&error)),
        }
    }

    fn explain(&self, error: &virt::error::Error) -> Error {
        let code = error.code();
        if code.is(ErrorNumber::NoDomain) || !self.process_lives() {
            return Error::Closed;
        }
        if code.is(ErrorNumber::OperationTimeout) {
            return Error::DomainBusy {
                domain: self.uuid.clone(),
                words: error.message().to_owned(),
            };
        }
        if code.is(ErrorNumber::OperationInvalid) && error.message().contains("not running") {
            return Error::Closed;
        }
        Error::Libvirt(error.message().to_owned())
    }
}

/// The domain and its id, `None` when it is off.
fn look_up(connection: &Connection, uuid: &str) -> Result<(Domain, Option<u32>)> {
    let (connect, uuid) = (connection.connect.clone(), uuid.to_owned());
    let found = within("look up the domain", ANSWER, move || {
        let domain = connect.lookup_domain_by_uuid_string(&uuid)?;
        let id = domain.id();
        Ok::<_, virt::error::Error>((domain, id))
    })?;
    found.map_err(|error| {
        if error.code().is(ErrorNumber::NoDomain) {
            Error::Closed
        } else {
            Error::Libvirt(error.message().to_owned())
        }
    })
}

/// Whether a command changes nothing, so that it may be asked again.
fn only_asks(command: &str) -> bool {
    ["query-", "qom-get", "qom-list", "x-debug-query-"]
        .iter()
        .any(|prefix| command.starts_with(prefix))
}

impl Monitor for DomainMonitor {
    fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        timeout: Duration,
    ) -> Result<Value> {
        if fd.is_some() {
            return Err(Error::Protocol(format!(
                "{command}: libvirt's passthrough takes no descriptor"
            )));
        }
        self.keep_apart(command);
        tracing::debug!(command, %arguments, "qmp");
        crate::fault::step(&format!("qmp:{command}:before"));
        let asked = request(command, arguments).to_string();
        let asks = only_asks(command);
        let answer = loop {
            if !asks {
                self.still_there()?;
            }
            match self.send(command, &asked, timeout) {
                Err(Error::Lost { .. }) if asks => {}
                sent => break sent?,
            }
        };
        self.answered = Some(clock::now());
        // It counts only if no other process can have given it. Which one this is about is to be found yet by the first.
        if self.process.pid == 0 {
            self.still_there()?;
        } else if !self.process_lives() {
            return Err(Error::Closed);
        }
        crate::fault::step(&format!("qmp:{command}:answered"));
        result(command, answer)
    }

    fn process(&self) -> &Process {
        &self.process
    }

    fn handover(&self) -> Handover<'_> {
        Handover::Domain {
            uri: &self.uri,
            uuid: &self.uuid,
        }
    }

    fn place(&self) -> Option<&Path> {
        Some(&self.place)
    }

    fn space(&mut self, apart: Duration) {
        self.apart = apart;
    }

    fn manager(&self) -> Option<Box<dyn Manager>> {
        let domain = super::Domain {
            uri: self.uri.clone(),
            name: self.uuid.clone(),
            uuid: self.uuid.clone(),
        };
        Some(Box::new(DomainSnapshots { domain }))
    }

    fn agent(&self) -> Result<Box<dyn Channel>> {
        let connection = open_patiently(&self.uri)?;
        match look_up(&connection, &self.uuid)? {
            (domain, Some(id)) if id == self.id => Ok(Box::new(DomainAgent { domain })),
            _ => Err(Error::Closed),
        }
    }
}

/// The guest agent as libvirt hands it on.
struct DomainAgent {
    domain: Domain,
}

impl std::fmt::Debug for DomainAgent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DomainAgent")
    }
}

impl DomainAgent {
    /// `seconds` as libvirt takes them: 0 asks and does not wait.
    fn send(&self, command: &str, request: &Value, seconds: i32) -> Result<String> {
        let (domain, text) = (self.domain.clone(), request.to_string());
        let longest = Duration::from_secs(u64::from(seconds.unsigned_abs())) + AGENT_GRACE;
        crate::fault::step(&format!("qga:{command}:before"));
        let answer = within(command, longest, move || {
            domain.qemu_agent_command(&text, seconds, 0)
        })?;
        crate::fault::step(&format!("qga:{command}:answered"));
        answer.map_err(|error| {
            let code = error.code();
            if code.is(ErrorNumber::AgentUnresponsive) || code.is(ErrorNumber::AgentCommandTimeout)
            {
                return Error::Timeout {
                    command: command.to_owned(),
                    seconds: u64::from(seconds.unsigned_abs()),
                };
            }
            if code.is(ErrorNumber::NoDomain) || error.message().contains("not running") {
                return Error::Closed;
            }
            Error::Libvirt(error.message().to_owned())
        })
    }
}

impl Channel for DomainAgent {
    fn call(&mut self, command: &str, arguments: Value, timeout: Duration) -> Result<Value> {
        let seconds = i32::try_from(timeout.as_secs().max(1)).unwrap_or(i32::MAX);
        let answer = self.send(command, &request(command, arguments), seconds)?;
        let answer = serde_json::from_str(&answer)
            .map_err(|error| Error::Protocol(format!("the agent's answer: {error}")))?;
        result(command, answer)
    }

    fn post(&mut self, command: &str) -> Result<()> {
        self.send(command, &request(command, Value::Null), 0)
            .map(drop)
    }
}
