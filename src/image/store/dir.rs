//! The store in a directory.
//!
//! An object is published so: temporary file in `tmp/`, write, fsync, link to its name (which fails when that is taken),
//! fsync of the directory, unlink of the temporary name. A failed fsync means that the object is lost: it is removed and the
//! error returned, since asking the kernel again would be answered with success for data that never reached the disk.
//! Objects have mode 0600, directories 0700. Who writes a temporary file holds a `flock` on it, so that the ones that dead
//! writers left can be told and are removed when the store is opened.

use std::collections::HashSet;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::num::NonZeroU64;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{
    Advice, FlockOperation, Timespec, Timestamps, UTIME_NOW, fadvise, flock, futimens,
};

use super::super::bytes::{narrow, wide};
use super::super::ids::{hex, random};
use super::recent::Recent;
use super::{Error, Holder, ObjectWriter, Result, Store, StoreLock, WHOLE_LIMIT, check_name, kind};
use crate::fault::step_of;

/// Pieces smaller than this are gathered before they are written.
const WRITE_BUFFER: usize = 256 << 10;

/// After so many bytes the kernel is told to begin writing them out, so that the final sync finds little left to do.
const WRITE_OUT: u64 = 16 << 20;

/// How often a publication is tried again when its directory is removed under it.
const DIRECTORY_TRIES: usize = 5;

/// A store in a directory of a local or network file system.
pub struct DirStore {
    inner: Arc<Inner>,
}

struct Inner {
    root: PathBuf,
    open: Recent<File>,
    /// Directories that are known to be durable.
    made: Mutex<HashSet<PathBuf>>,
}

/// The directories that every store has, made before anything else.
const DIRECTORIES: &[&str] = &[
    "condemned",
    "index",
    "keys",
    "leases",
    "locks",
    "maps",
    "packs",
    "pins",
    "points",
    "quarantine",
    "sessions",
    "tmp",
];

/// How the names of the files begin that make a client of a network file system forget its copy of a directory.
const PROBE: &str = ".probe-";
/// A probe that is older than this was left by a dead process.
const PROBE_AGE: Duration = Duration::from_secs(3600);

impl DirStore {
    /// Makes the directories of a new store. The path may be missing, empty, or left half-made by an earlier try.
    pub fn init(root: &Path) -> Result<Self> {
        let shown = root.display().to_string();
        let made = match DirBuilder::new().mode(0o700).create(root) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::NotFound {
                    object: format!("the directory that {shown} is to be made in"),
                });
            }
            Err(error) => return Err(Error::io("make", shown, error)),
        };
        if made {
            let parent = match root.parent() {
                Some(parent) if parent != Path::new("") => parent,
                _ => Path::new("."),
            };
            sync_directory(parent).map_err(|error| Error::io("sync", shown.clone(), error))?;
        }
        refuse_foreign(root, &shown)?;
        for name in DIRECTORIES {
            make_directory(&root.join(name)).map_err(|error| Error::io("make", *name, error))?;
        }
        sync_directory(root).map_err(|error| Error::io("sync", shown, error))?;
        Ok(Self::at(root))
    }

    /// Opens a store and removes the temporary files of dead writers.
    pub fn open(root: &Path) -> Result<Self> {
        let store = Self::at(root);
        store.inner.sweep();
        Ok(store)
    }

    fn at(root: &Path) -> Self {
        let inner = Inner {
            root: root.to_owned(),
            open: Recent::default(),
            made: Mutex::default(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }
}

/// A directory that holds anything but the beginnings of a store is somebody else's.
fn refuse_foreign(root: &Path, shown: &str) -> Result<()> {
    let entries = std::fs::read_dir(root).map_err(|error| Error::io("list", shown, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| Error::io("list", shown, error))?;
        let name = entry.file_name();
        if name == "config" {
            return Err(Error::Exists {
                object: format!("the repository {shown}"),
            });
        }
        let ours = DIRECTORIES.iter().any(|ours| name == *ours)
            || name == "lost+found"
            || name == super::RESERVE;
        if !ours {
            return Err(Error::Invalid(format!(
                "{shown} is not empty: it holds {}",
                name.display()
            )));
        }
    }
    Ok(())
}

fn make_directory(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

impl Inner {
    fn path(&self, name: &str) -> Result<PathBuf> {
        check_name(name)?;
        Ok(self.root.join(name))
    }

    /// A new temporary file, locked by us.
    fn temporary(&self, name: &str) -> Result<(PathBuf, File)> {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => Error::NotFound {
                object: format!("the directory {}/tmp", self.root.display()),
            },
            _ => Error::io("begin", name, error),
        };
        loop {
            let path = self.root.join("tmp").join(hex(&random::<16>()?));
            let file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .map_err(failed)?;
            let locked = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
            // A sweep may have taken it for a dead writer's before we had the lock.
            if locked && file.metadata().map_err(failed)?.nlink() == 1 {
                return Ok((path, file));
            }
        }
    }

    /// Removes what dead writers left. Failing to is no reason not to work.
    fn sweep(&self) {
        let Ok(entries) = std::fs::read_dir(self.root.join("tmp")) else {
            return;
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            // Network file systems lock exclusively only what is open for writing. The lock is held until the file is gone: a
            // writer that has it only just made sees that, and makes another one.
            let Ok(file) = OpenOptions::new().read(true).write(true).open(&path) else {
                continue;
            };
            let dead = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
            if dead && let Err(error) = std::fs::remove_file(&path) {
                tracing::debug!(path = %path.display(), %error, "a stale temporary file stays");
            }
        }
    }

    /// Makes the directory of an object and sees that it is durable, once a process.
    fn ensure_directory(&self, directory: &Path) -> io::Result<()> {
        let known = |made: &Mutex<HashSet<PathBuf>>| {
            made.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .contains(directory)
        };
        // One of the store's own may be of a later version than the store.
        if directory == self.root || known(&self.made) {
            return Ok(());
        }
        if let Some(parent) = directory.parent() {
            self.ensure_directory(parent)?;
            make_directory(directory)?;
            sync_directory(parent)?;
        }
        self.made
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(directory.to_owned());
        Ok(())
    }

    /// Gives a finished temporary file its name, durably.
    fn publish(&self, name: &str, temporary: &Path) -> Result<()> {
        let path = self.path(name)?;
        let directory = path.parent().unwrap_or(&self.root).to_owned();
        let mut tries = 0;
        loop {
            self.ensure_directory(&directory)
                .map_err(|error| Error::io("make the directory of", name, error))?;
            step_of("store", "link", kind(name));
            match std::fs::hard_link(temporary, &path) {
                Ok(()) => break,
                // Whoever emptied the directory removed it.
                Err(error)
                    if error.kind() == io::ErrorKind::NotFound && tries < DIRECTORY_TRIES =>
                {
                    tries += 1;
                    self.made
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .remove(&directory);
                }
                Err(error) => return Err(Error::io("publish", name, error)),
            }
        }
        step_of("store", "link", kind(name));
        step_of("store", "dirsync", kind(name));
        if let Err(error) = sync_directory(&directory) {
            // Nobody may find an object that a power loss would take away again.
            std::fs::remove_file(&path).ok();
            return Err(Error::io("sync the directory of", name, error));
        }
        step_of("store", "dirsync", kind(name));
        Ok(())
    }

    fn list(&self, prefix: &str, listing: Listing) -> Result<Vec<String>> {
        let directory = self.path(prefix.trim_end_matches('/'))?;
        let mut names = Vec::new();
        list_into(&directory, prefix, listing, &mut names)?;
        names.sort_unstable();
        Ok(names)
    }

    fn file(&self, name: &str) -> Result<Arc<File>> {
        let path = self.path(name)?;
        let open = || File::open(path).map_err(|error| Error::io("open", name, error));
        // The last segment of a session may go and another one get its name: a file that is kept open would be the old one.
        if kind(name) == "sessions" {
            return open().map(Arc::new);
        }
        self.open.get(name, open)
    }
}

/// Whether a listing may come from a cache.
#[derive(Clone, Copy, PartialEq)]
enum Listing {
    Any,
    Fresh,
}

/// Makes and removes a file, which makes a client of a network file system read the directory anew. Who may not write here
/// gets what the client has.
fn probe(directory: &Path) -> io::Result<()> {
    let path = directory.join(format!(
        "{PROBE}{}",
        hex(&random::<8>().map_err(io::Error::other)?)
    ));
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path);
    match made {
        Ok(_) => match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        },
        Err(error) => match error.kind() {
            // Gone meanwhile, or we are only reading.
            io::ErrorKind::NotFound
            | io::ErrorKind::ReadOnlyFilesystem
            | io::ErrorKind::PermissionDenied => Ok(()),
            // Setting a time needs no room, and answers with the directory's state as well.
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                let now = Timespec {
                    tv_sec: 0,
                    tv_nsec: UTIME_NOW,
                };
                let times = Timestamps {
                    last_access: now,
                    last_modification: now,
                };
                futimens(File::open(directory)?, &times).ok();
                Ok(())
            }
            _ => Err(error),
        },
    }
}

/// Removes a probe that a dead process left. Failing to is no reason not to list.
fn remove_stale_probe(entry: &std::fs::DirEntry) {
    let age = entry
        .metadata()
        .and_then(|metadata| metadata.modified())
        .ok()
        .and_then(|modified| modified.elapsed().ok());
    if age.is_some_and(|age| age > PROBE_AGE) {
        std::fs::remove_file(entry.path()).ok();
    }
}

fn list_into(
    directory: &Path,
    prefix: &str,
    listing: Listing,
    names: &mut Vec<String>,
) -> Result<()> {
    let failed = |error| Error::io("list", prefix, error);
    if listing == Listing::Fresh {
        probe(directory).map_err(failed)?;
    }
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(failed)?,
    };
    for entry in entries {
        let entry = entry.map_err(failed)?;
        let Ok(part) = entry.file_name().into_string() else {
            continue;
        };
        if part.starts_with(PROBE) {
            remove_stale_probe(&entry);
            continue;
        }
        let name = format!("{prefix}{part}");
        if entry.file_type().map_err(failed)?.is_dir() {
            list_into(&entry.path(), &format!("{name}/"), listing, names)?;
        } else if check_name(&name).is_ok() {
            names.push(name);
        }
    }
    Ok(())
}

impl Store for DirStore {
    fn put(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut writer = self.create(name)?;
        writer.write(bytes)?;
        writer.finish()
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        check_name(name)?;
        let (temporary, file) = self.inner.temporary(name)?;
        Ok(Box::new(DirWriter {
            inner: Arc::clone(&self.inner),
            name: name.to_owned(),
            temporary,
            file: BufWriter::with_capacity(WRITE_BUFFER, file),
            length: 0,
            written_out: 0,
        }))
    }

    fn get(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.inner.path(name)?;
        let failed = |error| Error::io("read", name, error);
        let file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        if length > WHOLE_LIMIT {
            return Err(Error::corrupt(
                name,
                format!("its {length} bytes are too many"),
            ));
        }
        let mut bytes = Vec::with_capacity(narrow(length));
        file.take(WHOLE_LIMIT)
            .read_to_end(&mut bytes)
            .map_err(failed)?;
        Ok(bytes)
    }

    fn get_range(&self, name: &str, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let file = self.inner.file(name)?;
        file.read_exact_at(buffer, offset)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => Error::corrupt(
                    name,
                    format!(
                        "it ends before byte {}",
                        offset.saturating_add(wide(buffer.len()))
                    ),
                ),
                _ => Error::io("read", name, error),
            })
    }

    fn size(&self, name: &str) -> Result<u64> {
        let file = self.inner.file(name)?;
        let failed = |error| Error::io("look at", name, error);
        Ok(file.metadata().map_err(failed)?.len())
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>> {
        self.inner.list(prefix, Listing::Any)
    }

    fn list_fresh(&self, prefix: &str) -> Result<Vec<String>> {
        self.inner.list(prefix, Listing::Fresh)
    }

    fn delete(&self, names: &[String]) -> Result<()> {
        let mut directories = HashSet::new();
        for name in names {
            let path = self.inner.path(name)?;
            self.inner.open.forget(name);
            step_of("store", "unlink", kind(name));
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io("delete", name, error));
                }
                _ => directories.extend(path.parent().map(Path::to_owned)),
            }
            step_of("store", "unlink", kind(name));
        }
        for directory in directories {
            match sync_directory(&directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    let shown = directory.display().to_string();
                    return Err(Error::io("sync", shown, error));
                }
                _ => {}
            }
            // Only the store's own directories stay when they are empty; one that is not empty refuses.
            if directory.parent() != Some(&self.inner.root) && directory != self.inner.root {
                std::fs::remove_dir(&directory).ok();
                self.inner
                    .made
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .remove(&directory);
            }
        }
        Ok(())
    }

    #[expect(clippy::disallowed_methods, reason = "the store's own durable write")]
    fn replace(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.inner.path(name)?;
        let directory = path.parent().unwrap_or(&self.inner.root);
        let (temporary, mut file) = self.inner.temporary(name)?;
        let kind = kind(name);
        step_of("store", "write", kind);
        let replaced = file
            .write_all(bytes)
            .and_then(|()| file.sync_all())
            .and_then(|()| {
                step_of("store", "rename", kind);
                std::fs::rename(&temporary, &path)?;
                step_of("store", "rename", kind);
                sync_directory(directory)
            });
        self.inner.open.forget(name);
        if replaced.is_err() {
            std::fs::remove_file(&temporary).ok();
        }
        replaced.map_err(|error| Error::io("replace", name, error))
    }

    fn lock(&self, name: &str, who: &str) -> Result<StoreLock> {
        let object = format!("locks/{name}");
        let path = self.inner.path(&object)?;
        let failed = |error| Error::io("lock", &*object, error);
        loop {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .map_err(failed)?;
            if !try_lock(&file, &object)? {
                let holder = Holder::words(&text_of(&file).map_err(failed)?);
                return Err(Error::Busy { object, holder });
            }
            // Whoever looked for dead holders may have taken it for one's before we had the lock.
            if file.metadata().map_err(failed)?.nlink() == 0 {
                continue;
            }
            let text = Holder::ourselves(who).to_text();
            file.set_len(0).map_err(failed)?;
            file.write_all(text.as_bytes()).map_err(failed)?;
            return Ok(StoreLock::new(Held(file)));
        }
    }

    fn held(&self, prefix: &str) -> Result<Vec<(String, String)>> {
        let mut held = Vec::new();
        for object in self.inner.list("locks/", Listing::Fresh)? {
            let Some(name) = object
                .strip_prefix("locks/")
                .filter(|name| name.starts_with(prefix))
            else {
                continue;
            };
            let failed = |error| Error::io("look at", &*object, error);
            let path = self.inner.path(&object)?;
            let file = match OpenOptions::new().read(true).write(true).open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other.map_err(failed)?,
            };
            if !try_lock(&file, &object)? {
                held.push((name.to_owned(), text_of(&file).map_err(failed)?));
                continue;
            }
            // Locked by us, so nobody holds it; removed before it is let go.
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
                _ => {}
            }
        }
        Ok(held)
    }
}

/// The file of a lock that is held.
struct Held(File);

impl Drop for Held {
    fn drop(&mut self) {
        // Said, and not only closed: a child that is about to be another program has the file open, too.
        flock(&self.0, FlockOperation::Unlock).ok();
    }
}

/// Takes the lock of a file unless somebody has it.
fn try_lock(file: &File, object: &str) -> Result<bool> {
    use rustix::io::Errno;
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(Errno::NOLCK | Errno::NOSYS | Errno::OPNOTSUPP) => Err(Error::Unsupported(format!(
            "the file system of {object} has no file locks, without which two processes would spoil the repository: mount it with locks (of NFS: without `nolock`)"
        ))),
        Err(error) => Err(Error::io("lock", object, error.into())),
    }
}

/// What the holder of a lock wrote.
fn text_of(file: &File) -> io::Result<String> {
    let mut text = Vec::new();
    file.take(4096).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// An object in the making: a locked temporary file.
struct DirWriter {
    inner: Arc<Inner>,
    name: String,
    temporary: PathBuf,
    file: BufWriter<File>,
    /// Bytes taken so far.
    length: u64,
    /// Up to where the kernel was told to write.
    written_out: u64,
}

impl DirWriter {
    /// Begins to write out what was written since the last time. Only a hint: [`ObjectWriter::finish`] syncs all of it.
    fn write_out(&mut self) -> io::Result<()> {
        self.file.flush()?;
        let length = NonZeroU64::new(self.length.saturating_sub(self.written_out));
        // Dirty pages cannot be dropped, so this begins their writing (mm/fadvise.c); the next call drops none of them either.
        fadvise(
            self.file.get_ref(),
            self.written_out,
            length,
            Advice::DontNeed,
        )
        .ok();
        self.written_out = self.length;
        Ok(())
    }
}

impl ObjectWriter for DirWriter {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.length = self.length.saturating_add(wide(bytes.len()));
        let mut written = self.file.write_all(bytes);
        if written.is_ok() && self.length.saturating_sub(self.written_out) >= WRITE_OUT {
            written = self.write_out();
        }
        written.map_err(|error| Error::io("write", &*self.name, error))
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        let failed = |error| Error::io("write", &*self.name, error);
        let kind = kind(&self.name);
        step_of("store", "write", kind);
        self.file.flush().map_err(failed)?;
        step_of("store", "write", kind);
        step_of("store", "fsync", kind);
        self.file.get_ref().sync_all().map_err(failed)?;
        step_of("store", "fsync", kind);
        if self.length >= WRITE_OUT {
            // Who made it will hardly read it again, and the guests' own files are worth more in the page cache.
            fadvise(self.file.get_ref(), 0, None, Advice::DontNeed).ok();
        }
        self.inner.publish(&self.name, &self.temporary)?;
        step_of("store", "untemp", kind);
        std::fs::remove_file(&self.temporary).ok();
        step_of("store", "untemp", kind);
        Ok(())
    }
}

impl Drop for DirWriter {
    /// An object that is not finished goes.
    fn drop(&mut self) {
        std::fs::remove_file(&self.temporary).ok();
    }
}
