//! What points cost: what each shows, and what only it does. Blocks count as they do for prune: what newer layers hide is nobody's.
//!
//! ```text
//! layers: + a block for all maps that have the layer, - what it hides from these     sorted by id, a part of all ids at a time
//! segments: + a block for sessions                                                   merged with the index
//!                                                                                    -> sizes by who has them
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
use super::map::{Entry, Layer, LayerRef, MAP, MapReader, Run, RunContent, SEGMENT, Shown};
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
    /// What its maps show.
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
#[derive(Debug, Clone, Default)]
struct Owners {
    points: BTreeSet<usize>,
    session: bool,
}

impl Owners {
    fn is_nobody(&self) -> bool {
        self.points.is_empty() && !self.session
    }
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

/// All layers and segments, each opened once.
#[derive(Default)]
struct Layers {
    /// Those of maps.
    opened: BTreeMap<ObjectId, Arc<Layer>>,
    /// The maps, as far as they can be read.
    shown: Shown,
    /// The points whose maps begin at a place there.
    points: HashMap<usize, Vec<usize>>,
    segments: Vec<Arc<Layer>>,
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
        let mut tried = BTreeSet::new();
        for (number, point) in points.iter().enumerate() {
            for map in point.disks.iter().map(|disk| &disk.map) {
                for layer in &map.layers {
                    if !tried.insert(layer.id) {
                        continue;
                    }
                    let store = repo.store_arc();
                    let opened = Layer::open(store, &layer.object(), MAP, Some(layer.digest));
                    if let Some(opened) = reported(opened, stats)? {
                        self.opened.insert(layer.id, Arc::new(opened));
                    }
                }
                // What a damaged layer hides cannot be told: the ones above it count.
                let sound = |layer: &&LayerRef| self.opened.contains_key(&layer.id);
                let sound = map.layers.iter().take_while(sound).count();
                let layers = map.layers.get(..sound).unwrap_or_default();
                let blocks = repo.block_size().blocks(map.size);
                if let Some(place) = self.shown.add(blocks, layers) {
                    self.points.entry(place).or_default().push(number);
                }
            }
        }
        Ok(())
    }

    fn of_sessions(&mut self, repo: &Repository, stats: &mut Stats) -> Result<()> {
        let sessions = Session::list(repo)?;
        stats
            .damaged
            .extend(sessions.damaged.into_iter().map(|(_, error)| error));
        for session in sessions.sessions {
            let Some(items) = reported(session.items(), stats)? else {
                continue;
            };
            for item in items {
                if let Item::Segment(segment) = item {
                    let opened = Layer::open(repo.store_arc(), segment.object(), SEGMENT, None);
                    if let Some(opened) = reported(opened, stats)? {
                        self.segments.push(Arc::new(opened));
                    }
                }
            }
        }
        Ok(())
    }

    fn layer(&self, id: ObjectId) -> Option<&Arc<Layer>> {
        self.opened.get(&id)
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

/// Who has a block, or from whom it is hidden.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Claim {
    /// All maps that have the layer at this place, but those from which it is hidden.
    Shown(u32),
    /// A layer at this place hides it.
    Hidden(u32),
    Session,
}

/// Which part an id is in.
fn part_of(id: BlockId, parts: u64) -> u64 {
    let part = (u128::from(id.leading()) * u128::from(parts)) >> 64;
    u64::try_from(part).unwrap_or(u64::MAX)
}

/// The counting of blocks by their owners.
struct Count<'a> {
    layers: &'a Layers,
    stats: &'a mut Stats,
    /// The numbers of the places, and of what lies over each.
    spans: Vec<(usize, usize)>,
    /// By the number of the place where their maps begin.
    points: Vec<&'a [usize]>,
    /// How many parts the ids are cut into, and which one is in hand.
    parts: u64,
    part: u64,
    /// The claims on the ids of the part in hand, sorted; the ones before `at` are done.
    ids: Vec<(BlockId, Claim)>,
    at: usize,
    /// Sizes by the claims on them, each with how often it is made.
    sets: HashMap<Vec<(Claim, i64)>, Sizes>,
}

impl<'a> Count<'a> {
    fn new(layers: &'a Layers, part: u64, stats: &'a mut Stats) -> Self {
        let spans = layers.shown.spans();
        let mut points: Vec<&[usize]> = vec![&[]; spans.len()];
        for (place, numbers) in &layers.points {
            if let Some((number, _)) = spans.get(*place)
                && let Some(there) = points.get_mut(*number)
            {
                *there = numbers;
            }
        }
        let places = layers.shown.places();
        let of_maps = places.filter_map(|(_, layer)| layers.layer(layer.id));
        let all = of_maps.chain(&layers.segments);
        let total: u64 = all.map(|layer| layer.totals.data).sum();
        Self {
            layers,
            stats,
            spans,
            points,
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
        part_of(id, self.parts)
    }

    /// Reads the ids of the part in hand.
    fn load(&mut self) -> Result<()> {
        self.ids.clear();
        self.at = 0;
        let layers = self.layers;
        for segment in &layers.segments {
            let mut runs = segment.stream();
            // Damage ends it as the end does.
            while let Some(Some(run)) = reported(runs.next_run(), self.stats)? {
                self.claim(&run, Claim::Session);
            }
        }
        for (place, layer) in layers.shown.places() {
            let Some(layer) = layers.layer(layer.id) else {
                continue;
            };
            let (blocks, beneath) = layers.shown.beneath(place);
            let beneath: Vec<ObjectId> = beneath.iter().map(|layer| layer.id).collect();
            let map = layers.map(&beneath, blocks);
            let number = u32::try_from(place).unwrap_or(u32::MAX);
            let mut runs = layer.stream();
            while let Some(Some(mut run)) = reported(runs.next_run(), self.stats)? {
                if run.end() > blocks {
                    run = run.split_before(blocks.max(run.first));
                }
                self.claim(&run, Claim::Shown(number));
                let Some(map) = map.as_ref().filter(|_| !beneath.is_empty()) else {
                    continue;
                };
                for block in run.first..run.end() {
                    if let Some(Entry::Data(id)) = reported(map.get(block), self.stats)?
                        && self.part_of(id) == self.part
                    {
                        self.ids.push((id, Claim::Hidden(number)));
                    }
                }
            }
        }
        self.ids.sort_unstable();
        Ok(())
    }

    /// Claims the blocks of the part in hand.
    fn claim(&mut self, run: &Run, claim: Claim) {
        if let RunContent::Data(ids) = &run.content {
            let (parts, part) = (self.parts, self.part);
            let mine = ids.as_slice().iter();
            let mine = mine.filter(|id| part_of(**id, parts) == part);
            self.ids.extend(mine.map(|id| (*id, claim)));
        }
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

    /// A block that is not in the index: missing, unless it is hidden everywhere.
    fn skip(&mut self, id: BlockId) {
        let claims = self.claims(id);
        if !self.owners(&claims).is_nobody() {
            self.stats.missing += 1;
        }
    }

    /// The claims on the next id.
    fn claims(&mut self, id: BlockId) -> Vec<(Claim, i64)> {
        let mut claims: Vec<(Claim, i64)> = Vec::new();
        while let Some((other, claim)) = self.ids.get(self.at)
            && *other == id
        {
            match claims.last_mut() {
                Some((last, count)) if last == claim => *count += 1,
                _ => claims.push((*claim, 1)),
            }
            self.at += 1;
        }
        claims
    }

    /// Who has what is claimed so: the points that have it more often than it is hidden from them.
    fn owners(&self, claims: &[(Claim, i64)]) -> Owners {
        let mut owners = Owners::default();
        let mut steps = Vec::new();
        for (claim, count) in claims {
            let (place, count) = match claim {
                Claim::Session => {
                    owners.session = true;
                    continue;
                }
                Claim::Shown(place) => (place, *count),
                Claim::Hidden(place) => (place, -count),
            };
            if let Some((first, end)) = self.spans.get(*place as usize) {
                steps.extend([(*first, count), (*end, -count)]);
            }
        }
        steps.sort_unstable();
        let mut times = 0;
        let mut next = steps.iter().peekable();
        while let Some((at, step)) = next.next() {
            times += step;
            let end = next.peek().map_or(*at, |(end, _)| *end);
            if times > 0 {
                let points = self.points.get(*at..end).unwrap_or_default();
                owners.points.extend(points.iter().copied().flatten());
            }
        }
        owners
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
        let set = self.claims(id);
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
        for (set, sizes) in std::mem::take(&mut self.sets) {
            let owners = self.owners(&set);
            if owners.is_nobody() {
                continue;
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
