//! The look: a writer deduplicates without a lock, publishes what it refers to (a segment of its session), and only *then* looks
//! whether packs were condemned since it began. Whoever condemns later marks again, sees the segment, and spares the pack.
//!
//! ```text
//! writer     snapshot of generation g ... packs, index run, segment | generation still g?  -> safe
//! prune                                     condemn: generation g+1 | mark again, spare, delete
//! ```
//!
//! One of the two always sees the other. What was condemned counts as not stored: the segment goes and the blocks are stored anew.

use std::collections::{HashMap, HashSet};

use super::condemned::Condemned;
use super::error::{Error, Result};
use super::ids::ObjectId;
use super::map::{RunContent, RunSource};
use super::pack;
use super::repo::Repository;

/// How often packs may be condemned while it looks.
const TRIES: usize = 50;

impl Repository {
    /// The generation that blocks are deduplicated against: to be asked before the first of the blocks that are proved together.
    pub fn generation(&self) -> Result<u64> {
        self.index().generation()
    }

    /// Whether all blocks of data in `runs` may be relied on, when they were found in a snapshot of generation `since` or a later
    /// one; of none that is known without.
    pub(super) fn look(
        &self,
        since: Option<u64>,
        runs: &dyn Fn() -> Result<Box<dyn RunSource>>,
    ) -> Result<bool> {
        let mut known = since;
        for _ in 0..TRIES {
            if known == Some(Condemned::generation(self.store())?) {
                return Ok(true);
            }
            self.index().refresh()?;
            let generation = self.index().generation()?;
            if !self.has_all(&mut *runs()?)? {
                return Ok(false);
            }
            known = Some(generation);
        }
        Err(Error::Busy {
            object: "the list of condemned packs".into(),
            holder: "whoever prunes again and again".into(),
        })
    }

    /// Whether every block of data is where nothing stands against it, in a pack that is there.
    fn has_all(&self, runs: &mut dyn RunSource) -> Result<bool> {
        let mut packs = Present::default();
        while let Some(run) = runs.next_run()? {
            let RunContent::Data(ids) = &run.content else {
                continue;
            };
            for id in ids.as_slice() {
                match self.index().locate(*id) {
                    Ok(Some(location)) if packs.has(self, location.pack)? => {}
                    Ok(_) => return Ok(false),
                    Err(error @ Error::Corrupt { .. }) => {
                        tracing::debug!(%error, "a block counts as not stored");
                        return Ok(false);
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(true)
    }
}

/// Which packs there are, past any cache.
#[derive(Default)]
pub(super) struct Present {
    listed: HashMap<String, HashSet<ObjectId>>,
}

impl Present {
    /// Whether a pack is there.
    pub(super) fn has(&mut self, repo: &Repository, pack: ObjectId) -> Result<bool> {
        let object = pack::name(pack);
        let (directory, _) = object.rsplit_once('/').unwrap_or_default();
        if let Some(listed) = self.listed.get(directory) {
            return Ok(listed.contains(&pack));
        }
        let listed = beside(repo, pack)?;
        let is_there = listed.contains(&pack);
        self.listed.insert(directory.to_owned(), listed);
        Ok(is_there)
    }
}

/// The packs whose names begin as this one's does, past any cache.
pub(super) fn beside(repo: &Repository, pack: ObjectId) -> Result<HashSet<ObjectId>> {
    let object = pack::name(pack);
    let (directory, _) = object.rsplit_once('/').unwrap_or_default();
    let names = repo.store().list_fresh(&format!("{directory}/"))?;
    let id = |name: &String| name.rsplit('/').next()?.parse().ok();
    Ok(names.iter().filter_map(id).collect())
}
