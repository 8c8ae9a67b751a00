//! A run, in the order of `src/session.rs` and `src/backup`: what is read and journaled when. Every step may be the last.

use std::cell::RefCell;
use std::collections::BTreeMap;

use anyhow::Result;
use forerun::bitmap::blocks::BlockSet;
use forerun::bitmap::dirty::Proofs;
use forerun::bitmap::rotate::{self, Port, Settings};
use forerun::bitmap::track::{self, Named, Rotation, State, Tracked};
use forerun::units::BlockRun;

use crate::vm::BLOCK;
use crate::world::{self, Content, Hold, Item, Log, Segment, World, effect};

/// What a run is to do.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) repo: usize,
    /// Bits of the disks that are not chosen.
    pub(crate) leave_out: u8,
    pub(crate) passes: u8,
    /// Blocks of a batch, and batches after which a pass is out of time.
    pub(crate) batch: u8,
    pub(crate) batches: u8,
    pub(crate) backup: bool,
}

/// How often a freeze is tried.
const FREEZES: u32 = 3;

pub(crate) struct Disk {
    pub(crate) key: String,
    pub(crate) blocks: u64,
    pub(crate) open: Option<BlockSet>,
}

/// What was read, by disk.
pub(crate) type Spool = Vec<Vec<(u64, u32)>>;

pub(crate) struct Run<'a> {
    pub(crate) world: &'a RefCell<World>,
    pub(crate) plan: &'a Plan,
    pub(crate) state: State,
    pub(crate) bases: BTreeMap<String, Tracked>,
    pub(crate) segments: Vec<Segment>,
    pub(crate) disks: Vec<Disk>,
}

/// Runs it. An error is a run that ended before its time.
pub(crate) fn run(world: &RefCell<World>, plan: &Plan) -> Result<()> {
    world.borrow_mut().repos[plan.repo].running = true;
    let done = Run::open(world, plan).and_then(|mut run| run.go());
    let mut world = world.borrow_mut();
    world.repos[plan.repo].running = false;
    world.vm.snapshot = false;
    done
}

impl<'a> Run<'a> {
    /// What the journal and the points say.
    fn open(world: &'a RefCell<World>, plan: &'a Plan) -> Result<Self> {
        let mut run = Self {
            world,
            plan,
            state: State::default(),
            bases: BTreeMap::new(),
            segments: Vec::new(),
            disks: Vec::new(),
        };
        let mut committed = false;
        {
            let world = world.borrow();
            let repo = &world.repos[plan.repo];
            for point in &repo.points {
                committed |= repo
                    .log
                    .as_ref()
                    .is_some_and(|(id, _)| *id == point.session);
                run.state.retired.extend(point.retired.iter().cloned());
                for (key, disk) in &point.disks {
                    run.bases.insert(key.clone(), disk.tracked.clone());
                }
            }
        }
        if committed {
            run.remove_session()?;
        }
        for item in world.borrow().repos[plan.repo]
            .log
            .iter()
            .flat_map(|(_, items)| items)
        {
            match item {
                Item::Record(record) => run.state.apply(record),
                Item::Segment(segment) => {
                    run.state.apply_proof(segment.epoch);
                    run.segments.push(segment.clone());
                }
            }
        }
        Ok(run)
    }

    pub(crate) fn remove_session(&self) -> Result<()> {
        effect(self.world, |world| {
            world.repos[self.plan.repo].log = None;
            Ok(())
        })
    }

    fn go(&mut self) -> Result<()> {
        for _ in 0..self.plan.passes {
            self.pass(Some(self.plan.batches))?;
        }
        if !self.plan.backup {
            if self.plan.passes == 0 {
                let mut hold = self.hold()?;
                self.rotate(&mut hold)?;
            }
            return Ok(());
        }
        for _ in 0..FREEZES {
            if let Some((instant, spool)) = self.freeze()? {
                return self.store(&instant, &spool);
            }
            self.pass(None)?;
        }
        anyhow::bail!("the freeze was given up")
    }

    pub(crate) fn hold(&self) -> Result<Hold<'a>> {
        Hold::take(self.world, self.plan)
    }

    /// One pass; so many batches and it is out of time.
    fn pass(&mut self, mut batches: Option<u8>) -> Result<()> {
        let mut rotated = false;
        loop {
            let mut hold = self.hold()?;
            if rotated && self.astray(&hold) {
                rotated = false;
            }
            if !rotated {
                self.rotate(&mut hold)?;
                for disk in &mut self.disks {
                    disk.open = None;
                }
                rotated = true;
            }
            self.batch(hold)?;
            if self
                .disks
                .iter()
                .all(|disk| disk.open.as_ref().is_some_and(BlockSet::is_empty))
            {
                return self.strike();
            }
            if let Some(left) = &mut batches {
                if *left == 0 {
                    return Ok(());
                }
                *left -= 1;
            }
        }
    }

    fn astray(&self, hold: &Hold<'_>) -> bool {
        if self.state.process.as_ref() != Some(&world::process(hold.process))
            || hold.disks.len() != self.disks.len()
        {
            return true;
        }
        hold.disks.iter().any(|seen| {
            let Some(tracked) = self.state.disks.get(&seen.key) else {
                return true;
            };
            let records = |named: &Named| {
                let mut has = seen.bitmaps.iter();
                has.any(|bitmap| bitmap.name == named.name && bitmap.recording)
            };
            track::trust(tracked, true, seen).is_err() || tracked.needed.iter().any(records)
        })
    }

    fn rotate(&mut self, hold: &mut Hold<'_>) -> Result<()> {
        self.intend(hold, |state, hold, log, settings| {
            rotate::rotate(state, hold, log, settings)
        })?;
        hold.seen()?;
        self.take_in(hold);
        Ok(())
    }

    pub(crate) fn intend(
        &mut self,
        hold: &mut Hold<'_>,
        act: impl Fn(&mut State, &mut Hold<'_>, &mut Log<'_>, &Settings<'_>) -> Result<Rotation>,
    ) -> Result<Rotation> {
        let process = world::process(hold.process);
        let settings = Settings {
            bases: &self.bases,
            granularity: BLOCK,
            repository: self.world.borrow().repos[self.plan.repo].short,
            process: &process,
        };
        let mut log = self.log();
        act(&mut self.state, hold, &mut log, &settings)
    }

    fn log(&self) -> Log<'a> {
        Log {
            world: self.world,
            repo: self.plan.repo,
        }
    }

    pub(crate) fn take_in(&mut self, hold: &Hold<'_>) {
        let mut before = std::mem::take(&mut self.disks);
        for seen in &hold.disks {
            let Some(tracked) = self.state.disks.get(&seen.key) else {
                continue;
            };
            let blocks = tracked.size / u64::from(BLOCK);
            let at = before
                .iter()
                .position(|disk| disk.key == tracked.key && disk.blocks == blocks);
            self.disks.push(at.map_or_else(
                || Disk {
                    key: tracked.key.clone(),
                    blocks,
                    open: None,
                },
                |at| before.swap_remove(at),
            ));
        }
    }

    /// Reads open blocks live, releases, makes the proofs durable, and only then counts them.
    fn batch(&mut self, hold: Hold<'_>) -> Result<()> {
        let epoch = self.state.epoch;
        let mut images = Vec::new();
        for index in 0..self.disks.len() {
            let image = hold.with(|world| hold.image(world, &self.disks[index].key))?;
            images.push(image);
            if self.disks[index].open.is_none() {
                let open = self.load(index, image)?;
                self.disks[index].open = Some(open);
            }
        }
        let mut left = self.plan.batch;
        let mut read: Spool = Vec::new();
        for (disk, image) in self.disks.iter().zip(&images) {
            let mut blocks = Vec::new();
            for run in disk.open.iter().flat_map(BlockSet::runs) {
                for block in run.first..run.end() {
                    if left == 0 {
                        break;
                    }
                    left -= 1;
                    let content = hold.with(|world| Ok(world.vm.read(*image, usize_of(block))))?;
                    blocks.push((block, content));
                }
            }
            read.push(blocks);
        }
        drop(hold);
        for (index, blocks) in read.into_iter().enumerate() {
            self.prove(index, epoch, &blocks)?;
            if let Some(open) = &mut self.disks[index].open {
                for (block, _) in blocks {
                    open.remove(one(block));
                }
            }
        }
        Ok(())
    }

    /// Makes proofs durable.
    pub(crate) fn prove(&mut self, index: usize, epoch: u64, read: &[(u64, u32)]) -> Result<()> {
        if read.is_empty() {
            return Ok(());
        }
        let key = self.disks[index].key.clone();
        let segment = effect(self.world, |world| {
            let base = self.base_map(world, &key);
            let content = |block: u64, version: u32| match base.get(usize_of(block)) {
                Some(base) if *base == version => Content::Same,
                _ => Content::Version(version),
            };
            let blocks = read
                .iter()
                .map(|(block, version)| (one(*block), content(*block, *version)));
            let segment = Segment {
                blocks: blocks.collect(),
                disk: key.clone(),
                epoch,
            };
            world::put(world, self.plan.repo, Item::Segment(segment.clone()));
            Ok(segment)
        })?;
        self.segments.push(segment);
        self.state.apply_proof(epoch);
        Ok(())
    }

    /// The base's map of a disk, empty without one.
    pub(crate) fn base_map(&self, world: &World, key: &str) -> Vec<u32> {
        let base = self
            .state
            .disks
            .get(key)
            .and_then(|tracked| tracked.base.as_ref());
        let point = base.map(|base| base.map.as_u64().unwrap());
        let map =
            point.map(|point| &world.repos[self.plan.repo].points[usize_of(point)].disks[key].map);
        map.cloned().unwrap_or_default()
    }

    /// The open blocks of a disk, from the bitmaps of an image.
    pub(crate) fn load(&self, index: usize, image: usize) -> Result<BlockSet> {
        let disk = &self.disks[index];
        let tracked = &self.state.disks[&disk.key];
        let mut proofs =
            Proofs::new(disk.blocks, tracked.pending_epochs()).map_err(anyhow::Error::msg)?;
        for segment in self
            .segments
            .iter()
            .filter(|segment| segment.disk == disk.key)
        {
            for (run, _) in &segment.blocks {
                proofs.prove(segment.epoch, *run);
            }
        }
        let mut open = BlockSet::new(disk.blocks);
        if let Some(epoch) = tracked.whole {
            let whole = BlockRun {
                first: 0,
                count: disk.blocks,
            };
            proofs.unsafe_of(epoch, whole, &mut open);
        }
        for named in &tracked.needed {
            for block in self.dirty(image, &named.name)? {
                proofs.unsafe_of(named.epoch, one(block), &mut open);
            }
        }
        Ok(open)
    }

    /// The blocks of a bitmap, exported: one that records cannot be.
    pub(crate) fn dirty(&self, image: usize, name: &str) -> Result<Vec<u64>> {
        let world = self.world.borrow();
        let mut bitmaps = world.vm.images[image].bitmaps.iter();
        let bitmap = bitmaps.find(|bitmap| bitmap.name == name && !bitmap.inconsistent);
        let Some(bitmap) = bitmap.filter(|bitmap| !bitmap.recording) else {
            anyhow::bail!("bitmap {name} cannot be exported");
        };
        Ok((0..64)
            .filter(|block| bitmap.bits >> block & 1 == 1)
            .collect())
    }

    fn strike(&mut self) -> Result<()> {
        let pending = |disk: &&Disk| {
            let tracked = self.state.disks.get(&disk.key);
            tracked.is_some_and(|tracked| !tracked.pending_epochs().is_empty())
        };
        let keys: Vec<String> = self
            .disks
            .iter()
            .filter(pending)
            .map(|disk| disk.key.clone())
            .collect();
        if keys.is_empty() {
            return Ok(());
        }
        let mut hold = self.hold()?;
        let up_to = self.state.epoch - 1;
        let mut log = self.log();
        rotate::strike(&mut self.state, &mut hold, &mut log, &keys, up_to)
    }
}

pub(crate) fn one(block: u64) -> BlockRun {
    BlockRun {
        first: block,
        count: 1,
    }
}

pub(crate) fn usize_of(number: u64) -> usize {
    usize::try_from(number).unwrap()
}
