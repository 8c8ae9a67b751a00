//! The control plane: QEMU's machine protocol (QMP, QEMU docs/interop/qmp-spec.rst).
//!
//! [`Monitor`] is the seam: a UNIX socket ([`socket::QmpSocket`]), or libvirt's passthrough (`libvirt::monitor`). Above it are the
//! typed commands ([`command`]), what a VM is and has ([`machine`], [`graph`]), the exports of a batch ([`export`]), the freeze
//! ([`freeze`], [`overlay`], [`managed`]) and the guest agent ([`agent`]). Nothing here knows of repositories or sessions.

pub mod agent;
pub mod command;
pub mod export;
pub mod freeze;
pub mod graph;
pub mod machine;
pub mod managed;
pub mod names;
pub mod orphans;
pub mod overlay;
pub mod release;
pub mod socket;

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// How long a command may take before the monitor counts as hung. QEMU answers in milliseconds unless its main loop
/// is busy (a drain under load, a starving host).
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(60);

/// What can go wrong between us and a monitor.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// QEMU refused the command.
    #[error("{command}: {description}")]
    Command {
        /// The command's name.
        command: String,
        /// QMP's error class.
        class: String,
        /// QEMU's own words.
        description: String,
    },
    /// Nobody greeted: another client holds the socket.
    #[error("the QMP socket {path} gives no greeting: another client holds it")]
    Busy {
        /// The socket.
        path: String,
    },
    /// The VM is not there.
    #[error("cannot connect to the QMP socket {path}")]
    Unreachable {
        /// The socket.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// libvirt has no such domain.
    #[error("libvirt ({uri}) has no domain `{name}`")]
    NoDomain {
        /// The name or UUID.
        name: String,
        /// The connection's URI.
        uri: String,
    },
    /// libvirt's daemon does not answer.
    #[error("cannot connect to libvirt ({uri}): {words}")]
    Unconnected {
        /// The connection's URI.
        uri: String,
        /// libvirt's own words.
        words: String,
    },
    /// Domains that cannot be backed up from here.
    #[error("libvirt's `{uri}`: {why}")]
    Foreign {
        /// The connection's URI.
        uri: String,
        /// Why not.
        why: String,
    },
    /// Who holds the monitor lets nobody else on it just now.
    #[error("libvirt is busy with domain {domain}: {words}")]
    DomainBusy {
        /// The domain's UUID.
        domain: String,
        /// libvirt's own words.
        words: String,
    },
    /// The connection to libvirt broke, and nobody knows whether the command was executed; the VM is there.
    #[error("the connection to libvirt broke during {command}")]
    Lost {
        /// What was asked.
        command: String,
    },
    /// libvirt itself said no.
    #[error("libvirt: {0}")]
    Libvirt(String),
    /// QEMU closed the connection (it ended, or the monitor was taken down).
    #[error("QEMU closed the monitor connection")]
    Closed,
    /// No answer in time.
    #[error("no answer to {command} within {seconds} s")]
    Timeout {
        /// What was asked.
        command: String,
        /// How long we waited.
        seconds: u64,
    },
    /// An answer that no QEMU should give.
    #[error("unexpected answer from QEMU: {0}")]
    Protocol(String),
    /// QEMU could not open a disk's image once more, which an external snapshot makes it do.
    #[error("QEMU cannot open the image {image} of disk `{disk}` once more: {why}")]
    CannotReopen {
        /// The disk's key.
        disk: String,
        /// The image, as QEMU was told.
        image: String,
        /// QEMU's own words.
        why: String,
    },
    /// The guest writes faster than its overlay is committed.
    #[error(
        "the guest writes to disk `{disk}` faster than its overlay {} is committed: after {seconds} s {} are left",
        file.display(), crate::units::Bytes(*left)
    )]
    NotConverged {
        /// The disk's key.
        disk: String,
        /// The overlay's file, which stays in use.
        file: std::path::PathBuf,
        /// How long it was waited for.
        seconds: u64,
        /// Bytes that were not committed then.
        left: u64,
    },
    /// A domain is off here and may run elsewhere.
    #[error("domain `{domain}` has migrated to another host, where its images are in use")]
    Migrated {
        /// Its name.
        domain: String,
    },
    /// A VM that is off goes on in its overlay when it is started.
    #[error("disk `{disk}` is on the overlay {} of a backup that was cut off, and the domain is off", file.display())]
    OverlayOff {
        /// The disk's key.
        disk: String,
        /// The overlay's file.
        file: std::path::PathBuf,
    },
    /// The disk was taken from the VM while it was on an overlay.
    #[error("the domain has no disk `{disk}` any more, and {} may hold its newest data", file.display())]
    OverlayUnknown {
        /// The disk's key.
        disk: String,
        /// The overlay's file.
        file: std::path::PathBuf,
    },
    /// The operating system failed us.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

impl Error {
    /// The `error` of an answer.
    fn answered(command: &str, error: &Value) -> Self {
        Self::Command {
            command: command.to_owned(),
            class: command::text(error, "class").to_owned(),
            description: command::text(error, "desc").to_owned(),
        }
    }

    /// Whether QEMU itself said no (and so is alive and changed nothing).
    #[must_use]
    pub fn refused(&self) -> bool {
        matches!(self, Self::Command { .. })
    }
}

/// The result of a monitor's command.
pub type Result<T> = std::result::Result<T, Error>;

/// Which process answers: a new one has lost its transient bitmaps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its id on this host.
    pub pid: i32,
    /// Its start time in clock ticks after boot (proc(5), `/proc/PID/stat`, field 22).
    pub start: u64,
}

/// What a guard needs to talk on for a dead run.
#[derive(Debug)]
pub enum Handover<'a> {
    /// A connection's own descriptor, to be inherited.
    Descriptor(BorrowedFd<'a>),
    /// A libvirt domain: the guard connects by itself.
    Domain {
        /// The connection's URI.
        uri: &'a str,
        /// The domain.
        uuid: &'a str,
    },
}

/// A connection to a VM's monitor.
pub trait Monitor: Send + std::fmt::Debug {
    /// Runs one command, with a descriptor passed along when there is one, and returns what QEMU returned.
    fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        timeout: Duration,
    ) -> Result<Value>;

    /// The process at the other end.
    fn process(&self) -> &Process;

    /// What a guard takes over.
    fn handover(&self) -> Handover<'_>;

    /// The directory where QEMU may open files and make sockets, for a monitor that passes no descriptors.
    fn place(&self) -> Option<&Path> {
        None
    }

    /// From now on a command comes so long after the one before it, where commands cost a guest anything: what it does
    /// meanwhile waits for one of them, and not for all.
    fn space(&mut self, _apart: Duration) {}

    /// Who takes external snapshots of the VM, where somebody else must know of them.
    fn manager(&self) -> Option<Box<dyn managed::Manager>> {
        None
    }

    /// A session with the guest agent, where who holds the monitor holds the agent's socket, too.
    fn agent(&self) -> Result<Box<dyn agent::Channel>> {
        Err(Error::Protocol(
            "the guest agent is not reached through the monitor".to_owned(),
        ))
    }
}

impl Monitor for Box<dyn Monitor> {
    fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        timeout: Duration,
    ) -> Result<Value> {
        (**self).execute(command, arguments, fd, timeout)
    }

    fn process(&self) -> &Process {
        (**self).process()
    }

    fn handover(&self) -> Handover<'_> {
        (**self).handover()
    }

    fn place(&self) -> Option<&Path> {
        (**self).place()
    }

    fn space(&mut self, apart: Duration) {
        (**self).space(apart);
    }

    fn manager(&self) -> Option<Box<dyn managed::Manager>> {
        (**self).manager()
    }

    fn agent(&self) -> Result<Box<dyn agent::Channel>> {
        (**self).agent()
    }
}
