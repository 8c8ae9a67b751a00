//! Why a command ended as it did, and the exit code for it: the one table between the two.

use std::fmt;

use serde::Serialize;

use crate::{hoststate, image, nbd, qmp};

/// What kind of end; the last is the worst, where there are several targets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Done, with warnings.
    Warned,
    /// A limit of the window or the residual was missed.
    Missed,
    /// Somebody else holds the target.
    Busy,
    /// The target needs an operator.
    Attention,
    /// No space, or out of quota.
    NoSpace,
    /// The command line is wrong.
    Usage,
    /// Something failed.
    Failed,
    /// Stored data is not what it was.
    Corrupt,
    /// A signal asked for the end.
    Interrupted,
}

impl Kind {
    /// The exit code.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Warned => 3,
            Self::Missed => 4,
            Self::Corrupt => 5,
            Self::Busy => 6,
            Self::Attention => 7,
            Self::NoSpace => 8,
            Self::Interrupted => 130,
        }
    }
}

impl Kind {
    /// The exit code in a word, as the reports have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Warned => "warned",
            Self::Missed => "missed",
            Self::Busy => "busy",
            Self::Attention => "attention",
            Self::NoSpace => "no-space",
            Self::Usage => "usage",
            Self::Failed => "failed",
            Self::Corrupt => "corrupt",
            Self::Interrupted => "interrupted",
        }
    }
}

/// An end with a reason for the operator and the way out.
#[derive(Debug)]
pub struct Failure {
    /// Its kind.
    pub kind: Kind,
    /// What happened, lower case, naming the thing.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

impl Failure {
    /// A failure with a way out.
    pub fn hinted(
        kind: Kind,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) -> anyhow::Error {
        Self {
            kind,
            message: message.into(),
            hint: Some(hint.into()),
        }
        .into()
    }

    /// A failure that says it all.
    pub fn plain(kind: Kind, message: impl Into<String>) -> anyhow::Error {
        Self {
            kind,
            message: message.into(),
            hint: None,
        }
        .into()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// The kind and the hint of an error: the first cause in its chain that knows.
#[must_use]
pub fn classify(error: &anyhow::Error) -> (Kind, Option<String>) {
    for cause in error.chain() {
        if let Some(failure) = cause.downcast_ref::<Failure>() {
            return (failure.kind, failure.hint.clone());
        }
        if let Some(hoststate::Error::Held { .. }) = cause.downcast_ref() {
            let hint = "wait for it, or end it: its work goes on in the next run";
            return (Kind::Busy, Some(hint.to_owned()));
        }
        if let Some(hoststate::Error::Io { source, .. }) = cause.downcast_ref()
            && no_space(source)
        {
            let hint = "free space in the host state directory, or name another one with FORERUN_STATE_DIR";
            return (Kind::NoSpace, Some(hint.to_owned()));
        }
        if let Some(hoststate::Error::Journal { .. }) = cause.downcast_ref() {
            let hint = "it lists what a dead run left in the VM: look there for names that begin with `forerun-`, then remove the file and run `forerun recover --repo REPO`";
            return (Kind::Attention, Some(hint.to_owned()));
        }
        if let Some(found) = cause.downcast_ref::<qmp::Error>().and_then(of_qmp) {
            return found;
        }
        if let Some(found) = cause.downcast_ref::<image::Error>().and_then(of_image) {
            return found;
        }
        if let Some(nbd::Error::Io { source, .. }) = cause.downcast_ref()
            && no_space(source)
        {
            return (Kind::NoSpace, None);
        }
        if cause.downcast_ref::<std::io::Error>().is_some_and(no_space) {
            return (Kind::NoSpace, None);
        }
    }
    (Kind::Failed, None)
}

fn of_qmp(error: &qmp::Error) -> Option<(Kind, Option<String>)> {
    let found = match error {
        qmp::Error::Busy { .. } => (
            Kind::Busy,
            "a QMP socket serves one client: give forerun a socket of its own (`-qmp unix:PATH,server=on,wait=off`)",
        ),
        qmp::Error::DomainBusy { .. } => (
            Kind::Busy,
            "wait for the end of what libvirt does with the domain (`virsh domjobinfo`)",
        ),
        qmp::Error::NoDomain { .. } => (
            Kind::Usage,
            "`virsh list --all` has their names; a QEMU without libvirt is named `qmp:SOCKET`, an image of a VM that is off `disk:PATH`",
        ),
        qmp::Error::Foreign { .. } => (Kind::Usage, "name another with `--connect URI`"),
        qmp::Error::Unconnected { .. } => (
            Kind::Failed,
            "is libvirt's daemon running, and may you use it? Name another with `--connect URI`; a QEMU without libvirt is named `qmp:SOCKET`",
        ),
        qmp::Error::Command { description, .. } if description.contains("Permission denied") => (
            Kind::Failed,
            "QEMU runs as a user of its own, who must be able to enter that directory: name another with `--scratch DIR`",
        ),
        qmp::Error::CannotReopen { .. } => (
            Kind::Attention,
            "an external snapshot would leave the disk unwritable: use `--freeze fleece`, or start QEMU with an absolute path that it may open at any time",
        ),
        qmp::Error::OverlayOff { .. } => (
            Kind::Attention,
            "nothing is lost, for libvirt knows of it: start the domain; `forerun recover`, or the next command, commits it then",
        ),
        qmp::Error::Migrated { .. } => (
            Kind::Attention,
            "back it up there. If it is on an overlay `forerun-...` there (`virsh domblklist`), `virsh blockcommit DOMAIN DISK --active --pivot` ends that, or `forerun recover` here when it is back",
        ),
        qmp::Error::OverlayUnknown { .. } => (
            Kind::Attention,
            "keep it if the disk is still wanted (`qemu-img commit` joins it with its base), then remove it and run `forerun recover`",
        ),
        qmp::Error::NotConverged { .. } => (
            Kind::Attention,
            "QEMU goes on committing it: run `forerun recover` when the guest writes less, and do not stop the VM before",
        ),
        qmp::Error::Unreachable { .. } => (
            Kind::Failed,
            "is the VM running, and may you open its socket?",
        ),
        _ => return None,
    };
    Some((found.0, Some(found.1.to_owned())))
}

fn of_image(error: &image::Error) -> Option<(Kind, Option<String>)> {
    let found = match error {
        image::Error::Corrupt { .. } => {
            (Kind::Corrupt, "run `forerun verify` for all that is hurt")
        }
        image::Error::NoRepository { path } => {
            let hint = format!("make one with `forerun init {path}`, or mount what it is on");
            return Some((Kind::Failed, Some(hint)));
        }
        image::Error::NoPoint { .. } => (
            Kind::Failed,
            "`forerun list --repo REPO` shows the points that there are",
        ),
        image::Error::NoSpace { .. } => (
            Kind::NoSpace,
            "free space in the repository and run the command again: it goes on from where it was",
        ),
        image::Error::TargetFull { .. } => (
            Kind::NoSpace,
            "make room where the disk is written to, or name another place, and restore again",
        ),
        image::Error::Busy { .. } => (Kind::Busy, "wait for it, or end it"),
        image::Error::NoKey => (
            Kind::Usage,
            "give `--key-file FILE` or `--passphrase-file FILE` (or FORERUN_KEY_FILE, FORERUN_PASSPHRASE_FILE); on a terminal the passphrase is asked for",
        ),
        image::Error::WrongKey { keys, .. } => {
            return Some((Kind::Failed, Some(format!("its keys: {}", keys.join(", ")))));
        }
        image::Error::Condemned { .. } => (Kind::Busy, "a prune is at work: run the command again"),
        image::Error::Interrupted => (
            Kind::Interrupted,
            "what is done stays; the next run goes on from there",
        ),
        _ => return None,
    };
    Some((found.0, Some(found.1.to_owned())))
}

fn no_space(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
    )
}
