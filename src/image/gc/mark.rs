//! The mark: every block that a root refers to. Roots are sessions (their segments and the maps that they build on), points, and the
//! leases of readers. Of a map it is the blocks that it shows: what newer layers hide in all maps is nobody's (`map/shown.rs`), although
//! a layer names it.
//!
//! What is referred to moves while roots are listed: from a point to a session that builds on it, from a session to the point that
//! it becomes. Each publishes the new reference before the old one may go, so sessions are listed before points, and both again
//! until a listing finds nothing new. Meanwhile points are not forgotten: `locks/points` is held. Sessions go only when
//! their point is there, or with all that they built.
//!
//! ```text
//! sessions, points, sessions, points ... leases        all listings past any cache
//! ```

use std::collections::HashSet;
use std::sync::Arc;

use super::super::error::{Error, Result};
use super::super::ids::{BlockId, ObjectId, PointId, SessionId};
use super::super::lease;
use super::super::map::{Layer, LayerRef, MAP, MapRef, RunContent, RunSource, SEGMENT, Shown};
use super::super::repo::Repository;
use super::super::session::{self, Root, State};
use super::Watch;
use super::live::Live;

/// How often a session is read again that changes meanwhile.
const TRIES: usize = 10;
/// How often the roots are listed at most: each time something new was found.
const ROUNDS: usize = 100;

/// The layers of a map, newest first, and how many blocks it has.
type Stack = (u64, Vec<ObjectId>);

/// A walk over all roots that reads what it has not read before.
#[derive(Default)]
struct Walk {
    /// Those that are there.
    layers: HashSet<ObjectId>,
    /// Maps that are to be read.
    maps: Vec<(u64, Vec<LayerRef>)>,
    /// Maps that were read: what they show is not read again for those that build on them.
    read: HashSet<Stack>,
    /// By the digests of their footers: a segment's name may be taken again by another.
    segments: HashSet<[u8; 32]>,
    points: HashSet<PointId>,
    sessions: HashSet<SessionId>,
    dead_leases: Vec<String>,
}

/// How much a root's word is worth.
#[derive(Clone, Copy, PartialEq)]
enum Claim {
    /// A point: all of its layers are there.
    Certain,
    /// A session or a lease: it may have named a map whose point had gone before, and finds that out when it looks. A layer that is
    /// missing went then.
    Hoped,
}

/// What a walk finds that is new.
enum Found<'a> {
    /// A layer of a map.
    Layer(&'a Layer),
    /// A segment of a session.
    Segment(&'a Arc<Layer>),
    /// All maps, at the end.
    Maps(&'a Shown),
}

type Each<'a> = &'a mut dyn FnMut(Found<'_>) -> Result<()>;

impl Walk {
    fn go(&mut self, repo: &Repository, each: Each<'_>) -> Result<()> {
        let _no_forget = repo.lock_points("a prune that looks for what is needed")?;
        for round in 0.. {
            let mut new = self.sessions(repo, each)?;
            new |= self.points(repo, each)?;
            if round > 0 && !new {
                break;
            }
            if round > ROUNDS {
                return Err(Error::Busy {
                    object: "the list of points and sessions".into(),
                    holder: "writers who add to it all the time".into(),
                });
            }
        }
        let leases = lease::read(repo)?;
        self.dead_leases = leases.dead;
        for map in &leases.maps {
            self.map(repo, map, Claim::Hoped, each)?;
        }
        self.read_maps(each)
    }

    /// Reads the maps that were found: all at once, since what is hidden is so in all of them.
    fn read_maps(&mut self, each: Each<'_>) -> Result<()> {
        let mut shown = Shown::default();
        let mut read = Vec::new();
        for (blocks, layers) in std::mem::take(&mut self.maps) {
            let ids: Vec<ObjectId> = layers.iter().map(|layer| layer.id).collect();
            let is_read = |first: &usize| {
                let below = ids.get(*first..).unwrap_or_default().to_vec();
                self.read.contains(&(blocks, below))
            };
            let end = (0..layers.len()).find(is_read).unwrap_or(layers.len());
            shown.add(blocks, layers.get(..end).unwrap_or_default());
            read.push((blocks, ids));
        }
        each(Found::Maps(&shown)).map_err(Error::missing_is_corrupt)?;
        self.read.extend(read);
        Ok(())
    }

    fn sessions(&mut self, repo: &Repository, each: Each<'_>) -> Result<bool> {
        let mut new = false;
        for (id, state) in session::states(repo)? {
            if matches!(state, State::Whole) && self.session(repo, id, each)? {
                new |= self.sessions.insert(id);
            }
        }
        Ok(new)
    }

    /// Reads a session; `false` when it is none any more. Its blocks are in a point then, which was published before.
    fn session(&mut self, repo: &Repository, id: SessionId, each: Each<'_>) -> Result<bool> {
        let mut tries = 0;
        loop {
            match self.try_session(repo, id, each) {
                // Its last segment was taken back, or it is being removed.
                Err(Error::NotFound { .. } | Error::Corrupt { .. }) if tries < TRIES => tries += 1,
                other => return other.map_err(Error::missing_is_corrupt),
            }
        }
    }

    fn try_session(&mut self, repo: &Repository, id: SessionId, each: Each<'_>) -> Result<bool> {
        let Some(roots) = session::roots(repo, id)? else {
            return Ok(false);
        };
        for root in roots {
            match root {
                Root::Maps(maps) => maps
                    .iter()
                    .try_for_each(|map| self.map(repo, map, Claim::Hoped, each))?,
                Root::Segment(object) => {
                    let segment = Layer::open(repo.store_arc(), &object, SEGMENT, None)?;
                    if !self.segments.contains(&segment.digest) {
                        let segment = Arc::new(segment);
                        each(Found::Segment(&segment))?;
                        self.segments.insert(segment.digest);
                    }
                }
            }
        }
        Ok(true)
    }

    fn points(&mut self, repo: &Repository, each: Each<'_>) -> Result<bool> {
        let mut new = false;
        for object in repo.store().list_fresh("points/")? {
            let id = object.strip_prefix("points/").map(str::parse);
            let Some(Ok(id)) = id else {
                return Err(Error::corrupt(object, "its name is no point's"));
            };
            if self.points.contains(&id) {
                continue;
            }
            match repo.point(id) {
                Ok(point) => {
                    for disk in &point.disks {
                        self.map(repo, &disk.map, Claim::Certain, each)?;
                    }
                    new |= self.points.insert(id);
                }
                // Forgotten meanwhile.
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(new)
    }

    fn map(&mut self, repo: &Repository, map: &MapRef, claim: Claim, each: Each<'_>) -> Result<()> {
        let mut there = Vec::with_capacity(map.layers.len());
        for layer in &map.layers {
            if !self.layers.contains(&layer.id) {
                let opened =
                    Layer::open(repo.store_arc(), &layer.object(), MAP, Some(layer.digest));
                let opened = match opened {
                    Err(error) if error.is_not_found() && claim == Claim::Hoped => continue,
                    other => other.map_err(Error::missing_is_corrupt)?,
                };
                each(Found::Layer(&opened))?;
                self.layers.insert(layer.id);
            }
            there.push(layer.clone());
        }
        let blocks = repo.block_size().blocks(map.size);
        if there.len() == map.layers.len() {
            self.maps.push((blocks, there));
        } else {
            // What such a map shows cannot be told.
            let alone = there.into_iter().map(|layer| (blocks, vec![layer]));
            self.maps.extend(alone);
        }
        Ok(())
    }
}

/// The blocks of data of some runs.
fn ids(mut runs: Box<dyn RunSource>, each: &mut dyn FnMut(BlockId)) -> Result<()> {
    while let Some(run) = runs.next_run()? {
        if let RunContent::Data(ids) = &run.content {
            ids.as_slice().iter().for_each(|id| each(*id));
        }
    }
    Ok(())
}

/// The blocks that maps show.
fn shown_ids(
    repo: &Repository,
    shown: &Shown,
    each: &mut dyn FnMut(BlockId),
    done: &dyn Fn(&Layer) -> Result<()>,
) -> Result<()> {
    let open = |layer: &LayerRef| {
        Layer::open(repo.store_arc(), &layer.object(), MAP, Some(layer.digest)).map(Arc::new)
    };
    for (place, layer) in shown.places() {
        let this = open(layer)?;
        let opened = |other: &LayerRef| {
            if other.id == layer.id {
                Ok(Arc::clone(&this))
            } else {
                open(other)
            }
        };
        ids(shown.stream(place, &opened)?, each)?;
        done(&this)?;
    }
    Ok(())
}

/// What is referred to.
pub(in crate::image) struct Mark<'a> {
    repo: &'a Repository,
    watch: &'a Watch<'a>,
    walk: Walk,
    live: Live,
    /// References that were found, those of shared layers once.
    pub(super) references: u64,
}

impl<'a> Mark<'a> {
    /// Marks everything.
    pub(super) fn make(repo: &'a Repository, watch: &'a Watch<'a>) -> Result<Self> {
        let mut expected = 0_u64;
        Walk::default().go(repo, &mut |found| {
            let more = match found {
                Found::Layer(layer) => layer.totals.data,
                Found::Segment(segment) => segment.totals.data,
                Found::Maps(_) => 0,
            };
            expected = expected.saturating_add(more);
            watch.go_on()
        })?;
        let room = expected / 8 + 1024;
        let mut mark = Self {
            repo,
            watch,
            walk: Walk::default(),
            live: Live::new(expected.saturating_add(room))?,
            references: 0,
        };
        watch.begin("mark", expected);
        mark.extend()?;
        Ok(mark)
    }

    /// Marks what is referred to now and was not before. What is marked already stays so: layers do not change, and a block that
    /// died meanwhile is for the next time.
    pub(super) fn extend(&mut self) -> Result<()> {
        let Self {
            repo,
            watch,
            walk,
            live,
            references,
        } = self;
        let mut take = |id| {
            live.insert(id);
            *references += 1;
        };
        let done = |layer: &Layer| {
            watch.done(layer.totals.data);
            watch.go_on()
        };
        walk.go(repo, &mut |found| match found {
            Found::Layer(_) => watch.go_on(),
            Found::Segment(segment) => {
                ids(segment.stream(), &mut take)?;
                done(segment)
            }
            Found::Maps(shown) => shown_ids(repo, shown, &mut take, &done),
        })
    }

    /// Whether a block may be referred to; certainly not, when it says so.
    pub(super) fn has(&self, id: BlockId) -> bool {
        self.live.has(id)
    }

    /// Those of some blocks that certainly are referred to, for which everything is read once more.
    pub(super) fn certainly(&self, among: &HashSet<BlockId>) -> Result<HashSet<BlockId>> {
        let mut found = HashSet::new();
        let mut take = |id| {
            if among.contains(&id) {
                found.insert(id);
            }
        };
        Walk::default().go(self.repo, &mut |new| match new {
            Found::Layer(_) => self.watch.go_on(),
            Found::Segment(segment) => ids(segment.stream(), &mut take),
            Found::Maps(shown) => shown_ids(self.repo, shown, &mut take, &|_| self.watch.go_on()),
        })?;
        Ok(found)
    }

    /// Whether a session was there when it was marked.
    pub(super) fn is_alive(&self, session: SessionId) -> bool {
        self.walk.sessions.contains(&session)
    }

    /// Whether any session was.
    pub(super) fn any_session(&self) -> bool {
        !self.walk.sessions.is_empty()
    }

    /// Whether a root has a layer.
    pub(super) fn has_layer(&self, layer: ObjectId) -> bool {
        self.walk.layers.contains(&layer)
    }

    /// Objects of readers who are dead.
    pub(super) fn dead_leases(&self) -> &[String] {
        &self.walk.dead_leases
    }
}
