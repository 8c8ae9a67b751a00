//! The audit: blocks that no bitmap holds are read again and compared with what is stored of them. A bitmap that does not
//! hold a change makes the next point wrong, and nothing else would notice.
//!
//! ```text
//! read a clean block: it differs --> rotate: is it in a bitmap now? --> read again --> wait, rotate, read again
//!                                    yes: the guest wrote it, fine                     still there, still in none: it lied
//! ```
//!
//! A bit is set when a write ends, so that what was read may be of a write that is counted later: hence the second rotation.
//! Once a bitmap has lied about a block nothing is believed of that disk: it is read in full.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{RunDisk, Runner};
use crate::bitmap::track::AUDIT_FOUND;
use crate::clock::{self, Deadline};
use crate::copy::base_entry;
use crate::exit::{Failure, Kind};
use crate::image::{Encoded, Entry, MapReader, PointId};
use crate::qmp::export::Listening;
use crate::units::{BlockRun, Bytes, Extent};

/// How long the VM is held at a time.
const BATCH: Duration = Duration::from_secs(3);
/// Blocks whose stored content is looked up together.
const GROUP: u64 = 16_384;
/// Differences that are looked up together are no further apart, and no more.
const APART: u64 = 256;
const TOGETHER: usize = 16;
/// A write that was on its way when a block was read has ended after this time.
const SETTLE: Duration = Duration::from_secs(2);
/// More differences than this are looked into at once.
const MANY: usize = 1 << 16;
/// So many of a disk are enough to know: the VM is held while they are read again.
const ENOUGH: usize = 1024;
/// What idle time is used for at a time, bytes.
const IDLE_BATCH: u64 = 64 << 20;
/// The share of a day is counted anew after so long.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Extents that a finding lists.
const LISTED: usize = 64;

/// A bitmap that did not hold changes.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// The disk.
    pub disk: String,
    /// How many blocks differ from what is stored although no bitmap holds them; of many only some were looked at twice.
    pub blocks: u64,
    /// The first of them.
    pub extents: Vec<Extent>,
    /// Points that were made since such a block was last proved: they may hold older content there.
    pub suspects: Vec<PointId>,
}

/// What an audit came to.
#[derive(Debug, Clone, Default, Serialize)]
pub struct AuditReport {
    /// Bytes that were read and compared.
    pub checked: u64,
    /// Bytes of the disks.
    pub size: u64,
    /// All that was asked for was read.
    pub complete: bool,
    /// What it found.
    pub findings: Vec<Finding>,
}

/// How far the rounds are.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Rounds {
    /// By disk: the block that comes next.
    next: BTreeMap<String, u64>,
    /// The day whose share is counted, and the bytes of it that are read.
    day: Option<Timestamp>,
    spent: u64,
}

/// Blocks by the index of their disk, with what is stored of them.
type Differences = Vec<(usize, u64, Stored)>;

/// What is stored of a block, and whether this session has proved it.
#[derive(Debug, Clone, Copy)]
struct Stored {
    entry: Entry,
    proved: bool,
}

impl Runner {
    fn rounds_name(&self) -> String {
        format!("{}.audit", self.repo.id().short())
    }

    fn rounds(&self) -> Rounds {
        let kept = self.vm.state.recall(&self.rounds_name());
        kept.and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default()
    }

    fn keep_rounds(&self, rounds: &Rounds) {
        if let Ok(bytes) = serde_json::to_vec(rounds) {
            self.vm.state.remember(&self.rounds_name(), &bytes);
        }
    }

    /// Audits this share of every disk, in percent, from where the last audit ended; `until` ends it early.
    pub fn audit(&mut self, share: f64, until: Option<Deadline>) -> Result<AuditReport> {
        let mut report = AuditReport::default();
        self.open_all()?;
        let block_size = self.repo.block_size();
        let mut left: Vec<u64> = self
            .disks
            .iter()
            .map(|disk| part(block_size.blocks(disk.size), share))
            .collect();
        report.size = self.disks.iter().map(|disk| disk.size).sum();
        let mut found = Differences::new();
        let mut rounds = self.rounds();
        while left.iter().any(|left| *left > 0) && !until.is_some_and(Deadline::passed) {
            self.check_interrupt()?;
            let Some(_place) = self.turn_to_copy(until)? else {
                break;
            };
            let ends = until.map_or(Deadline::after(BATCH), |until| until.at_most(BATCH));
            report.checked += self.audit_batch(&mut left, &mut rounds, ends, &mut found)?;
            self.keep_rounds(&rounds);
            if found.len() > MANY {
                self.confirm(std::mem::take(&mut found), &mut report.findings)?;
            }
        }
        report.complete = left.iter().all(|left| *left == 0);
        self.confirm(found, &mut report.findings)?;
        self.tell(&report.findings);
        Ok(report)
    }

    /// Uses idle time for a part of the day's share.
    pub(super) fn audit_idle(&mut self, until: Deadline) -> Result<()> {
        let Some(share) = self.options.audit else {
            return Ok(());
        };
        // Before the first rotation nothing is known of the disks.
        if self.vm.offline() || self.disks.is_empty() {
            return Ok(());
        }
        // Only where nobody waits for a turn: this time is spare.
        let Some(_place) = self.turn_to_copy(Some(Deadline::after(Duration::ZERO)))? else {
            return Ok(());
        };
        let mut rounds = self.rounds();
        let now = clock::utc_now();
        let is_over = |day: Timestamp| {
            Duration::try_from(now.duration_since(day)).is_ok_and(|passed| passed > DAY)
        };
        if rounds.day.is_none_or(is_over) {
            rounds.day = Some(now);
            rounds.spent = 0;
        }
        let block_size = self.repo.block_size();
        let size: u64 = self.disks.iter().map(|disk| disk.size).sum();
        let today =
            part(block_size.blocks(size), share).saturating_sub(rounds.spent / block_size.bytes());
        let now = today.min(IDLE_BATCH / block_size.bytes());
        if now == 0 {
            return Ok(());
        }
        // Each disk in its share.
        let mut left: Vec<u64> = self
            .disks
            .iter()
            .map(|disk| {
                now.saturating_mul(disk.size / block_size.bytes())
                    / (size / block_size.bytes()).max(1)
            })
            .collect();
        let mut found = Differences::new();
        let ends = until.at_most(BATCH);
        rounds.spent += self.audit_batch(&mut left, &mut rounds, ends, &mut found)?;
        self.keep_rounds(&rounds);
        let mut findings = Vec::new();
        self.confirm(found, &mut findings)?;
        self.tell(&findings);
        Ok(())
    }

    /// Tells the operator, loudly.
    fn tell(&mut self, findings: &[Finding]) {
        for finding in findings {
            let suspects = if finding.suspects.is_empty() {
                "no published point is affected".to_owned()
            } else {
                let ids: Vec<String> = finding.suspects.iter().map(PointId::to_string).collect();
                format!(
                    "points that may hold older content there: {}",
                    ids.join(", ")
                )
            };
            self.warnings.push(format!(
                "disk `{}`: {} that no bitmap holds differ from what is stored of them: its bitmap cannot be believed, the disk is read in full; {suspects}",
                finding.disk,
                Bytes(finding.blocks * self.repo.block_size().bytes()),
            ));
        }
    }

    /// Rotates, so that what is dirty can be read, and works out which blocks are clean.
    fn open_all(&mut self) -> Result<()> {
        let mut hold = self.hold()?;
        if self.vm.offline() {
            return Err(Failure::hinted(
                Kind::Attention,
                "an audit reads a VM that runs",
                "start it, or leave the audit to the next run",
            ));
        }
        self.rotate(&mut hold, false)?;
        for disk in &mut self.disks {
            disk.open = None;
        }
        Ok(())
    }

    /// Reads clean blocks for the length of a batch. `left` says how many of each disk, and `rounds` from where.
    fn audit_batch(
        &mut self,
        left: &mut [u64],
        rounds: &mut Rounds,
        ends: Deadline,
        found: &mut Differences,
    ) -> Result<u64> {
        let mut checked = 0;
        self.with_exports(|this, disks, clients| {
            for (index, disk) in disks.iter().enumerate() {
                let blocks = this.repo.block_size().blocks(disk.size);
                let next = rounds.next.entry(disk.key.clone()).or_insert(0);
                while left[index] > 0 && !ends.passed() {
                    if *next >= blocks {
                        *next = 0;
                    }
                    let group = BlockRun {
                        first: *next,
                        count: GROUP.min(blocks - *next).min(left[index]),
                    };
                    let open = disk.open.as_ref().context("what is open is not known")?;
                    let clean = (group.first..group.end()).filter(|block| !open.contains(*block));
                    let clean: Vec<u64> = clean.collect();
                    let (read, reached) =
                        this.compare(&mut clients[index], index, disk, &clean, ends, found)?;
                    checked += read;
                    let reached = reached.unwrap_or(group.end());
                    left[index] -= reached - group.first;
                    *next = reached;
                    if reached < group.end() {
                        return Ok(());
                    }
                }
            }
            Ok(())
        })?;
        Ok(checked)
    }

    /// Does something with an export of every disk. What is open is worked out where it is not known.
    fn with_exports(
        &mut self,
        act: impl FnOnce(&Self, &[RunDisk], &mut [crate::nbd::Client]) -> Result<()>,
    ) -> Result<()> {
        let mut hold = self.hold()?;
        if let Some(why) = self.astray(&hold, self.disks.len()) {
            tracing::info!(%why, "the VM changed: rotating anew");
            self.rotate(&mut hold, false)?;
            for disk in &mut self.disks {
                disk.open = None;
            }
        }
        let listening = Listening::place(&hold.monitor, self.vm.state.directory(), &self.run);
        let mut disks = std::mem::take(&mut self.disks);
        let acted = self.serve(&mut hold, &listening, disks.len(), true);
        let acted = acted.and_then(|()| self.connect_all(&mut hold, &listening, &mut disks));
        let acted = acted.and_then(|mut clients| {
            act(self, &disks, &mut clients)?;
            for client in clients {
                client.disconnect()?;
            }
            hold.look()?;
            match self.astray(&hold, disks.len()) {
                Some(why) => Err(Failure::hinted(
                    Kind::Busy,
                    format!("the VM changed while it was audited: {why}"),
                    "run it again",
                )),
                None => Ok(()),
            }
        });
        self.disks = disks;
        hold.release()?;
        acted
    }

    /// Reads blocks and compares them with what is stored. Returns the bytes, and the first block that was not reached.
    fn compare(
        &self,
        client: &mut crate::nbd::Client,
        index: usize,
        disk: &RunDisk,
        blocks: &[u64],
        ends: Deadline,
        found: &mut Differences,
    ) -> Result<(u64, Option<u64>)> {
        let (Some(first), Some(last)) = (blocks.first(), blocks.last()) else {
            return Ok((0, None));
        };
        let block_size = self.repo.block_size();
        let range = BlockRun {
            first: *first,
            count: last - first + 1,
        };
        let stored = self.stored(index, disk, range)?;
        let mut wanted: BTreeMap<u64, Stored> = BTreeMap::new();
        for block in blocks {
            let at = usize::try_from(block - first).unwrap_or(usize::MAX);
            if let Some(known) = stored.get(at).copied().flatten() {
                wanted.insert(*block, known);
            }
        }
        let extents: Vec<Extent> = joined(wanted.keys().copied())
            .map(|run| block_size.run_extent(run, disk.size))
            .collect();
        let mut read = 0;
        let mut failed = None;
        client.read_all(
            extents,
            self.read_options(),
            &|bytes| {
                let go_on = || {
                    !ends.passed() && !self.interrupted.load(Ordering::Relaxed) && !self.yields()
                };
                if self.throttle.wait(bytes, &go_on) && self.wait_for_rate(bytes, &go_on) {
                    ControlFlow::Continue(())
                } else {
                    ControlFlow::Break(())
                }
            },
            &mut |done| {
                let run = block_size.cover(done.extent);
                for block in run.first..run.end() {
                    let Some(known) = wanted.remove(&block) else {
                        continue;
                    };
                    let within = block_size.extent(block, disk.size);
                    let plain = done.data.as_deref().map(|data| {
                        let at = usize::try_from(within.offset - done.extent.offset).unwrap_or(0);
                        let end = at + usize::try_from(within.length).unwrap_or(0);
                        &data[at..end.min(data.len())]
                    });
                    read += within.length;
                    match self.is_same(plain, known.entry) {
                        Ok(true) => {}
                        Ok(false) => found.push((index, block, known)),
                        Err(error) => {
                            failed = Some(error);
                            return ControlFlow::Break(());
                        }
                    }
                }
                ControlFlow::Continue(())
            },
        )?;
        if let Some(error) = failed {
            return Err(error);
        }
        Ok((read, wanted.keys().next().copied()))
    }

    /// What is stored of a run of blocks; `None` where nothing is.
    fn stored(&self, index: usize, disk: &RunDisk, range: BlockRun) -> Result<Vec<Option<Stored>>> {
        let base = (range.first..range.end())
            .map(|block| base_entry(&self.copy_disks[index], block, self.repo.block_size()))
            .collect::<Result<Vec<Entry>>>()?;
        let mut stored: Vec<Entry> = base.clone();
        let mut proved = vec![false; stored.len()];
        self.session
            .newest_content(&disk.key, range, &mut |at, content| {
                stored[at] = content.unwrap_or(base[at]);
                proved[at] = true;
            })?;
        let both = stored.into_iter().zip(proved);
        Ok(both
            .map(|(entry, proved)| (entry != Entry::Unset).then_some(Stored { entry, proved }))
            .collect())
    }

    /// Whether a block is what is stored of it; `None` is a block of zeros.
    fn is_same(&self, plain: Option<&[u8]>, stored: Entry) -> Result<bool> {
        let Some(plain) = plain else {
            return Ok(stored == Entry::Zero);
        };
        let expected = match stored {
            Entry::Data(id) => Some(id),
            _ => None,
        };
        Ok(match self.repo.encode_expecting(plain, expected)? {
            Encoded::Zero => stored == Entry::Zero,
            Encoded::Known(id) => expected == Some(id),
            Encoded::New(block) => expected == Some(block.id()),
        })
    }

    /// Looks into differences: those that are still there, and in no bitmap, after two more rotations, are lies.
    fn confirm(&mut self, mut found: Differences, findings: &mut Vec<Finding>) -> Result<()> {
        for again in [false, true] {
            if found.is_empty() {
                return self.strike();
            }
            if again {
                self.pause(SETTLE)?;
            }
            let keys: Vec<String> = self.disks.iter().map(|disk| disk.key.clone()).collect();
            self.open_all()?;
            let before = std::mem::take(&mut found);
            self.with_exports(|this, disks, clients| {
                for (index, disk) in disks.iter().enumerate() {
                    let open = disk.open.as_ref().context("what is open is not known")?;
                    let mine = before
                        .iter()
                        .filter(|(at, ..)| keys.get(*at) == Some(&disk.key));
                    let mut clean: Vec<u64> = mine
                        .map(|(_, block, _)| *block)
                        .filter(|block| !open.contains(*block))
                        .collect();
                    clean.sort_unstable();
                    clean.truncate(ENOUGH);
                    for group in clean.chunk_by(|a, b| b - a < APART) {
                        for part in group.chunks(TOGETHER) {
                            let ends = Deadline::after(BATCH);
                            this.compare(&mut clients[index], index, disk, part, ends, &mut found)?;
                        }
                    }
                }
                Ok(())
            })?;
        }
        if found.is_empty() {
            return self.strike();
        }
        self.disbelieve(found, findings)
    }

    /// From now on these disks are read in full.
    fn disbelieve(&mut self, found: Differences, findings: &mut Vec<Finding>) -> Result<()> {
        let mut of_disk: BTreeMap<usize, Vec<(u64, Stored)>> = BTreeMap::new();
        for (disk, block, stored) in found {
            of_disk.entry(disk).or_default().push((block, stored));
        }
        for (index, mut blocks) in of_disk {
            blocks.sort_unstable_by_key(|(block, _)| *block);
            let disk = &self.disks[index];
            let runs = joined(blocks.iter().map(|(block, _)| *block));
            let extents = runs.map(|run| self.repo.block_size().run_extent(run, disk.size));
            let finding = Finding {
                disk: disk.key.clone(),
                blocks: blocks.len() as u64,
                extents: extents.take(LISTED).collect(),
                suspects: self.suspects(&disk.key, &blocks)?,
            };
            let why = format!(
                "{AUDIT_FOUND} {} changed blocks that its bitmap did not hold",
                finding.blocks
            );
            self.session.state.disbelieve(&finding.disk, why);
            findings.push(finding);
        }
        // The rotation writes it down before anything else is done.
        self.open_all()
    }

    /// The points that were made after these blocks were last proved.
    fn suspects(&self, disk: &str, blocks: &[(u64, Stored)]) -> Result<Vec<PointId>> {
        // What this session has proved no point has.
        let mut asked: Vec<(u64, Entry)> = blocks
            .iter()
            .filter(|(_, stored)| !stored.proved)
            .map(|(block, stored)| (*block, stored.entry))
            .collect();
        let points = self.repo.points()?.points;
        let mine = points
            .iter()
            .filter(|point| point.target.key == self.vm.key);
        let mut suspects = Vec::new();
        let mut newer: Option<PointId> = None;
        for point in mine.rev() {
            let Some(found) = point.disks.iter().find(|found| found.key == disk) else {
                continue;
            };
            let map = MapReader::open(&self.repo, &found.map)?;
            let mut inherited = Vec::new();
            for (block, entry) in asked {
                if block < map.blocks() && map.get(block)? == entry {
                    inherited.push((block, entry));
                }
            }
            // The newer point did not read these blocks: it took them from this one.
            if !inherited.is_empty() {
                suspects.extend(newer);
            }
            if found.rescanned.is_some() {
                break;
            }
            asked = inherited;
            newer = Some(point.id);
            if asked.is_empty() {
                break;
            }
        }
        Ok(suspects)
    }
}

/// Runs of neighbours.
fn joined(blocks: impl Iterator<Item = u64>) -> impl Iterator<Item = BlockRun> {
    let mut blocks = blocks.peekable();
    std::iter::from_fn(move || {
        let first = blocks.next()?;
        let mut run = BlockRun { first, count: 1 };
        while blocks.next_if_eq(&run.end()).is_some() {
            run.count += 1;
        }
        Some(run)
    })
}

/// A share of blocks in percent, at least one.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a share of a number of blocks"
)]
fn part(blocks: u64, share: f64) -> u64 {
    ((blocks as f64 * share / 100.0).ceil() as u64).min(blocks)
}
