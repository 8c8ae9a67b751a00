//! Verification: every object that the chosen points need is read, every distinct block of them once and re-hashed, and what is
//! damaged is named together with the points and disks that it hurts.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::block::{Location, decode_entry};
use super::bytes::narrow;
use super::error::{Error, Result};
use super::ids::{BlockId, ObjectId, PointId};
use super::manifest::Manifest;
use super::map::{Layer, LayerRef, MAP, MapReader, RunContent, RunSource};
use super::pack::{self, entry_length};
use super::repo::Repository;
use crate::clock::Deadline;

/// So many ids are held in memory at a time.
const PART: u64 = 16 << 20;
/// Blocks that a worker takes at a time.
const CHUNK: usize = 64;

/// What to verify.
#[derive(Debug, Clone, Default)]
pub struct VerifyOptions {
    /// Only these points, and not the objects that none of them needs.
    pub points: Option<Vec<PointId>>,
    /// Threads that read and hash; 0 counts as 1.
    pub threads: usize,
    /// Reading blocks ends after this time, and the report says that it is not complete.
    pub max_duration: Option<Duration>,
}

/// A damaged or missing object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Its name.
    pub object: String,
    /// How it is damaged.
    pub what: String,
    /// The points it hurts, each with the disk; no disk when the point itself is damaged.
    pub hurts: BTreeSet<(PointId, Option<String>)>,
}

/// What was verified and found.
#[derive(Debug, Clone, Default)]
pub struct VerifyReport {
    /// Points chosen.
    pub points: u64,
    /// Distinct blocks that were read and re-hashed.
    pub checked_blocks: u64,
    /// Their plain bytes.
    pub checked_bytes: u64,
    /// Whether all of them were.
    pub complete: bool,
    /// What is damaged.
    pub damage: Vec<Damage>,
}

type Hurts = BTreeSet<(PointId, Option<String>)>;

impl Repository {
    /// Verifies points, or everything.
    pub fn verify(&self, options: &VerifyOptions) -> Result<VerifyReport> {
        let mut verify = Verify {
            repo: self,
            threads: options.threads.max(1),
            deadline: options.max_duration.map(Deadline::after),
            report: VerifyReport {
                complete: true,
                ..VerifyReport::default()
            },
            bad_blocks: BTreeMap::new(),
        };
        let points = verify.choose(options.points.as_deref())?;
        verify.report.points = points.len() as u64;
        let layers = verify.layers(&points)?;
        verify.blocks(&layers)?;
        verify.attribute(&points)?;
        if options.points.is_none() {
            verify.structure()?;
        }
        Ok(verify.report)
    }
}

struct Verify<'a> {
    repo: &'a Repository,
    threads: usize,
    deadline: Option<Deadline>,
    report: VerifyReport,
    /// What is wrong with which block: the object and how.
    bad_blocks: BTreeMap<BlockId, (String, String)>,
}

/// The object and the fault of an error that is damage; other errors end the verification.
fn as_damage(error: Error) -> Result<(String, String)> {
    match error.missing_is_corrupt() {
        Error::Corrupt { object, what } => Ok((object, what)),
        Error::Unsupported(what) => Ok(("a point".into(), what)),
        other => Err(other),
    }
}

impl Verify<'_> {
    fn damage(&mut self, object: String, what: String, hurts: Hurts) {
        let known = self
            .report
            .damage
            .iter_mut()
            .find(|damage| damage.object == object);
        match known {
            Some(known) => {
                known.hurts.extend(hurts);
                if !known.what.contains(&what) && known.what.len() < 4096 {
                    known.what = format!("{}; {what}", known.what);
                }
            }
            None => self.report.damage.push(Damage {
                object,
                what,
                hurts,
            }),
        }
    }

    /// The manifests of the chosen points; damaged ones go into the report.
    fn choose(&mut self, chosen: Option<&[PointId]>) -> Result<Vec<Manifest>> {
        let Some(chosen) = chosen else {
            let points = self.repo.points()?;
            for error in points.damaged {
                let (object, what) = as_damage(error)?;
                let id = object
                    .strip_prefix("points/")
                    .and_then(|id| id.parse().ok());
                self.damage(object, what, id.map(|id| (id, None)).into_iter().collect());
            }
            return Ok(points.points);
        };
        let mut points = Vec::new();
        for id in chosen {
            match self.repo.point(*id) {
                Ok(point) => points.push(point),
                Err(error) => {
                    let (object, what) = as_damage(error)?;
                    self.damage(object, what, [(*id, None)].into());
                }
            }
        }
        Ok(points)
    }

    /// The distinct layers of the points that can be read, each opened; the damaged ones go into the report.
    fn layers(&mut self, points: &[Manifest]) -> Result<Vec<Arc<Layer>>> {
        let mut users: HashMap<ObjectId, (&LayerRef, Hurts)> = HashMap::new();
        for point in points {
            for disk in &point.disks {
                for layer in &disk.map.layers {
                    let (_, hurts) = users.entry(layer.id).or_insert((layer, Hurts::new()));
                    hurts.insert((point.id, Some(disk.key.clone())));
                }
            }
        }
        let mut layers = Vec::new();
        for (layer, hurts) in users.into_values() {
            match self.read_layer(layer) {
                Ok(layer) => layers.push(layer),
                Err(error) => {
                    let (object, what) = as_damage(error)?;
                    self.damage(object, what, hurts);
                }
            }
        }
        Ok(layers)
    }

    fn read_layer(&self, layer: &LayerRef) -> Result<Arc<Layer>> {
        let store = self.repo.store_arc();
        let opened = Layer::open(store, &layer.object(), MAP, Some(layer.digest))?;
        let opened = Arc::new(opened);
        let mut runs = opened.stream();
        while runs.next_run()?.is_some() {}
        Ok(opened)
    }

    /// Reads every distinct block of the layers, a part of the ids at a time.
    fn blocks(&mut self, layers: &[Arc<Layer>]) -> Result<()> {
        let total: u64 = layers.iter().map(|layer| layer.totals.data).sum();
        let parts = total / PART + 1;
        for part in 0..parts {
            let mut ids = Vec::new();
            for layer in layers {
                let mut runs = layer.stream();
                while let Some(run) = runs.next_run()? {
                    if let RunContent::Data(more) = &run.content {
                        let ours = |id: &&BlockId| {
                            (u128::from(id.leading()) * u128::from(parts)) >> 64 == u128::from(part)
                        };
                        ids.extend(more.as_slice().iter().filter(ours).copied());
                    }
                }
            }
            ids.sort_unstable();
            ids.dedup();
            self.check_blocks(&ids)?;
        }
        Ok(())
    }

    fn check_blocks(&mut self, ids: &[BlockId]) -> Result<()> {
        let located = Shared::default();
        self.in_parallel(ids, |id| {
            let location = self.repo.index().locate_stored(*id);
            located.add(*id, location)
        })?;
        let mut blocks: Vec<(BlockId, Location)> = located.good.into_inner().unwrap_or_default();
        self.bad_blocks
            .extend(located.bad.into_inner().unwrap_or_default());
        blocks.sort_unstable_by_key(|(_, location)| (location.pack, location.offset));
        let read = Shared::default();
        let (count, bytes) = (AtomicU64::new(0), AtomicU64::new(0));
        let done = self.in_parallel(&blocks, |(id, location)| {
            count.fetch_add(1, Ordering::Relaxed);
            bytes.fetch_add(u64::from(location.plain), Ordering::Relaxed);
            read.add(*id, self.check_or_again(*id, location))
        })?;
        self.bad_blocks
            .extend(read.bad.into_inner().unwrap_or_default());
        self.report.checked_blocks += count.into_inner();
        self.report.checked_bytes += bytes.into_inner();
        self.report.complete &= done;
        Ok(())
    }

    /// A pack that is gone was repacked since the block was located.
    fn check_or_again(&self, id: BlockId, location: &Location) -> Result<()> {
        match self.check(id, location) {
            Err(error) if error.is_not_found() => {
                self.repo.index().refresh_as_gone(location.pack)?;
                self.check(id, &self.repo.index().locate_stored(id)?)
            }
            other => other,
        }
    }

    fn check(&self, id: BlockId, location: &Location) -> Result<()> {
        let object = pack::name(location.pack);
        let mut entry = vec![0; entry_length(location)];
        let offset = u64::from(location.offset);
        self.repo.store().get_range(&object, offset, &mut entry)?;
        let mut plain = vec![0; narrow(u64::from(location.plain))];
        decode_entry(self.repo.hasher(), &entry, id, &mut plain)
            .map_err(|damage| Error::corrupt(object, format!("block {id}: {}", damage.0)))
    }

    /// Does something with every item, in order as far as threads allow. `false` when the time was up before.
    fn in_parallel<T: Sync>(
        &self,
        items: &[T],
        work: impl Fn(&T) -> Result<()> + Sync,
    ) -> Result<bool> {
        let next = AtomicUsize::new(0);
        let late = AtomicBool::new(false);
        let worker = || -> Result<()> {
            loop {
                let start = next.fetch_add(CHUNK, Ordering::Relaxed);
                let Some(rest) = items.get(start..).filter(|rest| !rest.is_empty()) else {
                    return Ok(());
                };
                if self.deadline.is_some_and(Deadline::passed) {
                    late.store(true, Ordering::Relaxed);
                    return Ok(());
                }
                rest.iter().take(CHUNK).try_for_each(&work)?;
            }
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..self.threads).map(|_| scope.spawn(worker)).collect();
            workers.into_iter().try_for_each(|worker| {
                worker
                    .join()
                    .unwrap_or_else(|_| Err(Error::Invalid("a verify worker panicked".into())))
            })
        })?;
        Ok(!late.into_inner())
    }

    /// Names the points that bad blocks hurt, and finds maps with holes.
    fn attribute(&mut self, points: &[Manifest]) -> Result<()> {
        let bad = std::mem::take(&mut self.bad_blocks);
        let mut hurts: HashMap<BlockId, Hurts> = HashMap::new();
        for point in points {
            for disk in &point.disks {
                let who = (point.id, Some(disk.key.clone()));
                let walked = MapReader::open(self.repo, &disk.map).and_then(|map| {
                    for run in map.runs() {
                        if let RunContent::Data(ids) = &run?.content {
                            for id in ids.as_slice().iter().filter(|id| bad.contains_key(id)) {
                                hurts.entry(*id).or_default().insert(who.clone());
                            }
                        }
                    }
                    Ok(())
                });
                if let Err(error) = walked {
                    let (object, what) = as_damage(error)?;
                    self.damage(object, what, [who].into());
                }
            }
        }
        for (id, hurts) in hurts {
            if let Some((object, what)) = bad.get(&id) {
                self.damage(object.clone(), what.clone(), hurts);
            }
        }
        Ok(())
    }

    /// Checks what restoring does not need: the packs' own indexes, and the index runs against the packs.
    fn structure(&mut self) -> Result<()> {
        let mut sizes = HashMap::new();
        for object in self.repo.store().list("packs/")? {
            match pack::open(self.repo.store(), &object) {
                Ok(index) => {
                    sizes.insert(index.id, self.repo.store().size(&object)?);
                }
                // Pruned meanwhile.
                Err(error) if error.is_not_found() => {}
                Err(error) => {
                    let id = object.rsplit('/').next().and_then(|id| id.parse().ok());
                    if let (Some(id), Ok(size)) = (id, self.repo.store().size(&object)) {
                        sizes.insert(id, size);
                    }
                    let (object, what) = as_damage(error)?;
                    self.damage(object, what, Hurts::new());
                }
            }
        }
        // A pack that is not listed may be newer than the list.
        let store = self.repo.store();
        let now = |pack| store.size(&pack::name(pack)).ok();
        let size = |pack| sizes.get(&pack).copied().or_else(|| now(pack));
        for error in self.repo.index().verify(&size)? {
            let (object, what) = as_damage(error)?;
            self.damage(object, what, Hurts::new());
        }
        Ok(())
    }
}

/// What workers found.
struct Shared<T> {
    good: Mutex<Vec<(BlockId, T)>>,
    bad: Mutex<BTreeMap<BlockId, (String, String)>>,
}

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Self {
            good: Mutex::default(),
            bad: Mutex::default(),
        }
    }
}

impl<T> Shared<T> {
    /// Takes a result; an error that is no damage is passed on.
    fn add(&self, id: BlockId, result: Result<T>) -> Result<()> {
        match result {
            Ok(good) => {
                let mut all = self.good.lock().unwrap_or_else(PoisonError::into_inner);
                all.push((id, good));
            }
            Err(error) => {
                let damage = as_damage(error)?;
                let mut all = self.bad.lock().unwrap_or_else(PoisonError::into_inner);
                all.insert(id, damage);
            }
        }
        Ok(())
    }
}
