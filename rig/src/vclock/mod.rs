//! Many concurrent writers whose pages carry a vector clock, and the check that images of their disks show one instant.
//!
//! # The writers
//!
//! There are `W` writers on each of `D` disks; writer `w` works on disk `w / W`, alone in the region `w % W` of it. Each has
//! one write in flight at a time: write `k` (1, 2, ...) starts after write `k - 1` has completed. Before it *submits* a write
//! a writer reads how many writes every other writer has *completed*; this vector clock goes into the page.
//!
//! A region has `S` slots. Write `k` goes to slot `slot(k)`, which walks over all 64 KiB blocks of the region with `run`
//! slots in each, then over the blocks again with the next `run` slots, until after `S` writes every slot has been written
//! once; then from the start. So there is always a block that was clean until microseconds ago, and a slot is only
//! overwritten by the write `S` later.
//!
//! # The invariants
//!
//! Let `n[w]` be the newest write of writer `w` that is found in the images. The images show one instant if and only if
//!
//! 1. **no write is lost**: every slot of `w` holds the newest write `k <= n[w]` with that slot, or zeroes when there is none
//!    (an older page, zeroes, damage or a foreign page there is a lost write);
//! 2. **nothing is too new**: for every `w` and every other `v`, the clock of the page of `w`'s write `n[w]` says at most
//!    `n[v]` for `v`: what had completed when that write was submitted is in the images as well (clocks only grow, so
//!    the newest page speaks for the older ones).
//!
//! A state that satisfies both is closed under "completed before it was submitted", so the writes can be put in an order
//! that real time allows and of which the images are a prefix; a state that breaks either is that of no instant. Writes that were
//! in flight may be in or not. With [`Bounds`] the instant must also lie between two moments of the host: every
//! write that was complete at the first is in, no write that was submitted after the second is.
//!
//! ```text
//! page words: 0 magic | 1 seed | 2 writer | 3 k | 4 slot of the disk | 5 W, run << 8, D << 16 | 6 S | 7 .. 7 + W * D clock
//!             | noise | checksum
//! ```

mod check;
mod writer;

use std::io;

use crate::block::{Page, SLOT, SLOTS_PER_BLOCK, is_sealed, mix};
pub use check::{Bounds, Report, Violation, check};
pub use writer::{Shared, run};

const MAGIC: u64 = u64::from_le_bytes(*b"FRVCLOCK");
const CLOCK: usize = 7;
/// Writers over all disks at most: their clock must fit in a page.
pub const MAX_WRITERS: u64 = 256;

/// Who writes where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Makes two runs different.
    pub seed: u64,
    /// Disks.
    pub disks: u64,
    /// Writers on each disk.
    pub per_disk: u64,
    /// Slots that are written in a 64 KiB block before the next block: 1, 2, 4, 8 or 16.
    pub run: u64,
    /// Slots of a writer's region, a multiple of 16.
    pub slots: u64,
}

impl Layout {
    /// The layout over disks of these sizes in bytes.
    pub fn new(seed: u64, sizes: &[u64], per_disk: u64, run: u64) -> io::Result<Self> {
        let smallest = sizes.iter().copied().min().unwrap_or(0);
        let slots = (smallest / SLOT).checked_div(per_disk).unwrap_or(0) / SLOTS_PER_BLOCK
            * SLOTS_PER_BLOCK;
        let layout = Self {
            seed,
            disks: sizes.len() as u64,
            per_disk,
            run,
            slots,
        };
        if layout.is_sane() {
            return Ok(layout);
        }
        Err(io::Error::other(format!("no room for {layout:?}")))
    }

    fn is_sane(&self) -> bool {
        let writers = self.disks.saturating_mul(self.per_disk);
        (1..=MAX_WRITERS).contains(&writers)
            && matches!(self.run, 1 | 2 | 4 | 8 | 16)
            && self.slots > 0
            && self.slots.is_multiple_of(SLOTS_PER_BLOCK)
    }

    /// Writers over all disks.
    pub fn writers(&self) -> u64 {
        self.disks * self.per_disk
    }

    /// The disk of a writer.
    pub fn disk(&self, writer: u64) -> u64 {
        writer / self.per_disk
    }

    /// The slot of its disk that a writer's write goes to.
    pub fn slot(&self, writer: u64, k: u64) -> u64 {
        let turn = (k - 1) % self.slots;
        let lap = self.slots / SLOTS_PER_BLOCK * self.run;
        let (phase, rest) = (turn / lap, turn % lap);
        let in_region = rest / self.run * SLOTS_PER_BLOCK + phase * self.run + rest % self.run;
        writer % self.per_disk * self.slots + in_region
    }

    /// The newest write up to `newest` that goes to a slot of the writer's region; 0 when none does.
    fn newest_at(&self, in_region: u64, newest: u64) -> u64 {
        let (block, offset) = (in_region / SLOTS_PER_BLOCK, in_region % SLOTS_PER_BLOCK);
        let lap = self.slots / SLOTS_PER_BLOCK * self.run;
        let first = offset / self.run * lap + block * self.run + offset % self.run + 1;
        if newest < first {
            0
        } else {
            newest - (newest - first) % self.slots
        }
    }

    /// The writer whose region a slot of a disk is in.
    fn owner(&self, disk: u64, slot: u64) -> Option<u64> {
        let region = slot / self.slots;
        (region < self.per_disk).then_some(disk * self.per_disk + region)
    }

    /// The page of a write.
    pub fn page(&self, writer: u64, k: u64, clock: &[u64]) -> Page {
        let mut page = Page::default();
        let shape = self.per_disk | self.run << 8 | self.disks << 16;
        let header = [
            MAGIC,
            self.seed,
            writer,
            k,
            self.slot(writer, k),
            shape,
            self.slots,
        ];
        for (index, word) in header.into_iter().chain(clock.iter().copied()).enumerate() {
            page.set_word(index, word);
        }
        page.seal(CLOCK + clock.len(), mix(self.seed ^ writer << 48 ^ k));
        page
    }

    /// Reads layout and write from a page that stands at a slot of a disk.
    fn parse(page: &Page, disk: u64, slot: u64) -> Option<(Self, u64)> {
        if page.word(0) != MAGIC || !is_sealed(&page.0) || page.word(4) != slot {
            return None;
        }
        let shape = page.word(5);
        let layout = Self {
            seed: page.word(1),
            disks: shape >> 16,
            per_disk: shape & 0xff,
            run: shape >> 8 & 0xff,
            slots: page.word(6),
        };
        let k = page.word(3);
        let right = layout.is_sane() && layout.owner(disk, slot) == Some(page.word(2)) && k > 0;
        (right && layout.slot(page.word(2), k) == slot).then_some((layout, k))
    }
}

fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::block::{BlockDevice, Image};

    /// Plays writes in a given order into images, with the clocks that real writers would have seen.
    struct Play {
        layout: Layout,
        done: Vec<u64>,
        images: Vec<Vec<u8>>,
    }

    impl Play {
        fn new() -> Self {
            let layout = Layout::new(3, &[1 << 20, 1 << 20], 4, 2).unwrap();
            assert_eq!(layout.slots, 64);
            Self {
                layout,
                done: vec![0; 8],
                images: vec![vec![0; 1 << 20]; 2],
            }
        }

        fn put(&mut self, writer: u64, k: u64, clock: &[u64]) {
            let page = self.layout.page(writer, k, clock);
            let start = index(self.layout.slot(writer, k) * SLOT);
            self.images[index(self.layout.disk(writer))][start..start + 4096]
                .copy_from_slice(&page.0);
        }

        fn write(&mut self, writer: u64) {
            let k = self.done[index(writer)] + 1;
            let clock = self.done.clone();
            self.put(writer, k, &clock);
            self.done[index(writer)] = k;
        }

        fn some(writes: u64) -> Self {
            let mut play = Self::new();
            for n in 0..writes {
                play.write(mix(n) % 8);
            }
            play
        }

        fn report(&self) -> Report {
            check(&[&self.images[0], &self.images[1]], None).unwrap()
        }
    }

    #[test]
    fn a_lap_writes_every_slot_once_and_is_inverted() {
        for run in [1, 2, 4, 8, 16] {
            let layout = Layout::new(1, &[1 << 20, 1 << 20], 4, run).unwrap();
            let mut seen = vec![0; 64];
            for k in 1..=64 {
                let slot = layout.slot(1, k) - 64;
                seen[index(slot)] += 1;
                for newest in [k, k + 1, k + 63] {
                    assert_eq!(layout.newest_at(slot, newest), k);
                }
                assert_eq!(layout.newest_at(slot, k - 1), 0);
                assert_eq!(layout.newest_at(slot, k + 64), k + 64);
            }
            assert_eq!(seen, vec![1; 64]);
        }
    }

    #[test]
    fn every_instant_is_exact() {
        for writes in [0, 1, 2, 100, 511, 512, 513, 2000] {
            let report = Play::some(writes).report();
            assert!(report.is_exact(), "{writes}: {:?}", report.violations);
        }
    }

    #[test]
    fn writes_in_flight_may_be_in_or_not() {
        let mut play = Play::some(1000);
        let clock = play.done.clone();
        for writer in [0, 3, 5] {
            play.put(writer, clock[index(writer)] + 1, &clock);
            assert!(play.report().is_exact());
        }
    }

    #[test]
    fn one_lost_write_is_refuted() {
        // Of the newest write only a clock can know, so somebody must have seen it complete.
        for back in [0, 1, 5, 40] {
            let mut play = Play::some(1000);
            play.write(7);
            play.write(1);
            let k = play.done[7] - back;
            let clock = play.done.clone();
            play.put(7, k, &clock);
            assert!(play.report().is_exact() || back > 0);
            play.put(7, k - play.layout.slots, &[0; 8]);
            let report = play.report();
            assert!(!report.is_exact(), "back {back}");
        }
    }

    #[test]
    fn a_lost_first_write_of_a_slot_is_refuted() {
        let mut play = Play::some(100);
        let start = index(play.layout.slot(2, 1) * SLOT);
        play.images[0][start..start + 4096].fill(0);
        let lost = Violation::Lost {
            writer: 2,
            disk: 0,
            slot: 128,
            expected: 1,
            found: 0,
        };
        assert_eq!(play.report().violations, [lost]);
    }

    #[test]
    fn one_write_that_is_too_new_is_refuted() {
        let mut play = Play::some(1000);
        let clock = play.done.clone();
        // Its own predecessor is not there.
        play.put(4, clock[4] + 2, &clock);
        assert!(matches!(
            play.report().violations[0],
            Violation::Lost { writer: 4, .. }
        ));
        let mut play = Play::some(1000);
        let mut clock = play.done.clone();
        clock[6] += 1;
        play.put(4, play.done[4] + 1, &clock);
        assert!(matches!(
            play.report().violations[..],
            [Violation::TooNew {
                writer: 4,
                other: 6,
                ..
            }]
        ));
    }

    #[test]
    fn disks_of_two_instants_are_refuted() {
        let (early, late) = (Play::some(1000), Play::some(1040));
        let mixed = Play {
            images: vec![early.images[0].clone(), late.images[1].clone()],
            ..late
        };
        assert!(matches!(
            mixed.report().violations[0],
            Violation::TooNew { .. }
        ));
    }

    #[test]
    fn a_block_of_another_instant_is_refuted() {
        let (early, mut late) = (Play::some(1000), Play::some(1400));
        late.images[0][65536..131_072].copy_from_slice(&early.images[0][65536..131_072]);
        assert!(matches!(
            late.report().violations[0],
            Violation::Lost { .. }
        ));
    }

    #[test]
    fn damage_and_foreign_pages_are_refuted() {
        let mut play = Play::some(1000);
        play.images[1][4096 * 3 + 2000] ^= 1;
        assert!(!play.report().is_exact());
        let mut play = Play::some(1000);
        play.layout.seed = 4;
        play.put(0, 1, &[0; 8]);
        assert!(!play.report().is_exact());
    }

    #[test]
    fn an_instant_outside_the_bounds_is_refuted() {
        let play = Play::some(1000);
        let images: [&dyn Image; 2] = [&play.images[0], &play.images[1]];
        let mut bounds = Bounds {
            completed: play.done.clone(),
            submitted: play.done.clone(),
        };
        assert!(check(&images, Some(&bounds)).unwrap().is_exact());
        bounds.completed[3] += 1;
        bounds.submitted[3] += 1;
        assert!(!check(&images, Some(&bounds)).unwrap().is_exact());
        bounds.completed[3] -= 2;
        bounds.submitted[3] -= 2;
        assert!(!check(&images, Some(&bounds)).unwrap().is_exact());
    }

    #[test]
    fn the_writers_leave_an_instant_and_resume_it() {
        let disks = [
            crate::testing::MemoryDisk::new(1 << 20),
            crate::testing::MemoryDisk::new(1 << 20),
        ];
        let layout = Layout::new(9, &[1 << 20, 1 << 20], 8, 4).unwrap();
        for _ in 0..2 {
            let shared = Shared::new(layout, 0);
            let open = |disk| Ok(Box::new(disks[index(disk)].clone()) as Box<dyn BlockDevice>);
            run(&shared, &open, Some(Duration::from_millis(10)), &mut |_| {}).unwrap();
            let report = check(&[&disks[0].bytes(), &disks[1].bytes()], None).unwrap();
            assert!(report.is_exact(), "{:?}", report.violations);
            assert_eq!(report.newest, shared.completed());
        }
    }
}
