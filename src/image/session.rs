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

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::envelope;
use super::error::{Error, Result};
use super::ids::{BlockId, SessionId, hex, random};
use super::map::{BlockIds, Layer, LayerWriter, Run, RunContent, RunSource, SEGMENT};
use super::repo::Repository;
use crate::units::BlockRun;

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

/// A session.
pub struct Session {
    repo: Repository,
    id: SessionId,
    header: Header,
    /// The number of the next item, once the log was listed.
    next: Mutex<Option<u64>>,
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

impl Session {
    /// Begins the session of a key; [`Error::Exists`] when it has one.
    pub fn create(repo: &Repository, key: &str, header: &Value) -> Result<Self> {
        // Other keys' sessions may begin at the same time.
        let lock = format!("session-{}", hex(&repo.hasher().session(key)));
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
        let bytes = envelope::seal("record", record)?;
        self.add("record", |object| self.repo.store().put(object, &bytes))
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

    fn add(&self, kind: &str, put: impl FnOnce(&str) -> Result<()>) -> Result<u64> {
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
        let names = self.repo.store().list(&prefix)?;
        let mut entries: Vec<LogEntry> = names
            .iter()
            .filter_map(|name| LogEntry::parse(&prefix, name))
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
            return envelope::open("record", &entry.object, &bytes).map(Item::Record);
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
        let layer = Layer::open(self.repo.store_arc(), &segment.object, SEGMENT, None)
            .map_err(Error::missing_is_corrupt)?;
        Ok(SegmentRuns {
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
        match repo.store().put(&removed_object(id), b"") {
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

enum State {
    Whole,
    Removed,
}

/// The sessions there are, by their objects' names alone.
fn states(repo: &Repository) -> Result<Vec<(SessionId, State)>> {
    let mut states: Vec<(SessionId, State)> = Vec::new();
    for name in repo.store().list("sessions/")? {
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

/// Deletes the objects of a session that is marked as removed, the mark last.
fn remove(repo: &Repository, id: SessionId) -> Result<()> {
    let store = repo.store();
    let mark = removed_object(id);
    let mut names = store.list(&prefix(id))?;
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

/// Sorts blocks and joins neighbours of one kind to runs.
fn runs_of(blocks: &[(u64, Content)]) -> Vec<Run> {
    let mut sorted: Vec<(u64, Content)> = blocks.to_vec();
    sorted.sort_by_key(|(block, _)| *block);
    // The sort keeps the order of equal ones: of those the last stays.
    sorted.reverse();
    sorted.dedup_by_key(|(block, _)| *block);
    sorted.reverse();
    let mut runs = Vec::new();
    for group in sorted.chunk_by(|(a, left), (b, right)| {
        *b == *a + 1 && std::mem::discriminant(left) == std::mem::discriminant(right)
    }) {
        let Some((first, content)) = group.first() else {
            continue;
        };
        let count = group.len() as u64;
        let ids = group.iter().filter_map(|(_, content)| match content {
            Content::Data(id) => Some(*id),
            _ => None,
        });
        let content = match content {
            Content::Zero => RunContent::Zero(count),
            Content::Same => RunContent::Same(count),
            Content::Data(_) => RunContent::Data(BlockIds::new(ids.collect())),
        };
        runs.push(Run {
            first: *first,
            content,
        });
    }
    runs
}

/// Neighbouring data blocks as one run.
fn joined(runs: &[(BlockRun, Content)]) -> impl Iterator<Item = Run> + '_ {
    let groups = runs.chunk_by(|(a, left), (b, right)| {
        let data = matches!((left, right), (Content::Data(_), Content::Data(_)));
        data && a.end() == b.first
    });
    groups.filter_map(|group| {
        let (first, content) = group.first()?;
        let ids = group.iter().filter_map(|(_, content)| match content {
            Content::Data(id) => Some(*id),
            _ => None,
        });
        let content = match content {
            Content::Zero => RunContent::Zero(first.count),
            Content::Same => RunContent::Same(first.count),
            Content::Data(_) => RunContent::Data(BlockIds::new(ids.collect())),
        };
        Some(Run {
            first: first.first,
            content,
        })
    })
}

/// The runs of blocks of a segment.
pub struct SegmentRuns {
    source: Box<dyn RunSource>,
    failed: bool,
}

impl Iterator for SegmentRuns {
    type Item = Result<BlockRun>;

    fn next(&mut self) -> Option<Result<BlockRun>> {
        if self.failed {
            return None;
        }
        let next = self.source.next_run().transpose();
        self.failed = matches!(next, Some(Err(_)));
        next.map(|run| run.map(|run| run.blocks()))
    }
}
