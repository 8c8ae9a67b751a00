//! What differs between two maps, which need not be of one repository.

use std::collections::VecDeque;

use super::super::error::Result;
use super::super::repo::Repository;
use super::{MapReader, MapRef, MapRuns, Run, RunContent};
use crate::units::BlockRun;

/// The runs of blocks that differ between two maps, in order. Blocks that only one of them has differ. Ids are compared, so a
/// block that was written with what it held is no difference.
pub fn diff(repo: &Repository, a: &MapRef, b: &MapRef) -> Result<Diff> {
    diff_across((repo, a), (repo, b))
}

fn diff_across(a: (&Repository, &MapRef), b: (&Repository, &MapRef)) -> Result<Diff> {
    Ok(Diff {
        a: Side::new(MapReader::open(a.0, a.1)?.runs()),
        b: Side::new(MapReader::open(b.0, b.1)?.runs()),
        end_of_equal: if a.1.size == b.1.size {
            u64::MAX
        } else {
            a.1.size.min(b.1.size) / b.0.block_size().bytes()
        },
        found: VecDeque::new(),
        ended: false,
    })
}

/// What a map holds where it differs from a base, in order, from block `from` on; all of it without a base. The base may be of
/// another repository of the same block size whose equal blocks have equal ids.
pub fn changes(
    base: Option<(&Repository, &MapRef)>,
    map: (&Repository, &MapRef),
    from: u64,
) -> Result<Changes> {
    let reader = MapReader::open(map.0, map.1)?;
    let end = reader.blocks();
    let all = BlockRun {
        first: 0,
        count: end,
    };
    Ok(Changes {
        diff: base.map(|base| diff_across(base, map)).transpose()?,
        wanted: base.is_none().then_some(all),
        runs: reader.runs(),
        held: None,
        from,
        end,
    })
}

/// See [`changes`].
pub struct Changes {
    /// The differences, unless everything is wanted.
    diff: Option<Diff>,
    /// What is left of the difference in hand.
    wanted: Option<BlockRun>,
    runs: MapRuns,
    /// What is left of the run in hand.
    held: Option<Run>,
    from: u64,
    end: u64,
}

impl Changes {
    /// The next difference, or what is left of it, within the bounds.
    fn wanted(&mut self) -> Result<Option<BlockRun>> {
        loop {
            let next = match self.wanted.take() {
                Some(wanted) => Some(wanted),
                None => self.diff.as_mut().and_then(Iterator::next).transpose()?,
            };
            let Some(next) = next else {
                return Ok(None);
            };
            let first = next.first.max(self.from);
            let end = next.end().min(self.end);
            if first < end {
                let count = end - first;
                return Ok(Some(BlockRun { first, count }));
            }
        }
    }

    fn step(&mut self) -> Result<Option<Run>> {
        let Some(wanted) = self.wanted()? else {
            return Ok(None);
        };
        loop {
            let next = match self.held.take() {
                Some(held) => Some(held),
                None => self.runs.next().transpose()?,
            };
            let Some(mut run) = next else {
                return Ok(None);
            };
            if run.end() <= wanted.first {
                continue;
            }
            if run.first < wanted.first {
                run.split_before(wanted.first);
            }
            let end = run.end();
            if end > wanted.end() {
                let piece = run.split_before(wanted.end());
                self.held = Some(run);
                return Ok(Some(piece));
            }
            self.wanted = Some(BlockRun {
                first: end,
                count: wanted.end() - end,
            });
            return Ok(Some(run));
        }
    }
}

impl Iterator for Changes {
    type Item = Result<Run>;

    fn next(&mut self) -> Option<Result<Run>> {
        let next = self.step().transpose();
        if let Some(Err(_)) = next {
            // Nothing after an error.
            self.end = 0;
            self.diff = None;
        }
        next
    }
}

/// See [`diff`].
pub struct Diff {
    a: Side,
    b: Side,
    /// From this block on everything differs: where the sizes do, the last block of the shorter is short.
    end_of_equal: u64,
    /// Runs found; the last one may still grow.
    found: VecDeque<BlockRun>,
    ended: bool,
}

struct Side {
    runs: MapRuns,
    next: Option<Run>,
}

impl Side {
    fn new(runs: MapRuns) -> Self {
        Self { runs, next: None }
    }

    /// How many blocks the run in hand has.
    fn count(&mut self) -> Result<Option<u64>> {
        if self.next.is_none() {
            self.next = self.runs.next().transpose()?;
        }
        Ok(self.next.as_ref().map(Run::count))
    }

    /// The first `count` blocks of the run in hand.
    fn take(&mut self, count: u64) -> Option<Run> {
        let run = self.next.as_mut()?;
        if run.count() <= count {
            return self.next.take();
        }
        Some(run.split_before(run.first.saturating_add(count)))
    }
}

impl Diff {
    fn step(&mut self) -> Result<()> {
        let count = match (self.a.count()?, self.b.count()?) {
            (Some(a), Some(b)) => a.min(b),
            (Some(only), None) | (None, Some(only)) => only,
            (None, None) => {
                self.ended = true;
                return Ok(());
            }
        };
        match (self.a.take(count), self.b.take(count)) {
            (Some(a), Some(b)) => self.compare(&a, &b),
            (Some(only), None) | (None, Some(only)) => self.add(only.first, only.count()),
            (None, None) => {}
        }
        Ok(())
    }

    /// Compares two pieces of the same blocks.
    fn compare(&mut self, a: &Run, b: &Run) {
        if let (RunContent::Data(left), RunContent::Data(right)) = (&a.content, &b.content) {
            let pairs = left.as_slice().iter().zip(right.as_slice());
            for (block, (left, right)) in (a.first..).zip(pairs) {
                if left != right || block >= self.end_of_equal {
                    self.add(block, 1);
                }
            }
            return;
        }
        let both_zero =
            !matches!(a.content, RunContent::Data(_)) && !matches!(b.content, RunContent::Data(_));
        if !both_zero {
            self.add(a.first, a.count());
        } else if a.end() > self.end_of_equal {
            let first = a.first.max(self.end_of_equal);
            self.add(first, a.end().saturating_sub(first));
        }
    }

    fn add(&mut self, first: u64, count: u64) {
        match self.found.back_mut() {
            Some(last) if last.end() == first => last.count += count,
            _ => self.found.push_back(BlockRun { first, count }),
        }
    }
}

impl Iterator for Diff {
    type Item = Result<BlockRun>;

    fn next(&mut self) -> Option<Result<BlockRun>> {
        while self.found.len() < 2 && !self.ended {
            if let Err(error) = self.step() {
                self.ended = true;
                self.found.clear();
                return Some(Err(error));
            }
        }
        self.found.pop_front().map(Ok)
    }
}
