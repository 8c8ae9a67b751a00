//! libvirt domains: found by name or UUID, described by their XML, and reached through libvirt's monitor passthrough.
//!
//! A [`Domain`] holds no connection: what only asks shares one that is kept open, and is asked again over a new one after a
//! restart of libvirt's daemon; what must not be asked twice opens one. Calls of libvirt block for as long as its daemon
//! likes; each runs in a thread of its own with a deadline.
//!
//! ```text
//! Domain    name, UUID, URI: active? XML?        xml      disks and agent, read from the XML
//! monitor   qmp::Monitor over the passthrough    disks    a disk's key is its target dev; what is refused
//! definition   what a domain is besides its disks      redefine   its XML for a restored copy, by edit
//! snapshot  qmp::managed::Manager: external snapshots and commits as libvirt makes them
//! ```

pub mod definition;
mod disks;
mod edit;
mod monitor;
mod redefine;
mod snapshot;
mod xml;

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use virt::connect::Connect;
use virt::domain::{DomainShutoffReason, DomainStateReason};
use virt::enumutil::Enum;
use virt::error::{ErrorNumber, clear_error_callback};

pub use self::redefine::{identity, redefine};

use self::definition::Definition;
use self::xml::Description;
use crate::clock::{self, Deadline};
use crate::qmp::machine::{LeftOut, Machine};
use crate::qmp::managed::Manager;
use crate::qmp::{Error, Monitor, Result};
use crate::target::Image;

/// How long libvirt may take for what it answers itself.
const ANSWER: Duration = Duration::from_secs(30);
/// How long it may take for what needs its lock of a domain, for which it waits 30 s itself.
const LOCKED: Duration = Duration::from_secs(45);
/// How long a daemon that is being restarted is waited for.
const RESTART: Duration = Duration::from_secs(20);
/// `VIR_DOMAIN_XML_SECURE` (libvirt-domain.h): with passwords.
const XML_SECURE: u32 = 1;
/// `VIR_DOMAIN_XML_INACTIVE` (libvirt-domain.h).
const XML_INACTIVE: u32 = 2;

/// A domain of this host.
#[derive(Debug, Clone)]
pub struct Domain {
    uri: String,
    name: String,
    uuid: String,
}

impl Domain {
    /// Finds a domain by its name, else by its UUID. `connect` is the URI of the hypervisor; without one libvirt's own
    /// default is taken, as virsh does.
    pub fn find(connect: Option<&str>, name: &str) -> Result<Self> {
        let connection = open(connect)?;
        let uri = connection.uri.clone();
        let wanted = name.to_owned();
        let found = asked("look up a domain", connection, move |connect| {
            let found = match connect.lookup_domain_by_name(&wanted) {
                // libvirt calls what is no UUID an error of its own.
                Err(error) => connect
                    .lookup_domain_by_uuid_string(&wanted)
                    .map_err(|_| error)?,
                found => found?,
            };
            Ok((found.name()?, found.uuid_string()?))
        });
        match found {
            Ok((name, uuid)) => Ok(Self { uri, name, uuid }),
            Err(Error::Closed) => Err(Error::NoDomain {
                name: name.to_owned(),
                uri,
            }),
            Err(error) => Err(error),
        }
    }

    /// All domains of this host.
    pub fn all(connect: Option<&str>) -> Result<Vec<Self>> {
        let connection = open(connect)?;
        let uri = connection.uri.clone();
        let listed = asked("list the domains", connection, |connect| {
            let domains = connect.list_all_domains(0)?;
            let named = domains
                .iter()
                .map(|domain| Ok((domain.name()?, domain.uuid_string()?)));
            named.collect::<Answered<Vec<_>>>()
        })?;
        let mut domains: Vec<Self> = listed
            .into_iter()
            .map(|(name, uuid)| Self {
                uri: uri.clone(),
                name,
                uuid,
            })
            .collect();
        domains.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(domains)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its UUID, and so the target's key.
    #[must_use]
    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// The URI that it was found by.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Whether it runs (or is paused).
    pub fn active(&self) -> Result<bool> {
        self.ask(
            "ask for the domain's state",
            virt::domain::Domain::is_active,
        )
    }

    /// Whether it is to go on from a managed save, with the memory that its guest had.
    pub fn is_saved(&self) -> Result<bool> {
        self.ask("ask for a managed save of the domain", |domain| {
            domain.has_managed_save(0)
        })
    }

    /// Whether it is off here because it went to another host.
    pub fn has_migrated(&self) -> Result<bool> {
        let migrated = DomainStateReason::Shutoff(Enum::Known(DomainShutoffReason::Migrated));
        let (_, reason) = self.ask("ask for the domain's state", virt::domain::Domain::state)?;
        Ok(reason == Enum::Known(migrated))
    }

    /// Its monitor; [`Error::Closed`] when it is off.
    pub fn monitor(&self) -> Result<Box<dyn Monitor>> {
        monitor(&self.uri, &self.uuid)
    }

    /// libvirt as the one who takes its snapshots.
    #[must_use]
    pub fn manager(&self) -> Box<dyn Manager> {
        Box::new(snapshot::DomainSnapshots {
            domain: self.clone(),
        })
    }

    /// Gives the disks that a monitor found the names that they have in the domain's XML, and refuses what cannot be
    /// attributed for certain. Says whether libvirt and QEMU agree on the disks' nodes.
    pub fn describe(&self, machine: &mut Machine) -> Result<bool> {
        Ok(disks::name(machine, &self.description(0)?))
    }

    /// The images of a domain that is off, and the disks that have none that can be opened.
    pub fn images(&self) -> Result<(Vec<Image>, Vec<LeftOut>)> {
        Ok(disks::images(&self.description(XML_INACTIVE)?))
    }

    /// Whether a guest agent is connected; `None` when the domain has no channel for one.
    pub fn agent_connected(&self) -> Result<Option<bool>> {
        Ok(self.description(0)?.agent_connected)
    }

    /// What it is besides its disks. Passwords of its consoles are in it only when `secrets` says so.
    pub fn definition(&self, secrets: bool) -> Result<Definition> {
        let facts = self.ask("read the domain's definition", move |domain| {
            let active = domain.is_active()?;
            let inactive = domain.xml_desc(XML_INACTIVE)?;
            let secure = domain.xml_desc(XML_INACTIVE | XML_SECURE)?;
            let live = if secrets { XML_SECURE } else { 0 };
            let live = active.then(|| domain.xml_desc(live)).transpose()?;
            let lasting = (
                domain.is_persistent()?,
                domain.is_persistent()? && domain.autostart()?,
            );
            Ok((inactive, secure, live, lasting))
        })?;
        let (inactive, secure, live, (persistent, autostart)) = facts;
        Ok(Definition {
            parts: redefine::parts(&inactive, &self.uri)?,
            uri: self.uri.clone(),
            live,
            without_secrets: !secrets && secure != inactive,
            inactive: if secrets { secure } else { inactive },
            persistent,
            autostart,
        })
    }

    /// Defines a domain.
    pub fn define(connect: Option<&str>, xml: &str) -> Result<Self> {
        let connection = open(connect)?;
        let uri = connection.uri.clone();
        let xml = xml.to_owned();
        let (name, uuid) = asked("define the domain", connection, move |connect| {
            let domain = connect.define_domain_xml(&xml)?;
            Ok((domain.name()?, domain.uuid_string()?))
        })?;
        Ok(Self { uri, name, uuid })
    }

    fn description(&self, flags: u32) -> Result<Description> {
        let xml = self.ask("read the domain's XML", move |domain| {
            domain.xml_desc(flags)
        })?;
        Description::parse(&xml)
    }

    /// Asks libvirt to do something that must not be asked twice. The answer may take as long as libvirt waits for a lock of
    /// its own, and some more.
    fn ask_once<T: Send + 'static>(
        &self,
        what: &'static str,
        question: impl FnOnce(&virt::domain::Domain) -> Answered<T> + Send + 'static,
    ) -> Result<T> {
        let uuid = self.uuid.clone();
        asked_within(what, open_patiently(&self.uri)?, LOCKED, move |connect| {
            question(&connect.lookup_domain_by_uuid_string(&uuid)?)
        })
    }

    /// Asks libvirt something about the domain; asked again where its daemon is just being restarted.
    fn ask<T: Send + 'static>(
        &self,
        what: &'static str,
        question: impl Fn(&virt::domain::Domain) -> Answered<T> + Clone + Send + 'static,
    ) -> Result<T> {
        let deadline = Deadline::after(RESTART);
        loop {
            let connection = kept(&self.uri)?;
            let (uuid, question) = (self.uuid.clone(), question.clone());
            let answer = asked(what, connection, move |connect| {
                question(&connect.lookup_domain_by_uuid_string(&uuid)?)
            });
            if matches!(
                answer,
                Err(Error::Unconnected { .. } | Error::Timeout { .. })
            ) {
                forget(&self.uri);
            }
            match answer {
                Err(Error::Unconnected { .. }) if !deadline.passed() => {}
                Err(Error::Closed) => {
                    return Err(Error::NoDomain {
                        name: self.name.clone(),
                        uri: self.uri.clone(),
                    });
                }
                answer => return answer,
            }
        }
    }
}

/// What the bindings return.
type Answered<T> = std::result::Result<T, virt::error::Error>;

/// Runs a question over a connection. [`Error::Closed`] means that there is no such domain, [`Error::Unconnected`] that the
/// connection broke.
fn asked<T: Send + 'static>(
    what: &str,
    connection: Connection,
    question: impl FnOnce(&Connect) -> Answered<T> + Send + 'static,
) -> Result<T> {
    asked_within(what, connection, ANSWER, question)
}

fn asked_within<T: Send + 'static>(
    what: &str,
    connection: Connection,
    timeout: Duration,
    question: impl FnOnce(&Connect) -> Answered<T> + Send + 'static,
) -> Result<T> {
    let uri = connection.uri.clone();
    let (answer, alive) = within(what, timeout, move || {
        let answer = question(&connection.connect);
        (answer, connection.connect.is_alive().unwrap_or(false))
    })?;
    answer.map_err(|error| {
        let words = error.message().to_owned();
        if !alive {
            Error::Unconnected { uri, words }
        } else if error.code().is(ErrorNumber::NoDomain) {
            Error::Closed
        } else {
            Error::Libvirt(words)
        }
    })
}

/// The monitor of a domain that runs.
pub fn monitor(uri: &str, uuid: &str) -> Result<Box<dyn Monitor>> {
    Ok(Box::new(monitor::DomainMonitor::connect(uri, uuid)?))
}

/// An open connection.
struct Connection {
    connect: Connect,
    uri: String,
}

fn open(uri: Option<&str>) -> Result<Connection> {
    clear_error_callback();
    let given = uri
        .map(str::to_owned)
        .or_else(|| std::env::var("LIBVIRT_DEFAULT_URI").ok())
        .filter(|uri| !uri.is_empty());
    if let Some(uri) = &given {
        refuse_foreign(uri)?;
    }
    let shown = given
        .clone()
        .unwrap_or_else(|| "its default URI".to_owned());
    let asked = given.clone();
    let opened = within("connect to libvirt", ANSWER, move || {
        let connect = Connect::open(asked.as_deref())?;
        let uri = connect.uri()?;
        Ok::<_, virt::error::Error>((connect, uri))
    })?;
    let (connect, resolved) = opened.map_err(|error| Error::Unconnected {
        uri: shown,
        words: error.message().to_owned(),
    })?;
    // The default may be an alias of libvirt.conf.
    refuse_foreign(&resolved)?;
    Ok(Connection {
        connect,
        uri: given.unwrap_or(resolved),
    })
}

/// Connections that were opened, by URI: each new one costs the daemon more than what is asked over it.
static KEPT: Mutex<BTreeMap<String, Connect>> = Mutex::new(BTreeMap::new());

/// A connection for what may be asked again when it turns out to be broken: a daemon that has gone is noticed then.
fn kept(uri: &str) -> Result<Connection> {
    let known = || KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    let alive = known()
        .get(uri)
        .filter(|connect| connect.is_alive().unwrap_or(false))
        .cloned();
    if let Some(connect) = alive {
        let uri = uri.to_owned();
        return Ok(Connection { connect, uri });
    }
    let opened = open_patiently(uri)?;
    known().insert(uri.to_owned(), opened.connect.clone());
    Ok(opened)
}

/// Whoever did not answer over it is not asked over it again.
fn forget(uri: &str) {
    let mut known = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    known.remove(uri);
}

/// A connection, also where the daemon is just being restarted.
fn open_patiently(uri: &str) -> Result<Connection> {
    let deadline = Deadline::after(RESTART);
    loop {
        match open(Some(uri)) {
            Err(Error::Unconnected { .. }) if !deadline.passed() => {
                clock::sleep(Duration::from_millis(100));
            }
            opened => return opened,
        }
    }
}

/// The URI that domains are reached by.
pub fn uri(connect: Option<&str>) -> Result<String> {
    Ok(open(connect)?.uri)
}

/// Disks are read over a UNIX socket, so the domains must be of this host.
fn refuse_foreign(uri: &str) -> Result<()> {
    let refuse = |why: &str| {
        Err(Error::Foreign {
            uri: uri.to_owned(),
            why: why.to_owned(),
        })
    };
    // An alias of libvirt.conf has no scheme; what it stands for is looked at once it is resolved.
    let Some((scheme, rest)) = uri.split_once("://") else {
        return Ok(());
    };
    let (driver, transport) = scheme.split_once('+').unwrap_or((scheme, "unix"));
    if driver != "qemu" {
        return refuse("only QEMU's domains can be backed up");
    }
    if transport != "unix" || !rest.starts_with('/') {
        return refuse("run forerun on the host of the domains");
    }
    if rest.starts_with("/embed") {
        return refuse("an embedded driver is reached by its own process only");
    }
    Ok(())
}

/// Runs a call of libvirt in a thread of its own. One that does not come back keeps its thread; the result is dropped.
fn within<T: Send + 'static>(
    what: &str,
    timeout: Duration,
    call: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let (give, take) = crossbeam_channel::bounded(1);
    std::thread::Builder::new()
        .name("libvirt".to_owned())
        .spawn(move || give.send(call()).ok())
        .map_err(|source| Error::Io {
            what: "start a thread".to_owned(),
            source,
        })?;
    take.recv_timeout(timeout).map_err(|_| Error::Timeout {
        command: what.to_owned(),
        seconds: timeout.as_secs(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host_s_domains_are_taken() {
        for good in [
            "qemu:///system",
            "qemu:///session",
            "qemu+unix:///system?socket=/run/x",
            "alias",
        ] {
            assert!(refuse_foreign(good).is_ok(), "{good}");
        }
        for bad in [
            "qemu+ssh://host/system",
            "qemu://host/system",
            "qemu+ssh:///system",
            "qemu:///embed?root=/x",
            "test:///default",
            "xen:///",
        ] {
            assert!(refuse_foreign(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_call_that_hangs_is_given_up() {
        let late = within("wait", Duration::from_millis(20), || {
            clock::sleep(Duration::from_secs(2));
        });
        assert!(matches!(late, Err(Error::Timeout { .. })));
        assert_eq!(within("answer", ANSWER, || 7).unwrap(), 7);
    }
}
