//! Reading blocks where they are stored: near ones at once, each checked against what lists it, decompressed and hashed.

use super::super::block::{Location, decode_exactly};
use super::super::bytes::{narrow, wide};
use super::super::error::{Error, Result};
use super::super::ids::{BlockId, ObjectId};
use super::super::pack;
use super::super::quarantine::Bad;
use super::super::repo::Repository;
use super::VerifyOptions;

/// Bytes of one read at most, unless a single entry is longer.
const READ: u64 = 4 << 20;
/// Entries that lie so near each other are read at once.
const GAP: u64 = 64 << 10;

/// A block and where it should be.
pub(super) type Place = (BlockId, Location);

/// Reads blocks; its buffers are used again and again.
pub(super) struct Places<'a> {
    repo: &'a Repository,
    /// Who says how fast, and when to end; `None` for a look in between.
    options: Option<&'a VerifyOptions>,
    stored: Vec<u8>,
    plain: Vec<u8>,
    /// Stored bytes that were told of as done.
    pub(super) told: u64,
    /// Blocks that were sound.
    pub(super) blocks: u64,
    /// Their plain bytes.
    pub(super) bytes: u64,
}

impl<'a> Places<'a> {
    pub(super) fn new(repo: &'a Repository, options: Option<&'a VerifyOptions>) -> Self {
        Self {
            repo,
            options,
            stored: Vec::new(),
            plain: Vec::new(),
            told: 0,
            blocks: 0,
            bytes: 0,
        }
    }

    /// Reads places that are in order and gives those that do not hold their block. [`Error::NotFound`] when a pack is gone. A device
    /// that answers nothing at all is an error; one that cannot read some of it is damage. [`Error::Interrupted`] when that is wished.
    pub(super) fn read(&mut self, places: &[Place]) -> Result<Vec<Bad>> {
        let mut bad = Vec::new();
        let mut unreadable = None;
        let mut readable = places.is_empty();
        for group in groups(places) {
            let end = group.iter().map(|(_, location)| location.end()).max();
            let Some((first, end)) = group.first().zip(end) else {
                continue;
            };
            if let Some(options) = self.options {
                options.go_on()?;
                let bytes = group.iter().map(|(_, location)| location.length()).sum();
                self.told += bytes;
                options.done(bytes);
            }
            match self.fetch(&first.1, end) {
                Ok(()) => {
                    readable = true;
                    let start = u64::from(first.1.offset);
                    for (id, location) in group {
                        bad.extend(self.decode(*id, location, start));
                    }
                }
                Err(Error::Corrupt { .. } | Error::Io { .. }) => {
                    for (id, location) in group {
                        match self.fetch(location, location.end()) {
                            Ok(()) => {
                                readable = true;
                                bad.extend(self.decode(*id, location, location.offset.into()));
                            }
                            Err(Error::Corrupt { what, .. }) => {
                                readable = true;
                                bad.push(found(*id, location.pack, &what));
                            }
                            Err(error @ Error::Io { .. }) => {
                                let Error::Io { source, .. } = &error else {
                                    continue;
                                };
                                let what = format!("it cannot be read: {source}");
                                bad.push(found(*id, location.pack, &what));
                                unreadable.get_or_insert(error);
                            }
                            Err(error) => return Err(error),
                        }
                    }
                }
                Err(error) => return Err(error),
            }
        }
        match unreadable {
            Some(error) if !readable => Err(error),
            _ => Ok(bad),
        }
    }

    /// Reads the bytes of a pack from an entry on.
    fn fetch(&mut self, first: &Location, end: u64) -> Result<()> {
        let start = u64::from(first.offset);
        let length = narrow(end.saturating_sub(start));
        if let Some(pace) = self.options.and_then(|options| options.pace.as_ref()) {
            pace(wide(length));
        }
        if self.stored.len() < length {
            self.stored.resize(length, 0);
        }
        self.repo
            .store()
            .get_range(&pack::name(first.pack), start, &mut self.stored[..length])
    }

    /// Checks a block in what was read from `start` on.
    fn decode(&mut self, id: BlockId, location: &Location, start: u64) -> Option<Bad> {
        let skip = narrow(u64::from(location.offset).saturating_sub(start));
        let end = narrow(location.end().saturating_sub(start));
        let entry = self.stored.get(skip..end).unwrap_or_default();
        let length = narrow(location.plain.into());
        if self.plain.len() < length {
            self.plain.resize(length, 0);
        }
        match decode_exactly(
            self.repo.hasher(),
            entry,
            id,
            location,
            &mut self.plain[..length],
        ) {
            Ok(()) => {
                self.blocks += 1;
                self.bytes += u64::from(location.plain);
                None
            }
            Err(damage) => Some(found(id, location.pack, damage.0)),
        }
    }
}

/// A block that is not where it should be.
pub(super) fn found(id: BlockId, pack: ObjectId, what: &str) -> Bad {
    Bad {
        id,
        pack,
        what: what.to_owned(),
    }
}

/// Neighbours that are read at once.
fn groups(places: &[Place]) -> impl Iterator<Item = &[Place]> {
    let mut rest = places;
    std::iter::from_fn(move || {
        let (_, first) = rest.first()?;
        let start = u64::from(first.offset);
        let mut end = first.end();
        let mut count = 1;
        for (_, next) in &rest[1..] {
            let at = u64::from(next.offset);
            let goes_with = next.pack == first.pack
                && (start..=end.saturating_add(GAP)).contains(&at)
                && next.end().saturating_sub(start) <= READ;
            if !goes_with {
                break;
            }
            end = end.max(next.end());
            count += 1;
        }
        let (group, after) = rest.split_at(count);
        rest = after;
        Some(group)
    })
}
