//! The mark: every block that a root refers to. Roots are sessions (their segments and the maps that they build on), points, and the
//! leases of readers.
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
use super::super::map::{Layer, MAP, MapRef, RunContent, RunSource, SEGMENT};
use super::super::repo::Repository;
use super::super::session::{self, Root, State};
use super::Watch;
use super::live::Live;

/// How often a session is read again that changes meanwhile.
const TRIES: usize = 10;
/// How often the roots are listed at most: each time something new was found.
const ROUNDS: usize = 100;

/// A walk over all roots that reads what it has not read before.
#[derive(Default)]
struct Walk {
    layers: HashSet<ObjectId>,
    /// By the digests of their footers: a segment's name may be taken again by another.
    segments: HashSet<[u8; 32]>,
    points: HashSet<PointId>,
    sessions: HashSet<SessionId>,
    dead_leases: Vec<String>,
}

/// How much a root's word is worth.
#[derive(Clone, Copy, PartialEq)]
enum Claim {
    /// A point: all of it is there.
    Certain,
    /// A session or a lease: it may have named a map whose point had gone before, and finds that out when it looks. A layer that is
    /// missing went then.
    Hoped,
}

type Each<'a> = &'a mut dyn FnMut(&Arc<Layer>) -> Result<()>;

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
        leases
            .maps
            .iter()
            .try_for_each(|map| self.map(repo, map, Claim::Hoped, each))
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
                        each(&segment)?;
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
        for layer in &map.layers {
            if self.layers.contains(&layer.id) {
                continue;
            }
            let opened = Layer::open(repo.store_arc(), &layer.object(), MAP, Some(layer.digest));
            let opened = match opened {
                Err(error) if error.is_not_found() && claim == Claim::Hoped => continue,
                other => other.map_err(Error::missing_is_corrupt)?,
            };
            each(&Arc::new(opened)).map_err(Error::missing_is_corrupt)?;
            self.layers.insert(layer.id);
        }
        Ok(())
    }
}

/// The blocks of a layer or segment.
fn ids(layer: &Arc<Layer>, each: &mut dyn FnMut(BlockId)) -> Result<()> {
    let mut runs = layer.stream();
    while let Some(run) = runs.next_run()? {
        if let RunContent::Data(ids) = &run.content {
            ids.as_slice().iter().for_each(|id| each(*id));
        }
    }
    Ok(())
}

/// What is referred to.
pub(in crate::image) struct Mark<'a> {
    repo: &'a Repository,
    watch: &'a Watch<'a>,
    walk: Walk,
    live: Live,
    /// References that were read, those of shared layers once.
    pub(super) references: u64,
}

impl<'a> Mark<'a> {
    /// Marks everything.
    pub(super) fn make(repo: &'a Repository, watch: &'a Watch<'a>) -> Result<Self> {
        let mut expected = 0_u64;
        Walk::default().go(repo, &mut |layer| {
            expected = expected.saturating_add(layer.totals.data);
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
        walk.go(repo, &mut |layer| {
            ids(layer, &mut |id| live.insert(id))?;
            *references += layer.totals.data;
            watch.done(layer.totals.data);
            watch.go_on()
        })
    }

    /// Whether a block may be referred to; certainly not, when it says so.
    pub(super) fn has(&self, id: BlockId) -> bool {
        self.live.has(id)
    }

    /// Those of some blocks that certainly are referred to, for which everything is read once more.
    pub(super) fn certainly(&self, among: &HashSet<BlockId>) -> Result<HashSet<BlockId>> {
        let mut found = HashSet::new();
        Walk::default().go(self.repo, &mut |layer| {
            ids(layer, &mut |id| {
                if among.contains(&id) {
                    found.insert(id);
                }
            })?;
            self.watch.go_on()
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
