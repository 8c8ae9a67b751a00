//! What is durable, and the tape of what happens: before every step of a run the world may move on, or the run may die, before
//! or after the step took effect.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::collections::VecDeque;

use anyhow::{Result, bail, ensure};
use forerun::bitmap::name;
use forerun::bitmap::rotate::{Journal, Port};
use forerun::bitmap::track::{Record, Seen, State};
use forerun::qmp::Process;
use forerun::units::BlockRun;

use crate::run::{self, Plan};
use crate::vm::{Act, Vm};

/// An event on the tape.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    /// The run takes so many steps undisturbed.
    Steps(u8),
    /// A run begins; in the middle of another repository's run, between two batches of it.
    Start(Plan),
    /// The run dies at its next step, and whether that takes effect.
    Die(bool),
    /// The guest or an operator does something.
    Act(Act),
}

/// What a block was proved to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    Version(u32),
    Same,
}

/// An item of a session's log.
#[derive(Debug, Clone)]
pub(crate) enum Item {
    Record(Record),
    Segment(Segment),
}

#[derive(Debug, Clone)]
pub(crate) struct Segment {
    pub(crate) disk: String,
    pub(crate) epoch: u64,
    pub(crate) blocks: Vec<(BlockRun, Content)>,
}

/// A disk of a point.
#[derive(Debug, Clone)]
pub(crate) struct PointDisk {
    pub(crate) tracked: forerun::bitmap::track::Tracked,
    pub(crate) map: Vec<u32>,
}

#[derive(Debug, Clone)]
pub(crate) struct Point {
    pub(crate) session: u64,
    pub(crate) retired: Vec<(String, String)>,
    pub(crate) disks: BTreeMap<String, PointDisk>,
}

/// What a repository keeps of the target.
#[derive(Debug)]
pub(crate) struct Repo {
    pub(crate) short: &'static str,
    pub(crate) log: Option<(u64, Vec<Item>)>,
    pub(crate) sessions: u64,
    pub(crate) points: Vec<Point>,
    pub(crate) running: bool,
    /// By slot: up to when what happened to it has led to a rescan already.
    excused: BTreeMap<String, u64>,
    /// When it last looked at the disks.
    looked: u64,
    /// How many disks were put in doubt so far.
    pub(crate) doubts: u64,
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) vm: Vm,
    pub(crate) repos: Vec<Repo>,
    tape: VecDeque<Op>,
    steps: u8,
    pub(crate) held: bool,
    /// What the runs have been through, for the statistics of the test.
    pub(crate) published: u64,
}

impl World {
    pub(crate) fn new(vm: Vm, tape: Vec<Op>) -> RefCell<Self> {
        let repo = |short| Repo {
            short,
            log: None,
            sessions: 0,
            points: Vec::new(),
            running: false,
            excused: BTreeMap::new(),
            looked: 0,
            doubts: 0,
        };
        RefCell::new(Self {
            vm,
            repos: vec![repo("0000aaaa"), repo("0000bbbb")],
            tape: tape.into(),
            steps: 0,
            held: false,
            published: 0,
        })
    }
}

/// What becomes of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Taken,
    DiedBefore,
    DiedAfter,
}

fn step(world: &RefCell<World>) -> Step {
    loop {
        let op = {
            let mut world = world.borrow_mut();
            if world.steps > 0 {
                world.steps -= 1;
                return Step::Taken;
            }
            world.tape.pop_front()
        };
        match op {
            None => return Step::Taken,
            Some(Op::Steps(steps)) => world.borrow_mut().steps = steps,
            Some(Op::Die(false)) => return Step::DiedBefore,
            Some(Op::Die(true)) => return Step::DiedAfter,
            Some(Op::Start(plan)) => start(world, &plan),
            Some(Op::Act(act)) => {
                let mut world = world.borrow_mut();
                let held = world.held;
                world.vm.act(&act, held);
            }
        }
    }
}

/// Begins a run where one may begin now; how it ends is its own affair.
fn start(world: &RefCell<World>, plan: &Plan) {
    {
        let world = world.borrow();
        if world.held || world.repos[plan.repo].running {
            return;
        }
    }
    run::run(world, plan).ok();
}

/// Plays the tape to its end.
pub(crate) fn play(world: &RefCell<World>) {
    while !world.borrow().tape.is_empty() {
        world.borrow_mut().steps = 0;
        step(world);
    }
    world.borrow_mut().steps = 0;
}

/// A step of a run that has an effect.
pub(crate) fn effect<T>(
    world: &RefCell<World>,
    act: impl FnOnce(&mut World) -> Result<T>,
) -> Result<T> {
    let step = step(world);
    ensure!(step != Step::DiedBefore, "died before a step");
    let done = act(&mut world.borrow_mut())?;
    ensure!(step != Step::DiedAfter, "died after a step");
    Ok(done)
}

/// The target in a run's hands.
pub(crate) struct Hold<'a> {
    world: &'a RefCell<World>,
    repo: usize,
    leave_out: u8,
    pub(crate) process: u64,
    /// Slot and image of the chosen disks, as they were last seen.
    pub(crate) looked: Vec<(usize, usize)>,
    pub(crate) disks: Vec<Seen>,
}

impl<'a> Hold<'a> {
    pub(crate) fn take(world: &'a RefCell<World>, plan: &Plan) -> Result<Self> {
        let process = effect(world, |world| {
            world.held = true;
            Ok(world.vm.process)
        })?;
        let mut hold = Self {
            world,
            repo: plan.repo,
            leave_out: plan.leave_out,
            process,
            looked: Vec::new(),
            disks: Vec::new(),
        };
        hold.seen()?;
        ensure!(!hold.disks.is_empty(), "no disk is chosen");
        Ok(hold)
    }

    /// The monitor's connection is of one process.
    pub(crate) fn with<T>(&self, act: impl FnOnce(&mut World) -> Result<T>) -> Result<T> {
        effect(self.world, |world| {
            ensure!(world.vm.process == self.process, "QEMU is gone");
            act(world)
        })
    }

    pub(crate) fn image(&self, world: &World, key: &str) -> Result<usize> {
        let slot = world.vm.slot(key);
        match self.looked.iter().find(|(looked, _)| *looked == slot) {
            Some((_, image))
                if world.vm.slots[slot].plugged && world.vm.slots[slot].image == *image =>
            {
                Ok(*image)
            }
            _ => bail!("disk {key} is no longer there"),
        }
    }

    /// The places of bitmaps that are there; none of another repository's.
    fn places(
        &self,
        world: &World,
        bitmaps: &[(String, String)],
        usable: bool,
    ) -> Result<Vec<(usize, usize)>> {
        let mut places = Vec::new();
        for (key, name) in bitmaps {
            assert!(
                name::belongs_to(name, world.repos[self.repo].short),
                "{name} is not ours"
            );
            let image = self.image(world, key)?;
            let found = &world.vm.images[image].bitmaps;
            let Some(index) = found.iter().position(|bitmap| &bitmap.name == name) else {
                bail!("bitmap {name} is not there");
            };
            ensure!(
                !(usable && found[index].inconsistent),
                "{name} is inconsistent"
            );
            ensure!(!places.contains(&(image, index)), "{name} is named twice");
            places.push((image, index));
        }
        Ok(places)
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.world.borrow_mut().held = false;
    }
}

impl Port for Hold<'_> {
    fn seen(&mut self) -> Result<Vec<Seen>> {
        let (leave_out, repo) = (self.leave_out, self.repo);
        let (looked, disks) = self.with(|world| {
            world.vm.time += 1;
            world.repos[repo].looked = world.vm.time;
            let vm = &world.vm;
            let chosen = (0..vm.slots.len())
                .filter(|slot| vm.slots[*slot].plugged && leave_out >> *slot & 1 == 0);
            let looked: Vec<(usize, usize)> =
                chosen.map(|slot| (slot, vm.slots[slot].image)).collect();
            let disks: Vec<Seen> = looked.iter().map(|(slot, _)| vm.seen(*slot)).collect();
            Ok((looked, disks))
        })?;
        self.looked = looked;
        self.disks.clone_from(&disks);
        Ok(disks)
    }

    fn add(&mut self, bitmaps: &[(String, String)]) -> Result<()> {
        self.with(|world| {
            let images = bitmaps.iter().map(|(key, _)| self.image(world, key));
            let images = images.collect::<Result<Vec<_>>>()?;
            for (image, (_, name)) in images.into_iter().zip(bitmaps) {
                world.vm.add(image, name);
            }
            Ok(())
        })
    }

    fn disable(&mut self, bitmaps: &[(String, String)]) -> Result<()> {
        self.with(|world| {
            for (image, index) in self.places(world, bitmaps, true)? {
                world.vm.images[image].bitmaps[index].recording = false;
            }
            Ok(())
        })
    }

    fn remove(&mut self, bitmaps: &[(String, String)]) -> Result<()> {
        self.with(|world| {
            self.places(world, bitmaps, false)?;
            for (key, name) in bitmaps {
                let image = self.image(world, key)?;
                let has = &mut world.vm.images[image].bitmaps;
                has.retain(|bitmap| &bitmap.name != name);
            }
            Ok(())
        })
    }
}

/// The durable log of a repository's session.
pub(crate) struct Log<'a> {
    pub(crate) world: &'a RefCell<World>,
    pub(crate) repo: usize,
}

impl Journal for Log<'_> {
    fn append(&mut self, record: &Record) -> Result<()> {
        effect(self.world, |world| {
            judge(world, self.repo, record);
            put(world, self.repo, Item::Record(record.clone()));
            Ok(())
        })
    }
}

/// Appends to the session's log, which begins with its first item.
pub(crate) fn put(world: &mut World, repo: usize, item: Item) {
    let repo = &mut world.repos[repo];
    if repo.log.is_none() {
        repo.sessions += 1;
        repo.log = Some((repo.sessions, Vec::new()));
    }
    repo.log.as_mut().unwrap().1.push(item);
}

/// A disk that nothing happened to is not rescanned, and a rescan has a reason.
fn judge(world: &mut World, repo: usize, record: &Record) {
    let Record::Rotation { epoch, disks, .. } = record else {
        return;
    };
    let mut state = State::default();
    let repo = &mut world.repos[repo];
    let mut proved: BTreeMap<String, u64> = BTreeMap::new();
    for item in repo.log.iter().flat_map(|(_, items)| items) {
        match item {
            Item::Record(record) => state.apply(record),
            Item::Segment(segment) => {
                state.apply_proof(segment.epoch);
                proved.insert(segment.disk.clone(), segment.epoch);
            }
        }
    }
    for disk in disks.iter().filter(|disk| disk.whole == Some(epoch - 1)) {
        assert!(
            disk.doubt.as_ref().is_some_and(|doubt| !doubt.is_empty()),
            "no reason"
        );
        repo.doubts += 1;
        let base = repo
            .points
            .iter()
            .rev()
            .find_map(|point| point.disks.get(&disk.key));
        let known = state.disks.get(&disk.key);
        // A first copy or a rescan that was cut off before anything was proved begins anew.
        let fresh = known.map_or(base.is_none(), |known| {
            let marker = known.whole.unwrap_or(0);
            // There is a limit of pending bitmaps.
            known.needed.len() > 250
                || known.needed.is_empty()
                    && known.whole.is_some()
                    && proved.get(&disk.key).is_none_or(|epoch| *epoch <= marker)
        });
        let disturbed = world.vm.slots[world.vm.slot(&disk.key)].disturbed;
        let excused = repo.excused.entry(disk.key.clone()).or_default();
        assert!(
            fresh || disturbed > *excused,
            "disk {} is rescanned for nothing: {:?}",
            disk.key,
            disk.doubt
        );
        // What happened after the look that this rests on is yet to be seen.
        if disturbed <= repo.looked {
            *excused = disturbed;
        }
    }
}

/// A disk whose session was given up with the point of the others.
pub(crate) fn excuse(world: &mut World, key: &str) {
    world.vm.time += 1;
    let slot = world.vm.slot(key);
    world.vm.slots[slot].disturbed = world.vm.time;
}

pub(crate) fn process(process: u64) -> Process {
    Process {
        pid: 1,
        start: process,
    }
}
