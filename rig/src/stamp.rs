//! One ordered stream of writes over several disks, and the check that images of them are its state after some write.
//!
//! Step `n` (1, 2, ...) goes to disk `(n - 1) % disks`, after step `n - 1` has completed. What it does is computed from the
//! seed and `n` alone: a 4 KiB write of a page that holds `n` at a pseudo-random slot or, in trim mode, every now and then
//! zeroes over or a discard of 64 KiB. So the images are taken at one instant if and only if there is an `N` such that
//! every slot of every disk holds exactly what the steps `1..=N` left there.
//!
//! A slot that was discarded and not written since may hold its old page or zeroes: both are right.
//!
//! The program resumes after a restart by looking for the newest page. A crash may have lost writes that no flush covered;
//! it then writes again what the state after that page should be and says how many slots it repaired.
//!
//! ```text
//! page words: 0 magic | 1 seed | 2 step | 3 disk | 4 slot | 5 slots used on each disk | 6 disks, trim << 8 | noise | checksum
//! ```

use std::io;
use std::time::{Duration, Instant};

use crate::block::{BlockDevice, Image, Page, SLOT, SLOTS_PER_BLOCK, is_sealed, is_zero, mix};

const MAGIC: u64 = u64::from_le_bytes(*b"FRSTAMP1");
/// Steps beyond the newest page that may have left no page of their own.
const MAX_TAIL: u64 = 4096;
const HEADER_WORDS: usize = 7;

/// What the stream of steps is computed from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Makes two streams different.
    pub seed: u64,
    /// How many disks the steps go round.
    pub disks: u64,
    /// Slots used on each disk, from slot 0; a multiple of 16.
    pub slots: u64,
    /// Whether some steps zero and discard.
    pub trim: bool,
}

/// What a step does to its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Writes the step's page at a slot.
    Write(u64),
    /// Zeroes the 16 slots from here on.
    Zero(u64),
    /// Discards the 16 slots from here on.
    Discard(u64),
}

impl Plan {
    /// A plan over disks of these sizes in bytes, using at most `span` bytes of each.
    pub fn new(seed: u64, sizes: &[u64], span: Option<u64>, trim: bool) -> io::Result<Self> {
        let smallest = sizes
            .iter()
            .copied()
            .min()
            .unwrap_or(0)
            .min(span.unwrap_or(u64::MAX));
        let slots = smallest / SLOT / SLOTS_PER_BLOCK * SLOTS_PER_BLOCK;
        if slots == 0 {
            return Err(io::Error::other("stamp needs at least 64 KiB of each disk"));
        }
        Ok(Self {
            seed,
            disks: sizes.len() as u64,
            slots,
            trim,
        })
    }

    /// The disk of a step.
    pub fn disk(&self, step: u64) -> u64 {
        (step - 1) % self.disks
    }

    /// What a step does.
    pub fn action(&self, step: u64) -> Action {
        let hash = mix(self.seed ^ mix(step));
        let block = (hash >> 8) % (self.slots / SLOTS_PER_BLOCK) * SLOTS_PER_BLOCK;
        match hash & 0x1f {
            0 if self.trim => Action::Zero(block),
            1 if self.trim => Action::Discard(block),
            _ => Action::Write((hash >> 8) % self.slots),
        }
    }

    /// The page that step `step` wrote or would write at a slot.
    pub fn page(&self, step: u64, slot: u64) -> Page {
        let mut page = Page::default();
        let options = self.disks | u64::from(self.trim) << 8;
        let header = [
            MAGIC,
            self.seed,
            step,
            self.disk(step),
            slot,
            self.slots,
            options,
        ];
        for (index, word) in header.into_iter().enumerate() {
            page.set_word(index, word);
        }
        page.seal(HEADER_WORDS, mix(self.seed ^ step));
        page
    }

    /// Reads plan and step from a page; `None` when it is no stamp of that disk and slot.
    fn parse(page: &Page, disk: u64, slot: u64) -> Option<(Self, u64)> {
        let stamped = page.word(0) == MAGIC && is_sealed(&page.0);
        if !stamped || page.word(3) != disk || page.word(4) != slot {
            return None;
        }
        let (options, slots) = (page.word(6), page.word(5));
        let (disks, trim) = (options & 0xff, options >> 8 == 1);
        let plan = Self {
            seed: page.word(1),
            disks,
            slots,
            trim,
        };
        let sane = disks > disk && slots > slot && slots.is_multiple_of(SLOTS_PER_BLOCK);
        (sane && page.word(2) > 0).then(|| (plan, page.word(2)))
    }
}

/// What a slot must hold. Steps are never 0, which stands for zeroes here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Expected {
    step: u64,
    /// Discarded since: zeroes will do as well.
    or_zero: bool,
}

impl Expected {
    fn accepts(self, found: Found) -> bool {
        match found {
            Found::Zero => self.step == 0 || self.or_zero,
            Found::Step(step) => step == self.step,
            Found::Garbage => false,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Zero,
    Step(u64),
    Garbage,
}

/// The state of all disks after some step.
struct State {
    plan: Plan,
    step: u64,
    disks: Vec<Vec<Expected>>,
}

impl State {
    fn at(plan: Plan, step: u64) -> io::Result<Self> {
        let slots = usize::try_from(plan.slots).map_err(io::Error::other)?;
        let disks = (0..plan.disks)
            .map(|_| vec![Expected::default(); slots])
            .collect();
        let mut state = Self {
            plan,
            step: 0,
            disks,
        };
        while state.step < step {
            state.advance(&mut |_, _, _, _| {});
        }
        Ok(state)
    }

    /// Takes the next step and reports every slot that it touches: disk, slot, before, after.
    fn advance(&mut self, touched: &mut dyn FnMut(usize, usize, Expected, Expected)) {
        self.step += 1;
        let disk = index(self.plan.disk(self.step));
        let (first, count) = match self.plan.action(self.step) {
            Action::Write(slot) => (slot, 1),
            Action::Zero(slot) | Action::Discard(slot) => (slot, SLOTS_PER_BLOCK),
        };
        for slot in index(first)..index(first + count) {
            let before = self.disks[disk][slot];
            let after = match self.plan.action(self.step) {
                Action::Write(_) => Expected {
                    step: self.step,
                    or_zero: false,
                },
                Action::Zero(_) => Expected::default(),
                Action::Discard(_) => Expected {
                    or_zero: true,
                    ..before
                },
            };
            self.disks[disk][slot] = after;
            touched(disk, slot, before, after);
        }
    }
}

fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// What the images say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// No stamp anywhere: the state before the first step.
    Empty,
    /// Exactly the state after this step (and, where later steps left no trace, after those too).
    Exact(u64),
    /// Not the state after any step.
    Inexact {
        /// The newest step seen.
        newest: u64,
        /// How many slots contradict the state after it.
        wrong: usize,
        /// The first of them, in words.
        examples: Vec<String>,
    },
}

impl Verdict {
    /// Whether the images are those of one instant.
    pub fn is_exact(&self) -> bool {
        !matches!(self, Self::Inexact { .. })
    }
}

struct Scan {
    plan: Option<Plan>,
    newest: u64,
    found: Vec<Vec<Found>>,
    complaints: Vec<String>,
}

fn scan(images: &[&dyn Image]) -> io::Result<Scan> {
    let mut scan = Scan {
        plan: None,
        newest: 0,
        found: Vec::new(),
        complaints: Vec::new(),
    };
    let mut page = Page::default();
    for (disk, image) in images.iter().enumerate() {
        let mut found = Vec::with_capacity(index(image.slots()));
        for slot in 0..image.slots() {
            image.slot(slot, &mut page)?;
            found.push(scan.look(&page, disk as u64, slot));
        }
        scan.found.push(found);
    }
    Ok(scan)
}

impl Scan {
    fn look(&mut self, page: &Page, disk: u64, slot: u64) -> Found {
        if is_zero(&page.0) {
            return Found::Zero;
        }
        match Plan::parse(page, disk, slot) {
            Some((plan, step)) if *self.plan.get_or_insert(plan) == plan => {
                self.newest = self.newest.max(step);
                Found::Step(step)
            }
            other => {
                let what = if other.is_some() {
                    "a stamp of another run"
                } else {
                    "no stamp of this place"
                };
                self.complaints
                    .push(format!("disk {disk} slot {slot}: {what}"));
                Found::Garbage
            }
        }
    }
}

/// Whether the images, in the order of the program's disks, are the state after some step.
pub fn check(images: &[&dyn Image]) -> io::Result<Verdict> {
    let scan = scan(images)?;
    let Some(plan) = scan.plan else {
        let wrong = scan.complaints.len();
        return Ok(match wrong {
            0 => Verdict::Empty,
            _ => Verdict::Inexact {
                newest: 0,
                wrong,
                examples: some(&scan.complaints),
            },
        });
    };
    if plan.disks != images.len() as u64 || images.iter().any(|image| image.slots() < plan.slots) {
        let reason = format!("{} images do not fit {plan:?}", images.len());
        return Ok(Verdict::Inexact {
            newest: scan.newest,
            wrong: 1,
            examples: vec![reason],
        });
    }
    let state = State::at(plan, scan.newest)?;
    let (wrong, examples) = mismatches(&state, &scan);
    match exact_step(state, &scan, wrong) {
        Some(step) => Ok(Verdict::Exact(step)),
        None => Ok(Verdict::Inexact {
            newest: scan.newest,
            wrong,
            examples,
        }),
    }
}

/// Slots that contradict the state, beyond the used range too, and the first few in words.
fn mismatches(state: &State, scan: &Scan) -> (usize, Vec<String>) {
    let (mut wrong, mut examples) = (0, some(&scan.complaints));
    for (disk, found) in scan.found.iter().enumerate() {
        for (slot, &found) in found.iter().enumerate() {
            let expected = state.disks[disk].get(slot).copied().unwrap_or_default();
            if !expected.accepts(found) {
                wrong += 1;
                let text = format!("disk {disk} slot {slot}: {found:?} instead of {expected:?}");
                examples.push(text);
            }
        }
    }
    (wrong, some(&examples))
}

/// Walks on from the newest page seen, since later steps may have left no page (or only erased some).
fn exact_step(mut state: State, scan: &Scan, mut wrong: usize) -> Option<u64> {
    let last = state.step + MAX_TAIL;
    while wrong > 0 && state.step < last {
        state.advance(&mut |disk, slot, before, after| {
            let found = scan.found[disk][slot];
            wrong += usize::from(!after.accepts(found));
            wrong -= usize::from(!before.accepts(found));
        });
    }
    (wrong == 0).then_some(state.step)
}

fn some(list: &[String]) -> Vec<String> {
    list.iter().take(8).cloned().collect()
}

/// How the program runs.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Seed of a fresh stream.
    pub seed: u64,
    /// Uses at most so many bytes of each disk.
    pub span: Option<u64>,
    /// Zeroes and discards now and then.
    pub trim: bool,
    /// Steps a second at most.
    pub rate: Option<u32>,
    /// Ends after so many steps of this run.
    pub steps: Option<u64>,
}

struct Devices<'a>(&'a mut [Box<dyn BlockDevice>]);

impl Devices<'_> {
    /// Reads all disks as the checker does.
    fn scan(&mut self) -> io::Result<Scan> {
        let mut scan = Scan {
            plan: None,
            newest: 0,
            found: Vec::new(),
            complaints: Vec::new(),
        };
        let mut page = Page::default();
        for (disk, device) in self.0.iter_mut().enumerate() {
            let mut found = Vec::new();
            for slot in 0..device.size() / SLOT {
                device.read(slot, &mut page)?;
                found.push(scan.look(&page, disk as u64, slot));
            }
            scan.found.push(found);
        }
        Ok(scan)
    }

    fn act(&mut self, plan: &Plan, step: u64) -> io::Result<()> {
        let device = &mut self.0[index(plan.disk(step))];
        match plan.action(step) {
            Action::Write(slot) => device.write(slot, &plan.page(step, slot)),
            Action::Zero(slot) => device.zero(slot, SLOTS_PER_BLOCK),
            Action::Discard(slot) => device.discard(slot, SLOTS_PER_BLOCK),
        }
    }

    /// Brings the disks to the state after a step; returns how many slots were not.
    fn repair(&mut self, plan: Plan, scan: &Scan) -> io::Result<usize> {
        let state = State::at(plan, scan.newest)?;
        let mut repaired = 0;
        for (disk, found) in scan.found.iter().enumerate() {
            for (slot, &found) in found.iter().enumerate() {
                let expected = state.disks[disk].get(slot).copied().unwrap_or_default();
                if expected.accepts(found) {
                    continue;
                }
                repaired += 1;
                let slot = slot as u64;
                let page = match expected.step {
                    0 => Page::default(),
                    step => plan.page(step, slot),
                };
                self.0[disk].write(slot, &page)?;
            }
        }
        Ok(repaired)
    }
}

/// Runs the program; `say` gets a line at the start, about once a second, and at the end.
pub fn run(
    devices: &mut [Box<dyn BlockDevice>],
    options: &Options,
    say: &mut dyn FnMut(&str),
) -> io::Result<u64> {
    let sizes: Vec<u64> = devices.iter().map(|device| device.size()).collect();
    let mut devices = Devices(devices);
    let scan = devices.scan()?;
    let fresh = Plan::new(options.seed, &sizes, options.span, options.trim)?;
    let plan = scan.plan.unwrap_or(fresh);
    let mut step = scan.newest;
    if step > 0 {
        let repaired = devices.repair(plan, &scan)?;
        say(&format!(
            "stamp: resume after seq {step}, repaired {repaired}"
        ));
    }
    say(&format!(
        "stamp: running seq {step} slots {} disks {}",
        plan.slots, plan.disks
    ));
    let (started, first) = (Instant::now(), step);
    let mut spoken = started;
    while options.steps.is_none_or(|steps| step - first < steps) {
        step += 1;
        devices.act(&plan, step)?;
        if spoken.elapsed() >= Duration::from_secs(1) {
            spoken = Instant::now();
            say(&format!(
                "stamp: seq {step} t={}",
                started.elapsed().as_secs()
            ));
        }
        if let Some(rate) = options.rate {
            let due =
                started + Duration::from_secs(1) * u32::try_from(step - first).unwrap_or(0) / rate;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    }
    for device in devices.0.iter_mut() {
        device.flush()?;
    }
    say(&format!("stamp: done seq {step}"));
    Ok(step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::MemoryDisk;

    const MIB: u64 = 1 << 20;

    fn pair(trim: bool, steps: u64) -> (Plan, Vec<MemoryDisk>) {
        let disks = vec![MemoryDisk::new(MIB), MemoryDisk::new(MIB)];
        let mut boxed: Vec<Box<dyn BlockDevice>> = disks
            .iter()
            .map(|disk| Box::new(disk.clone()) as Box<dyn BlockDevice>)
            .collect();
        let options = Options {
            seed: 7,
            span: None,
            trim,
            rate: None,
            steps: Some(steps),
        };
        run(&mut boxed, &options, &mut |_| {}).unwrap();
        (Plan::new(7, &[MIB, MIB], None, trim).unwrap(), disks)
    }

    fn verdict(disks: &[MemoryDisk]) -> Verdict {
        let images: Vec<Vec<u8>> = disks.iter().map(MemoryDisk::bytes).collect();
        check(&[&images[0], &images[1]]).unwrap()
    }

    #[test]
    fn every_prefix_of_the_stream_is_exact() {
        for trim in [false, true] {
            for steps in [1, 2, 3, 50, 51, 400, 2000, 2001] {
                let (_, disks) = pair(trim, steps);
                let verdict = verdict(&disks);
                assert!(
                    matches!(verdict, Verdict::Exact(n) if n <= steps),
                    "{trim} {steps}: {verdict:?}"
                );
            }
        }
        let empty = [MemoryDisk::new(MIB), MemoryDisk::new(MIB)];
        assert_eq!(verdict(&empty), Verdict::Empty);
    }

    #[test]
    fn a_lost_write_is_refuted() {
        let (plan, mut disks) = pair(false, 500);
        // Step 480's slot as it was before: zero. (No later step writes there, or the test would say so.)
        let Action::Write(slot) = plan.action(480) else {
            panic!("a write")
        };
        disks[index(plan.disk(480))]
            .write(slot, &Page::default())
            .unwrap();
        assert!(matches!(verdict(&disks), Verdict::Inexact { wrong: 1, .. }));
    }

    #[test]
    fn a_write_from_the_future_is_refuted() {
        let (plan, mut disks) = pair(false, 500);
        let Action::Write(slot) = plan.action(510) else {
            panic!("a write")
        };
        disks[index(plan.disk(510))]
            .write(slot, &plan.page(510, slot))
            .unwrap();
        assert!(!verdict(&disks).is_exact());
    }

    #[test]
    fn disks_of_two_instants_are_refuted() {
        let (_, early) = pair(false, 500);
        let (_, late) = pair(false, 504);
        assert!(!verdict(&[early[0].clone(), late[1].clone()]).is_exact());
        // One step apart is a legal order of the two disks, and the other way round it is not.
        let (_, next) = pair(false, 501);
        assert_eq!(
            verdict(&[next[0].clone(), early[1].clone()]),
            Verdict::Exact(501)
        );
    }

    #[test]
    fn zeroes_that_come_back_are_refuted() {
        let (plan, mut disks) = pair(true, 3000);
        let state = State::at(plan, 3000).unwrap();
        let disk = &state.disks[0];
        let slot = disk.iter().position(|e| *e == Expected::default()).unwrap() as u64;
        let old = (1..3000)
            .rev()
            .find(|&n| plan.disk(n) == 0 && plan.action(n) == Action::Write(slot))
            .unwrap();
        disks[0].write(slot, &plan.page(old, slot)).unwrap();
        assert!(!verdict(&disks).is_exact());
    }

    #[test]
    fn damage_and_foreign_pages_are_refuted() {
        let (plan, mut disks) = pair(false, 500);
        let Action::Write(slot) = plan.action(500) else {
            panic!("a write")
        };
        let mut page = plan.page(500, slot);
        page.0[2000] ^= 1;
        disks[1].write(slot, &page).unwrap();
        assert!(!verdict(&disks).is_exact());
        let other = Plan { seed: 8, ..plan };
        disks[1].write(slot, &other.page(500, slot)).unwrap();
        assert!(!verdict(&disks).is_exact());
    }

    #[test]
    fn a_restart_repairs_what_a_crash_lost_and_goes_on() {
        let (plan, mut disks) = pair(true, 500);
        let slot = (1..490).rev().find_map(|n| match plan.action(n) {
            Action::Write(slot) if plan.disk(n) == 0 => Some(slot),
            _ => None,
        });
        disks[0].write(slot.unwrap(), &Page::default()).unwrap();
        let mut boxed: Vec<Box<dyn BlockDevice>> = disks
            .iter()
            .map(|disk| Box::new(disk.clone()) as Box<dyn BlockDevice>)
            .collect();
        let options = Options {
            seed: 1,
            span: None,
            trim: false,
            rate: None,
            steps: Some(100),
        };
        run(&mut boxed, &options, &mut |_| {}).unwrap();
        assert!(matches!(verdict(&disks), Verdict::Exact(n) if n >= 590));
    }
}
