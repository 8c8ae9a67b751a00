//! A session: the next point of a target while it is incomplete. Its log is a row of numbered objects, put if absent, so that
//! two writers cannot both go on; what an append returned from survives a power loss.
//!
//! ```text
//! sessions/<id>/00000000-header     key and header record
//! sessions/<id>/00000001-record     a JSON record, opaque here
//! sessions/<id>/00000002-segment    blocks of a disk and what they hold (map/layer.rs)
//! sessions/<id>/merge-<random>      an intermediate result; nobody's after a crash
//! sessions/<id>/removed             the session is being removed
//! ```
//!
//! The first half of an id is a hash of the key, so a key is found by a listing and a damaged session of another target is in
//! nobody's way. A session is a root for garbage collection until it is removed by decision.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::envelope;
use super::error::{Error, Result};
use super::ids::{BlockId, SessionId, hex, random};
use super::manifest::Manifest;
use super::map::{Layer, LayerWriter, MapRef, Run, RunContent, RunSource, SEGMENT};
use super::repo::Repository;
use super::segment::{joined, runs_of};
use super::store::StoreLock;
use crate::clock::{self, Deadline};
use crate::units::BlockRun;

/// How long another process is waited for that begins, publishes or drops a session of the same key.
const LOCK_WAIT: Duration = Duration::from_secs(60);
/// How often the lock is tried meanwhile.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// What a block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Zeros.
    Zero,
    /// The block of this id.
    Data(BlockId),
    /// Proved equal to the base's block. Only in segments of sessions.
    Same,
}

/// Where the blocks of a segment come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentHeader {
    /// The disk's key.
    pub disk: String,
    /// The epoch in which they were read.
    pub epoch: u64,
    /// The pass that read them.
    pub pass: u64,
    /// How many bytes of the disk were read for it.
    #[serde(default)]
    pub read: u64,
    /// Of these, bytes that the session had read before: copied for nothing then.
    #[serde(default)]
    pub again: u64,
}

/// A segment of a session's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentRef {
    /// Its number in the log.
    pub seq: u64,
    /// Where its blocks come from.
    pub header: SegmentHeader,
    /// How many blocks it has.
    pub blocks: u64,
    /// How many of them have data.
    pub data_blocks: u64,
    object: String,
}

impl SegmentRef {
    pub(super) fn object(&self) -> &str {
        &self.object
    }
}

/// An item of a session's log.
#[derive(Debug, Clone, PartialEq)]
pub enum Item {
    /// A record, as it was appended.
    Record(Value),
    /// A segment.
    Segment(SegmentRef),
}

#[derive(Serialize, Deserialize)]
struct Header {
    key: String,
    header: Value,
}

/// A record of the log, with the maps that it makes roots.
#[derive(Serialize, Deserialize)]
struct LogRecord {
    record: Value,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    maps: Vec<MapRef>,
}

/// What an object of a session refers to, for whoever looks for roots.
pub(super) enum Root {
    /// The maps that it builds on.
    Maps(Vec<MapRef>),
    /// The blocks of this segment.
    Segment(String),
}

/// A session.
pub struct Session {
    repo: Repository,
    id: SessionId,
    header: Header,
    /// The number of the next item, once the log was listed.
    next: Mutex<Option<u64>>,
    /// The maps that are known to be roots by its records.
    rooted: Mutex<Vec<MapRef>>,
    /// The log ends with a segment of which it is not known whether it may be relied on.
    unsettled: AtomicBool,
}

/// The sessions of a repository.
#[derive(Default)]
pub struct Sessions {
    /// The ones that can be read.
    pub sessions: Vec<Session>,
    /// The ones that cannot, with the reason. [`Session::remove_damaged`] drops one.
    pub damaged: Vec<(SessionId, Error)>,
}

fn prefix(id: SessionId) -> String {
    format!("sessions/{id}/")
}

fn header_object(id: SessionId) -> String {
    format!("{}00000000-header", prefix(id))
}

fn removed_object(id: SessionId) -> String {
    format!("{}removed", prefix(id))
}

/// The lock of the sessions of a key, by the key's hash.
fn lock_name(hash: &[u8]) -> String {
    format!("session-{}", hex(hash))
}

/// Takes the lock of the sessions of the key of this one; who holds it does so for a few writes.
fn lock_key(repo: &Repository, id: SessionId, who: &str) -> Result<StoreLock> {
    let hash = id.as_bytes().get(..8).unwrap_or_default();
    let deadline = Deadline::after(LOCK_WAIT);
    loop {
        match repo.store().lock(&lock_name(hash), who) {
            Err(Error::Busy { .. }) if !deadline.passed() => clock::sleep(LOCK_PAUSE),
            other => return other,
        }
    }
}

impl Session {
    /// Begins the session of a key; [`Error::Exists`] when it has one.
    pub fn create(repo: &Repository, key: &str, header: &Value) -> Result<Self> {
        // Other keys' sessions may begin at the same time.
        let lock = lock_name(&repo.hasher().session(key));
        let _lock = repo.store().lock(&lock, "beginning a session")?;
        if let Some(session) = Self::find(repo, key)? {
            return Err(Error::Exists {
                object: format!("session {} of {key}", session.id),
            });
        }
        let mut bytes = [0; 16];
        let (hash, rest) = bytes.split_at_mut(8);
        hash.copy_from_slice(&repo.hasher().session(key));
        rest.copy_from_slice(&random::<8>()?);
        let id = SessionId::from_bytes(bytes);
        let header = Header {
            key: key.to_owned(),
            header: header.clone(),
        };
        let sealed = envelope::seal("session", &header)?;
        repo.store().put(&header_object(id), &sealed)?;
        Ok(Self {
            repo: repo.clone(),
            id,
            header,
            next: Mutex::new(Some(1)),
            rooted: Mutex::default(),
            unsettled: AtomicBool::new(false),
        })
    }

    /// The session of a key. One whose removal was cut short is removed now.
    pub fn find(repo: &Repository, key: &str) -> Result<Option<Self>> {
        let hash = repo.hasher().session(key);
        let mut found: Option<Self> = None;
        for (id, state) in states(repo)? {
            if !id.as_bytes().starts_with(&hash) {
                continue;
            }
            match state {
                State::Removed => remove(repo, id)?,
                State::Whole => {
                    let session = Self::open(repo, id)?;
                    if session.key() != key {
                        continue;
                    }
                    if let Some(other) = &found {
                        return Err(Error::Invalid(format!(
                            "{key} has two sessions, {} and {id}: drop one",
                            other.id
                        )));
                    }
                    found = Some(session);
                }
            }
        }
        Ok(found)
    }

    /// All sessions.
    pub fn list(repo: &Repository) -> Result<Sessions> {
        let mut sessions = Sessions::default();
        for (id, state) in states(repo)? {
            if let State::Removed = state {
                continue;
            }
            match Self::open(repo, id) {
                Ok(session) => sessions.sessions.push(session),
                // Removed meanwhile.
                Err(error) if error.is_not_found() => {}
                Err(error) => sessions.damaged.push((id, error)),
            }
        }
        Ok(sessions)
    }

    fn open(repo: &Repository, id: SessionId) -> Result<Self> {
        let object = header_object(id);
        let header: Header = envelope::open("session", &object, &repo.store().get(&object)?)?;
        if !id
            .as_bytes()
            .starts_with(&repo.hasher().session(&header.key))
        {
            return Err(Error::corrupt(object, "its key is another session's"));
        }
        Ok(Self {
            repo: repo.clone(),
            id,
            header,
            next: Mutex::default(),
            rooted: Mutex::default(),
            unsettled: AtomicBool::new(false),
        })
    }

    /// Its name.
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// The target's key.
    pub fn key(&self) -> &str {
        &self.header.key
    }

    /// The header record it was created with.
    pub fn header(&self) -> &Value {
        &self.header.header
    }

    pub(super) fn prefix(&self) -> String {
        prefix(self.id)
    }

    /// Adds a record to the log, durably, and gives its number. [`Error::Busy`] when another process wrote to the log since.
    pub fn append(&self, record: &Value) -> Result<u64> {
        self.append_with_roots(record, &[])
    }

    /// As [`Session::append`]; from then on the maps stay whole as long as the session lives, whatever becomes of their points.
    /// But only if they were whole until then: the caller looks *afterwards* whether the points still exist.
    pub fn append_with_roots(&self, record: &Value, maps: &[MapRef]) -> Result<u64> {
        let mut rooted = self.rooted.lock().unwrap_or_else(PoisonError::into_inner);
        let maps: Vec<MapRef> = maps
            .iter()
            .filter(|map| !rooted.contains(map))
            .cloned()
            .collect();
        let record = LogRecord {
            record: record.clone(),
            maps,
        };
        let bytes = envelope::seal("record", &record)?;
        let seq = self.add("record", |object| self.repo.store().put(object, &bytes))?;
        rooted.extend(record.maps);
        Ok(seq)
    }

    /// Adds the blocks of a disk and what they hold, durably, and gives its number. The order of the blocks does not matter;
    /// of one that comes twice, the later counts.
    pub fn append_segment(&self, header: &SegmentHeader, blocks: &[(u64, Content)]) -> Result<u64> {
        let meta = serde_json::to_vec(header)
            .map_err(|error| Error::Invalid(format!("cannot write a segment header: {error}")))?;
        self.add("segment", |object| {
            let mut writer = LayerWriter::create(self.repo.store(), object, SEGMENT)?;
            for run in runs_of(blocks) {
                writer.push(run)?;
            }
            writer.finish(&meta).map(drop)
        })
    }

    /// As [`Session::append_segment`], of runs that are in order and do not overlap; a run of more than one block is zero or
    /// the same as the base.
    pub fn append_runs(
        &self,
        header: &SegmentHeader,
        runs: &[(BlockRun, Content)],
    ) -> Result<SegmentRef> {
        let meta = serde_json::to_vec(header)
            .map_err(|error| Error::Invalid(format!("cannot write a segment header: {error}")))?;
        let mut blocks = 0;
        let mut data_blocks = 0;
        let seq = self.add("segment", |object| {
            let mut writer = LayerWriter::create(self.repo.store(), object, SEGMENT)?;
            for run in joined(runs) {
                blocks += run.count();
                if let RunContent::Data(ids) = &run.content {
                    data_blocks += ids.as_slice().len() as u64;
                }
                writer.push(run)?;
            }
            writer.finish(&meta).map(drop)
        })?;
        Ok(SegmentRef {
            seq,
            header: header.clone(),
            blocks,
            data_blocks,
            object: format!("{}{seq:08}-segment", self.prefix()),
        })
    }

    /// As [`Session::append_runs`], and then looks whether all of it may be relied on, when its blocks were encoded since the
    /// generation was `since`. [`Error::Condemned`] when not: then nothing was appended, and the blocks are to be read again.
    pub fn prove(
        &self,
        header: &SegmentHeader,
        runs: &[(BlockRun, Content)],
        since: u64,
    ) -> Result<SegmentRef> {
        let segment = self.append_runs(header, runs)?;
        match self.look(&segment.object, segment.seq, Some(since)) {
            Ok(()) => Ok(segment),
            Err(error @ Error::Condemned { .. }) => Err(error),
            // Whether it may be relied on is not known: what is appended behind it would hide that from who goes on.
            Err(error) => match self.take_back(&segment.object, segment.seq) {
                Ok(()) => Err(error),
                Err(stays) => {
                    tracing::debug!(%stays, "a segment is at the end of the log that nobody has looked at");
                    self.unsettled.store(true, Ordering::Relaxed);
                    Err(error)
                }
            },
        }
    }

    /// Looks again at the end of the log when that is a segment: whoever wrote it may have died before it did. One that cannot be
    /// relied on is deleted, and its number given.
    pub fn settle(&self) -> Result<Option<u64>> {
        let Some(last) = self.entries()?.pop().filter(|last| last.is_segment) else {
            return Ok(None);
        };
        let gone = match self.look(&last.object, last.seq, None) {
            Ok(()) => None,
            Err(Error::Condemned { .. }) => Some(last.seq),
            Err(error) => return Err(error),
        };
        self.unsettled.store(false, Ordering::Relaxed);
        Ok(gone)
    }

    fn look(&self, object: &str, seq: u64, since: Option<u64>) -> Result<()> {
        let runs = || -> Result<Box<dyn RunSource>> {
            let layer = Layer::open(self.repo.store_arc(), object, SEGMENT, None)
                .map_err(Error::missing_is_corrupt)?;
            Ok(Arc::new(layer).stream())
        };
        if self.repo.look(since, &runs)? {
            return Ok(());
        }
        self.take_back(object, seq)?;
        Err(Error::Condemned {
            object: object.to_owned(),
        })
    }

    /// Deletes the segment that ends the log.
    fn take_back(&self, object: &str, seq: u64) -> Result<()> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        self.repo.store().delete(&[object.to_owned()])?;
        *next = Some(seq);
        Ok(())
    }

    /// Publishes the point that the session was for: from then on it exists. Not when another host has dropped the session
    /// meanwhile: then nothing keeps its blocks. Dropping takes the same lock, so there is no moment, and no crash, at which such a
    /// point exists.
    pub fn publish(&self, manifest: &Manifest) -> Result<()> {
        let _no_drop = lock_key(&self.repo, self.id, "publishing a point")?;
        if standing(&self.repo, self.id)?.is_none() {
            return Err(Error::NotFound {
                object: format!(
                    "session {} (it was dropped while its point was made)",
                    self.id
                ),
            });
        }
        self.repo.publish(manifest).map(drop)
    }

    fn add(&self, kind: &str, put: impl FnOnce(&str) -> Result<()>) -> Result<u64> {
        if self.unsettled.load(Ordering::Relaxed) {
            return Err(Error::Invalid(format!(
                "session {} ends with a segment that may not be relied on: begin the run anew",
                self.id
            )));
        }
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let seq = match *next {
            Some(seq) => seq,
            None => self.entries()?.last().map_or(1, |entry| entry.seq + 1),
        };
        *next = Some(seq);
        put(&format!("{}{seq:08}-{kind}", self.prefix())).map_err(|error| match error {
            Error::Exists { object } => Error::Busy {
                object,
                holder: "another writer of the session".into(),
            },
            other => other,
        })?;
        *next = Some(seq + 1);
        Ok(seq)
    }

    /// The numbered objects after the header, in order; a gap is damage.
    fn entries(&self) -> Result<Vec<LogEntry>> {
        let prefix = self.prefix();
        entries_of(&prefix, &self.repo.store().list_fresh(&prefix)?)
    }

    /// The log in order.
    pub fn items(&self) -> Result<Vec<Item>> {
        let entries = self.entries()?;
        {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            *next = Some(entries.last().map_or(1, |entry| entry.seq + 1));
        }
        entries
            .into_iter()
            .map(|entry| self.item(entry).map_err(Error::missing_is_corrupt))
            .collect()
    }

    fn item(&self, entry: LogEntry) -> Result<Item> {
        if !entry.is_segment {
            let bytes = self.repo.store().get(&entry.object)?;
            let record: LogRecord = envelope::open("record", &entry.object, &bytes)?;
            let mut rooted = self.rooted.lock().unwrap_or_else(PoisonError::into_inner);
            rooted.extend(record.maps);
            return Ok(Item::Record(record.record));
        }
        let layer = Layer::open(self.repo.store_arc(), &entry.object, SEGMENT, None)?;
        let header = serde_json::from_slice(&layer.meta).map_err(|error| {
            Error::corrupt(&*entry.object, format!("its header is damaged: {error}"))
        })?;
        Ok(Item::Segment(SegmentRef {
            seq: entry.seq,
            header,
            blocks: layer.totals.blocks(),
            data_blocks: layer.totals.data,
            object: entry.object,
        }))
    }

    /// Which blocks a segment has, in order, with little memory.
    pub fn segment_runs(&self, segment: &SegmentRef) -> Result<SegmentRuns> {
        self.segment_content(segment).map(SegmentRuns)
    }

    /// The blocks of a segment and what they hold, in order, with little memory.
    pub fn segment_content(&self, segment: &SegmentRef) -> Result<SegmentContent> {
        let layer = Layer::open(self.repo.store_arc(), &segment.object, SEGMENT, None)
            .map_err(Error::missing_is_corrupt)?;
        Ok(SegmentContent {
            source: Arc::new(layer).stream(),
            failed: false,
        })
    }

    /// Removes the session: first a mark, so that a removal that is cut short is finished by the next [`Session::find`] and
    /// never taken for a session; then the log, the header, the mark.
    pub fn remove(self) -> Result<()> {
        Self::remove_damaged(&self.repo, self.id)
    }

    /// Removes a session by its name, also one that cannot be read.
    pub fn remove_damaged(repo: &Repository, id: SessionId) -> Result<()> {
        let no_publication = lock_key(repo, id, "removing a session")?;
        let marked = repo.store().put(&removed_object(id), b"");
        drop(no_publication);
        match marked {
            Ok(()) | Err(Error::Exists { .. }) => remove(repo, id),
            Err(error) => Err(error),
        }
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Session({} of {})", self.id, self.header.key)
    }
}

pub(super) enum State {
    Whole,
    Removed,
}

/// The sessions there are, by their objects' names alone.
pub(super) fn states(repo: &Repository) -> Result<Vec<(SessionId, State)>> {
    let mut states: Vec<(SessionId, State)> = Vec::new();
    for name in repo.store().list_fresh("sessions/")? {
        let parts: Vec<&str> = name.split('/').collect();
        let [_, id, object] = parts[..] else {
            continue;
        };
        let Ok(id) = id.parse() else {
            continue;
        };
        match object {
            "00000000-header" => states.push((id, State::Whole)),
            // It sorts behind the header, which may be gone already.
            "removed" => {
                states.retain(|(other, _)| *other != id);
                states.push((id, State::Removed));
            }
            _ => {}
        }
    }
    Ok(states)
}

/// The numbered objects after the header of a session, in order; a gap is damage.
fn entries_of(prefix: &str, names: &[String]) -> Result<Vec<LogEntry>> {
    let mut entries: Vec<LogEntry> = names
        .iter()
        .filter_map(|name| LogEntry::parse(prefix, name))
        .filter(|entry| entry.seq > 0)
        .collect();
    entries.sort_by_key(|entry| entry.seq);
    for (expected, entry) in (1..).zip(&entries) {
        if entry.seq != expected {
            let what = if entry.seq < expected {
                format!("there are two objects of number {}", entry.seq)
            } else {
                format!("object {expected} of its log is missing")
            };
            return Err(Error::corrupt(prefix.trim_end_matches('/'), what));
        }
    }
    Ok(entries)
}

/// The objects of a session, past any cache; `None` when it is none, or none any more.
fn standing(repo: &Repository, id: SessionId) -> Result<Option<Vec<String>>> {
    let names = repo.store().list_fresh(&prefix(id))?;
    let has = |name: &String| names.binary_search(name).is_ok();
    let stands = has(&header_object(id)) && !has(&removed_object(id));
    Ok(stands.then_some(names))
}

/// What the log of a session refers to; `None` when it is none any more. [`Error::NotFound`] when it changes meanwhile.
pub(super) fn roots(repo: &Repository, id: SessionId) -> Result<Option<Vec<Root>>> {
    let Some(names) = standing(repo, id)? else {
        return Ok(None);
    };
    let root = |entry: LogEntry| {
        if entry.is_segment {
            return Ok(Root::Segment(entry.object));
        }
        let bytes = repo.store().get(&entry.object)?;
        let record: LogRecord = envelope::open("record", &entry.object, &bytes)?;
        Ok(Root::Maps(record.maps))
    };
    let entries = entries_of(&prefix(id), &names)?;
    entries
        .into_iter()
        .map(root)
        .collect::<Result<_>>()
        .map(Some)
}

/// The sessions whose removal was begun, and objects of ones that are none: neither is anybody's.
pub(super) fn remains(repo: &Repository) -> Result<Vec<SessionId>> {
    let names = repo.store().list_fresh("sessions/")?;
    let id = |name: &String| name.split('/').nth(1)?.parse().ok();
    let mut ids: Vec<SessionId> = names.iter().filter_map(id).collect();
    ids.dedup();
    let mut remains = Vec::new();
    for id in ids {
        // Its header is the first that is there of a session, so that one that is only just begun is none of these.
        if standing(repo, id)?.is_none() {
            remains.push(id);
        }
    }
    Ok(remains)
}

/// Deletes the objects of a session that is marked as removed, the mark last.
pub(super) fn remove(repo: &Repository, id: SessionId) -> Result<()> {
    let store = repo.store();
    let mark = removed_object(id);
    let mut names = store.list_fresh(&prefix(id))?;
    names.retain(|name| *name != mark);
    // The header, which sorts first, goes last of these.
    names.reverse();
    store.delete(&names)?;
    store.delete(&[mark])
}

struct LogEntry {
    seq: u64,
    is_segment: bool,
    object: String,
}

impl LogEntry {
    fn parse(prefix: &str, object: &str) -> Option<Self> {
        let (seq, kind) = object.strip_prefix(prefix)?.split_once('-')?;
        let is_segment = match kind {
            "segment" => true,
            "record" => false,
            _ => return None,
        };
        Some(Self {
            seq: seq.parse().ok()?,
            is_segment,
            object: object.to_owned(),
        })
    }
}

/// The runs of a segment with what they hold.
pub struct SegmentContent {
    source: Box<dyn RunSource>,
    failed: bool,
}

impl Iterator for SegmentContent {
    type Item = Result<Run>;

    fn next(&mut self) -> Option<Result<Run>> {
        if self.failed {
            return None;
        }
        let next = self.source.next_run().transpose();
        self.failed = matches!(next, Some(Err(_)));
        next
    }
}

/// The runs of blocks of a segment.
pub struct SegmentRuns(SegmentContent);

impl Iterator for SegmentRuns {
    type Item = Result<BlockRun>;

    fn next(&mut self) -> Option<Result<BlockRun>> {
        self.0.next().map(|run| run.map(|run| run.blocks()))
    }
}
