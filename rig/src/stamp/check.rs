//! What the disks must hold after a step, what they do hold, and whether there is a step that makes the two the same.

use std::io;

use super::{Action, Plan, index};
use crate::block::{Image, Page, SLOTS_PER_BLOCK, is_zero};

/// Steps beyond the newest page that may have left no page of their own.
const MAX_TAIL: u64 = 4096;

/// What a slot must hold. Steps are never 0, which stands for zeroes here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Expected {
    pub(super) step: u64,
    /// Discarded since: zeroes will do as well.
    pub(super) or_zero: bool,
}

impl Expected {
    pub(super) fn accepts(self, found: Found) -> bool {
        match found {
            Found::Zero => self.step == 0 || self.or_zero,
            Found::Step(step) => step == self.step,
            Found::Garbage => false,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    Zero,
    Step(u64),
    Garbage,
}

/// The state of all disks after some step.
pub(super) struct State {
    plan: Plan,
    step: u64,
    pub(super) disks: Vec<Vec<Expected>>,
}

impl State {
    pub(super) fn at(plan: Plan, step: u64) -> io::Result<Self> {
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

#[derive(Default)]
pub(super) struct Scan {
    pub(super) plan: Option<Plan>,
    pub(super) newest: u64,
    pub(super) found: Vec<Vec<Found>>,
    complaints: Vec<String>,
}

fn scan(images: &[&dyn Image]) -> io::Result<Scan> {
    let mut scan = Scan::default();
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
    pub(super) fn look(&mut self, page: &Page, disk: u64, slot: u64) -> Found {
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
