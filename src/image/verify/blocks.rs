//! Verifying points: every distinct block that they need is read once, in the order of the packs.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::super::error::{Error, Result};
use super::super::ids::{BlockId, ObjectId};
use super::super::map::{Layer, LayerRef, RunContent, Shown};
use super::places::{Place, Places};
use super::structure::missing;
use super::{Verify, VerifyReport, as_damage, in_parallel, lock};

/// So many ids are held in memory at a time.
pub(super) const PART: u64 = 8 << 20;
/// Blocks that a worker looks up, or reads, at a time.
const CHUNK: usize = 64;
/// How often blocks are looked up again whose packs are gone.
const TRIES: usize = 3;

/// The maps of points, as far as they can be read.
#[derive(Default)]
pub(super) struct Maps {
    pub(super) layers: HashMap<ObjectId, Arc<Layer>>,
    pub(super) shown: Shown,
}

/// The distinct blocks that maps show, a part of the ids at a time, the parts in their order. What is hidden may be gone.
pub(super) struct Parts<'a> {
    maps: &'a Maps,
    count: u64,
    next: u64,
}

impl<'a> Parts<'a> {
    pub(super) fn new(maps: &'a Maps) -> Self {
        let layers = maps.layers.values();
        let total: u64 = layers.map(|layer| layer.totals.data).sum();
        Self {
            maps,
            count: total / PART + 1,
            next: 0,
        }
    }

    /// Which part an id is in.
    pub(super) fn of(&self, id: BlockId) -> u64 {
        let part = (u128::from(id.leading()) * u128::from(self.count)) >> 64;
        u64::try_from(part).unwrap_or(u64::MAX)
    }

    /// The number and the sorted ids of the next part.
    pub(super) fn next(&mut self) -> Result<Option<(u64, Vec<BlockId>)>> {
        let part = self.next;
        if part >= self.count {
            return Ok(None);
        }
        self.next += 1;
        let mut ids = Vec::new();
        let open = |layer: &LayerRef| {
            let opened = self.maps.layers.get(&layer.id).cloned();
            opened.ok_or_else(|| Error::corrupt(layer.object(), "it could not be opened"))
        };
        for (place, _) in self.maps.shown.places() {
            let mut runs = self.maps.shown.stream(place, &open)?;
            while let Some(run) = runs.next_run()? {
                if let RunContent::Data(more) = &run.content {
                    let ours = |id: &&BlockId| self.of(**id) == part;
                    ids.extend(more.as_slice().iter().filter(ours).copied());
                }
            }
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(Some((part, ids)))
    }
}

impl Verify<'_> {
    /// Reads every distinct block of the maps.
    pub(super) fn blocks(&mut self, maps: &Maps, report: &mut VerifyReport) -> Result<()> {
        let mut parts = Parts::new(maps);
        while let Some((_, ids)) = parts.next()? {
            if self.is_late() {
                report.complete = false;
                break;
            }
            let mut ids = ids;
            for _ in 0..TRIES {
                let places = self.locate(&ids)?;
                ids = self.read_places(&places, report)?;
                if ids.is_empty() {
                    break;
                }
                // Their packs were repacked meanwhile.
                self.repo.index().refresh()?;
            }
            for id in ids {
                for (location, _) in self.repo.index().locate_all(id)? {
                    if self.repo.is_missing(location.pack)? {
                        self.found.push(missing(id, location.pack));
                    }
                }
            }
        }
        Ok(())
    }

    /// Where blocks are, in the order of the packs.
    fn locate(&mut self, ids: &[BlockId]) -> Result<Vec<Place>> {
        let repo = self.repo;
        let found = Mutex::new(Vec::with_capacity(ids.len()));
        let lost = Mutex::new(Vec::new());
        in_parallel(self.threads, CHUNK, ids, &|| false, &|ids| {
            self.options.go_on()?;
            let mut some = Vec::with_capacity(ids.len());
            for id in ids {
                match repo.index().locate_stored(*id) {
                    Ok(location) => some.push((*id, location)),
                    Err(error) => lock(&lost).push((*id, as_damage(error)?)),
                }
            }
            lock(&found).append(&mut some);
            Ok(())
        })?;
        let lost = lost.into_inner().unwrap_or_default();
        self.absent.extend(lost.iter().map(|(id, _)| *id));
        self.lost.extend(lost);
        let mut found = found.into_inner().unwrap_or_default();
        found.sort_unstable_by_key(|(_, location)| (location.pack, location.offset));
        Ok(found)
    }

    /// Reads places that are in order; gives the blocks whose packs are gone.
    fn read_places(&mut self, places: &[Place], report: &mut VerifyReport) -> Result<Vec<BlockId>> {
        let repo = self.repo;
        let options = self.options;
        options.begin(
            "verify",
            places.iter().map(|(_, location)| location.length()).sum(),
        );
        let gone = Mutex::new(Vec::new());
        let found = Mutex::new(Vec::new());
        let counted = Mutex::new((0, 0));
        let late = || self.is_late();
        let done = in_parallel(self.threads, CHUNK, places, &late, &|places| {
            let mut reader = Places::new(repo, Some(options));
            for one in places.chunk_by(|(_, a), (_, b)| a.pack == b.pack) {
                match reader.read(one) {
                    Ok(mut bad) => lock(&found).append(&mut bad),
                    Err(Error::NotFound { .. }) => {
                        lock(&gone).extend(one.iter().map(|(id, _)| *id));
                    }
                    // Whoever asked for it is asked again before the next.
                    Err(Error::Interrupted) => break,
                    Err(error) => return Err(error),
                }
            }
            let mut counted = lock(&counted);
            counted.0 += reader.blocks;
            counted.1 += reader.bytes;
            Ok(())
        })?;
        let (blocks, bytes) = counted.into_inner().unwrap_or_default();
        report.checked_blocks += blocks;
        report.checked_bytes += bytes;
        report.complete &= done && !options.is_interrupted();
        self.found
            .append(&mut found.into_inner().unwrap_or_default());
        Ok(gone.into_inner().unwrap_or_default())
    }
}
