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

mod check;
mod writer;

use std::io;

use crate::block::{Page, SLOT, SLOTS_PER_BLOCK, is_sealed, mix};
pub use check::{Verdict, check};
pub use writer::{Options, run};

const MAGIC: u64 = u64::from_le_bytes(*b"FRSTAMP1");
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

fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::check::{Expected, State};
    use super::*;
    use crate::block::BlockDevice;
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
