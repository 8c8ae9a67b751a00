//! Room for a freeze: how large the scratches may grow, whether there is space for them and the spool, and which devices
//! would feel a scratch that fails.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use qapi::qmp as commands;
use serde_json::json;

use super::millis;
use crate::backup::Runner;
use crate::clock;
use crate::exit::{Failure, Kind};
use crate::qmp::Monitor as _;
use crate::qmp::command::list;
use crate::qmp::freeze::{FreezeDisk, Method};
use crate::units::Bytes;
use crate::vm::Hold;

/// The least that a scratch is given.
const SCRATCH_LEAST: u64 = 1 << 30;

impl Runner {
    /// At least 1 GiB, or what the guest's writes could fill until the deadline; never more than the disk can.
    pub(super) fn scratch_limit(&self, size: u64, writes_per_second: u64) -> u64 {
        if let Some(reserve) = self.options.scratch_reserve {
            return reserve;
        }
        let seconds = self.options.deadline.as_secs().max(1);
        let could = writes_per_second
            .saturating_mul(seconds)
            .saturating_mul(64 << 10);
        // A scratch holds the disk and its own tables at most; half of the limit is the end.
        let most = (size + size / 64 + (4 << 20)) * 2;
        could.max(SCRATCH_LEAST).min(most)
    }

    /// How many writes a second the guest has made since the run's first look.
    pub(super) fn writes_per_second(&self, hold: &mut Hold) -> Result<u64> {
        let Some((since, before)) = self.writes else {
            return Ok(0);
        };
        let writes = count_writes(hold)?.saturating_sub(before);
        let millis = millis(clock::now() - since).max(200);
        Ok(writes.saturating_mul(1000) / millis)
    }

    pub(super) fn scratch_directory(&self) -> PathBuf {
        self.options
            .scratch
            .clone()
            .unwrap_or_else(|| self.vm.state.directory().to_path_buf())
    }

    /// Where the scratches go: a domain's QEMU can open files by their paths only where it may, which is certain in the
    /// domain's own directory.
    pub(super) fn scratches_go_to(&self, hold: &Hold) -> PathBuf {
        match (&self.options.scratch, hold.monitor.place()) {
            (None, Some(place)) => place.to_path_buf(),
            _ => self.scratch_directory(),
        }
    }

    /// A freeze is not begun where the scratches or overlays and the spool have no room, or would leave their file system less
    /// than a tenth free: the guest's own images may grow there. On any other file system a freeze puts nothing.
    pub(super) fn check_space(
        &self,
        hold: &Hold,
        disks: &[FreezeDisk],
        directory: &Path,
    ) -> Result<()> {
        let beside: BTreeSet<&Path> = disks
            .iter()
            .map(|disk| disk.overlay_directory.as_path())
            .filter(|directory| !directory.as_os_str().is_empty())
            .collect();
        if beside.is_empty() {
            return self.check_room(hold, disks, directory);
        }
        for directory in beside {
            self.check_room(hold, disks, directory)?;
        }
        Ok(())
    }

    fn check_room(&self, hold: &Hold, disks: &[FreezeDisk], directory: &Path) -> Result<()> {
        let stat = rustix::fs::statvfs(directory)
            .with_context(|| format!("look at {}", directory.display()))?;
        let free = stat.f_bavail * stat.f_frsize;
        let tenth = stat.f_blocks * stat.f_frsize / 10;
        let spool = self.estimate(hold);
        let scratch: u64 = disks.iter().map(|disk| disk.scratch_limit).sum();
        if free < scratch + spool + tenth {
            return Err(Failure::hinted(
                Kind::NoSpace,
                format!(
                    "{} has {} free; the freeze needs {} for {} and {} for the residual, and leaves a tenth ({}) free",
                    directory.display(),
                    Bytes(free),
                    Bytes(scratch),
                    match self.options.method {
                        Method::Fleece => "scratches",
                        Method::Snapshot => "overlays",
                    },
                    Bytes(spool),
                    Bytes(tenth)
                ),
                "name a larger place with `--scratch DIR`, or a smaller limit with `--scratch-reserve`",
            ));
        }
        Ok(())
    }

    /// Where a fleecing job would make the guest feel errors, it is used only when it was asked for by name.
    pub(super) fn refuse_risky(&self, hold: &Hold) -> Result<()> {
        if self.options.method != Method::Fleece || self.options.method_named {
            return Ok(());
        }
        let unreadable = &self.session.state.unreadable;
        for disk in hold.disks() {
            let (why, repair) = if unreadable.contains(&disk.key) {
                let why = "could not be read, and a guest's write to what cannot be read would fail during a fleecing freeze";
                (
                    why,
                    "repair the disk and run `precopy`, which reads it again; or ",
                )
            } else if disk.werror == "report" {
                let why = "reports write errors to the guest (werror=report), so a full scratch would be its error";
                (why, "")
            } else {
                continue;
            };
            return Err(Failure::hinted(
                Kind::Attention,
                format!("disk `{}` {why}", disk.key),
                format!(
                    "{repair}use `--freeze snapshot`, or accept the risk with `--freeze fleece`"
                ),
            ));
        }
        Ok(())
    }

    /// An overlay of a domain goes beside its image, or where the operator says.
    pub(super) fn place_overlays(&self, hold: &Hold, disks: &mut [FreezeDisk]) -> Result<()> {
        if self.options.method == Method::Fleece || hold.monitor.place().is_none() {
            return Ok(());
        }
        for disk in disks {
            disk.overlay_directory = match (&self.options.scratch, Path::new(&disk.file).parent()) {
                (Some(named), _) => named.clone(),
                (None, Some(beside)) if disk.protocol == "file" => beside.to_path_buf(),
                _ => {
                    return Err(Failure::hinted(
                        Kind::Usage,
                        format!(
                            "the overlay of disk `{}` cannot be put beside {}",
                            disk.key, disk.file
                        ),
                        "name a directory that QEMU may enter with `--scratch DIR`, or use `--freeze fleece`",
                    ));
                }
            };
        }
        Ok(())
    }

    /// Counts the guest's writes since the first look, for the size of the scratches.
    pub(in crate::backup) fn sample_writes(&mut self, hold: &mut Hold) -> Result<()> {
        if self.vm.offline() {
            return Ok(());
        }
        if self.writes.is_none() {
            self.writes = Some((clock::now(), count_writes(hold)?));
        }
        Ok(())
    }
}

/// The write requests that the guest has made on all its disks.
fn count_writes(hold: &mut Hold) -> Result<u64> {
    let stats = list::<commands::query_blockstats>(&mut hold.monitor, json!({}))?;
    let counts = stats
        .iter()
        .filter_map(|device| device.pointer("/stats/wr_operations")?.as_u64());
    Ok(counts.sum())
}
