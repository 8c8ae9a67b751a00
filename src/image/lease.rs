//! Leases: a reader's claim on the maps that it reads, so that a point that is forgotten meanwhile stays whole for it.
//!
//! ```text
//! locks/lease-<32 hex>    the store lock that the reader holds; a dead reader lets go
//! leases/<32 hex>         JSON, kind lease: {"maps": [...]}; published while the lock is held
//! ```
//!
//! The lock is taken first, so a lease without one is a dead reader's. The reader looks only *after* its lease is published whether
//! the point still exists: a prune that did not see the lease saw the point.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::envelope;
use super::error::{Error, Result};
use super::ids::ObjectId;
use super::manifest::Manifest;
use super::map::MapRef;
use super::repo::Repository;
use super::store::{Holder, StoreLock};

const PREFIX: &str = "leases/";
const LOCK: &str = "lease-";
const KIND: &str = "lease";
/// How often another name is tried.
const TRIES: u32 = 10;

#[derive(Serialize, Deserialize)]
struct Record {
    maps: Vec<MapRef>,
}

/// A reader's claim; dropping it lets go.
pub struct Lease {
    repo: Repository,
    /// Its object and its lock's file.
    objects: [String; 2],
    _lock: StoreLock,
}

impl Repository {
    /// Claims the maps of points for a reader, and then looks whether the points still exist. A reader that may not write to the
    /// repository, or finds it full, goes without: it fails, at worst, and never reads anything wrong.
    pub fn lease(&self, points: &[&Manifest], who: &str) -> Result<Option<Lease>> {
        let maps = points.iter().flat_map(|point| &point.disks);
        let maps: Vec<MapRef> = maps.map(|disk| disk.map.clone()).collect();
        let lease = match self.lease_maps(maps, who) {
            Ok(lease) => Some(lease),
            Err(error @ (Error::Io { .. } | Error::NoSpace { .. } | Error::NotFound { .. })) => {
                tracing::warn!(%error, "no lease could be written: a prune meanwhile may end this read");
                None
            }
            Err(error) => return Err(error),
        };
        for point in points {
            self.still_exists(point)?;
        }
        Ok(lease)
    }

    fn lease_maps(&self, maps: Vec<MapRef>, who: &str) -> Result<Lease> {
        let mut tries = 0;
        let (id, lock, held) = loop {
            let id = ObjectId::random()?;
            let lock = format!("{LOCK}{id}");
            match self.store().lock(&lock, who) {
                Ok(held) => break (id, lock, held),
                // A prune that looks who is alive had it in its hands.
                Err(Error::Busy { .. }) if tries < TRIES => tries += 1,
                Err(error) => return Err(error),
            }
        };
        let object = format!("{PREFIX}{id}");
        self.store()
            .put(&object, &envelope::seal(KIND, &Record { maps })?)?;
        Ok(Lease {
            repo: self.clone(),
            objects: [object, format!("locks/{lock}")],
            _lock: held,
        })
    }

    fn still_exists(&self, point: &Manifest) -> Result<()> {
        if self.has_point(point.id)? {
            return Ok(());
        }
        Err(Error::NotFound {
            object: format!("point {} (it was forgotten meanwhile)", point.id),
        })
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Err(error) = self.repo.store().delete(&self.objects) {
            tracing::debug!(%error, "a lease stays until the next prune");
        }
    }
}

/// The leases there are.
#[derive(Default)]
pub(super) struct Leases {
    /// The maps of living readers.
    pub(super) maps: Vec<MapRef>,
    /// Objects of dead ones.
    pub(super) dead: Vec<String>,
}

/// Reads the leases, past any cache.
pub(super) fn read(repo: &Repository) -> Result<Leases> {
    let store = repo.store();
    let objects = store.list_fresh(PREFIX)?;
    let mut leases = Leases::default();
    if objects.is_empty() {
        return Ok(leases);
    }
    let held = store.held(LOCK)?;
    let living: HashSet<&str> = held
        .iter()
        .filter_map(|(name, _)| name.strip_prefix(LOCK))
        .collect();
    for object in objects {
        let id = object.strip_prefix(PREFIX).unwrap_or_default();
        if !living.contains(id) {
            leases.dead.push(object);
            continue;
        }
        let read = store
            .get(&object)
            .and_then(|bytes| envelope::open::<Record>(KIND, &object, &bytes));
        match read {
            Ok(record) => leases.maps.extend(record.maps),
            // Its reader has ended.
            Err(Error::NotFound { .. }) => {}
            Err(error) => {
                let holder = held.iter().find(|(name, _)| name.ends_with(id));
                let holder = holder.map_or("", |(_, text)| text);
                return Err(Error::Busy {
                    object: format!("{object}, which cannot be read ({error}),"),
                    holder: Holder::words(holder),
                });
            }
        }
    }
    Ok(leases)
}
