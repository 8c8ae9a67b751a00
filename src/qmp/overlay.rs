//! The overlay of an external snapshot, and how it is committed back. The guest's newest writes are in it and nowhere else, so
//! its file is removed only when a commit is known to have ended well.
//!
//! ```text
//! added          node without a backing                          never put in place: rubbish
//! in place       node --backing--> base, no job                  to be committed, also when its disk was unplugged
//! committing     job                                             waited for
//! committed      job `concluded` without an error, no device     the base has it all; node, file and job go, in this order
//! ```
//!
//! A job that has ended stays listed until it is dismissed, and it is dismissed last: so the third state and the last are never
//! taken for the second, whenever a run dies. To commit a second time what a guest has since overwritten would undo its writes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use qapi::qmp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::command::{call, jobs, text};
use super::graph::Graph;
use super::{Error, Monitor, Result};
use crate::clock;
use crate::units::Bytes;

/// Between two looks at a commit.
const POLL: Duration = Duration::from_millis(5);
/// After this part of its time a commit is slow.
const SLOW: u32 = 20;

/// An overlay of `--freeze snapshot`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlay {
    /// The disk's key.
    pub disk: String,
    /// The node that the overlay is put on.
    pub base: String,
    /// The overlay's node.
    pub node: String,
    /// The job that commits it.
    pub job: String,
    /// The overlay's file.
    pub file: PathBuf,
    /// The base's file or device, as QEMU named it.
    pub base_file: String,
    /// How the base's file looked once the overlay was in place; `None` before.
    pub base_version: Option<FileVersion>,
    /// The commit has begun: the base holds a mix until it ends.
    pub committing: bool,
    /// How long a commit is waited for, milliseconds.
    pub deadline_ms: u64,
}

/// A state of a file that a later write cannot leave unchanged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileVersion {
    /// Device and inode.
    pub inode: (u64, u64),
    /// Bytes.
    pub size: u64,
    /// Modification time: seconds since the epoch and nanoseconds.
    pub modified: (i64, i64),
    /// Status change time: seconds since the epoch and nanoseconds.
    pub changed: (i64, i64),
}

impl FileVersion {
    /// Looks at a file; `None` when it is no regular file or cannot be seen.
    #[must_use]
    pub fn of(path: &Path) -> Option<Self> {
        use std::os::unix::fs::MetadataExt;
        let meta = std::fs::metadata(path).ok()?;
        meta.is_file().then(|| Self {
            inode: (meta.dev(), meta.ino()),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

/// What became of an overlay.
#[derive(Debug, Default)]
pub struct Committed {
    /// That it was committed, in words; not when it was never in place.
    pub what: Option<String>,
    /// That it took long, in words.
    pub slow: Option<String>,
}

/// Commits an overlay back into its base and takes it away, wherever an earlier try was cut off. Only for the QEMU process
/// that it was made for. A commit that does not keep up with the guest goes on in QEMU when this fails.
pub fn commit(monitor: &mut dyn Monitor, overlay: &Overlay) -> Result<Committed> {
    let mut done = Committed::default();
    let graph = Graph::read(monitor)?;
    let in_place = graph.backing(&overlay.node) == Some(overlay.base.as_str())
        || graph.has_parents(&overlay.node);
    if in_place {
        if find_job(monitor, overlay)?.is_none() {
            let job = json!({
                "job-id": overlay.job, "device": overlay.node, "base-node": overlay.base,
                "auto-dismiss": false,
            });
            call::<qmp::block_commit>(monitor, job)?;
        }
        done.slow = finish(monitor, overlay)?;
        if Graph::read(monitor)?.has_parents(&overlay.node) {
            // Somebody has cancelled it: another try begins anew.
            dismiss(monitor, overlay)?;
            return Err(Error::Protocol(format!(
                "the commit of {} into {} ended, but the overlay is still in place",
                overlay.node, overlay.base
            )));
        }
        done.what = Some(format!("overlay of disk {}", overlay.disk));
    }
    match call::<qmp::blockdev_del>(monitor, json!({ "node-name": overlay.node })) {
        Err(Error::Command { description, .. }) if description.contains("Failed to find node") => {}
        deleted => deleted.map(drop)?,
    }
    match std::fs::remove_file(&overlay.file) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::Io {
                what: format!("remove {}", overlay.file.display()),
                source,
            });
        }
        _ => {}
    }
    dismiss(monitor, overlay)?;
    Ok(done)
}

fn find_job(monitor: &mut dyn Monitor, overlay: &Overlay) -> Result<Option<Value>> {
    let mut all = jobs(monitor)?.into_iter();
    Ok(all.find(|job| text(job, "id") == overlay.job))
}

fn dismiss(monitor: &mut dyn Monitor, overlay: &Overlay) -> Result<()> {
    match call::<qmp::job_dismiss>(monitor, json!({ "id": overlay.job })) {
        Err(error) if !error.refused() => Err(error),
        _ => Ok(()),
    }
}

/// Waits until the commit has ended well, and says so when that took long.
fn finish(monitor: &mut dyn Monitor, overlay: &Overlay) -> Result<Option<String>> {
    let begun = clock::now();
    let deadline = Duration::from_millis(overlay.deadline_ms);
    let mut slow = None;
    loop {
        let Some(job) = find_job(monitor, overlay)? else {
            return Err(Error::Protocol(format!("job {} vanished", overlay.job)));
        };
        let number = |key| job.get(key).and_then(Value::as_u64).unwrap_or(0);
        let total = number("total-progress");
        let left = total.saturating_sub(number("current-progress"));
        let took = clock::now() - begun;
        match text(&job, "status") {
            "ready" => match call::<qmp::job_complete>(monitor, json!({ "id": overlay.job })) {
                Err(error) if !error.refused() => return Err(error),
                _ => {}
            },
            "concluded" => {
                let why = text(&job, "error");
                if why.is_empty() {
                    return Ok(slow.map(|at_first: String| {
                        format!("{at_first}; it was in use for {} s", took.as_secs())
                    }));
                }
                dismiss(monitor, overlay)?;
                return Err(Error::Command {
                    command: format!("block-commit of the overlay of disk `{}`", overlay.disk),
                    class: "GenericError".to_owned(),
                    description: why.to_owned(),
                });
            }
            _ => {}
        }
        // Also a job that is ready goes on copying for as long as the guest is faster.
        if took > deadline {
            return Err(Error::NotConverged {
                disk: overlay.disk.clone(),
                file: overlay.file.clone(),
                seconds: took.as_secs(),
                left,
            });
        }
        if slow.is_none() && took > deadline / SLOW {
            let words = format!(
                "the overlay of disk `{}` was not committed after {} ms, {} of {} were left: the guest writes nearly as fast",
                overlay.disk,
                took.as_millis(),
                Bytes(left),
                Bytes(total)
            );
            tracing::warn!("{words}");
            slow = Some(words);
        }
        clock::sleep(POLL);
    }
}
