//! Copying points to a second repository: only what it lacks is read there, proved by its id, and stored as any block is.
//!
//! ```text
//! the source's map, less what the destination's base has --runs--> known there by id? --> proof
//!                          readers: fetch, decode, hash <--else--       |
//!                                    | pieces                           v
//!                     copier: hash, compress, packs --> proofs --> segments of a session --> maps --> the point
//! ```
//!
//! The session, of the key `copy:<source>:<point>`, is what a killed copy goes on from, and what keeps its blocks from being
//! pruned meanwhile. Its segments of a disk come in the order of the blocks, so the last block of the last one says how far the
//! disk is. Block ids are compared with the destination's only where equal blocks have equal ids in both repositories; elsewhere
//! the source's own earlier point says what did not change since the destination's copy of it.

use std::collections::BTreeMap;
use std::ops::{ControlFlow, Deref};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, Result};
use crossbeam_channel::{Receiver, Sender, bounded};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::copy::{self, CopyDisk, Manner, Piece, Proof};
use crate::exit::{Failure, Kind};
use crate::image::store::StoreLock;
use crate::image::{
    BlockId, Content, DiskPoint, Error, Item, Manifest, MapRef, Origin, PointId, RepoId,
    Repository, RunContent, SegmentHeader, SegmentRef, Session, build_map, changes,
};
use crate::progress::Progress;
use crate::throttle::Throttle;
use crate::units::{BlockRun, Extent};

/// Plain bytes of one read of the source.
const READ: u64 = 2 << 20;
/// Runs of blocks in one segment at most: they are in memory until it is written.
const PROOFS: usize = 1 << 18;
/// Reads on their way for each reader.
const IN_FLIGHT: usize = 3;

/// How often in a row a prune may come in between.
const CONDEMNED_TRIES: u32 = 20;

/// How to copy.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Read at most this many bytes a second.
    pub rate: Option<u64>,
    /// After so many bytes read the session is brought up to date: what a kill costs.
    pub batch: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            rate: None,
            batch: 512 << 20,
        }
    }
}

/// What became of a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copied {
    /// It is there already.
    Skipped,
    /// It was copied.
    Done {
        /// Bytes read from the source by this run.
        read: u64,
        /// Bytes newly stored by this run, after compression.
        stored: u64,
        /// The point of the destination that it builds on.
        base: Option<PointId>,
    },
}

/// Two repositories, one to copy to the other.
pub struct Replication<'a> {
    from: &'a Repository,
    to: &'a Repository,
    options: Options,
    throttle: Throttle,
    progress: &'a Progress,
    interrupted: Arc<AtomicBool>,
}

/// What the session says of itself, at its beginning.
#[derive(Debug, Serialize, Deserialize)]
struct Header {
    /// Which content.
    origin: Origin,
    /// By disk, the point of the destination that it builds on.
    bases: BTreeMap<String, PointId>,
}

/// What a disk builds on.
struct Base {
    point: PointId,
    /// Its map in the destination.
    map: MapRef,
    /// The same content where its ids can be compared with the source's.
    compare: MapRef,
    /// Whether that is in the source.
    in_source: bool,
}

fn session_key(source: RepoId, point: PointId) -> String {
    format!("copy:{source}:{point}")
}

/// The point that a session of this key copies, when it is the key of a copy's session.
fn point_of_key(key: &str) -> Option<PointId> {
    let (_, point) = key.strip_prefix("copy:")?.split_once(':')?;
    point.parse().ok()
}

/// Whether a session of this key is a copy on its way.
#[must_use]
pub fn is_session_key(key: &str) -> bool {
    point_of_key(key).is_some()
}

/// Keeps other copies of the point of a session of this key away, when it is the key of a copy's session.
pub fn lock_session(to: &Repository, key: &str) -> Result<Option<StoreLock>> {
    point_of_key(key).map(|point| lock(to, point)).transpose()
}

fn lock(to: &Repository, point: PointId) -> Result<StoreLock> {
    let lock = to
        .store()
        .lock(&format!("copy-{point}"), "copying the point")?;
    Ok(lock)
}

impl<'a> Replication<'a> {
    /// Refuses what cannot be copied at all.
    pub fn new(
        from: &'a Repository,
        to: &'a Repository,
        options: Options,
        progress: &'a Progress,
    ) -> Result<Self> {
        if from.id() == to.id() {
            return Err(Failure::hinted(
                Kind::Usage,
                format!("both are the repository {}", from.id()),
                "when the second was made by copying files, give it an identity of its own: `forerun repair new-id --repo REPO2`",
            ));
        }
        if from.block_size() != to.block_size() {
            return Err(Failure::hinted(
                Kind::Usage,
                format!(
                    "the source has blocks of {}, the destination of {}",
                    from.block_size(),
                    to.block_size()
                ),
                format!(
                    "make a destination with `forerun init REPO2 --block-size {}`",
                    from.block_size().bytes()
                ),
            ));
        }
        Ok(Self {
            from,
            to,
            options,
            throttle: Throttle::new(options.rate),
            progress,
            interrupted: Arc::default(),
        })
    }

    /// Ends when this is set: what was read until then is in the session, and the next copy of the point goes on from there.
    #[must_use]
    pub fn ended_by(mut self, interrupted: Arc<AtomicBool>) -> Self {
        self.interrupted = interrupted;
        self
    }

    fn keeps_on(&self) -> bool {
        !self.interrupted.load(Ordering::Relaxed)
    }

    fn go_on(&self) -> Result<()> {
        if self.keeps_on() {
            return Ok(());
        }
        Err(Error::Interrupted.into())
    }

    /// Copies a point, or what is missing of one.
    pub fn copy(&self, id: PointId) -> Result<Copied> {
        self.go_on()?;
        let point = self.from.point(id).context("read the point")?;
        let origin = self.from.origin(&point)?;
        let _lock = lock(self.to, id)?;
        let _lease = self.from.lease(&[&point], "forerun copy")?;
        // From here on the source's layers and blocks of this point must stay.
        if let Some(there) = self.there(id)? {
            let other = self.to.origin(&there)?;
            if other.digest != origin.digest {
                return Err(Failure::hinted(
                    Kind::Failed,
                    format!(
                        "the destination has another point {id}: of {}, {}",
                        there.target.key, there.instant
                    ),
                    "nothing is replaced; look at both with `forerun show`",
                ));
            }
            // Only the removal of its session may have been cut off.
            if let Some(session) = Session::find(self.to, &session_key(self.from.id(), id))? {
                session.remove()?;
            }
            return Ok(Copied::Skipped);
        }
        let (session, bases) = self.session(&point, origin)?;
        let mut run = PointCopy {
            all: self,
            point: &point,
            segments: segments(&session)?,
            session: &session,
            read: 0,
            stored: 0,
        };
        let disks: Result<Vec<DiskPoint>> = point
            .disks
            .iter()
            .map(|disk| run.disk(disk, bases.get(&disk.key)))
            .collect();
        let (read, stored) = (run.read, run.stored);
        let disks = match disks {
            Ok(disks) => disks,
            Err(error) => {
                // It would go on to the same damage; what is stored is found by its ids as long as it is there.
                if crate::exit::classify(&error).0 == Kind::Corrupt {
                    session.remove()?;
                }
                return Err(error);
            }
        };
        let base = bases.values().map(|base| base.point).next();
        let published = Manifest {
            session: session.id(),
            disks,
            // Bitmaps carry the name of the repository whose points they follow.
            retired_bitmaps: Vec::new(),
            origin: Some(origin),
            ..point.clone()
        };
        session.publish(&published)?;
        session.remove()?;
        Ok(Copied::Done { read, stored, base })
    }

    fn there(&self, id: PointId) -> Result<Option<Manifest>> {
        match self.to.point(id) {
            Ok(point) => Ok(Some(point)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error).context("in the destination"),
        }
    }

    /// What each disk builds on: the nearest point of the target that the destination has, an earlier one rather than a later.
    fn bases(&self, point: &Manifest) -> Result<BTreeMap<String, Base>> {
        let points = self.to.points()?.points;
        let mut near: Vec<&Manifest> = points
            .iter()
            .filter(|other| other.target.key == point.target.key)
            .collect();
        near.sort_by_key(|other| {
            let distance = other.instant.duration_since(point.instant);
            (other.instant > point.instant, distance.abs())
        });
        let mut bases = BTreeMap::new();
        for disk in &point.disks {
            for other in &near {
                if let Some(base) = self.base(other, &disk.key)? {
                    bases.insert(disk.key.clone(), base);
                    break;
                }
            }
        }
        Ok(bases)
    }

    /// A point of the destination as the base of a disk, when it has the disk and can be compared with.
    fn base(&self, there: &Manifest, disk: &str) -> Result<Option<Base>> {
        let map_of = |point: &Manifest| {
            let disk = point.disks.iter().find(|other| other.key == disk);
            disk.map(|disk| disk.map.clone())
        };
        let Some(map) = map_of(there) else {
            return Ok(None);
        };
        if self.to.shares_ids_with(self.from) {
            return Ok(Some(Base {
                point: there.id,
                compare: map.clone(),
                map,
                in_source: false,
            }));
        }
        let here = match self.from.point(there.id) {
            Ok(here) => here,
            Err(error) if error.is_not_found() || error.is_corrupt() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if self.from.origin(&here)?.digest != self.to.origin(there)?.digest {
            return Ok(None);
        }
        Ok(map_of(&here).map(|compare| Base {
            point: there.id,
            map,
            compare,
            in_source: true,
        }))
    }

    /// The session to go on with, or a new one: one that was begun for another content, or on bases that are gone, is given up.
    fn session(
        &self,
        point: &Manifest,
        origin: Origin,
    ) -> Result<(Session, BTreeMap<String, Base>)> {
        let key = session_key(self.from.id(), point.id);
        if let Some(session) = Session::find(self.to, &key)? {
            let begun: Option<Header> = serde_json::from_value(session.header().clone()).ok();
            if let Some(begun) = begun.filter(|begun| begun.origin.digest == origin.digest)
                && session.settle().map(|_| true)?
                && !session.items()?.is_empty()
                && let Some(bases) = self.recorded(&begun.bases)?
            {
                return Ok((session, bases));
            }
            session.remove()?;
        }
        let bases = self.bases(point)?;
        let on = bases.iter().map(|(disk, base)| (disk.clone(), base.point));
        let header = Header {
            origin,
            bases: on.collect(),
        };
        let encoded = serde_json::to_value(&header).context("encode the header")?;
        let session = Session::create(self.to, &key, &encoded)?;
        // The bases' maps are needed until the point stands, whatever becomes of their points.
        let maps: Vec<MapRef> = bases.values().map(|base| base.map.clone()).collect();
        session.append_with_roots(&json!({ "record": "copy" }), &maps)?;
        // Only now it is certain that they stay.
        for base in bases.values() {
            if !self.to.has_point(base.point)? {
                session.remove()?;
                return self.session(point, origin);
            }
        }
        Ok((session, bases))
    }

    /// The bases that a session was begun on, if all of them are still there.
    fn recorded(
        &self,
        bases: &BTreeMap<String, PointId>,
    ) -> Result<Option<BTreeMap<String, Base>>> {
        let mut found = BTreeMap::new();
        for (disk, id) in bases {
            let Some(there) = self.there(*id)? else {
                return Ok(None);
            };
            let Some(base) = self.base(&there, disk)? else {
                return Ok(None);
            };
            found.insert(disk.clone(), base);
        }
        Ok(Some(found))
    }
}

fn segments(session: &Session) -> Result<Vec<SegmentRef>> {
    let items = session.items()?.into_iter();
    Ok(items
        .filter_map(|item| match item {
            Item::Segment(segment) => Some(segment),
            Item::Record(_) => None,
        })
        .collect())
}

/// A point on its way.
struct PointCopy<'a> {
    all: &'a Replication<'a>,
    point: &'a Manifest,
    session: &'a Session,
    segments: Vec<SegmentRef>,
    read: u64,
    stored: u64,
}

/// Neighbouring blocks to be read.
struct Job {
    extent: Extent,
    ids: Vec<BlockId>,
}

/// What goes into one segment.
#[derive(Default)]
struct Batch {
    /// The destination's generation before the first block was looked up.
    since: Option<u64>,
    /// What is known without reading.
    proofs: Vec<Proof>,
    jobs: Vec<Job>,
    /// What the jobs read.
    bytes: u64,
}

impl PointCopy<'_> {
    /// Copies a disk. When a prune takes away what a batch was found to have there already, that batch is planned again.
    fn disk(&mut self, disk: &DiskPoint, base: Option<&Base>) -> Result<DiskPoint> {
        let mut tries = 0;
        loop {
            match self.try_disk(disk, base) {
                Err(error)
                    if matches!(error.downcast_ref(), Some(Error::Condemned { .. }))
                        && tries < CONDEMNED_TRIES =>
                {
                    tries += 1;
                }
                other => return other,
            }
        }
    }

    /// Copies a disk from where it is, and builds its map.
    fn try_disk(&mut self, disk: &DiskPoint, base: Option<&Base>) -> Result<DiskPoint> {
        let Replication {
            from, to, progress, ..
        } = self.all;
        if disk.map.size != disk.size {
            let what = format!("the map of disk {} is of another size", disk.key);
            return Err(Error::corrupt(format!("points/{}", self.point.id), what).into());
        }
        let block_size = from.block_size();
        progress.begin(&format!("{} {}", self.point.id, disk.key), disk.size);
        let at = self.done(&disk.key)?;
        let compare = base.map(|base| {
            let repo = if base.in_source { from } else { to };
            (*repo, &base.compare)
        });
        let runs = changes(compare, (from, &disk.map), at)
            .with_context(|| format!("compare the maps of disk {}", disk.key))?;
        let mut batch = Batch::default();
        for run in runs {
            self.all.go_on()?;
            let run = run.with_context(|| format!("read the map of disk {}", disk.key))?;
            let RunContent::Data(ids) = &run.content else {
                batch.proofs.push((run.blocks(), Content::Zero));
                self.carry_out_full(&mut batch, disk)?;
                continue;
            };
            for (block, id) in (run.first..).zip(ids.as_slice()) {
                let extent = block_size.extent(block, disk.size);
                self.plan(&mut batch, block, *id, extent)?;
                self.carry_out_full(&mut batch, disk)?;
            }
        }
        self.carry_out(batch, disk)?;
        let mine: Vec<SegmentRef> = self
            .segments
            .iter()
            .filter(|segment| segment.header.disk == disk.key)
            .cloned()
            .collect();
        let base = base.map(|base| &base.map);
        let (map, _) = build_map(to, base, self.session, &mine, disk.size)?;
        Ok(DiskPoint {
            map,
            tracking: None,
            ..disk.clone()
        })
    }

    /// Up to which block a disk is in the session.
    fn done(&self, disk: &str) -> Result<u64> {
        let last = self.segments.iter().rfind(|last| last.header.disk == disk);
        let Some(last) = last else {
            return Ok(0);
        };
        let mut end = 0;
        for run in self.session.segment_runs(last)? {
            end = run?.end();
        }
        Ok(end)
    }

    /// A block is known, or is to be read.
    fn plan(&self, batch: &mut Batch, block: u64, id: BlockId, extent: Extent) -> Result<()> {
        let to = self.all.to;
        if batch.since.is_none() {
            batch.since = Some(to.generation()?);
        }
        if to.shares_ids_with(self.all.from) && to.has_block(id)? {
            let one = BlockRun {
                first: block,
                count: 1,
            };
            batch.proofs.push((one, Content::Data(id)));
            return Ok(());
        }
        batch.bytes += extent.length;
        match batch.jobs.last_mut() {
            Some(job) if job.extent.end() == extent.offset && job.extent.length < READ => {
                job.extent.length += extent.length;
                job.ids.push(id);
            }
            _ => batch.jobs.push(Job {
                extent,
                ids: vec![id],
            }),
        }
        Ok(())
    }

    /// Carries out a batch that is full.
    fn carry_out_full(&mut self, batch: &mut Batch, disk: &DiskPoint) -> Result<()> {
        if batch.bytes >= self.all.options.batch || batch.proofs.len() >= PROOFS {
            return self.carry_out(std::mem::take(batch), disk);
        }
        Ok(())
    }

    /// Reads and stores a batch, and puts it into the session.
    fn carry_out(&mut self, batch: Batch, disk: &DiskPoint) -> Result<()> {
        let Batch {
            since,
            mut proofs,
            jobs,
            bytes,
        } = batch;
        let since = match since {
            Some(since) => since,
            None => self.all.to.generation()?,
        };
        let mut ended_at = None;
        if !jobs.is_empty() {
            let disks = [CopyDisk {
                key: disk.key.clone(),
                size: disk.size,
                base: None,
                base_size: 0,
            }];
            let counted = AtomicU64::new(0);
            let (end, mut copied) = copy::copy(
                self.all.to,
                &disks,
                (self.session.id(), "copy"),
                &counted,
                Manner::default(),
                |give| self.read(jobs, disk, give),
            )?;
            self.read += copied.bytes;
            self.stored += copied.stored;
            proofs.extend(copied.proofs.drain(..).flatten());
            ended_at = end;
        }
        if let Some(end) = ended_at {
            // Where the segment ends is where the next run begins: nothing behind that may be in it.
            let end = end / self.all.from.block_size().bytes();
            proofs.retain(|(run, _)| run.first < end);
        }
        if proofs.is_empty() {
            return self.all.go_on();
        }
        proofs.sort_unstable_by_key(|(run, _)| run.first);
        let header = SegmentHeader {
            disk: disk.key.clone(),
            epoch: 0,
            pass: 0,
            read: bytes,
            again: 0,
        };
        let segment = self.session.prove(&header, &proofs, since)?;
        self.segments.push(segment);
        match ended_at {
            Some(_) => Err(Error::Interrupted.into()),
            None => Ok(()),
        }
    }

    /// Reads from the source, with many readers, and hands on in the order that comes. Gives where it ended when it was to end
    /// before all of it: everything before that was handed on.
    fn read(
        &self,
        jobs: Vec<Job>,
        disk: &DiskPoint,
        give: &mut dyn FnMut(Piece) -> ControlFlow<()>,
    ) -> Result<Option<u64>> {
        let readers = std::thread::available_parallelism().map_or(1, usize::from);
        let (work, taken) = bounded::<Job>(readers * IN_FLIGHT);
        let (done, results) = bounded::<Result<Piece>>(readers * IN_FLIGHT);
        // What it takes along ends with it, and that ends the readers.
        std::thread::scope(move |scope| {
            for _ in 0..readers {
                let (taken, done) = (taken.clone(), done.clone());
                scope.spawn(move || self.read_all(&taken, &done));
            }
            drop((taken, done));
            let mut jobs = jobs.into_iter();
            let mut in_flight = 0;
            let mut ended_at = None;
            loop {
                while ended_at.is_none()
                    && in_flight < readers * IN_FLIGHT
                    && let Some(job) = jobs.next()
                {
                    let keeps_on = || self.all.keeps_on();
                    if !self.all.throttle.wait(job.extent.length, &keeps_on) {
                        ended_at = Some(job.extent.offset);
                        break;
                    }
                    let at = &self.all.progress.done;
                    at.store(job.extent.offset, Ordering::Relaxed);
                    work.send(job).ok().context("the readers ended early")?;
                    in_flight += 1;
                }
                if in_flight == 0 {
                    return Ok(ended_at);
                }
                let piece = results.recv().context("the readers ended early")?;
                in_flight -= 1;
                let piece =
                    piece.with_context(|| format!("read disk {} of the source", disk.key))?;
                if give(piece).is_break() {
                    // Why it takes no more is the copier's error.
                    return Ok(None);
                }
            }
        })
    }

    fn read_job(&self, ids: Vec<BlockId>, extent: Extent) -> Result<Vec<u8>> {
        let length = usize::try_from(extent.length).context("a read is too long")?;
        Ok(self.all.from.read_blocks(ids, length)?)
    }

    fn read_all(&self, work: &Receiver<Job>, done: &Sender<Result<Piece>>) {
        for job in work {
            // A panic must come as an error: this piece would be waited for, for ever.
            let read = catch_unwind(AssertUnwindSafe(|| self.read_job(job.ids, job.extent)));
            let read = read.unwrap_or_else(|_| Err(anyhow::anyhow!("a reader panicked")));
            let piece = read.map(|plain| Piece {
                disk: 0,
                extent: job.extent,
                data: Some(Box::new(plain) as Box<dyn Deref<Target = [u8]> + Send>),
            });
            if done.send(piece).is_err() {
                return;
            }
        }
    }
}
