//! What a process knows of the index at one moment: the condemned packs, the runs, and the blocks that were found bad, read in
//! this order and past any cache. So whatever a snapshot answers with was not condemned when its generation was read, and
//! comparing generations later tells whether it still holds.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use super::super::block::Location;
use super::super::condemned::Condemned;
use super::super::error::{Error, Result};
use super::super::ids::{BlockId, ObjectId};
use super::super::quarantine::Quarantine;
use super::super::store::Store;
use super::run::{self, KnownPacks, Run};

/// How often the list is read again when runs vanish while it is opened.
const LIST_TRIES: usize = 10;

/// Bytes of the filters in memory, those of the smallest runs.
const FILTERS: u64 = 32 << 20;

/// The runs of one merge.
pub(super) struct Group {
    pub(super) entries: u64,
    pub(super) runs: Vec<Arc<Run>>,
}

/// The index as it was at one moment.
pub(super) struct Snapshot {
    /// Of the condemned list.
    pub(super) generation: u64,
    /// A damaged list might name any pack.
    condemned: Result<Condemned>,
    /// Those with the most entries first: they have most of the blocks.
    pub(super) runs: Vec<Arc<Run>>,
    /// Runs that could not be opened. They hide nothing that another run has, but what is found nowhere may be in them.
    pub(super) broken: Vec<Error>,
    quarantine: Quarantine,
}

impl Snapshot {
    /// Reads everything; runs that an earlier snapshot has open are not opened again.
    pub(super) fn take(store: &dyn Store, before: Option<&Self>) -> Result<Self> {
        let opened: HashMap<&str, &Arc<Run>> = before
            .iter()
            .flat_map(|before| before.runs.iter().map(|run| (&*run.object, run)))
            .collect();
        let mut tries = 0;
        'list: loop {
            let (generation, condemned) = Condemned::read_head(store)?;
            let (mut runs, mut broken) = (Vec::new(), Vec::new());
            let mut packs: KnownPacks = opened
                .values()
                .map(|run| (run.packs_digest, Arc::clone(&run.packs)))
                .collect();
            for object in store.list_fresh(run::PREFIX)? {
                if let Some(run) = opened.get(&*object) {
                    runs.push(Arc::clone(run));
                    continue;
                }
                match Run::open(store, &object, &mut packs) {
                    Ok(run) => runs.push(Arc::new(run)),
                    Err(error) if error.is_not_found() && tries < LIST_TRIES => {
                        tries += 1;
                        continue 'list;
                    }
                    Err(error @ Error::Corrupt { .. }) => {
                        tracing::warn!(%error, "an index run is not used");
                        broken.push(error);
                    }
                    Err(error) => return Err(error),
                }
            }
            runs.sort_by_key(|run| Reverse(run.entries));
            match load_filters(store, &runs) {
                Err(error) if error.is_not_found() && tries < LIST_TRIES => {
                    tries += 1;
                    continue 'list;
                }
                other => other?,
            }
            return Ok(Self {
                generation,
                condemned,
                runs,
                broken,
                quarantine: Quarantine::read(store)?,
            });
        }
    }

    /// The runs by groups, those with the most entries first.
    pub(super) fn groups(&self) -> Vec<Group> {
        let mut groups: HashMap<ObjectId, Group> = HashMap::new();
        for run in &self.runs {
            let group = groups.entry(run.group).or_insert_with(|| Group {
                entries: 0,
                runs: Vec::new(),
            });
            group.entries = group.entries.saturating_add(run.entries);
            group.runs.push(Arc::clone(run));
        }
        let mut groups: Vec<(ObjectId, Group)> = groups.into_iter().collect();
        groups.sort_by_key(|(id, group)| (Reverse(group.entries), *id));
        groups.into_iter().map(|(_, group)| group).collect()
    }

    /// Whether nobody may deduplicate against a location.
    fn excludes(&self, id: BlockId, location: &Location) -> bool {
        let condemned = match &self.condemned {
            Ok(condemned) => condemned.packs.contains(&location.pack),
            Err(_) => true,
        };
        condemned || self.quarantine.has(id, location.pack)
    }

    /// Whether a block is bad at some location.
    pub(super) fn is_quarantined(&self, id: BlockId) -> bool {
        self.quarantine.has_block(id)
    }

    /// A location that is not excluded. Damage is an error only when it may hide one.
    pub(super) fn locate(&self, store: &dyn Store, id: BlockId) -> Result<Option<Location>> {
        let mut found = None;
        let mut excluded = false;
        self.find(store, id, &mut |location| {
            if self.excludes(id, &location) {
                excluded = true;
                return false;
            }
            found = Some(location);
            true
        })?;
        match (&self.condemned, found) {
            (Err(error), None) if excluded => Err(error.repeat_damage()),
            _ => Ok(found),
        }
    }

    /// Every location and whether it is excluded, those first that are not. Damage is an error only when nothing is found.
    pub(super) fn locate_all(
        &self,
        store: &dyn Store,
        id: BlockId,
    ) -> Result<Vec<(Location, bool)>> {
        let mut found: Vec<(Location, bool)> = Vec::new();
        let searched = self.find(store, id, &mut |location| {
            if found.iter().all(|(other, _)| *other != location) {
                found.push((location, self.excludes(id, &location)));
            }
            false
        });
        match searched {
            Err(error) if found.is_empty() || error.is_not_found() => return Err(error),
            _ => {}
        }
        found.sort_by_key(|(location, excluded)| (*excluded, location.pack, location.offset));
        Ok(found)
    }

    /// Hands on locations until `each` says that it is enough. Damage is told at the end, unless that came before.
    fn find(
        &self,
        store: &dyn Store,
        id: BlockId,
        each: &mut dyn FnMut(Location) -> bool,
    ) -> Result<()> {
        let mut damage = None;
        for run in &self.runs {
            let found = match run.may_have(store, id) {
                Ok(false) => continue,
                Ok(true) => run.find(store, id, each),
                Err(error) => Err(error),
            };
            match found {
                Ok(false) => {}
                Ok(true) => return Ok(()),
                Err(error @ Error::Corrupt { .. }) => damage = Some(error),
                Err(error) => return Err(error),
            }
        }
        match (damage, self.broken.first()) {
            (Some(error), _) => Err(error),
            (None, Some(error)) => Err(error.repeat_damage()),
            (None, None) => Ok(()),
        }
    }
}

/// Takes the filters of small runs into memory, as many as may be.
fn load_filters(store: &dyn Store, runs: &[Arc<Run>]) -> Result<()> {
    let loaded = runs.iter().filter(|run| run.has_filter());
    let mut bytes: u64 = loaded.map(|run| run.filter_bytes()).sum();
    for run in runs.iter().rev().filter(|run| !run.has_filter()) {
        bytes = bytes.saturating_add(run.filter_bytes());
        if bytes > FILTERS {
            break;
        }
        run.load_filter(store)?;
    }
    Ok(())
}
