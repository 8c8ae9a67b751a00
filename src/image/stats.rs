//! What points cost: what each refers to, and what only it has. Blocks count by the layers that name them, as they do for prune: a
//! block of a layer stays as long as any point has the layer, also where a newer layer hides it.
//!
//! ```text
//! layers, segments --ids with their layer, sorted, a part of all ids at a time--> merged with the index --> sizes by set of owners
//! ```
//!
//! A layer is read once for each part of the ids, however many points share it; memory is that of one part.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use jiff::Timestamp;

use super::block::Location;
use super::error::{Error, Result};
use super::ids::{BlockId, ObjectId, PointId};
use super::manifest::Manifest;
use super::map::{Entry, Layer, LayerRef, MAP, MapReader, RunContent, SEGMENT};
use super::pack::entry_length;
use super::repo::Repository;
use super::session::{Item, Session};

/// About so many ids are held in memory at a time.
const PART: u64 = 4 << 20;
/// So many sets of owners are counted apart before they are added up.
const SETS: usize = 1 << 18;

/// Distinct blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    /// How many.
    pub blocks: u64,
    /// Their bytes in plain.
    pub plain: u64,
    /// What they take in packs.
    pub stored: u64,
}

impl Sizes {
    fn add(&mut self, other: Self) {
        self.blocks += other.blocks;
        self.plain += other.plain;
        self.stored += other.stored;
    }
}

/// What a point, or the points of a target, amount to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amount {
    /// The sizes of the disks.
    pub logical: u64,
    /// Of these, bytes in blocks that are not zero.
    pub data: u64,
    /// What its maps refer to.
    pub refers: Sizes,
    /// Of that, what nothing else refers to: it is freed when this is forgotten and pruned.
    pub only: Sizes,
}

impl Amount {
    fn add(&mut self, sizes: Sizes, alone: bool) {
        self.refers.add(sizes);
        if alone {
            self.only.add(sizes);
        }
    }
}

/// A point and what it amounts to.
#[derive(Debug, Clone)]
pub struct PointStats {
    /// Its id.
    pub id: PointId,
    /// Its target's key.
    pub target: String,
    /// Its instant.
    pub instant: Timestamp,
    /// What it amounts to.
    pub amount: Amount,
}

/// The objects of a kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Objects {
    /// How many.
    pub count: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// What a repository holds.
#[derive(Debug, Default)]
pub struct Stats {
    /// The points that can be read, oldest first.
    pub points: Vec<PointStats>,
    /// By the target's key.
    pub targets: BTreeMap<String, Amount>,
    /// All that any point or session refers to.
    pub referred: Sizes,
    /// Of that, what only sessions refer to.
    pub sessions_only: Sizes,
    /// Blocks that are referred to and in no index run.
    pub missing: u64,
    /// The objects by kind.
    pub objects: BTreeMap<&'static str, Objects>,
    /// What cannot be read, and so is not counted.
    pub damaged: Vec<Error>,
}

/// Who refers to something: points by number, and sessions.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Owners {
    points: BTreeSet<usize>,
    session: bool,
}

impl Repository {
    /// Counts everything.
    pub fn stats(&self) -> Result<Stats> {
        self.stats_in_parts(PART)
    }

    /// As [`Repository::stats`], with about so many ids in memory at a time.
    pub fn stats_in_parts(&self, part: u64) -> Result<Stats> {
        let found = self.points()?;
        let mut stats = Stats {
            damaged: found.damaged,
            ..Stats::default()
        };
        let mut layers = Layers::default();
        layers.of_points(self, &found.points, &mut stats)?;
        for point in &found.points {
            let amount = layers.amount(self, point, &mut stats)?;
            let target = stats.targets.entry(point.target.key.clone()).or_default();
            target.logical += amount.logical;
            target.data += amount.data;
            stats.points.push(PointStats {
                id: point.id,
                target: point.target.key.clone(),
                instant: point.instant,
                amount,
            });
        }
        layers.of_sessions(self, &mut stats)?;
        Count::new(&layers, part, &mut stats).run(self)?;
        // It is met once for each part.
        let mut told = BTreeSet::new();
        stats.damaged.retain(|error| told.insert(error.to_string()));
        for kind in ["packs", "index", "maps", "points", "sessions"] {
            let objects = self.measure(&format!("{kind}/"))?;
            stats.objects.insert(kind, objects);
        }
        Ok(stats)
    }

    fn measure(&self, prefix: &str) -> Result<Objects> {
        let mut objects = Objects::default();
        for object in self.store().list(prefix)? {
            match self.store().size(&object) {
                Ok(size) => {
                    objects.count += 1;
                    objects.bytes += size;
                }
                // It went meanwhile.
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(objects)
    }
}

/// All layers and segments, each opened once, with their owners.
#[derive(Default)]
struct Layers {
    all: Vec<(Arc<Layer>, Owners)>,
    /// Where the layers of maps are in the list.
    numbers: HashMap<ObjectId, usize>,
    /// How many of the first blocks have data in a row of layers.
    data: HashMap<(Vec<ObjectId>, u64), u64>,
}

/// Passes damage on to the report; gives nothing then.
fn reported<T>(result: Result<T>, stats: &mut Stats) -> Result<Option<T>> {
    match result.map_err(Error::missing_is_corrupt) {
        Ok(value) => Ok(Some(value)),
        Err(error @ (Error::Corrupt { .. } | Error::Unsupported(_))) => {
            stats.damaged.push(error);
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

impl Layers {
    fn of_points(
        &mut self,
        repo: &Repository,
        points: &[Manifest],
        stats: &mut Stats,
    ) -> Result<()> {
        let mut owners: BTreeMap<ObjectId, (&LayerRef, Owners)> = BTreeMap::new();
        for (number, point) in points.iter().enumerate() {
            for layer in point.disks.iter().flat_map(|disk| &disk.map.layers) {
                let (_, owners) = owners.entry(layer.id).or_insert((layer, Owners::default()));
                owners.points.insert(number);
            }
        }
        for (id, (layer, owners)) in owners {
            let store = repo.store_arc();
            let opened = Layer::open(store, &layer.object(), MAP, Some(layer.digest));
            if let Some(opened) = reported(opened, stats)? {
                self.numbers.insert(id, self.all.len());
                self.all.push((Arc::new(opened), owners));
            }
        }
        Ok(())
    }

    fn of_sessions(&mut self, repo: &Repository, stats: &mut Stats) -> Result<()> {
        let sessions = Session::list(repo)?;
        stats
            .damaged
            .extend(sessions.damaged.into_iter().map(|(_, error)| error));
        let owners = Owners {
            session: true,
            ..Owners::default()
        };
        for session in sessions.sessions {
            let Some(items) = reported(session.items(), stats)? else {
                continue;
            };
            for item in items {
                if let Item::Segment(segment) = item {
                    let opened = Layer::open(repo.store_arc(), segment.object(), SEGMENT, None);
                    if let Some(opened) = reported(opened, stats)? {
                        self.all.push((Arc::new(opened), owners.clone()));
                    }
                }
            }
        }
        Ok(())
    }

    fn layer(&self, id: ObjectId) -> Option<&Arc<Layer>> {
        let number = self.numbers.get(&id)?;
        self.all.get(*number).map(|(layer, _)| layer)
    }

    /// The sizes of a point's disks, all and without zeros.
    fn amount(&mut self, repo: &Repository, point: &Manifest, stats: &mut Stats) -> Result<Amount> {
        let mut amount = Amount::default();
        let block_size = repo.block_size();
        for disk in &point.disks {
            amount.logical += disk.size;
            let ids: Vec<ObjectId> = disk.map.layers.iter().map(|layer| layer.id).collect();
            let blocks = block_size.blocks(disk.map.size);
            let Some(data) = reported(self.data_blocks(&ids, blocks), stats)?.flatten() else {
                continue;
            };
            amount.data += data * block_size.bytes();
            // The last one may be short.
            if let (Some(last), Some(map)) = (blocks.checked_sub(1), self.map(&ids, blocks))
                && let Some(Entry::Data(_)) = reported(map.get(last), stats)?
            {
                let short = block_size.bytes() - block_size.extent(last, disk.map.size).length;
                amount.data -= short;
            }
        }
        Ok(amount)
    }

    /// The map of these layers, when all of them could be opened.
    fn map(&self, ids: &[ObjectId], blocks: u64) -> Option<MapReader> {
        let layers = ids.iter().map(|id| self.layer(*id).cloned());
        Some(MapReader::of(layers.collect::<Option<_>>()?, blocks))
    }

    /// How many of the first `blocks` have data; `None` when a layer could not be opened. What lies below the newest layer is
    /// counted once for all points that share it.
    fn data_blocks(&mut self, ids: &[ObjectId], blocks: u64) -> Result<Option<u64>> {
        let Some((top, below)) = ids.split_first() else {
            return Ok(Some(0));
        };
        let key = (ids.to_vec(), blocks);
        if let Some(known) = self.data.get(&key) {
            return Ok(Some(*known));
        }
        let Some(mut data) = self.data_blocks(below, blocks)? else {
            return Ok(None);
        };
        let (Some(layer), Some(map)) = (self.layer(*top), self.map(below, blocks)) else {
            return Ok(None);
        };
        if below.is_empty() && layer.totals.blocks() <= blocks {
            data = layer.totals.data;
        } else {
            let mut runs = layer.stream();
            while let Some(run) = runs.next_run()? {
                let is_data = matches!(run.content, RunContent::Data(_));
                for block in run.first..run.end().min(blocks) {
                    let was_data = matches!(map.get(block)?, Entry::Data(_));
                    data += u64::from(is_data && !was_data);
                    data -= u64::from(was_data && !is_data);
                }
            }
        }
        self.data.insert(key, data);
        Ok(Some(data))
    }
}

/// The counting of blocks by their owners.
struct Count<'a> {
    layers: &'a Layers,
    stats: &'a mut Stats,
    /// The distinct owners of layers.
    classes: Vec<&'a Owners>,
    /// Of each layer, the number of its owners.
    class_of: Vec<u32>,
    /// How many parts the ids are cut into, and which one is in hand.
    parts: u64,
    part: u64,
    /// The ids of the part in hand with the owners' numbers, sorted; the ones before `at` are done.
    ids: Vec<(BlockId, u32)>,
    at: usize,
    /// Sizes by the set of owners' numbers.
    sets: HashMap<Vec<u32>, Sizes>,
}

impl<'a> Count<'a> {
    fn new(layers: &'a Layers, part: u64, stats: &'a mut Stats) -> Self {
        let mut numbers: BTreeMap<&Owners, u32> = BTreeMap::new();
        let mut classes = Vec::new();
        let mut class_of = Vec::new();
        for (_, owners) in &layers.all {
            let number = *numbers.entry(owners).or_insert_with(|| {
                classes.push(owners);
                u32::try_from(classes.len() - 1).unwrap_or(u32::MAX)
            });
            class_of.push(number);
        }
        let total: u64 = layers.all.iter().map(|(layer, _)| layer.totals.data).sum();
        Self {
            layers,
            stats,
            classes,
            class_of,
            parts: total / part.max(1) + 1,
            part: 0,
            ids: Vec::new(),
            at: 0,
            sets: HashMap::new(),
        }
    }

    fn run(mut self, repo: &Repository) -> Result<()> {
        self.load()?;
        repo.index()
            .sweep(&mut |id, locations| self.block(id, locations))?;
        while self.part < self.parts {
            self.end_part()?;
        }
        self.add_up();
        Ok(())
    }

    fn part_of(&self, id: BlockId) -> u64 {
        let part = (u128::from(id.leading()) * u128::from(self.parts)) >> 64;
        u64::try_from(part).unwrap_or(u64::MAX)
    }

    /// Reads the ids of the part in hand.
    fn load(&mut self) -> Result<()> {
        self.ids.clear();
        self.at = 0;
        let layers = self.layers;
        for ((layer, _), class) in layers.all.iter().zip(self.class_of.clone()) {
            let mut runs = layer.stream();
            // Damage ends it as the end does.
            while let Some(Some(run)) = reported(runs.next_run(), self.stats)? {
                if let RunContent::Data(ids) = &run.content {
                    let mine = ids.as_slice().iter();
                    let mine = mine.filter(|id| self.part_of(**id) == self.part);
                    let mine: Vec<_> = mine.map(|id| (*id, class)).collect();
                    self.ids.extend(mine);
                }
            }
        }
        self.ids.sort_unstable();
        self.ids.dedup();
        Ok(())
    }

    /// What the index does not have of the part in hand is missing; then the next part.
    fn end_part(&mut self) -> Result<()> {
        while let Some((id, _)) = self.ids.get(self.at) {
            self.skip(*id);
        }
        self.part += 1;
        if self.part < self.parts {
            self.load()?;
        }
        Ok(())
    }

    /// A block that is referred to and not in the index.
    fn skip(&mut self, id: BlockId) {
        self.stats.missing += 1;
        while self.ids.get(self.at).is_some_and(|(other, _)| *other == id) {
            self.at += 1;
        }
    }

    /// Takes the next block of the index.
    fn block(&mut self, id: BlockId, locations: &[Location]) -> Result<()> {
        while self.part < self.part_of(id) {
            self.end_part()?;
        }
        while let Some((other, _)) = self.ids.get(self.at)
            && *other < id
        {
            self.skip(*other);
        }
        let mut set = Vec::new();
        while let Some((other, class)) = self.ids.get(self.at)
            && *other == id
        {
            set.push(*class);
            self.at += 1;
        }
        let Some(location) = locations.first().filter(|_| !set.is_empty()) else {
            return Ok(());
        };
        self.sets.entry(set).or_default().add(Sizes {
            blocks: 1,
            plain: u64::from(location.plain),
            stored: entry_length(location) as u64,
        });
        if self.sets.len() >= SETS {
            self.add_up();
        }
        Ok(())
    }

    /// Gives what was counted to its owners.
    fn add_up(&mut self) {
        for (set, sizes) in self.sets.drain() {
            let mut owners = Owners::default();
            for class in set {
                if let Some(more) = self.classes.get(class as usize) {
                    owners.points.extend(&more.points);
                    owners.session |= more.session;
                }
            }
            self.stats.referred.add(sizes);
            if owners.points.is_empty() {
                self.stats.sessions_only.add(sizes);
            }
            let Stats {
                points, targets, ..
            } = &mut *self.stats;
            let of_points = owners
                .points
                .iter()
                .filter_map(|number| points.get(*number));
            let keys: BTreeSet<&str> = of_points.map(|point| point.target.as_str()).collect();
            let alone = keys.len() == 1 && !owners.session;
            for key in keys {
                if let Some(amount) = targets.get_mut(key) {
                    amount.add(sizes, alone);
                }
            }
            let alone = owners.points.len() == 1 && !owners.session;
            for number in &owners.points {
                if let Some(point) = points.get_mut(*number) {
                    point.amount.add(sizes, alone);
                }
            }
        }
    }
}
