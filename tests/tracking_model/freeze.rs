//! The end of a run, in the order of `src/backup/freeze.rs` and `commit.rs`: the instant, its residual, the point.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, ensure};
use forerun::bitmap::blocks::BlockSet;
use forerun::bitmap::rotate::{self, Port};
use forerun::bitmap::track::{Base, Rotation, State, Tracked};
use serde_json::json;

use crate::run::{Disk, Run, Spool, one, usize_of};
use crate::world::{self, Content, Hold, Point, PointDisk, World, effect};

/// A block that no proof and no base tells of.
const UNKNOWN: u32 = u32::MAX;

/// What the snapshot held, by disk.
pub(crate) type Instant = BTreeMap<String, Vec<u32>>;

impl Run<'_> {
    /// `None` when it was given up.
    pub(crate) fn freeze(&mut self) -> Result<Option<(Instant, Spool)>> {
        let mut hold = self.hold()?;
        let frozen = self.freeze_held(&mut hold);
        self.world.borrow_mut().vm.snapshot = false;
        if !matches!(frozen, Ok(Some(_))) {
            for disk in &mut self.disks {
                disk.open = None;
            }
        }
        frozen
    }

    fn freeze_held(&mut self, hold: &mut Hold<'_>) -> Result<Option<(Instant, Spool)>> {
        let whole =
            |state: &State, key: &str| state.disks.get(key).and_then(|tracked| tracked.whole);
        let known: Vec<(String, Option<u64>)> = self
            .disks
            .iter()
            .map(|disk| (disk.key.clone(), whole(&self.state, &disk.key)))
            .collect();
        let rotation = self.intend(hold, |state, hold, log, settings| {
            rotate::intend(state, hold, log, settings, true)
        })?;
        hold.seen()?;
        self.take_in(hold);
        for disk in &mut self.disks {
            let before = known.iter().find(|(key, _)| key == &disk.key);
            if before.is_none_or(|(_, before)| *before != whole(&self.state, &disk.key)) {
                disk.open = None;
            }
        }
        hold.seen()?;
        let instant = self.cut(hold, &rotation)?;
        let mut spool = Vec::new();
        for index in 0..self.disks.len() {
            let key = &self.disks[index].key;
            let image = hold.with(|world| hold.image(world, key))?;
            self.open_residual(index, image)?;
        }
        for disk in &self.disks {
            let image = hold.with(|world| hold.image(world, &disk.key))?;
            let mut blocks = Vec::new();
            for run in disk.open.iter().flat_map(BlockSet::runs) {
                for block in run.first..run.end() {
                    // Once a job is gone, its scratch answers with live data and no error.
                    let content = hold.with(|world| {
                        Ok(if world.vm.snapshot {
                            instant[&disk.key]
                                .get(usize_of(block))
                                .copied()
                                .unwrap_or(UNKNOWN)
                        } else {
                            world.vm.read(image, usize_of(block))
                        })
                    })?;
                    blocks.push((block, content));
                }
            }
            spool.push(blocks);
        }
        let holds = hold.with(|world| Ok(world.vm.snapshot))?;
        let valid = holds && self.still_the_disks(hold)?;
        Ok(valid.then_some((instant, spool)))
    }

    /// The transaction: add on all disks, the snapshot of all disks, which drains, disable on all disks.
    fn cut(&self, hold: &Hold<'_>, rotation: &Rotation) -> Result<Instant> {
        hold.with(|world| {
            let mut images = BTreeMap::new();
            for disk in &self.disks {
                images.insert(disk.key.clone(), hold.image(world, &disk.key)?);
            }
            let has = |world: &World, key: &str, name: &str| {
                let image = images.get(key).map(|image| &world.vm.images[*image]);
                image.is_some_and(|image| {
                    image
                        .bitmaps
                        .iter()
                        .any(|bitmap| bitmap.name == name && !bitmap.inconsistent)
                })
            };
            ensure!(
                rotation.add.iter().all(|(key, _)| images.contains_key(key)),
                "a disk is gone"
            );
            ensure!(
                rotation
                    .disable
                    .iter()
                    .all(|(key, name)| has(world, key, name)),
                "a bitmap is gone"
            );
            for (key, name) in &rotation.add {
                world.vm.add(images[key], name);
            }
            let mut instant = Instant::new();
            for (key, image) in &images {
                world.vm.drain(*image);
                instant.insert(key.clone(), world.vm.images[*image].content.clone());
            }
            for (key, name) in &rotation.disable {
                for bitmap in &mut world.vm.images[images[key]].bitmaps {
                    bitmap.recording &= &bitmap.name != name;
                }
            }
            world.vm.snapshot = true;
            Ok(instant)
        })
    }

    fn open_residual(&mut self, index: usize, image: usize) -> Result<()> {
        let tracked = &self.state.disks[&self.disks[index].key];
        let Some(mut open) = self.disks[index].open.clone() else {
            let open = self.load(index, image)?;
            self.disks[index].open = Some(open);
            return Ok(());
        };
        if let Some(last) = tracked.needed.last() {
            for block in self.dirty(image, &last.name)? {
                open.insert(one(block));
            }
        }
        self.disks[index].open = Some(open);
        Ok(())
    }

    /// The disks are those that the rotation wrote down.
    fn still_the_disks(&self, hold: &mut Hold<'_>) -> Result<bool> {
        let after = hold.seen()?;
        Ok(after.len() == self.disks.len()
            && after.iter().all(|seen| {
                let tracked = self.state.disks.get(&seen.key);
                tracked.is_some_and(|tracked| {
                    tracked.size == seen.size && tracked.identity == seen.identity
                })
            }))
    }

    /// The residual is proved, the maps are built, the point is published, the session goes, old bitmaps go.
    pub(crate) fn store(&mut self, instant: &Instant, spool: &Spool) -> Result<()> {
        let epoch = self.state.epoch;
        for (index, blocks) in spool.iter().enumerate() {
            self.prove(index, epoch, blocks)?;
        }
        effect(self.world, |world| {
            self.publish(world, instant);
            Ok(())
        })?;
        self.remove_session()?;
        let keys: Vec<String> = self.disks.iter().map(|disk| disk.key.clone()).collect();
        self.state.retired = self.state.outlived(&keys, &BTreeSet::new());
        let mut hold = self.hold()?;
        rotate::sweep(&mut self.state, &mut hold)
    }

    fn publish(&self, world: &mut World, instant: &Instant) {
        let mut disks = BTreeMap::new();
        let repo = self.plan.repo;
        let number = world.repos[repo].points.len();
        for disk in &self.disks {
            let tracked = &self.state.disks[&disk.key];
            let map = self.build_map(world, disk);
            assert_eq!(
                map, instant[&disk.key],
                "disk {} of point {number} of repository {repo} is not exact",
                disk.key
            );
            let tracked = Tracked {
                base: Some(Base {
                    point: number.to_string(),
                    size: tracked.size,
                    map: json!(number),
                }),
                needed: Vec::new(),
                whole: None,
                doubt: None,
                ..tracked.clone()
            };
            disks.insert(disk.key.clone(), PointDisk { tracked, map });
        }
        for key in self
            .state
            .disks
            .keys()
            .filter(|key| !disks.contains_key(*key))
        {
            world::excuse(world, key);
        }
        let keys: Vec<String> = disks.keys().cloned().collect();
        let earlier = world.repos[repo]
            .points
            .iter()
            .flat_map(|point| &point.retired);
        let retired = self.state.outlived(&keys, &earlier.cloned().collect());
        let session = world.repos[repo].log.as_ref().unwrap().0;
        world.repos[repo].points.push(Point {
            session,
            retired,
            disks,
        });
        world.published += 1;
    }

    /// Base and segments, the later ones over the earlier.
    fn build_map(&self, world: &World, disk: &Disk) -> Vec<u32> {
        let base = self.base_map(world, &disk.key);
        let base = |block: usize| base.get(block).copied().unwrap_or(UNKNOWN);
        let mut map: Vec<u32> = (0..usize_of(disk.blocks)).map(base).collect();
        for segment in self
            .segments
            .iter()
            .filter(|segment| segment.disk == disk.key)
        {
            for (run, content) in &segment.blocks {
                if let Some(block) = map.get_mut(usize_of(run.first)) {
                    *block = match content {
                        Content::Version(version) => *version,
                        Content::Same => base(usize_of(run.first)),
                    };
                }
            }
        }
        map
    }
}
