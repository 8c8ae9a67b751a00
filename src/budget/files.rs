//! The members' files: one each, locked for as long as its member lives, all read and written under one lock.
//!
//! The kernel lets go of a dead member's locks: whoever comes next removes its file. No lock is held while anybody waits.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::order::Member;
use crate::clock::{self, Deadline};

/// How the name of a member's file ends.
const MEMBER: &str = "member";
const LOCK: &str = "members.lock";
/// Between two tries to get the lock.
const AGAIN: Duration = Duration::from_millis(2);
/// More members of one process than this are none of ours.
const MOST: u32 = 10_000;

/// The directory, opened by one member or by who only looks.
#[derive(Debug)]
pub(super) struct Files {
    directory: PathBuf,
    lock: File,
    own: Option<Own>,
}

#[derive(Debug)]
struct Own {
    path: PathBuf,
    file: File,
}

/// The lock of all members' files.
struct Locked<'a>(&'a File);

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // Said, and not only closed: a child that is about to be another program has the file open, too.
        rustix::fs::flock(self.0, FlockOperation::Unlock).ok();
    }
}

impl Files {
    /// Opens the directory, which is made when it is not there.
    pub(super) fn open(directory: &Path) -> io::Result<Self> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
        let lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(directory.join(LOCK))?;
        Ok(Self {
            directory: directory.to_owned(),
            lock,
            own: None,
        })
    }

    /// All other members; `None` where the lock is not to be had in this time.
    pub(super) fn look(&self, patience: Duration) -> io::Result<Option<Vec<Member>>> {
        let Some(_locked) = lock(&self.lock, patience)? else {
            return Ok(None);
        };
        read(&self.directory, self.own.as_ref()).map(Some)
    }

    /// Reads the others, has `decide` say what to write of this one, and writes it. Says whether the lock was to be had.
    pub(super) fn exchange(
        &mut self,
        patience: Duration,
        decide: impl FnOnce(Vec<Member>) -> Member,
    ) -> io::Result<bool> {
        let Some(_locked) = lock(&self.lock, patience)? else {
            return Ok(false);
        };
        let me = decide(read(&self.directory, self.own.as_ref())?);
        let own = match &mut self.own {
            Some(own) => own,
            None => self.own.insert(create(&self.directory)?),
        };
        own.write(&me)?;
        Ok(true)
    }

    /// Removes this member's file.
    pub(super) fn leave(&mut self, patience: Duration) {
        let Some(own) = self.own.take() else { return };
        // Without the lock it stays, and whoever comes next removes it.
        if let Ok(Some(_locked)) = lock(&self.lock, patience) {
            std::fs::remove_file(&own.path).ok();
        }
        rustix::fs::flock(&own.file, FlockOperation::Unlock).ok();
    }
}

impl Own {
    fn write(&mut self, me: &Member) -> io::Result<()> {
        let text = serde_json::to_vec(me).map_err(io::Error::other)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&text)?;
        self.file.set_len(text.len() as u64)
    }
}

/// Reads all members but one's own, in the order of their files' names, and removes what dead ones left.
fn read(directory: &Path, own: Option<&Own>) -> io::Result<Vec<Member>> {
    let mut members = Vec::new();
    let now = u64::try_from(clock::since_boot().as_nanos()).unwrap_or(u64::MAX);
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if own.is_some_and(|own| own.path == path)
            || path.extension().is_none_or(|ending| ending != MEMBER)
        {
            continue;
        }
        // A pipe of that name, which none of ours is, must not hold anybody up.
        let wait = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
        let opened = OpenOptions::new().read(true).custom_flags(wait).open(&path);
        let Ok(mut file) = opened else { continue };
        if !file.metadata()?.is_file() {
            continue;
        }
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            std::fs::remove_file(&path).ok();
            continue;
        }
        let mut text = Vec::new();
        let read = file.read_to_end(&mut text).map_err(serde_json::Error::io);
        match read.and_then(|_| serde_json::from_slice::<Member>(&text)) {
            Ok(mut member) => {
                // What is of a later time is of another boot.
                for time in [&mut member.served, &mut member.since, &mut member.seen] {
                    if *time > now {
                        *time = 0;
                    }
                }
                members.push((path, member));
            }
            Err(error) => {
                tracing::debug!(%error, member = %path.display(), "cannot be understood");
            }
        }
    }
    members.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(members.into_iter().map(|(_, member)| member).collect())
}

/// A file of a new member, locked.
fn create(directory: &Path) -> io::Result<Own> {
    let pid = std::process::id();
    for number in 0..MOST {
        let path = directory.join(format!("{pid}-{number}.{MEMBER}"));
        let made = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path);
        match made {
            Ok(file) => {
                rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
                return Ok(Own { path, file });
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("too many members"))
}

fn lock(file: &File, patience: Duration) -> io::Result<Option<Locked<'_>>> {
    let deadline = Deadline::after(patience);
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(Locked(file))),
            Err(Errno::WOULDBLOCK) if deadline.passed() => return Ok(None),
            Err(Errno::WOULDBLOCK) => clock::sleep(AGAIN),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
