//! What this host knows of its targets: locks, and the journals of what runs have in a VM.
//!
//! ```text
//! /var/lib/forerun/<key>/           0700; FORERUN_STATE_DIR or the XDG state directory without root
//!   target.lock                     held while anything of ours is in the VM (a batch, a freeze), whichever the repository
//!   waits.lock                      held, shared, by those who wait for that: a batch then ends sooner
//!   run-<repository>.lock           held by the one run of a repository on this target
//!   <run>.journal                   what that run has put, or is about to put, into the VM
//! /var/lib/forerun/budget/           what all runs of this host share (`budget`)
//! /var/lib/forerun/learned/<key>/   what was measured of the target; worth something, and no harm when it is lost
//! ```
//!
//! Locks are the kernel's (`flock`): a holder that dies lets go. A guard inherits the target's lock, so it is held until
//! the guard is done.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::budget::BUDGET;
use crate::clock::{self, Deadline};
use crate::hooks::Hook;
use crate::qmp::Process;
use crate::qmp::agent::Address;
use crate::qmp::release::{Leftover, Released};
use crate::qmp::{self, Monitor};

/// What can go wrong with host state.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody else works on this target.
    #[error("{what} is held by {holder}")]
    Held {
        /// The lock.
        what: String,
        /// Who, since when.
        holder: String,
    },
    /// A journal that is none.
    #[error("the journal {path} cannot be understood")]
    Journal {
        /// Its file.
        path: String,
        /// Why.
        source: serde_json::Error,
    },
    /// The file system failed us.
    #[error("{what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

type Result<T> = std::result::Result<T, Error>;

fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.display().to_string();
    move |source| Error::Io { what, path, source }
}

/// The lock of a batch or a freeze, and what it is of.
const TARGET_LOCK: &str = "target.lock";
const THE_TARGET: &str = "the target";
/// What those hold together who wait for it.
const TARGET_WAIT: &str = "waits.lock";
/// Between two tries to take a lock.
const LOCK_LOOK: Duration = Duration::from_millis(20);
/// Where what was measured of targets is kept.
const LEARNED: &str = "learned";
/// How the file of a journal that is being written ends.
const UNWRITTEN: &str = "journal-new";

/// The directory of all host state.
#[must_use]
pub fn root() -> PathBuf {
    if let Some(set) = std::env::var_os("FORERUN_STATE_DIR") {
        return PathBuf::from(set);
    }
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/var/lib/forerun");
    }
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state"));
    let state = std::env::var_os("XDG_STATE_HOME")
        .map(PathBuf::from)
        .or_else(home);
    state
        .unwrap_or_else(|| PathBuf::from("/var/tmp"))
        .join("forerun")
}

/// Who holds the target that is spelled so, of those who have noted it: what to say of a monitor that serves somebody else.
#[must_use]
pub fn holder_of(spelling: &str) -> Option<Error> {
    let noted = format!("{spelling}` ");
    std::fs::read_dir(root()).ok()?.flatten().find_map(|entry| {
        let mut file = File::open(entry.path().join(TARGET_LOCK)).ok()?;
        let free = rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_ok();
        let mut holder = String::new();
        file.read_to_string(&mut holder).ok()?;
        (!free && holder.contains(&noted)).then_some(Error::Held {
            what: THE_TARGET.to_owned(),
            holder,
        })
    })
}

/// The keys of all targets that this host has state of.
#[must_use]
pub fn keys() -> Vec<String> {
    let entries = std::fs::read_dir(root()).into_iter().flatten().flatten();
    let mut keys: Vec<String> = entries
        .filter(|entry| entry.path().is_dir())
        .filter(|entry| entry.file_name() != LEARNED && entry.file_name() != BUDGET)
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    keys.sort();
    keys
}

/// The host state of one target.
#[derive(Debug, Clone)]
pub struct TargetState {
    directory: PathBuf,
    learned: PathBuf,
}

/// A lock that is held until it is dropped.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

impl Lock {
    /// The lock's file, for a guard to inherit.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl TargetState {
    /// The state of the target with this key, its directory made when it is not there.
    pub fn open(key: &str) -> Result<Self> {
        let directory = root().join(key);
        make_directory(&directory)?;
        let learned = root().join(LEARNED).join(key);
        Ok(Self { directory, learned })
    }

    /// What was kept under this name, if anything was.
    #[must_use]
    pub fn recall(&self, name: &str) -> Option<Vec<u8>> {
        std::fs::read(self.learned.join(file_name(name))).ok()
    }

    /// Keeps bytes under a name. They may be lost, also without a crash: who reads them must do without.
    pub fn remember(&self, name: &str, bytes: &[u8]) {
        let path = self.learned.join(file_name(name));
        if let Err(error) = make_directory(&self.learned).and_then(|()| replace(&path, bytes)) {
            tracing::debug!(%error, "what was measured is not kept");
        }
    }

    /// Keeps nothing under a name any more.
    pub fn unlearn(&self, name: &str) {
        std::fs::remove_file(self.learned.join(file_name(name))).ok();
    }

    /// Where it is.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Takes the target's lock for a batch or a freeze, waiting for at most `wait`.
    pub fn lock_target(&self, doing: &str, wait: Duration) -> Result<Lock> {
        self.lock(TARGET_LOCK, THE_TARGET, doing, wait)
    }

    /// Whether somebody waits for the target's lock.
    #[must_use]
    pub fn is_awaited(&self) -> bool {
        let Ok(file) = File::open(self.directory.join(TARGET_WAIT)) else {
            return false;
        };
        let free = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
        matches!(free, Err(rustix::io::Errno::WOULDBLOCK))
    }

    /// Takes the lock of the one run of a repository on this target.
    pub fn lock_run(&self, repository: &str, doing: &str) -> Result<Lock> {
        self.lock(
            &format!("run-{repository}.lock"),
            "this target's session",
            doing,
            Duration::ZERO,
        )
    }

    fn lock(&self, name: &str, what: &str, doing: &str, wait: Duration) -> Result<Lock> {
        let path = self.directory.join(name);
        let mut file = open_lock(&path)?;
        let mut waits = None;
        let deadline = Deadline::after(wait);
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) if deadline.passed() => {
                    let mut holder = String::new();
                    file.read_to_string(&mut holder)
                        .map_err(io("read", &path))?;
                    let holder = if holder.is_empty() {
                        "another process"
                    } else {
                        holder.trim()
                    };
                    return Err(Error::Held {
                        what: what.to_owned(),
                        holder: holder.to_owned(),
                    });
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    if waits.is_none() {
                        waits = self.wait_for(name);
                    }
                    clock::sleep(LOCK_LOOK);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(io("lock", &path)(error.into())),
            }
        }
        drop(waits);
        let holder = format!(
            "`{doing}` (pid {}) since {}",
            std::process::id(),
            clock::utc_now()
        );
        // Who holds it is told to those who wait; on a full disk they must do without.
        let told = file
            .set_len(0)
            .and_then(|()| file.seek(SeekFrom::Start(0)))
            .and_then(|_| file.write_all(holder.as_bytes()));
        if let Err(error) = told {
            tracing::warn!(%error, lock = %path.display(), "cannot note who holds the lock");
        }
        Ok(Lock { file })
    }

    /// Tells the holder of the target's lock that somebody waits for it, for as long as the file is open. Where that cannot be
    /// told it is waited for all the same.
    fn wait_for(&self, name: &str) -> Option<File> {
        if name != TARGET_LOCK {
            return None;
        }
        let file = open_lock(&self.directory.join(TARGET_WAIT)).ok()?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).ok()?;
        Some(file)
    }

    /// The journals of runs that left something in the VM. Only meaningful under the target's lock: then none of them
    /// is of a live batch.
    pub fn journals(&self) -> Result<Vec<Journal>> {
        let mut found = Vec::new();
        let entries = std::fs::read_dir(&self.directory).map_err(io("list", &self.directory))?;
        for entry in entries {
            let path = entry.map_err(io("list", &self.directory))?.path();
            if path.extension().is_none_or(|ending| ending != "journal") {
                continue;
            }
            match Journal::load(path) {
                // Its run has just closed it.
                Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
                loaded => found.push(loaded?),
            }
        }
        Ok(found)
    }

    /// Removes journals that were not written whole: what they would have listed was never made. Only under the target's
    /// lock.
    pub fn remove_unwritten(&self) -> Result<()> {
        let entries = std::fs::read_dir(&self.directory).map_err(io("list", &self.directory))?;
        for entry in entries {
            let path = entry.map_err(io("list", &self.directory))?.path();
            if path.extension().is_some_and(|ending| ending == UNWRITTEN) {
                std::fs::remove_file(&path).map_err(io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// A new journal for a run; nothing is written yet.
    #[must_use]
    pub fn journal(&self, run: &str, monitor: &Path, found: Found, process: &Process) -> Journal {
        Journal {
            path: self.directory.join(format!("{run}.journal")),
            content: Content {
                monitor: monitor.to_path_buf(),
                found: Some(found),
                process: process.clone(),
                left: Vec::new(),
                after: None,
            },
        }
    }
}

fn open_lock(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(io("open", path))
}

fn make_directory(directory: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(io("create", directory))
}

/// A name as one of a file: disks may be called anything.
fn file_name(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let spell = |byte: u8| {
        if plain(byte) {
            char::from(byte).to_string()
        } else {
            format!("%{byte:02x}")
        }
    };
    name.bytes().map(spell).collect()
}

/// Replaces a file whole, though not durably.
#[expect(
    clippy::disallowed_methods,
    reason = "what is kept so may be lost, but is never read half"
)]
fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let fresh = path.with_extension(format!("new-{}", std::process::id()));
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&fresh)
        .map_err(io("create", &fresh))?;
    let written = file.write_all(bytes).map_err(io("write", &fresh));
    let replaced =
        written.and_then(|()| std::fs::rename(&fresh, path).map_err(io("replace", path)));
    if replaced.is_err() {
        std::fs::remove_file(&fresh).ok();
    }
    replaced
}

fn write_new(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(io("create", path))?;
    file.write_all(bytes).map_err(io("write", path))?;
    file.sync_all().map_err(io("sync", path))
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Content {
    monitor: PathBuf,
    /// As what the VM was found; unknown in journals of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    found: Option<Found>,
    process: Process,
    left: Vec<Leftover>,
    /// The hook that must be run when the guest is thawed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    after: Option<Hook>,
}

/// As what a VM was found, for a `recover` that is not told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// The target as it was spelled; the present name of a domain.
    pub target: String,
    /// The hypervisor of a domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connect: Option<String>,
}

/// What a run has put, or is about to put, into a VM. Written before it is made.
#[derive(Debug, Clone)]
pub struct Journal {
    path: PathBuf,
    content: Content,
}

impl Journal {
    /// Reads a journal.
    pub fn load(path: PathBuf) -> Result<Self> {
        let bytes = std::fs::read(&path).map_err(io("read", &path))?;
        let content = serde_json::from_slice(&bytes).map_err(|source| Error::Journal {
            path: path.display().to_string(),
            source,
        })?;
        Ok(Self { path, content })
    }

    /// Its file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The monitor's socket, or the image.
    #[must_use]
    pub fn monitor(&self) -> &Path {
        &self.content.monitor
    }

    /// As what the VM was found.
    #[must_use]
    pub fn found(&self) -> Option<&Found> {
        self.content.found.as_ref()
    }

    /// The QEMU process that it was written for.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.content.process
    }

    /// What it lists.
    #[must_use]
    pub fn left(&self) -> &[Leftover] {
        &self.content.left
    }

    /// The hook that is to be run once the guest is thawed.
    #[must_use]
    pub fn hook(&self) -> Option<&Hook> {
        self.content.after.as_ref()
    }

    /// Sets that hook; the next [`write`](Self::write) makes it durable.
    pub fn set_hook(&mut self, hook: Option<Hook>) {
        self.content.after = hook;
    }

    /// Makes a new list durable.
    pub fn write(&mut self, left: Vec<Leftover>) -> Result<()> {
        self.content.left = left;
        self.save()
    }

    /// Leaves items out of the list in memory: what is on disk may say more than there is, never less.
    pub fn forget(&mut self, left: Vec<Leftover>) {
        self.content.left = left;
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "the journal is replaced whole, then its directory is synced"
    )]
    fn save(&self) -> Result<()> {
        crate::fault::step("journal:write:before");
        let bytes = serde_json::to_vec(&self.content)
            .map_err(|error| io("encode", &self.path)(std::io::Error::other(error)))?;
        let fresh = self.path.with_extension(UNWRITTEN);
        if let Err(error) = write_new(&fresh, &bytes) {
            std::fs::remove_file(&fresh).ok();
            return Err(error);
        }
        std::fs::rename(&fresh, &self.path).map_err(io("replace", &self.path))?;
        self.sync_directory()?;
        crate::fault::step("journal:write:after");
        Ok(())
    }

    fn sync_directory(&self) -> Result<()> {
        let directory = self.path.parent().unwrap_or(Path::new("/"));
        let opened = File::open(directory).map_err(io("open", directory))?;
        opened.sync_all().map_err(io("sync", directory))
    }

    /// Takes back everything that it lists, through a monitor of the VM. The journal stays until [`close`](Self::close).
    pub fn release(
        &mut self,
        monitor: &mut dyn Monitor,
        patience: Duration,
    ) -> anyhow::Result<Released> {
        if monitor.process() != &self.content.process {
            // That QEMU is gone, and with it everything but files: nothing is committed, and a socket is not its server.
            // A domain's agent goes with it; at a socket another guest may answer, and a thaw harms none.
            // An overlay that libvirt knows of is committed in whichever QEMU the domain runs by now.
            let stays = |item: &&Leftover| match item {
                Leftover::Frozen { agent } => *agent != Address::Domain,
                Leftover::Managed(_) => true,
                _ => false,
            };
            let left: Vec<_> = self.content.left.iter().filter(stays).cloned().collect();
            return Ok(qmp::release::release(monitor, &left, patience)?);
        }
        self.before_commit();
        Ok(qmp::release::release(
            monitor,
            &self.content.left,
            patience,
        )?)
    }

    /// Frees the guest only.
    pub fn free_guest(&self, monitor: &mut dyn Monitor, done: &mut Released) -> anyhow::Result<()> {
        let patience = qmp::agent::THAW_FOR;
        Ok(qmp::release::free_guest(
            monitor,
            &self.content.left,
            patience,
            done,
        )?)
    }

    /// Takes back the rest.
    pub fn release_rest(
        &mut self,
        monitor: &mut dyn Monitor,
        done: &mut Released,
    ) -> anyhow::Result<()> {
        self.before_commit();
        Ok(qmp::release::release_rest(
            monitor,
            &self.content.left,
            done,
        )?)
    }

    /// A commit makes the base a mix until it ends: that is noted before it begins. Where it cannot be noted (a full file
    /// system) the guest is freed all the same: a base that a commit has written to is not what was recorded of it.
    fn before_commit(&mut self) {
        let mut changed = false;
        for item in &mut self.content.left {
            if let Leftover::Overlay(overlay) = item
                && overlay.base_version.is_some()
                && !overlay.committing
            {
                overlay.committing = true;
                changed = true;
            }
        }
        if changed && let Err(error) = self.save() {
            tracing::warn!(%error, "cannot note that a commit begins");
        }
    }

    /// The VM is clean: the journal goes.
    pub fn close(&mut self) -> Result<()> {
        self.content.left.clear();
        self.content.after = None;
        match std::fs::remove_file(&self.path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(io("remove", &self.path)(source))
            }
            _ => self.sync_directory(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_holds_a_target_sees_whether_somebody_waits_for_it() {
        let root = tempfile::tempdir().unwrap();
        let state = TargetState {
            directory: root.path().to_owned(),
            learned: root.path().join(LEARNED),
        };
        let long = Duration::from_secs(60);
        let held = state.lock_target("one", Duration::ZERO).unwrap();
        assert!(!state.is_awaited());
        // Who does not wait is not waited for.
        state.lock_target("two", Duration::ZERO).unwrap_err();
        state.lock_run("repository", "two").unwrap();
        assert!(!state.is_awaited());
        let third = std::thread::scope(|scope| {
            let third = scope.spawn(|| state.lock_target("three", long));
            let deadline = Deadline::after(long);
            while !state.is_awaited() {
                assert!(!deadline.passed(), "nobody is seen to wait");
                clock::sleep(Duration::from_millis(1));
            }
            drop(held);
            third.join().unwrap().unwrap()
        });
        assert!(!state.is_awaited());
        drop(third);
    }
}
