//! The actors: the real code of the repository, as writers, forgets, prunes and readers call it.

use std::sync::Arc;

use forerun::image::{
    BlockId, Encoded, Entry, Error, Item, Manifest, MapReader, MapRef, PruneOptions, Repository,
    Session, build_map,
};
use forerun::units::BlockRun;
use serde_json::json;

use super::image_common::{manifest_of, segment_header};
use super::world::{Dice, Role, View, World};

/// The most blocks of a disk, which is cut and grown from point to point. The repository takes short blocks, which are quick to hash.
pub(crate) const BLOCKS: u64 = 4;
/// Bytes of a block of the disk.
const BLOCK: u64 = 65536;
/// Few contents: everybody deduplicates against everybody, and against what is dying.
const CONTENTS: u64 = 9;

fn content(value: u64) -> Vec<u8> {
    format!("content {value:03}").into_bytes()
}

/// All blocks of data of a map.
pub(crate) fn blocks_of(repo: &Repository, map: &MapRef) -> Result<Vec<BlockId>, Error> {
    let reader = MapReader::open(repo, map)?;
    let mut ids = Vec::new();
    for block in 0..reader.blocks() {
        match reader.get(block)? {
            Entry::Data(id) => ids.push(id),
            Entry::Zero => {}
            Entry::Unset => {
                return Err(Error::Corrupt {
                    object: "a map".into(),
                    what: format!("block {block} is not set"),
                });
            }
        }
    }
    Ok(ids)
}

/// An actor on its thread.
pub(crate) struct Player {
    pub(crate) world: Arc<World>,
    pub(crate) number: usize,
    pub(crate) role: Role,
    pub(crate) dice: Dice,
}

impl Player {
    pub(crate) fn play(mut self, rounds: u64) {
        for _ in 0..rounds {
            // A new process each time.
            let view = View::of(&self.world, self.number, self.role);
            let played = match self.role {
                Role::Writer => self.write(&view),
                Role::Forget => self.forget(&view),
                Role::Prune => self.prune(&view),
                Role::Reader => self.read(&view),
            };
            let killed = self.world.revive(self.number);
            match played {
                Err(error) if !killed && !may_happen(&error) => {
                    self.world.fail(format!("{:?}: {error}", self.role));
                }
                _ => {}
            }
            if self.world.failure().is_some() {
                break;
            }
        }
        self.world.end(self.number);
    }

    fn write(&mut self, view: &View) -> Result<(), Error> {
        let repo = view.open()?;
        let key = format!("target {}", self.number);
        let points = repo.points()?.points;
        let mut last: Option<Manifest> = points.into_iter().rfind(|point| point.target.key == key);
        let session = match Session::find(&repo, &key)? {
            Some(session) => {
                if last
                    .as_ref()
                    .is_some_and(|last| last.session == session.id())
                {
                    self.world.release(&session.id().to_string());
                    return session.remove();
                }
                // What was looked at, but nothing was done upon it yet, may be taken back.
                if session.settle()?.is_some() {
                    self.world.release(&session.id().to_string());
                }
                // What it builds on is in its header.
                let based = session.header()["base"].as_str().map(str::to_owned);
                if let Some(point) = &based {
                    match last.take() {
                        Some(known) if known.id.to_string() == *point => last = Some(known),
                        _ => {
                            // The point is forgotten, and this test kept its map nowhere else.
                            self.world.release(&session.id().to_string());
                            return session.remove();
                        }
                    }
                } else {
                    last = None;
                }
                session
            }
            None => {
                let base = last.as_ref().map(|last| last.id);
                Session::create(&repo, &key, &json!({ "base": base }))?
            }
        };
        if let Some(base) = &last {
            session.append_with_roots(&json!({}), &[base.disks[0].map.clone()])?;
            if !repo.has_point(base.id)? {
                self.world.release(&session.id().to_string());
                return session.remove();
            }
            let blocks = blocks_of(&repo, &base.disks[0].map)?;
            self.world.promise(&session.id().to_string(), &blocks);
        }
        let segments = segments(&session)?;
        if last.is_none() && segments.is_empty() {
            let all: Vec<u64> = (0..BLOCKS).collect();
            self.copy(&repo, &session, &all)?;
        }
        for _ in 0..self.dice.below(3) {
            let block = self.dice.below(BLOCKS);
            self.copy(&repo, &session, &[block])?;
        }
        match self.dice.below(8) {
            // It goes on another day.
            0 | 1 => return Ok(()),
            2 => {
                self.world.release(&session.id().to_string());
                return session.remove();
            }
            _ => {}
        }
        let base = last.as_ref().map(|last| &last.disks[0].map);
        let mut size = BLOCKS * BLOCK;
        if self.dice.below(3) == 0 {
            size -= self.dice.below(3) * BLOCK;
        }
        // What the base does not have must be set.
        let known = base.map_or(BLOCKS, |base| base.size / BLOCK);
        let new: Vec<u64> = (known..size / BLOCK).collect();
        if !new.is_empty() {
            self.copy(&repo, &session, &new)?;
        }
        let segments = self::segments(&session)?;
        let (map, _) = build_map(&repo, base, &session, &segments, size)?;
        let manifest = manifest_of(&key, map, &session, last.as_ref())?;
        session.publish(&manifest)?;
        self.world.release(&session.id().to_string());
        session.remove()
    }

    /// Stores and proves blocks, again when they were condemned meanwhile.
    fn copy(&mut self, repo: &Repository, session: &Session, blocks: &[u64]) -> Result<(), Error> {
        let plain: Vec<Vec<u8>> = blocks
            .iter()
            .map(|_| content(self.dice.below(CONTENTS)))
            .collect();
        for _ in 0..30 {
            let since = repo.generation()?;
            let mut writer = repo.pack_writer(&format!("{} vda 1", session.id()));
            let mut proofs = Vec::new();
            let mut ids = Vec::new();
            for (block, plain) in blocks.iter().zip(&plain) {
                let one = BlockRun {
                    first: *block,
                    count: 1,
                };
                let encoded = repo.encode(plain)?;
                ids.push(match &encoded {
                    Encoded::Known(id) => *id,
                    Encoded::New(new) => new.id(),
                    Encoded::Zero => continue,
                });
                proofs.push((one, writer.put(encoded)?));
            }
            writer.seal()?;
            match session.prove(&segment_header(), &proofs, since) {
                Err(Error::Condemned { .. }) => {}
                // Who dies before the look has nothing: it looks again when it goes on.
                done => {
                    done?;
                    self.world.promise(&session.id().to_string(), &ids);
                    return Ok(());
                }
            }
        }
        Err(Error::Invalid(
            "a block is condemned again and again".into(),
        ))
    }

    fn forget(&mut self, view: &View) -> Result<(), Error> {
        let repo = view.open()?;
        let points = repo.points()?.points;
        // Not always: there must be something to find, too.
        if points.is_empty() || self.dice.below(4) == 0 {
            return Ok(());
        }
        let chosen = self.dice.below(points.len() as u64) as usize;
        repo.withdraw(points[chosen].id)
    }

    fn prune(&mut self, view: &View) -> Result<(), Error> {
        let repo = view.open()?;
        repo.prune(&PruneOptions::default(), &|_, _, _| ())
            .map(drop)
    }

    fn read(&mut self, view: &View) -> Result<(), Error> {
        let repo = view.open()?;
        let points = repo.points()?.points;
        if points.is_empty() {
            return Ok(());
        }
        let point = &points[self.dice.below(points.len() as u64) as usize];
        let lease = repo.lease(&[point], "a reader")?;
        assert!(lease.is_some() || self.world.is_dead(self.number));
        let ids = blocks_of(&repo, &point.disks[0].map)?;
        let name = format!("reader {}", self.number);
        self.world.promise(&name, &ids);
        let read = ids.iter().try_for_each(|id| repo.read_block(*id).map(drop));
        self.world.release(&name);
        drop(lease);
        read
    }
}

/// The segments of a session.
fn segments(session: &Session) -> Result<Vec<forerun::image::SegmentRef>, Error> {
    let items = session.items()?.into_iter();
    Ok(items
        .filter_map(|item| match item {
            Item::Segment(segment) => Some(segment),
            Item::Record(_) => None,
        })
        .collect())
}

/// Errors that are part of life: another one is at it, or what was looked for has gone.
fn may_happen(error: &Error) -> bool {
    matches!(
        error,
        Error::Busy { .. } | Error::NotFound { .. } | Error::Exists { .. }
    )
}
