//! The judgement: every slot against the newest write of its writer, every newest clock against the newest writes.

use std::{fmt, io};

use super::{CLOCK, Layout, index};
use crate::block::{Image, Page, is_zero};

/// Violations that a report keeps; all are counted.
const MAX_KEPT: usize = 16;

/// Moments of the host between which the instant lies, by writer.
#[derive(Debug, Clone)]
pub struct Bounds {
    /// Writes complete at the first moment.
    pub completed: Vec<u64>,
    /// Writes submitted at the second moment.
    pub submitted: Vec<u64>,
}

/// Why images do not show one instant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Violation {
    /// A page that no writer wrote there, or a damaged one.
    Garbage {
        /// Its disk.
        disk: u64,
        /// Its slot.
        slot: u64,
    },
    /// A slot should hold a write that is not newer than others of its writer, and does not.
    Lost {
        /// The writer.
        writer: u64,
        /// Its disk.
        disk: u64,
        /// The slot of the disk.
        slot: u64,
        /// The write that should be there.
        expected: u64,
        /// The write that is there; 0 for zeroes.
        found: u64,
    },
    /// A write is there although one that had completed before it was submitted is not.
    TooNew {
        /// The writer of the write that is there.
        writer: u64,
        /// That write.
        write: u64,
        /// The writer of the one that is not.
        other: u64,
        /// What the other had completed.
        completed: u64,
        /// What the images hold of it.
        newest: u64,
    },
    /// The newest write of a writer is older or newer than the host's bounds allow.
    OutOfBounds {
        /// The writer.
        writer: u64,
        /// Its newest write.
        newest: u64,
        /// Complete before.
        completed: u64,
        /// Submitted until after.
        submitted: u64,
    },
    /// The images have no page, or not the number and size of the layout.
    Unfit,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Garbage { disk, slot } => write!(f, "garbage on disk {disk} at slot {slot}"),
            Self::Lost {
                writer,
                disk,
                slot,
                expected,
                found,
            } => write!(
                f,
                "lost write {expected} of writer {writer} on disk {disk} at slot {slot}: {found} is there"
            ),
            Self::TooNew {
                writer,
                write,
                other,
                completed,
                newest,
            } => write!(
                f,
                "write {write} of writer {writer} is too new: it saw {completed} writes of writer {other}, {newest} are there"
            ),
            Self::OutOfBounds {
                writer,
                newest,
                completed,
                submitted,
            } => write!(
                f,
                "newest write {newest} of writer {writer} is not within {completed}..={submitted}"
            ),
            Self::Unfit => write!(f, "the images do not fit the writers' layout"),
        }
    }
}

/// What the images say.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// The newest write of each writer.
    pub newest: Vec<u64>,
    /// How many violations there are.
    pub violated: usize,
    /// The first of them.
    pub violations: Vec<Violation>,
}

impl Report {
    /// Whether the images are those of one instant.
    pub fn is_exact(&self) -> bool {
        self.violated == 0
    }

    fn add(&mut self, violation: Violation) {
        self.violated += 1;
        if self.violations.len() < MAX_KEPT {
            self.violations.push(violation);
        }
    }
}

/// Everything that is in the images: the write at each slot, and the pages of the newest ones.
pub(super) struct Scan {
    pub(super) layout: Option<Layout>,
    pub(super) found: Vec<Vec<u64>>,
    newest: Vec<u64>,
    clocks: Vec<Vec<u64>>,
    garbage: Vec<(u64, u64)>,
}

impl Scan {
    pub(super) fn new() -> Self {
        let (found, newest, clocks) = (Vec::new(), Vec::new(), Vec::new());
        Self {
            layout: None,
            found,
            newest,
            clocks,
            garbage: Vec::new(),
        }
    }

    pub(super) fn look(&mut self, page: &Page, disk: u64, slot: u64) -> u64 {
        if is_zero(&page.0) {
            return 0;
        }
        let Some((layout, k)) = Layout::parse(page, disk, slot) else {
            self.garbage.push((disk, slot));
            return 0;
        };
        if *self.layout.get_or_insert(layout) != layout {
            self.garbage.push((disk, slot));
            return 0;
        }
        let (writer, writers) = (index(page.word(2)), index(layout.writers()));
        self.newest.resize(writers, 0);
        self.clocks.resize(writers, vec![0; writers]);
        if k > self.newest[writer] {
            self.newest[writer] = k;
            for (other, clock) in self.clocks[writer].iter_mut().enumerate() {
                *clock = page.word(CLOCK + other);
            }
        }
        k
    }

    pub(super) fn judge(self, images: u64) -> Report {
        let mut report = Report::default();
        for &(disk, slot) in &self.garbage {
            report.add(Violation::Garbage { disk, slot });
        }
        let Some(layout) = self.layout else {
            return report;
        };
        let fits = self
            .found
            .iter()
            .all(|found| found.len() as u64 >= layout.slots * layout.per_disk);
        if layout.disks != images || !fits {
            report.add(Violation::Unfit);
            return report;
        }
        self.judge_slots(layout, &mut report);
        self.judge_clocks(&mut report);
        report.newest = self.newest;
        report
    }

    fn judge_slots(&self, layout: Layout, report: &mut Report) {
        for (disk, found) in (0..).zip(&self.found) {
            for (slot, &found) in (0..).zip(found) {
                // Beyond the regions there are only zeroes, which `look` saw to: no page parses there.
                let Some(writer) = layout.owner(disk, slot) else {
                    continue;
                };
                let newest = self.newest[index(writer)];
                let expected = layout.newest_at(slot % layout.slots, newest);
                if found != expected {
                    report.add(Violation::Lost {
                        writer,
                        disk,
                        slot,
                        expected,
                        found,
                    });
                }
            }
        }
    }

    fn judge_clocks(&self, report: &mut Report) {
        for (writer, clock) in (0..).zip(&self.clocks) {
            for (other, (&completed, &newest)) in (0..).zip(clock.iter().zip(&self.newest)) {
                if completed > newest {
                    let write = self.newest[index(writer)];
                    report.add(Violation::TooNew {
                        writer,
                        write,
                        other,
                        completed,
                        newest,
                    });
                }
            }
        }
    }
}

/// Whether the images, in the order of the program's disks, show one instant, and one within the bounds if there are any.
pub fn check(images: &[&dyn Image], bounds: Option<&Bounds>) -> io::Result<Report> {
    let mut scan = Scan::new();
    let mut page = Page::default();
    for (disk, image) in (0..).zip(images) {
        let mut found = Vec::with_capacity(index(image.slots()));
        for slot in 0..image.slots() {
            image.slot(slot, &mut page)?;
            found.push(scan.look(&page, disk, slot));
        }
        scan.found.push(found);
    }
    let mut report = scan.judge(images.len() as u64);
    if let Some(bounds) = bounds {
        report.newest.resize(bounds.completed.len(), 0);
        let limits = bounds.completed.iter().zip(&bounds.submitted);
        for (writer, (newest, (&completed, &submitted))) in
            (0..).zip(report.newest.clone().into_iter().zip(limits))
        {
            if newest < completed || newest > submitted {
                report.add(Violation::OutOfBounds {
                    writer,
                    newest,
                    completed,
                    submitted,
                });
            }
        }
    }
    Ok(report)
}
