//! What can go wrong in the repository: a small kind for control flow, with the object and its numbers for people.

use std::io;

/// The result of everything in `image`.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the repository. The message is lower case, names the object, and does not repeat its source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An object, point or session that was asked for by name does not exist.
    #[error("{object} does not exist")]
    NotFound {
        /// Its name.
        object: String,
    },
    /// There is no repository where one was looked for.
    #[error("there is no repository at {path}")]
    NoRepository {
        /// Where.
        path: String,
    },
    /// No point is called so.
    #[error("a point {name} does not exist{more}")]
    NoPoint {
        /// What was asked for.
        name: String,
        /// How it was understood, and what it may be instead; empty, or begun with a colon.
        more: String,
    },
    /// Something is there already and nothing is ever replaced.
    #[error("{object} exists already")]
    Exists {
        /// Its name.
        object: String,
    },
    /// Somebody else works on it.
    #[error("{object} is held by {holder}")]
    Busy {
        /// The lock or session.
        object: String,
        /// Who holds it, in the holder's own words.
        holder: String,
    },
    /// Blocks that were found in the repository were condemned before they were referred to: they are to be stored anew.
    #[error("blocks that {object} refers to are being deleted: they must be stored anew")]
    Condemned {
        /// The segment that is gone again.
        object: String,
    },
    /// The file system is full or the quota is used up.
    #[error("no space left for {object}")]
    NoSpace {
        /// The object that was being written.
        object: String,
        /// What the system said.
        source: io::Error,
    },
    /// There is no room where a disk is written to.
    #[error("no space left to write {object}")]
    TargetFull {
        /// What was to be written, and of which disk.
        object: String,
        /// What the system said.
        source: io::Error,
    },
    /// Stored bytes are not what was written, or an object that others refer to is gone.
    #[error("{object} is corrupt: {what}")]
    Corrupt {
        /// The damaged object.
        object: String,
        /// How it is damaged.
        what: String,
    },
    /// Somebody asked for the end.
    #[error("interrupted")]
    Interrupted,
    /// The repository is encrypted and no key was given.
    #[error("the repository is encrypted, and no key was given")]
    NoKey,
    /// None of the keys is this one.
    #[error("no key of the repository opens with this {with}")]
    WrongKey {
        /// What was given: a passphrase or a key file.
        with: &'static str,
        /// The keys there are, for people.
        keys: Vec<String>,
    },
    /// A format version or feature that this build does not know.
    #[error("{0}")]
    Unsupported(String),
    /// A request that makes no sense as given.
    #[error("{0}")]
    Invalid(String),
    /// The system refused.
    #[error("cannot {action} {object}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which object.
        object: String,
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    /// A damaged object.
    pub(crate) fn corrupt(object: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Corrupt {
            object: object.into(),
            what: what.into(),
        }
    }

    /// A failed system call, sorted into the kind that callers act on.
    pub(crate) fn io(action: &'static str, object: impl Into<String>, source: io::Error) -> Self {
        let object = object.into();
        match source.kind() {
            io::ErrorKind::NotFound => Self::NotFound { object },
            io::ErrorKind::AlreadyExists => Self::Exists { object },
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::NoSpace { object, source }
            }
            _ => Self::Io {
                action,
                object,
                source,
            },
        }
    }

    /// An object that a published object refers to must be there: its absence is damage, not a wrong question.
    pub(crate) fn missing_is_corrupt(self) -> Self {
        match self {
            Self::NotFound { object } => Self::Corrupt {
                object,
                what: "it is missing".into(),
            },
            other => other,
        }
    }

    /// The same damage once more, for an answer to somebody else.
    pub(crate) fn repeat_damage(&self) -> Self {
        match self {
            Self::Corrupt { object, what } => Self::corrupt(object, what),
            other => Self::Unsupported(other.to_string()),
        }
    }

    /// Whether stored data is damaged.
    pub fn is_corrupt(&self) -> bool {
        matches!(self, Self::Corrupt { .. })
    }

    /// Whether the object was not there.
    pub fn is_not_found(&self) -> bool {
        matches!(
            self,
            Self::NotFound { .. } | Self::NoRepository { .. } | Self::NoPoint { .. }
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_and_a_used_up_quota_are_one_kind() {
        for errno in [rustix::io::Errno::NOSPC, rustix::io::Errno::DQUOT] {
            let error = Error::io("write", "packs/ab/cd", errno.into());
            assert!(matches!(error, Error::NoSpace { .. }), "{error:?}");
            assert_eq!(error.to_string(), "no space left for packs/ab/cd");
        }
    }
}
