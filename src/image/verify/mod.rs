//! Verification and checking: what is damaged is named together with the points and disks that it hurts, and blocks that are bad
//! where they are stored go into quarantine, so that the next backup stores them anew while the VM still has them.
//!
//! ```text
//! check           points -> layers -> sessions -> index against the packs' footers             structure.rs
//! verify          all that, then whole packs, those not looked at for longest first            packs.rs, checks.rs
//! verify POINT    points -> layers -> exactly their blocks                                     blocks.rs
//! all of them     known bad blocks are looked at again                                         known.rs
//!                 whom it hurts, and whether anybody needs it                                  hurts.rs
//! ```
//!
//! A bad place hurts a point when no other place has the block; that is found out by reading it, as a restore would.

mod blocks;
mod checks;
mod hurts;
mod known;
mod packs;
mod places;
mod structure;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;

use super::error::{Error, Result};
use super::ids::{BlockId, ObjectId, PointId};
use super::manifest::Manifest;
use super::map::{Layer, LayerRef, MAP};
use super::quarantine::{Bad, Quarantine};
use super::repo::Repository;
use super::session::{Item, Session};
use crate::clock::Deadline;

use blocks::Maps;
pub use hurts::Need;

/// What asks before so many bytes are read, and waits.
pub type Pace = Arc<dyn Fn(u64) + Send + Sync>;
/// What is told of a phase and its bytes, then with an empty name of how many more are done.
pub type Progress = Arc<dyn Fn(&str, u64, u64) + Send + Sync>;

/// What to verify.
#[derive(Clone, Default)]
pub struct VerifyOptions {
    /// Only these points, and not the objects that none of them needs.
    pub points: Option<Vec<PointId>>,
    /// Threads that read and hash; 0 counts as 1.
    pub threads: usize,
    /// No pack is begun after this time.
    pub max_duration: Option<Duration>,
    /// Only this share of the stored bytes, in percent: the packs that were not checked for longest.
    pub share: Option<f64>,
    /// Only packs that were not checked for so long.
    pub older_than: Option<Duration>,
    /// How fast to read; `None` for as fast as it goes.
    pub pace: Option<Pace>,
    /// How often what was checked is written down; `None` for every minute.
    pub save_every: Option<Duration>,
    /// Set by whoever wants it to end: what was found until then is written down.
    pub interrupted: Option<Arc<AtomicBool>>,
    /// Who is told how far it is.
    pub progress: Option<Progress>,
}

impl VerifyOptions {
    fn is_interrupted(&self) -> bool {
        let flag = self.interrupted.as_ref();
        flag.is_some_and(|flag| flag.load(Ordering::Relaxed))
    }

    fn go_on(&self) -> Result<()> {
        if self.is_interrupted() {
            return Err(Error::Interrupted);
        }
        Ok(())
    }

    /// Begins a phase of so many bytes.
    fn begin(&self, phase: &str, bytes: u64) {
        if let Some(progress) = &self.progress {
            progress(phase, 0, bytes);
        }
    }

    fn done(&self, bytes: u64) {
        if let Some(progress) = &self.progress {
            progress("", bytes, 0);
        }
    }
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
    /// Who needs what is damaged.
    pub need: Need,
}

/// What was verified and found.
#[derive(Debug, Clone, Default)]
pub struct VerifyReport {
    /// Points chosen.
    pub points: u64,
    /// Blocks that were read and are what their ids say.
    pub checked_blocks: u64,
    /// Their plain bytes.
    pub checked_bytes: u64,
    /// What was read in whole packs; `None` when points were chosen.
    pub packs: Option<PackReport>,
    /// Whether all that was chosen was checked.
    pub complete: bool,
    /// Whether it was ended before: then it is not told whom the damage hurts.
    pub interrupted: bool,
    /// What is damaged.
    pub damage: Vec<Damage>,
    /// Blocks that are bad somewhere and were stored anew since.
    pub healed: u64,
    /// Blocks that had been found bad and can be read again where they are.
    pub sound_again: u64,
    /// What could not be written down, for the operator.
    pub notes: Vec<String>,
}

/// How far the round through all packs has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PackReport {
    /// Packs that were read.
    pub checked: u64,
    /// Their bytes.
    pub checked_bytes: u64,
    /// Packs that there are.
    pub all: u64,
    /// Their bytes.
    pub all_bytes: u64,
    /// How many of them were never checked.
    pub never: u64,
    /// When the one was checked that was not looked at for longest.
    pub oldest: Option<Timestamp>,
}

/// What a check of the structure found.
#[derive(Debug, Clone, Default)]
pub struct CheckReport {
    /// Points chosen.
    pub points: u64,
    /// Their layers.
    pub layers: u64,
    /// Sessions.
    pub sessions: u64,
    /// Packs.
    pub packs: u64,
    /// Distinct blocks that the points need.
    pub blocks: u64,
    /// Entries of the index.
    pub entries: u64,
    /// What is damaged.
    pub damage: Vec<Damage>,
    /// What could not be written down, for the operator.
    pub notes: Vec<String>,
}

type Hurts = BTreeSet<(PointId, Option<String>)>;

impl Repository {
    /// Verifies points, or everything.
    pub fn verify(&self, options: &VerifyOptions) -> Result<VerifyReport> {
        let mut verify = Verify::new(self, options)?;
        options.begin("check the structure", 0);
        let points = verify.choose(options.points.as_deref())?;
        let maps = verify.maps(&points)?;
        let mut report = VerifyReport {
            points: points.len() as u64,
            complete: true,
            ..VerifyReport::default()
        };
        let mut unreadable = BTreeMap::new();
        if options.points.is_some() {
            verify.blocks(&maps, &mut report)?;
        } else {
            verify.sessions()?;
            let structure = verify.structure(&maps)?;
            verify.look_at_known(&mut report)?;
            verify.loose(&structure)?;
            verify.packs(&structure, &mut report)?;
            unreadable = structure.unreadable;
        }
        verify.settle()?;
        if report.complete && report.packs.is_some() {
            // Whatever they said was found anew.
            let deleted = self.store().delete(&verify.worthless);
            verify.note("damaged records of bad blocks stay", deleted);
        }
        options.begin("look whom it hurts", 0);
        report.interrupted = match verify.attribute(&points, unreadable) {
            Err(Error::Interrupted) => true,
            other => other.map(|()| !report.complete && options.is_interrupted())?,
        };
        report.damage = verify.damage.into_values().collect();
        report.notes = verify.notes;
        Ok(report)
    }

    /// Checks what can be told without reading the blocks: of all points, or of these.
    pub fn check(&self, points: Option<&[PointId]>, threads: usize) -> Result<CheckReport> {
        self.check_with(&VerifyOptions {
            points: points.map(<[PointId]>::to_vec),
            threads,
            ..VerifyOptions::default()
        })
    }

    /// The same; only the points, the threads, the wish to end and the progress count. Ended before, it has told nothing.
    pub fn check_with(&self, options: &VerifyOptions) -> Result<CheckReport> {
        let mut verify = Verify::new(self, options)?;
        options.begin("check the structure", 0);
        let points = verify.choose(options.points.as_deref())?;
        let maps = verify.maps(&points)?;
        let sessions = verify.sessions()?;
        let structure = verify.structure(&maps)?;
        verify.look_at_known(&mut VerifyReport::default())?;
        verify.loose(&structure)?;
        verify.settle()?;
        let (packs, blocks, entries) = (
            structure.packs.len() as u64,
            structure.blocks,
            structure.entries,
        );
        verify.attribute(&points, structure.unreadable)?;
        Ok(CheckReport {
            points: points.len() as u64,
            layers: maps.layers.len() as u64,
            sessions,
            packs,
            blocks,
            entries,
            damage: verify.damage.into_values().collect(),
            notes: verify.notes,
        })
    }
}

struct Verify<'a> {
    repo: &'a Repository,
    threads: usize,
    options: &'a VerifyOptions,
    deadline: Option<Deadline>,
    /// By object.
    damage: BTreeMap<String, Damage>,
    notes: Vec<String>,
    /// What is known to be bad since before.
    quarantine: Quarantine,
    /// Damaged records of bad places.
    worthless: Vec<String>,
    /// Bad places that were found now.
    found: Vec<Bad>,
    /// Blocks that cannot be read anywhere: the object and how.
    lost: BTreeMap<BlockId, (String, String)>,
    /// Those of them that are nowhere at all: damage only if somebody needs them.
    absent: HashSet<BlockId>,
    /// Blocks that are bad in an object, and can be read elsewhere.
    elsewhere: Vec<(BlockId, String, String)>,
}

/// The object and the fault of an error that is damage; other errors end the verification.
fn as_damage(error: Error) -> Result<(String, String)> {
    match error.missing_is_corrupt() {
        Error::Corrupt { object, what } => Ok((object, what)),
        Error::Unsupported(what) => Ok(("a point".into(), what)),
        other => Err(other),
    }
}

impl<'a> Verify<'a> {
    fn new(repo: &'a Repository, options: &'a VerifyOptions) -> Result<Self> {
        Ok(Self {
            repo,
            threads: options.threads.max(1),
            options,
            deadline: options.max_duration.map(Deadline::after),
            damage: BTreeMap::new(),
            notes: Vec::new(),
            quarantine: Quarantine::read(repo.store())?,
            worthless: Vec::new(),
            found: Vec::new(),
            lost: BTreeMap::new(),
            absent: HashSet::new(),
            elsewhere: Vec::new(),
        })
    }

    /// Whether nothing more is to be begun.
    fn is_late(&self) -> bool {
        self.options.is_interrupted() || self.deadline.is_some_and(Deadline::passed)
    }

    fn damage(&mut self, object: String, what: &str, hurts: Hurts) {
        self.damage_of(object, what, hurts, Need::Somebody);
    }

    fn damage_of(&mut self, object: String, what: &str, hurts: Hurts, need: Need) {
        let known = self.damage.entry(object.clone()).or_insert_with(|| Damage {
            object,
            what: what.to_owned(),
            hurts: Hurts::new(),
            need,
        });
        known.hurts.extend(hurts);
        known.need = known.need.max(need);
        if known.what.len() < 4096 && !known.what.contains(what) {
            known.what = format!("{}; {what}", known.what);
        }
    }

    fn damaged(&mut self, error: Error, hurts: Hurts) -> Result<()> {
        let (object, what) = as_damage(error)?;
        self.damage(object, &what, hurts);
        Ok(())
    }

    /// What could not be written: no failure, since what was found is told all the same.
    fn note(&mut self, what: &str, written: Result<()>) {
        if let Err(error) = written {
            self.notes.push(format!("{what}: {error}"));
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
                self.damage(object, &what, id.map(|id| (id, None)).into_iter().collect());
            }
            return Ok(points.points);
        };
        let mut points = Vec::new();
        for id in chosen {
            match self.repo.point(*id) {
                Ok(point) => points.push(point),
                Err(error) => self.damaged(error, [(*id, None)].into())?,
            }
        }
        Ok(points)
    }

    /// The maps of the points, their distinct layers opened and read; damaged ones go into the report.
    fn maps(&mut self, points: &[Manifest]) -> Result<Maps> {
        let mut users: HashMap<ObjectId, (&LayerRef, Hurts)> = HashMap::new();
        for point in points {
            for disk in &point.disks {
                for layer in &disk.map.layers {
                    let (_, hurts) = users.entry(layer.id).or_insert((layer, Hurts::new()));
                    hurts.insert((point.id, Some(disk.key.clone())));
                }
            }
        }
        let mut maps = Maps::default();
        for (id, (layer, hurts)) in users {
            self.options.go_on()?;
            match self.read_layer(layer) {
                Ok(layer) => {
                    maps.layers.insert(id, layer);
                }
                Err(error) => {
                    let hurts = self.that_are_there(hurts)?;
                    if !hurts.is_empty() {
                        self.damaged(error, hurts)?;
                    }
                }
            }
        }
        for map in points
            .iter()
            .flat_map(|point| &point.disks)
            .map(|disk| &disk.map)
        {
            // What a damaged layer hides cannot be told: the ones above it count.
            let sound = |layer: &&LayerRef| maps.layers.contains_key(&layer.id);
            let sound = map.layers.iter().take_while(sound).count();
            let layers = map.layers.get(..sound).unwrap_or_default();
            maps.shown
                .add(self.repo.block_size().blocks(map.size), layers);
        }
        Ok(maps)
    }

    fn read_layer(&self, layer: &LayerRef) -> Result<Arc<Layer>> {
        let store = self.repo.store_arc();
        let opened = Layer::open(store, &layer.object(), MAP, Some(layer.digest))?;
        let opened = Arc::new(opened);
        let mut runs = opened.stream();
        while runs.next_run()?.is_some() {}
        Ok(opened)
    }

    /// Without the points that were forgotten meanwhile.
    fn that_are_there(&self, mut hurts: Hurts) -> Result<Hurts> {
        let points: BTreeSet<PointId> = hurts.iter().map(|(point, _)| *point).collect();
        for point in points {
            match self.repo.point(point) {
                Err(error) if error.is_not_found() => hurts.retain(|(other, _)| *other != point),
                Err(error @ (Error::Corrupt { .. } | Error::Unsupported(_))) => {
                    tracing::debug!(%error, "a point is damaged since it was read");
                }
                Err(error) => return Err(error),
                Ok(_) => {}
            }
        }
        Ok(hurts)
    }

    /// Reads the logs of all sessions; gives how many there are.
    fn sessions(&mut self) -> Result<u64> {
        let sessions = Session::list(self.repo)?;
        let count = sessions.sessions.len() + sessions.damaged.len();
        for (_, error) in sessions.damaged {
            self.damaged(error, Hurts::new())?;
        }
        for session in sessions.sessions {
            self.options.go_on()?;
            let read = session.items().and_then(|items| {
                for item in items {
                    if let Item::Segment(segment) = item {
                        for run in session.segment_runs(&segment)? {
                            run?;
                        }
                    }
                }
                Ok(())
            });
            match read {
                Ok(()) => {}
                // Only one that is still there can be damaged.
                Err(error) => {
                    let now = Session::list(self.repo)?.sessions;
                    if now.iter().any(|other| other.id() == session.id()) {
                        self.damaged(error, Hurts::new())?;
                    }
                }
            }
        }
        Ok(count as u64)
    }
}

/// Does something with every item, a few at a time, on several threads, in order as far as they allow. `false` when `late` said
/// so before the end.
fn in_parallel<T: Sync>(
    threads: usize,
    chunk: usize,
    items: &[T],
    late: &(dyn Fn() -> bool + Sync),
    work: &(dyn Fn(&[T]) -> Result<()> + Sync),
) -> Result<bool> {
    let next = AtomicUsize::new(0);
    let worker = || -> Result<bool> {
        loop {
            if next.load(Ordering::Relaxed) < items.len() && late() {
                return Ok(false);
            }
            let start = next.fetch_add(chunk, Ordering::Relaxed);
            let Some(rest) = items.get(start..).filter(|rest| !rest.is_empty()) else {
                return Ok(true);
            };
            let done = work(&rest[..rest.len().min(chunk)]);
            if done.is_err() {
                // The others end with what they have.
                next.store(items.len(), Ordering::Relaxed);
            }
            done?;
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        let mut all = true;
        let mut failure = None;
        for worker in workers {
            match worker.join() {
                Ok(Ok(done)) => all &= done,
                Ok(Err(error)) => {
                    failure.get_or_insert(error);
                }
                Err(_) => {
                    failure.get_or_insert(Error::Invalid("a verify worker panicked".into()));
                }
            }
        }
        failure.map_or(Ok(all), Err)
    })
}

/// What several threads gather.
fn lock<T>(shared: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
