//! The next recovery point of a target while it is incomplete: the tracking state, the proofs, and what they build on.
//!
//! The log is the repository's ([`image::Session`]); what it means is [`bitmap::track`](crate::bitmap::track)'s. A target
//! without a session begins one at its first rotation.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::bitmap::blocks::BlockSet;
use crate::bitmap::dirty::Proofs;
use crate::bitmap::rotate::Journal;
use crate::bitmap::track::{Base, Named, Record, State, Tracked, disown, withdraw};
use crate::copy::Proof;
use crate::image::{
    self, BlockId, Entry, Item, Manifest, MapReader, MapRef, Repository, Run, RunContent,
    SegmentHeader, SegmentRef,
};
use crate::units::{BlockRun, BlockSize};

/// What was read for proofs. Bytes of disks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Read {
    /// All of it.
    pub read: u64,
    /// Of these, what had been read before.
    pub again: u64,
}

/// A target's session, open.
pub struct Session {
    repo: Repository,
    key: String,
    log: Option<image::Session>,
    /// What the log's records add up to.
    pub state: State,
    /// The newest point of each disk, as if it were tracked.
    pub bases: BTreeMap<String, Tracked>,
    /// The newest point of the target.
    pub parent: Option<image::PointId>,
    segments: Vec<SegmentRef>,
    pass: u64,
    /// What dropped sessions withdrew from the bases since the newest point.
    withdrawn: Option<image::Session>,
    /// The sessions that the target's points came from.
    published: Vec<image::SessionId>,
    /// A session whose point is published, to be removed.
    committed: Option<image::Session>,
    /// Disks whose bases were made sure of.
    grounded: BTreeSet<String>,
}

/// What the keys end with under which the names of bitmaps are kept that dropped sessions withdrew: no target has such a key.
const WITHDRAWN: &str = "/withdrawn";

fn withdrawn_key(key: &str) -> String {
    format!("{key}{WITHDRAWN}")
}

/// Whether a session of this key holds no more than what dropped ones withdrew.
#[must_use]
pub fn is_withdrawn_key(key: &str) -> bool {
    key.ends_with(WITHDRAWN)
}

impl Session {
    /// Opens the session of a target, or what it would begin from.
    pub fn open(repo: &Repository, key: &str) -> Result<Self> {
        let mut session = Self::find(repo, key)?;
        // What is the same as in the base counts as stored without a look.
        if !session.bases.is_empty() {
            repo.expect_index()?;
        }
        session.read_log()?;
        Ok(session)
    }

    /// The session of a target, its log not read yet.
    fn find(repo: &Repository, key: &str) -> Result<Self> {
        let mut session = Self {
            repo: repo.clone(),
            key: key.to_owned(),
            log: image::Session::find(repo, key)?,
            state: State::default(),
            bases: BTreeMap::new(),
            parent: None,
            segments: Vec::new(),
            pass: 0,
            withdrawn: image::Session::find(repo, &withdrawn_key(key))?,
            published: Vec::new(),
            committed: None,
            grounded: BTreeSet::new(),
        };
        session.find_bases()?;
        if session.committed() {
            session.committed = session.log.take();
        }
        Ok(session)
    }

    fn read_log(&mut self) -> Result<()> {
        let Some(log) = &self.log else { return Ok(()) };
        for item in log.items()? {
            match item {
                Item::Record(value) => {
                    let record: Record = serde_json::from_value(value)
                        .context("a record of the session cannot be understood")?;
                    self.state.apply(&record);
                }
                Item::Segment(segment) => {
                    self.state.apply_proof(segment.header.epoch);
                    self.pass = self.pass.max(segment.header.pass);
                    self.segments.push(segment);
                }
            }
        }
        Ok(())
    }

    /// Gives a target's session up and names its bitmaps, which are of no use any more; `None` when there is none. The run
    /// lock must be held.
    ///
    /// The session has rotated on since the newest point, so that point's bitmaps no longer hold all changes. With the
    /// session that knowledge would go, and a bitmap that somebody enables by hand would be believed: so it is written
    /// down first, and stands until the next point.
    pub fn give_up(
        repo: &Repository,
        key: &str,
    ) -> Result<Option<(image::SessionId, BTreeSet<String>)>> {
        let mut session = Self::find(repo, key)?;
        session.remove_committed()?;
        let Some(id) = session.id() else {
            return Ok(None);
        };
        let known: BTreeSet<_> = session.state.retired.iter().cloned().collect();
        if let Err(error) = session.read_log() {
            // What it rotated is not known: then it may have been any disk.
            tracing::warn!("the session is damaged: {error:#}");
            for (disk, base) in &session.bases {
                let names = base.names().map(|named| (disk.clone(), named.name.clone()));
                session.state.retired.extend(names);
            }
        }
        let gone = session.state.outlived(&[], &known);
        if !gone.is_empty() {
            let key = withdrawn_key(key);
            let log = match session.withdrawn.take() {
                Some(log) => log,
                None => image::Session::create(repo, &key, &json!({}))?,
            };
            // The next number is known to a log that was listed.
            log.items()?;
            log.append(&serde_json::to_value(&gone).context("encode names")?)?;
        }
        if let Some(log) = session.log.take() {
            log.remove()?;
        }
        let known = known.into_iter().map(|(_, name)| name);
        let names = gone.into_iter().map(|(_, name)| name);
        Ok(Some((id, names.chain(known).collect())))
    }

    /// Removes a session whose point is published. The run lock must be held.
    pub fn remove_committed(&mut self) -> Result<()> {
        match self.committed.take() {
            Some(log) => Ok(log.remove()?),
            None => Ok(()),
        }
    }

    /// Looks again at the last proofs of a run that may have died before it did. The run lock must be held.
    pub fn settle(&mut self) -> Result<()> {
        if let Some(log) = &self.log
            && let Some(gone) = log.settle()?
        {
            self.segments.retain(|segment| segment.seq != gone);
        }
        Ok(())
    }

    /// Makes sure of the bases of disks before anything builds on them: their maps become roots of the session, and only then it is
    /// looked whether their points still exist. A base whose point is gone is none: that disk is read in full.
    pub fn ground(&mut self, disks: &[String]) -> Result<()> {
        let mut bases = Vec::new();
        for key in disks {
            let known = self.state.disks.contains_key(key) || self.grounded.contains(key);
            let base = self.bases.get(key).and_then(|based| based.base.clone());
            if let Some(base) = base.filter(|_| !known) {
                bases.push((key.clone(), base));
            }
        }
        if bases.is_empty() {
            return Ok(());
        }
        let maps = bases.iter().map(|(_, base)| base_map(base));
        let maps: Vec<MapRef> = maps.collect::<Result<_>>()?;
        let mut points: Vec<String> = bases.iter().map(|(_, base)| base.point.clone()).collect();
        points.sort_unstable();
        points.dedup();
        self.write(&Record::Bases { points }, &maps)?;
        for (key, base) in bases {
            let point = base.point.parse().map_err(anyhow::Error::msg)?;
            if !self.repo.has_point(point)?
                && let Some(based) = self.bases.get_mut(&key)
            {
                based.forsake();
            }
            self.grounded.insert(key);
        }
        Ok(())
    }

    /// Publishes the session's point: from then on it exists.
    pub fn publish(&self, manifest: &Manifest) -> Result<()> {
        let log = self.log.as_ref().context("a point without a session")?;
        Ok(log.publish(manifest)?)
    }

    /// Whether the session's point is published already: only its removal was cut off.
    fn committed(&self) -> bool {
        self.log
            .as_ref()
            .is_some_and(|log| self.published.contains(&log.id()))
    }

    /// Per disk the newest point that has it; what an older point recorded is stale once a newer one was made.
    fn find_bases(&mut self) -> Result<()> {
        let points = self.repo.points()?;
        for point in points
            .points
            .iter()
            .filter(|point| point.target.key == self.key)
        {
            self.published.push(point.session);
            for retired in &point.retired_bitmaps {
                self.state
                    .retired
                    .push((retired.disk.clone(), retired.name.clone()));
            }
            for disk in &point.disks {
                let based = base_of(point, disk)?;
                if disk.file.is_some() {
                    // Files are read in full every time: any point will do.
                    self.bases.insert(disk.key.clone(), based);
                    continue;
                }
                // Rotations are counted; a clock may be set back.
                let epoch = |base: &Tracked| base.new.as_ref().map(|new| new.epoch);
                let known = self.bases.get(&disk.key).and_then(epoch);
                if epoch(&based).is_none_or(|epoch| known.is_none_or(|known| known <= epoch)) {
                    self.parent = Some(point.id);
                    self.bases.insert(disk.key.clone(), based);
                }
            }
        }
        if let Some(log) = &self.withdrawn {
            for item in log.items()? {
                if let Item::Record(names) = item {
                    let names: Vec<(String, String)> = serde_json::from_value(names)
                        .context("what dropped sessions withdrew cannot be understood")?;
                    self.state.retired.extend(names);
                }
            }
        }
        withdraw(&mut self.bases, &self.state.retired);
        let repository = self.repo.id().short();
        disown(&mut self.bases, &mut self.state.retired, &repository);
        Ok(())
    }

    /// The session's id, once it has begun.
    #[must_use]
    pub fn id(&self) -> Option<image::SessionId> {
        self.log.as_ref().map(image::Session::id)
    }

    /// When the session began.
    #[must_use]
    pub fn begun(&self) -> Option<jiff::Timestamp> {
        let header = self.log.as_ref()?.header();
        header.get("begun")?.as_str()?.parse().ok()
    }

    /// Takes a step of the tracking, with this session as its journal.
    pub fn track<T>(&mut self, step: impl FnOnce(&mut State, &mut Self) -> Result<T>) -> Result<T> {
        let mut state = std::mem::take(&mut self.state);
        let done = step(&mut state, self);
        self.state = state;
        done
    }

    /// The number of the pass that comes next.
    pub fn next_pass(&mut self) -> u64 {
        self.pass += 1;
        self.pass
    }

    /// Makes proofs durable: the blocks themselves must be so already.
    ///
    /// Blocks that were looked up since the repository's generation was `since` may be condemned by now: then it fails with
    /// [`image::Error::Condemned`], nothing is proved, and they are to be read and stored anew.
    pub fn prove(
        &mut self,
        disk: &str,
        epoch: u64,
        proofs: &[Proof],
        read: Read,
        since: u64,
    ) -> Result<()> {
        if proofs.is_empty() {
            return Ok(());
        }
        let log = self.log.as_ref().context("proofs without a session")?;
        let Read { read, again } = read;
        let pass = self.pass;
        let header = SegmentHeader {
            disk: disk.to_owned(),
            epoch,
            pass,
            read,
            again,
        };
        let segment = log.prove(&header, proofs, since)?;
        self.segments.push(segment);
        self.state.apply_proof(epoch);
        Ok(())
    }

    /// What the session has read so far, over all its runs.
    #[must_use]
    pub fn read_so_far(&self) -> Read {
        let headers = self.segments.iter().map(|segment| &segment.header);
        headers.fold(Read::default(), |sum, header| Read {
            read: sum.read + header.read,
            again: sum.again + header.again,
        })
    }

    /// The segments of a disk, in the order of the log.
    #[must_use]
    pub fn segments_of(&self, disk: &str) -> Vec<SegmentRef> {
        self.segments
            .iter()
            .filter(|segment| segment.header.disk == disk)
            .cloned()
            .collect()
    }

    /// The proofs that a disk has against its pending bitmaps, and the blocks that have any.
    pub fn proofs(&self, disk: &Tracked, block_size: BlockSize) -> Result<(Proofs, BlockSet)> {
        let blocks = block_size.blocks(disk.size);
        let mut proofs = Proofs::new(blocks, disk.pending_epochs()).map_err(anyhow::Error::msg)?;
        let mut proved = BlockSet::new(blocks);
        for segment in self
            .segments
            .iter()
            .filter(|segment| segment.header.disk == disk.key)
        {
            let log = self.log.as_ref().context("segments without a session")?;
            for run in log.segment_runs(segment)? {
                let run = run?;
                proofs.prove(segment.header.epoch, run);
                proved.insert(run);
            }
        }
        Ok((proofs, proved))
    }

    /// The blocks of a disk whose content in the next point would be one of `lost`: the base has it, or the session, and nothing
    /// later was proved. They are to be read again, which stores them anew.
    pub fn unsound(
        &self,
        disk: &Tracked,
        lost: &HashSet<BlockId>,
        block_size: BlockSize,
    ) -> Result<BlockSet> {
        let mut of_base = BlockSet::new(block_size.blocks(disk.size));
        if lost.is_empty() {
            return Ok(of_base);
        }
        if let Some(base) = &disk.base {
            for run in MapReader::open(&self.repo, &base_map(base)?)?.runs() {
                take_in(&run?, lost, None, &mut of_base);
            }
        }
        let mut unsound = of_base.clone();
        let segments = self.segments.iter();
        for segment in segments.filter(|segment| segment.header.disk == disk.key) {
            let log = self.log.as_ref().context("segments without a session")?;
            for run in log.segment_content(segment)? {
                take_in(&run?, lost, Some(&of_base), &mut unsound);
            }
        }
        Ok(unsound)
    }

    /// What the newest proofs of a disk say of a run of blocks: tells each by its place in the run, `None` being the same as the
    /// base; older proofs come before newer ones of the same block.
    pub fn newest_content(
        &self,
        disk: &str,
        range: BlockRun,
        tell: &mut dyn FnMut(usize, Option<Entry>),
    ) -> Result<()> {
        let segments = self.segments.iter();
        for segment in segments.filter(|segment| segment.header.disk == disk) {
            let log = self.log.as_ref().context("segments without a session")?;
            for run in log.segment_content(segment)? {
                let run = run?;
                for block in run.first.max(range.first)..run.end().min(range.end()) {
                    let at = usize::try_from(block - range.first).unwrap_or(usize::MAX);
                    tell(
                        at,
                        match &run.content {
                            RunContent::Zero(_) => Some(Entry::Zero),
                            RunContent::Same(_) => None,
                            RunContent::Data(ids) => {
                                let at = usize::try_from(block - run.first).unwrap_or(usize::MAX);
                                ids.as_slice().get(at).copied().map(Entry::Data)
                            }
                        },
                    );
                }
            }
        }
        Ok(())
    }

    /// Builds the map of a disk from its base and all its proofs.
    pub fn build_map(&self, disk: &Tracked) -> Result<(MapRef, image::MapStats)> {
        let base = disk.base.as_ref().map(base_map).transpose()?;
        let log = self.log.as_ref().context("a map without a session")?;
        let segments = self.segments_of(&disk.key);
        Ok(image::build_map(
            &self.repo,
            base.as_ref(),
            log,
            &segments,
            disk.size,
        )?)
    }

    /// The point is published: the session's work is done. What dropped ones withdrew is the point's to know now.
    pub fn remove(&mut self) -> Result<()> {
        for log in self.log.take().into_iter().chain(self.withdrawn.take()) {
            log.remove()?;
        }
        Ok(())
    }
}

impl Session {
    fn write(&mut self, record: &Record, roots: &[MapRef]) -> Result<()> {
        let value = serde_json::to_value(record).context("encode a record")?;
        if let Some(log) = &self.log {
            log.append_with_roots(&value, roots)?;
        } else {
            let header = json!({ "begun": crate::clock::utc_now().to_string() });
            let log = image::Session::create(&self.repo, &self.key, &header)?;
            log.append_with_roots(&value, roots)?;
            self.log = Some(log);
        }
        Ok(())
    }
}

impl Journal for Session {
    fn append(&mut self, record: &Record) -> Result<()> {
        self.write(record, &[])
    }
}

/// Takes in what blocks hold of lost ones. What is the same as the base is as unsound as that.
fn take_in(run: &Run, lost: &HashSet<BlockId>, of_base: Option<&BlockSet>, unsound: &mut BlockSet) {
    unsound.remove(run.blocks());
    let ones = (run.first..run.end()).map(|first| BlockRun { first, count: 1 });
    match &run.content {
        RunContent::Zero(_) => {}
        RunContent::Same(_) => {
            for one in ones.filter(|one| of_base.is_some_and(|base| base.contains(one.first))) {
                unsound.insert(one);
            }
        }
        RunContent::Data(ids) => {
            for (one, id) in ones.zip(ids.as_slice()) {
                if lost.contains(id) {
                    unsound.insert(one);
                }
            }
        }
    }
}

/// The map that a base refers to.
pub fn base_map(base: &Base) -> Result<MapRef> {
    serde_json::from_value(base.map.clone()).context("the base's map cannot be understood")
}

fn base_of(point: &Manifest, disk: &image::DiskPoint) -> Result<Tracked> {
    let map: Value = serde_json::to_value(&disk.map).context("encode a map reference")?;
    let base = Base {
        point: point.id.to_string(),
        size: disk.size,
        map,
    };
    let tracking = disk.tracking.as_ref();
    Ok(Tracked {
        key: disk.key.clone(),
        size: disk.size,
        identity: tracking.map_or(Value::Null, |tracking| tracking.identity.clone()),
        persistent: tracking.is_some_and(|tracking| tracking.persistent),
        granularity: tracking.map_or(0, |tracking| tracking.granularity),
        base: Some(base),
        needed: Vec::new(),
        new: tracking.map(|tracking| Named {
            epoch: tracking.epoch,
            name: tracking.bitmap.clone(),
        }),
        whole: None,
        doubt: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{
        DiskPoint, InitOptions, PointId, Quiesce, Repository, SessionId, Target, Tracking,
    };

    fn point(repository: &str, map: &MapRef, minute: i64, epoch: Option<u64>) -> Manifest {
        let tracking = epoch.map(|epoch| Tracking {
            epoch,
            bitmap: crate::bitmap::name::new(repository, epoch),
            persistent: true,
            granularity: 65536,
            identity: Value::Null,
        });
        Manifest {
            id: PointId::random().unwrap(),
            target: Target {
                key: "vm".to_owned(),
                spellings: Vec::new(),
            },
            instant: jiff::Timestamp::from_second(minute * 60).unwrap(),
            utc_offset: 0,
            forerun: String::new(),
            parent: None,
            session: SessionId::from_bytes([0; 16]),
            freeze: "fleece".to_owned(),
            quiesce: Quiesce::CrashConsistent,
            disks: vec![DiskPoint {
                key: "vda".to_owned(),
                device: String::new(),
                node: String::new(),
                format: "qcow2".to_owned(),
                size: map.size,
                map: map.clone(),
                tracking,
                rescanned: None,
                file: None,
            }],
            machine: Value::Null,
            statistics: Value::Null,
            origin: None,
            retired_bitmaps: Vec::new(),
        }
    }

    #[test]
    fn the_newest_point_is_the_one_of_the_last_rotation_whatever_the_clock_says() {
        let directory = tempfile::tempdir().unwrap();
        let options = InitOptions::default();
        let repo = Repository::init(&directory.path().join("repo"), options).unwrap();
        let log = image::Session::create(&repo, "map", &Value::Null).unwrap();
        let header = SegmentHeader {
            disk: "vda".to_owned(),
            epoch: 1,
            pass: 1,
            read: 0,
            again: 0,
        };
        let all = crate::units::BlockRun {
            first: 0,
            count: 16,
        };
        let zeros = log.append_runs(&header, &[(all, image::Content::Zero)]);
        let map = image::build_map(&repo, None, &log, &[zeros.unwrap()], 1 << 20)
            .unwrap()
            .0;
        let base = || {
            let session = Session::open(&repo, "vm").unwrap();
            let base = session.bases.get("vda").cloned().unwrap();
            assert_eq!(
                base.base.unwrap().point,
                session.parent.unwrap().to_string()
            );
            base.new.map(|new| new.epoch)
        };
        for (minute, epoch, newest) in [
            (10, Some(5), Some(5)),
            // The clock was set back.
            (5, Some(7), Some(7)),
            // An image of a VM that was off, without bitmaps: no rotation tells.
            (20, None, None),
        ] {
            let point = point(&repo.id().short(), &map, minute, epoch);
            repo.publish(&point).unwrap();
            assert_eq!(base(), newest);
        }
    }
}
