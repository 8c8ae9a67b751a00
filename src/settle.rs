//! Settling what a dead run left: through the VM's monitor while its QEMU lives, and what is on the file system after.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::exit::{Failure, Kind};
use crate::hoststate::Journal;
use crate::qmp::agent::Address;
use crate::qmp::managed::{self, Managed, Manager};
use crate::qmp::overlay::{FileVersion, Overlay};
use crate::qmp::release::Leftover;
use crate::qmp::{self, Monitor};

/// What [`take_back`] says of a VM that a full scratch had stopped.
pub const RESUMED: &str = "a VM that a full scratch had stopped goes on";

/// What a journal listed and what became of it.
#[derive(Debug, Default)]
pub struct TakenBack {
    /// What was found and taken back.
    pub removed: Vec<String>,
    /// Agents that do not say that their guests' file systems are thawed. The journal stays for them.
    pub unthawed: Vec<Address>,
    /// Hooks that had to be run after the thaw and failed; they are not run again.
    pub failed_hooks: Vec<String>,
}

/// Takes back what a journal lists, then removes the journal. Without a monitor the VM is off; its manager knows of its overlays
/// all the same. An agent that does not
/// answer is asked again for as long as `patience`; after that the journal keeps the guest for the next command.
pub fn take_back(
    journal: &mut Journal,
    monitor: Option<&mut dyn Monitor>,
    manager: Option<&dyn Manager>,
    patience: Duration,
) -> Result<TakenBack> {
    let mut taken = TakenBack::default();
    let running = monitor.is_some();
    if let Some(monitor) = monitor {
        let released = journal.release(monitor, patience)?;
        let resumed = released.resumed.then(|| RESUMED.to_owned());
        taken.removed = released.removed.into_iter().chain(resumed).collect();
        taken.unthawed = released.unthawed;
    }
    if let Some(hook) = journal.hook() {
        match hook.run(&|| false) {
            Ok(()) => {
                let what = format!("what came before the freeze, by {hook}");
                taken.removed.push(what);
            }
            Err(error) => taken.failed_hooks.push(error.to_string()),
        }
        journal.set_hook(None);
    }
    for item in journal.left() {
        if let Leftover::Managed(overlay) = item
            && let Some(what) = settle_managed(manager, overlay)?
        {
            taken.removed.push(what);
        }
    }
    // All overlays are judged before the first one is touched: disks of two instants would be worse than either.
    let mut ends = Vec::new();
    for item in journal.left() {
        if let Leftover::Overlay(overlay) = item
            && overlay.file.exists()
        {
            ends.push((overlay.clone(), judge(overlay, running)?));
        }
    }
    for (overlay, end) in &ends {
        if *end == End::Commit {
            commit(overlay)?;
        }
        std::fs::remove_file(&overlay.file)
            .with_context(|| format!("remove {}", overlay.file.display()))?;
        taken
            .removed
            .push(format!("overlay file {}", overlay.file.display()));
    }
    for item in journal.left() {
        if let Leftover::Server { socket: path, .. } | Leftover::File { path } = item {
            std::fs::remove_file(path).ok();
        }
    }
    if taken.unthawed.is_empty() {
        journal.close()?;
    } else {
        let frozen = taken.unthawed.iter().map(|agent| Leftover::Frozen {
            agent: agent.clone(),
        });
        journal.write(frozen.collect())?;
    }
    Ok(taken)
}

/// An overlay that the VM's manager knows of, and that no live run is about to commit.
fn settle_managed(manager: Option<&dyn Manager>, overlay: &Managed) -> Result<Option<String>> {
    match manager {
        Some(manager) => Ok(managed::commit(manager, overlay)?.what),
        None if overlay.file.exists() => Err(qmp::Error::OverlayOff {
            disk: overlay.disk.clone(),
            file: overlay.file.clone(),
        }
        .into()),
        None => Ok(None),
    }
}

/// What is to become of an overlay's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// It was never in place.
    Remove,
    /// The guest's last writes are in it, and belong into its base.
    Commit,
}

/// Judges the file of an overlay whose QEMU is gone: the guest's last writes are in it. It is committed only onto a base
/// that nobody has touched since; else everything stays as it is.
fn judge(overlay: &Overlay, running: bool) -> Result<End> {
    let Some(recorded) = &overlay.base_version else {
        // It was never seen in place; it holds something only if it was, just before the end.
        if holds_data(&overlay.file)? {
            return Err(stays(overlay, "how its base looked is not known"));
        }
        return Ok(End::Remove);
    };
    if overlay.committing {
        return Err(stays(overlay, "its commit had begun"));
    }
    if FileVersion::of(Path::new(&overlay.base_file)).as_ref() != Some(recorded) {
        return Err(stays(overlay, "its base has been written to since"));
    }
    if running {
        return Err(stays(overlay, "its VM runs again without it"));
    }
    Ok(End::Commit)
}

fn stays(overlay: &Overlay, why: &str) -> anyhow::Error {
    Failure::hinted(
        Kind::Attention,
        format!(
            "disk `{}`: the guest's last writes are in the overlay {} and {why}",
            overlay.disk,
            overlay.file.display()
        ),
        format!(
            "its base is {}: decide which of both states is wanted, for all disks alike (`qemu-img commit` joins them while the VM is off), then remove the overlays",
            overlay.base_file
        ),
    )
}

fn commit(overlay: &Overlay) -> Result<()> {
    let output = Command::new("qemu-img")
        .args(["commit", "-q", "-f", "qcow2", "--"])
        .arg(&overlay.file)
        .output()
        .context("run qemu-img commit")?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let why = format!("it could not be committed: {}", words.trim());
    Err(stays(overlay, &why))
}

fn holds_data(file: &Path) -> Result<bool> {
    let output = Command::new("qemu-img")
        .args(["map", "--output=json", "-f", "qcow2", "-U", "--"])
        .arg(file)
        .output()
        .context("run qemu-img map")?;
    if !output.status.success() {
        // Not even a qcow2 header: it was never formatted.
        return Ok(std::fs::metadata(file).is_ok_and(|meta| meta.len() > 0));
    }
    let map: Vec<serde_json::Value> =
        serde_json::from_slice(&output.stdout).context("understand qemu-img map")?;
    Ok(map.iter().any(|extent| {
        extent.get("depth").and_then(serde_json::Value::as_u64) == Some(0)
            && extent
                .get("present")
                .and_then(serde_json::Value::as_bool)
                .unwrap_or(true)
    }))
}
