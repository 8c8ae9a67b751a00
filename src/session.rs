//! The next recovery point of a target while it is incomplete: the tracking state, the proofs, and what they build on.
//!
//! The log is the repository's ([`image::Session`]); what it means is [`bitmap::track`](crate::bitmap::track)'s. A target
//! without a session begins one at its first rotation.

use std::collections::{BTreeMap, HashSet};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::bitmap::blocks::BlockSet;
use crate::bitmap::dirty::Proofs;
use crate::bitmap::rotate::Journal;
use crate::bitmap::track::{Base, Named, Record, State, Tracked, withdraw};
use crate::copy::Proof;
use crate::image::{
    self, BlockId, Item, Manifest, MapReader, MapRef, Repository, Run, RunContent, SegmentHeader,
    SegmentRef,
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
    /// The sessions that the target's points came from.
    published: Vec<image::SessionId>,
    /// A session whose point is published, to be removed.
    committed: Option<image::Session>,
}

impl Session {
    /// Opens the session of a target, or what it would begin from.
    pub fn open(repo: &Repository, key: &str) -> Result<Self> {
        let mut session = Self {
            repo: repo.clone(),
            key: key.to_owned(),
            log: image::Session::find(repo, key)?,
            state: State::default(),
            bases: BTreeMap::new(),
            parent: None,
            segments: Vec::new(),
            pass: 0,
            published: Vec::new(),
            committed: None,
        };
        session.find_bases()?;
        if session.committed() {
            session.committed = session.log.take();
        }
        if let Some(log) = &session.log {
            for item in log.items()? {
                match item {
                    Item::Record(value) => {
                        let record: Record = serde_json::from_value(value)
                            .context("a record of the session cannot be understood")?;
                        session.state.apply(&record);
                    }
                    Item::Segment(segment) => {
                        session.state.apply_proof(segment.header.epoch);
                        session.pass = session.pass.max(segment.header.pass);
                        session.segments.push(segment);
                    }
                }
            }
        }
        Ok(session)
    }

    /// Removes a session whose point is published. The run lock must be held.
    pub fn remove_committed(&mut self) -> Result<()> {
        match self.committed.take() {
            Some(log) => Ok(log.remove()?),
            None => Ok(()),
        }
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
            self.parent = Some(point.id);
            self.published.push(point.session);
            for retired in &point.retired_bitmaps {
                self.state
                    .retired
                    .push((retired.disk.clone(), retired.name.clone()));
            }
            for disk in &point.disks {
                let based = base_of(point, disk)?;
                self.bases.insert(disk.key.clone(), based);
            }
        }
        withdraw(&mut self.bases, &self.state.retired);
        Ok(())
    }

    /// The session's id, once it has begun.
    #[must_use]
    pub fn id(&self) -> Option<image::SessionId> {
        self.log.as_ref().map(image::Session::id)
    }

    /// The number of the pass that comes next.
    pub fn next_pass(&mut self) -> u64 {
        self.pass += 1;
        self.pass
    }

    /// Makes proofs durable: the blocks themselves must be so already.
    pub fn prove(&mut self, disk: &str, epoch: u64, proofs: &[Proof], read: Read) -> Result<()> {
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
        let segment = log.append_runs(&header, proofs)?;
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

    /// The point is published: the session's work is done.
    pub fn remove(&mut self) -> Result<()> {
        if let Some(log) = self.log.take() {
            log.remove()?;
        }
        Ok(())
    }
}

impl Journal for Session {
    fn append(&mut self, record: &Record) -> Result<()> {
        let value = serde_json::to_value(record).context("encode a record")?;
        if let Some(log) = &self.log {
            log.append(&value)?;
        } else {
            let header = json!({ "begun": crate::clock::utc_now().to_string() });
            let log = image::Session::create(&self.repo, &self.key, &header)?;
            log.append(&value)?;
            self.log = Some(log);
        }
        Ok(())
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
