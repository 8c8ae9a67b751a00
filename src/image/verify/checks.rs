//! When which pack was checked: what lets each run go on with the packs that were not looked at for longest.
//!
//! ```text
//! checks/<16 hex digits, a counter>   JSON, kind checks: {"checked": [{"at": RFC 3339, "packs": ["<32 hex>", ...]}, ...]}
//! ```
//!
//! A run adds an object now and then, so that one that is killed is gone on with; at its end all are folded into one, without
//! the packs that are gone.

use std::collections::{BTreeMap, HashMap};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::super::envelope;
use super::super::error::{Error, Result};
use super::super::ids::{ObjectId, hex, unhex};
use super::super::store::Store;

const PREFIX: &str = "checks/";
const KIND: &str = "checks";
/// How often a number is looked for that another run did not take.
const TRIES: u64 = 1000;

#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    checked: Vec<Group>,
}

/// Packs that were checked at about the same time.
#[derive(Debug, Serialize, Deserialize)]
struct Group {
    at: Timestamp,
    packs: Vec<ObjectId>,
}

/// What is known of all packs.
#[derive(Debug, Default)]
pub(super) struct Checks {
    at: HashMap<ObjectId, Timestamp>,
    /// What no object holds yet.
    fresh: Vec<ObjectId>,
    /// The objects that this was read from or written to.
    objects: Vec<String>,
    /// A number that was free.
    next: u64,
}

fn number(object: &str) -> Option<u64> {
    Some(u64::from_be_bytes(unhex(object.strip_prefix(PREFIX)?)?))
}

impl Checks {
    /// Reads what there is. A damaged object is given in `damaged` and goes with the next fold: its packs count as never checked.
    pub(super) fn read(store: &dyn Store, damaged: &mut Vec<Error>) -> Result<Self> {
        let mut checks = Self::default();
        for object in store.list_fresh(PREFIX)? {
            let read = store
                .get(&object)
                .and_then(|bytes| envelope::open::<Record>(KIND, &object, &bytes));
            match read {
                Ok(record) => {
                    for Group { at, packs } in record.checked {
                        for pack in packs {
                            let known = checks.at.entry(pack).or_insert(at);
                            *known = at.max(*known);
                        }
                    }
                }
                // Folded by another run.
                Err(error) if error.is_not_found() => continue,
                Err(error @ Error::Corrupt { .. }) => damaged.push(error),
                Err(error) => return Err(error),
            }
            checks.next = number(&object).unwrap_or(0).max(checks.next);
            checks.objects.push(object);
        }
        checks.next = checks.next.saturating_add(1);
        Ok(checks)
    }

    /// When a pack was last checked.
    pub(super) fn last(&self, pack: ObjectId) -> Option<Timestamp> {
        self.at.get(&pack).copied()
    }

    /// A pack has been checked.
    pub(super) fn done(&mut self, pack: ObjectId, at: Timestamp) {
        self.at.insert(pack, at);
        self.fresh.push(pack);
    }

    /// Writes what was checked since the last time.
    pub(super) fn flush(&mut self, store: &dyn Store) -> Result<()> {
        let packs = std::mem::take(&mut self.fresh);
        let written = self.put(store, packs.iter().copied());
        if written.is_err() {
            self.fresh = packs;
        }
        written
    }

    /// Makes one object of all, without the packs that are gone.
    pub(super) fn fold(
        &mut self,
        store: &dyn Store,
        exists: &dyn Fn(ObjectId) -> bool,
    ) -> Result<()> {
        self.at.retain(|pack, _| exists(*pack));
        if self.objects.len() <= 1 && self.fresh.is_empty() {
            return Ok(());
        }
        let before = std::mem::take(&mut self.objects);
        let all: Vec<ObjectId> = self.at.keys().copied().collect();
        match self.put(store, all.into_iter()) {
            Ok(()) => {
                self.fresh.clear();
                store.delete(&before)
            }
            Err(error) => {
                self.objects = before;
                Err(error)
            }
        }
    }

    fn put(&mut self, store: &dyn Store, packs: impl Iterator<Item = ObjectId>) -> Result<()> {
        let mut groups: BTreeMap<Timestamp, Vec<ObjectId>> = BTreeMap::new();
        for pack in packs {
            if let Some(at) = self.at.get(&pack) {
                groups.entry(*at).or_default().push(pack);
            }
        }
        if groups.is_empty() {
            return Ok(());
        }
        let checked = groups.into_iter().map(|(at, mut packs)| {
            packs.sort_unstable();
            Group { at, packs }
        });
        let record = Record {
            checked: checked.collect(),
        };
        let bytes = envelope::seal(KIND, &record)?;
        let last = self.next.saturating_add(TRIES);
        loop {
            let object = format!("{PREFIX}{}", hex(&self.next.to_be_bytes()));
            self.next = self.next.saturating_add(1);
            match store.put(&object, &bytes) {
                Ok(()) => {
                    self.objects.push(object);
                    return Ok(());
                }
                // Another run's.
                Err(Error::Exists { .. }) if self.next < last => {}
                Err(error) => return Err(error),
            }
        }
    }
}
