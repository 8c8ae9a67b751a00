//! The end of a run: the residual is stored and proved, the maps are built, the point is published, and only then what it
//! replaces is removed from the VM.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;

use super::freeze::{GivenUp, Residual};
use super::pass::read_of;
use super::spool::Spool;
use super::together::{Common, Seat, Stage};
use super::{Bytes, CONDEMNED_TRIES, Rescan, Runner, is_condemned};
use crate::bitmap::rotate;
use crate::clock;
use crate::copy::{self, Copied, Manner};
use crate::exit::{Failure, Kind};
use crate::image::{self, DiskPoint, Manifest, PointId, RetiredBitmap, Tracking};
use crate::plan::Patience;
use crate::qmp::freeze::Method;

/// How often a freeze that was given up is tried again.
const FREEZES: u32 = 3;

/// A finished recovery point, for reports.
#[derive(Debug, Clone, Serialize)]
pub struct Point {
    /// Its id.
    pub id: PointId,
    /// The instant.
    pub instant: Timestamp,
    /// `quiesced`, `crash-consistent` or `offline`.
    pub quiesce: image::Quiesce,
    /// `fleece`, `snapshot` or `offline`.
    pub freeze: String,
    /// The disks with their sizes.
    pub disks: Vec<PointDisk>,
    /// What of the VM is held besides its disks.
    pub files: Vec<PointFile>,
    /// The transaction, milliseconds.
    pub freeze_ms: u64,
    /// From the transaction to the guest released, milliseconds.
    pub released_ms: u64,
    /// How long the file systems were frozen, milliseconds.
    pub quiesced_ms: Option<u64>,
    /// How many file systems were frozen at the instant.
    pub file_systems: Option<u64>,
    /// Why the guest is not quiesced.
    pub not_quiesced: Option<String>,
    /// The common instant of several targets.
    pub together: Option<Common>,
    /// From when the backup was due to the guest released, milliseconds.
    pub window_ms: u64,
    /// Of these, how long it waited since other runs of the host froze, milliseconds.
    pub waited_ms: u64,
    /// What was copied.
    pub bytes: Bytes,
    /// The window, as it was expected and as it came.
    pub window: Predicted,
    /// What the freeze found, as it was expected and as it came.
    pub residual: PredictedBytes,
    /// Which limits it missed, in words.
    pub missed: Option<String>,
    /// The disks that were read in full, with the reasons.
    pub rescanned: Vec<Rescan>,
}

/// How long the backup took from when it was due.
#[derive(Debug, Clone, Copy)]
struct Waits {
    window_ms: u64,
    waited_ms: u64,
}

/// A time that was expected.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Predicted {
    /// What was expected.
    pub predicted_ms: Option<u64>,
    /// What came.
    pub actual_ms: u64,
}

/// An amount that was expected.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct PredictedBytes {
    /// What was expected.
    pub predicted: Option<u64>,
    /// What came.
    pub actual: u64,
}

/// A disk of a point, for reports.
#[derive(Debug, Clone, Serialize)]
pub struct PointDisk {
    /// Its key.
    pub key: String,
    /// Bytes.
    pub size: u64,
    /// Bytes of blocks that differ from the point before.
    pub changed_bytes: u64,
}

/// A file of a point, for reports.
#[derive(Debug, Clone, Serialize)]
pub struct PointFile {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub role: String,
    /// Bytes.
    pub size: u64,
}

impl PointFile {
    /// A stored one that is a file.
    #[must_use]
    pub fn of(stored: &DiskPoint) -> Option<Self> {
        let file = stored.file.as_ref()?;
        Some(Self {
            name: file.name.clone(),
            role: file.role.clone(),
            size: stored.size,
        })
    }
}

impl Runner {
    /// Makes a recovery point: converges live when much is left, freezes, stores, commits. `due` is when it should have begun;
    /// where that is yet to come, all is prepared and waits for it.
    pub fn backup(&mut self, due: Timestamp) -> Result<Point> {
        self.tell_due(due);
        self.not_before = Some(due);
        self.converge_in_turn()?;
        self.decide(due)?;
        let mut tries = 0;
        let mut begun;
        let residual = loop {
            self.check_interrupt()?;
            self.progress.begin("freeze and residual", 0);
            tries += 1;
            begun = clock::now();
            let waited = self.waited;
            let frozen = self.freeze();
            begun += self.waited.saturating_sub(waited);
            match frozen {
                Ok(residual) => break residual,
                Err(error) if error.downcast_ref::<GivenUp>().is_some() => {
                    if tries == FREEZES {
                        return Err(Failure::hinted(
                            Kind::Missed,
                            format!("{error:#}, {tries} times"),
                            "run `precopy` when the guest writes less, raise `--deadline`, or give a larger scratch with `--scratch-reserve`",
                        ));
                    }
                    self.warnings
                        .push(format!("{error:#}; trying again after another pass"));
                    self.patience = Patience::None;
                    self.pass(None)?;
                }
                Err(error) => return Err(error),
            }
        };
        let released = clock::utc_now();
        let took = clock::now() - begun;
        let cut = &residual.instant;
        let reading = Duration::from_millis(cut.released_ms.saturating_sub(cut.freeze_ms));
        let window_ms = u64::try_from(released.duration_since(due).as_millis()).unwrap_or(0);
        self.meet(Stage::Released)?;
        let together = self.seat.as_ref().and_then(Seat::common);
        // One commit after the other: they would only take the disk from each other.
        let turn = self.seat.as_ref().map(Seat::turn);
        let _turn = turn.as_deref().map(take_turn);
        self.seat = None;
        let waits = Waits {
            window_ms,
            waited_ms: u64::try_from(self.waited.as_millis()).unwrap_or(u64::MAX),
        };
        let point = self.store(residual, waits, together)?;
        self.learned
            .speeds
            .froze(self.bytes.residual, reading, took);
        self.keep_learned();
        self.sweep();
        Ok(point)
    }

    /// Converges; of several targets of a common instant one after the other, then all once more: during the others' turns the
    /// first one's guest has written.
    fn converge_in_turn(&mut self) -> Result<()> {
        let Some(turn) = self.seat.as_ref().map(Seat::turn) else {
            return self.converge();
        };
        for stage in [Stage::Copied, Stage::Close] {
            let mine = take_turn(&turn);
            self.check_interrupt()?;
            self.converge()?;
            drop(mine);
            self.meet(stage)?;
        }
        Ok(())
    }

    /// Stores the residual and publishes the point.
    fn store(
        &mut self,
        residual: Residual,
        waits: Waits,
        together: Option<Common>,
    ) -> Result<Point> {
        let Waits {
            window_ms,
            waited_ms,
        } = waits;
        let Residual {
            instant,
            spool,
            mut machine,
            configuration,
        } = residual;
        self.progress.begin("store the residual", spool.bytes());
        self.session.next_pass();
        let keys: Vec<String> = self.disks.iter().map(|disk| disk.key.clone()).collect();
        let mut left: BTreeSet<&str> = keys.iter().map(String::as_str).collect();
        let mut tries = 0;
        loop {
            let copied = self.store_spool(&spool)?;
            match self.prove_residual(copied, &mut left) {
                Err(error) if is_condemned(&error) && tries < CONDEMNED_TRIES => {
                    tracing::info!("{error:#}: the residual is stored again");
                    tries += 1;
                }
                proved => break proved?,
            }
        }
        let so_far = self.session.read_so_far();
        self.bytes.precopied = so_far.read.saturating_sub(self.bytes.residual);
        self.bytes.superseded = so_far.again;
        let (mut disks, reported) = self.point_disks(&keys)?;
        let mut files = Vec::new();
        if let Some(configuration) = configuration {
            let (stored, record) = self.store_configuration(configuration)?;
            files = stored.iter().filter_map(PointFile::of).collect();
            disks.extend(stored);
            machine["domain"] = record;
        }
        let quiesce = match (self.vm.offline(), instant.quiesced) {
            (true, true) => image::Quiesce::Offline,
            (false, true) => image::Quiesce::Quiesced,
            (_, false) => image::Quiesce::CrashConsistent,
        };
        let freeze = match (self.vm.offline(), self.options.method) {
            (true, _) => "offline",
            (_, Method::Fleece) => "fleece",
            (_, Method::Snapshot) => "snapshot",
        };
        let point = Point {
            id: PointId::random()?,
            instant: instant.at,
            quiesce,
            freeze: freeze.to_owned(),
            disks: reported,
            files,
            freeze_ms: instant.freeze_ms,
            released_ms: instant.released_ms,
            quiesced_ms: instant.quiesced_ms,
            file_systems: instant.file_systems,
            not_quiesced: self
                .not_quiesced
                .take()
                .filter(|_| quiesce == image::Quiesce::CrashConsistent),
            together,
            window_ms,
            waited_ms,
            bytes: self.bytes,
            window: Predicted {
                predicted_ms: self.predicted.map(|outlook| outlook.window_ms),
                actual_ms: window_ms,
            },
            residual: PredictedBytes {
                predicted: self.predicted.map(|outlook| outlook.residual),
                actual: self.bytes.residual,
            },
            missed: self.options.limits.missed(self.bytes.residual, window_ms),
            rescanned: self.rescans(),
        };
        let manifest = self.manifest(&point, disks, machine, instant.scratch_bytes)?;
        self.session.publish(&manifest)?;
        // The point stands; the next run removes a session that is committed.
        if let Err(error) = self.session.remove() {
            self.warnings.push(format!(
                "the finished session stays until the next run: {error:#}"
            ));
        }
        Ok(point)
    }

    /// Stores what the spool holds.
    fn store_spool(&mut self, spool: &Spool) -> Result<Copied> {
        let session = self.session.id().context("a residual without a session")?;
        let stored = copy::copy(
            &self.repo,
            &self.copy_disks,
            (session, "residual"),
            &self.progress.done,
            Manner::default(),
            |give| {
                let ended = spool.hand_on(give)?;
                anyhow::ensure!(
                    ended == ControlFlow::Continue(()),
                    "the residual was not stored whole"
                );
                Ok(())
            },
        );
        let ((), copied) = stored?;
        self.bytes.stored += copied.stored;
        Ok(copied)
    }

    /// Proves the residual of the disks that are left, and takes each from them.
    fn prove_residual(&mut self, copied: Copied, left: &mut BTreeSet<&str>) -> Result<()> {
        // The snapshot is of the instant that this epoch began with: what it held is proved for everything older.
        let epoch = self.session.state.epoch;
        for (disk, mut proofs) in self.disks.iter().zip(copied.proofs) {
            if !left.contains(&*disk.key) {
                continue;
            }
            proofs.sort_unstable_by_key(|(run, _)| run.first);
            let read = read_of(&proofs, &disk.proved, self.repo.block_size());
            let since = copied.generation;
            self.session.prove(&disk.key, epoch, &proofs, read, since)?;
            self.bytes.residual += read.read;
            left.remove(&*disk.key);
        }
        Ok(())
    }

    fn point_disks(&self, keys: &[String]) -> Result<(Vec<DiskPoint>, Vec<PointDisk>)> {
        let mut disks = Vec::new();
        let mut reported = Vec::new();
        for key in keys {
            let tracked = self.tracked(key)?;
            let (map, stats) = self.session.build_map(&tracked)?;
            let new = tracked
                .new
                .as_ref()
                .context("a frozen disk without a bitmap")?;
            let transient_offline = self.vm.offline() && !tracked.persistent;
            disks.push(DiskPoint {
                key: key.clone(),
                device: String::new(),
                node: String::new(),
                format: format_of(&tracked.identity),
                size: tracked.size,
                map,
                tracking: (!transient_offline).then(|| Tracking {
                    epoch: new.epoch,
                    bitmap: new.name.clone(),
                    persistent: tracked.persistent,
                    granularity: tracked.granularity,
                    identity: tracked.identity.clone(),
                }),
                rescanned: tracked.rescanned(),
                file: None,
            });
            let changed_bytes = stats.changed_blocks * self.repo.block_size().bytes();
            reported.push(PointDisk {
                key: key.clone(),
                size: tracked.size,
                changed_bytes,
            });
        }
        Ok((disks, reported))
    }

    fn manifest(
        &self,
        point: &Point,
        disks: Vec<DiskPoint>,
        machine: serde_json::Value,
        scratch_bytes: u64,
    ) -> Result<Manifest> {
        let keys: Vec<String> = disks.iter().map(|disk| disk.key.clone()).collect();
        let points = self.repo.points()?;
        let earlier = points
            .points
            .iter()
            .flat_map(|point| &point.retired_bitmaps);
        let earlier = earlier
            .map(|retired| (retired.disk.clone(), retired.name.clone()))
            .collect();
        let outlived = self.session.state.outlived(&keys, &earlier);
        let retired = outlived
            .into_iter()
            .map(|(disk, name)| RetiredBitmap { disk, name })
            .collect();
        let session = self.session.id().context("a point without a session")?;
        Ok(Manifest {
            id: point.id,
            target: image::Target {
                key: self.vm.key.clone(),
                spellings: self.spellings()?,
            },
            instant: point.instant,
            utc_offset: clock::local_now().offset().seconds(),
            forerun: env!("CARGO_PKG_VERSION").to_owned(),
            parent: self.session.parent,
            session,
            freeze: point.freeze.clone(),
            quiesce: point.quiesce,
            disks,
            machine,
            statistics: json!({
                "bytes": point.bytes, "passes": self.passes, "freeze_ms": point.freeze_ms,
                "released_ms": point.released_ms, "quiesced_ms": point.quiesced_ms,
                "window_ms": point.window_ms, "scratch_bytes": scratch_bytes,
                "begun": self.begun, "file_systems": point.file_systems,
                "not_quiesced": point.not_quiesced, "together": point.together,
            }),
            retired_bitmaps: retired,
            origin: None,
        })
    }

    /// Every spelling that the target was ever named by in this repository; a spelling of two targets is refused.
    fn spellings(&self) -> Result<Vec<String>> {
        let own = self.vm.target.to_string();
        let mut spellings = vec![own.clone()];
        for point in self.repo.points()?.points {
            if point.target.key == self.vm.key {
                spellings.extend(point.target.spellings);
            }
        }
        spellings.sort();
        spellings.dedup();
        Ok(spellings)
    }

    /// Removes from the VM what the point made needless. The point stands whether or not this works; what stays is
    /// removed by the next run.
    fn sweep(&mut self) {
        let keys: Vec<String> = self.disks.iter().map(|disk| disk.key.clone()).collect();
        self.session.state.publish(&keys);
        let held = self.hold();
        let swept = held.and_then(|mut hold| rotate::sweep(&mut self.session.state, &mut hold));
        if let Err(error) = swept {
            self.warnings.push(format!(
                "old bitmaps stay in the VM until the next run: {error:#}"
            ));
        }
    }
}

/// Waits for one's turn.
fn take_turn(turn: &Mutex<()>) -> MutexGuard<'_, ()> {
    turn.lock().unwrap_or_else(PoisonError::into_inner)
}

fn format_of(identity: &serde_json::Value) -> String {
    let text = |key| identity.pointer(key).and_then(serde_json::Value::as_str);
    let (driver, protocol) = (text("/0/driver"), text("/0/protocol"));
    // libvirt gives raw images no format node of their own.
    let driver = driver.filter(|_| driver != protocol);
    driver.unwrap_or("raw").to_owned()
}
