//! `restore`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use serde_json::json;

use super::secret;
use crate::cli::{Format, RepoArgs};
use crate::exit::{Failure, Kind};
use crate::progress::Progress;
use crate::report::{Bar, Outcome, Style};
use crate::restore::{self, Task, Watch};
use crate::units::Bytes;

/// What is asked for.
pub(super) struct Request {
    pub(super) point: String,
    pub(super) output: Option<PathBuf>,
    pub(super) disks: Vec<String>,
    pub(super) format: Format,
    pub(super) force: bool,
}

/// Plans first: nothing is written before every target is known to be good.
pub(super) fn restore(
    args: &RepoArgs,
    request: &Request,
    style: Style,
    interrupted: &AtomicBool,
) -> Result<Outcome> {
    let repo = secret::open(args)?;
    let point = repo.resolve(&request.point)?;
    let qcow2 = request.format == Format::Qcow2;
    let mut tasks = Vec::new();
    if let Some(directory) = &request.output {
        let ending = if qcow2 { "qcow2" } else { "raw" };
        for disk in &point.disks {
            let path = directory.join(format!("{}.{ending}", disk.key));
            tasks.push(Task {
                disk: disk.clone(),
                path,
                qcow2,
            });
        }
    }
    for named in &request.disks {
        let Some((key, path)) = named.split_once('=') else {
            let message = format!("`{named}` is not DISK=PATH");
            return Err(Failure::plain(Kind::Usage, message));
        };
        let Some(disk) = point.disks.iter().find(|disk| disk.key == key) else {
            let keys: Vec<&str> = point.disks.iter().map(|disk| disk.key.as_str()).collect();
            return Err(Failure::hinted(
                Kind::Usage,
                format!("the point has no disk `{key}`"),
                format!("its disks are: {}", keys.join(", ")),
            ));
        };
        tasks.push(Task {
            disk: disk.clone(),
            path: path.into(),
            qcow2,
        });
    }
    restore::check(&tasks, request.force)?;
    // From here on a forget and a prune take nothing of it away.
    let _lease = repo.lease(&[&point], "forerun restore")?;
    if let Some(directory) = &request.output {
        restore::make_directory(directory)?;
    }
    let progress = Arc::new(Progress::default());
    let bar = Bar::show(Arc::clone(&progress), style);
    let mut outcome = Outcome::default();
    let mut restored = Vec::new();
    for task in &tasks {
        progress.begin(&format!("restore {}", task.disk.key), task.disk.size);
        let existed = task.path.exists();
        let watch = Watch {
            progress: &progress,
            interrupted,
        };
        match restore::apply(&repo, task, request.force, &watch) {
            Err(_) if interrupted.load(Ordering::Relaxed) => {
                outcome
                    .errors
                    .push(ended(task, existed, restored.is_empty()));
                break;
            }
            done => done?,
        }
        outcome.line(format!(
            "{}  {}  {}",
            task.disk.key,
            Bytes(task.disk.size),
            task.path.display()
        ));
        restored.push(json!({ "disk": task.disk.key, "size": task.disk.size, "path": task.path }));
    }
    drop(bar);
    outcome.more.insert("point".to_owned(), json!(point.id));
    outcome.more.insert("restored".to_owned(), restored.into());
    Ok(outcome)
}

/// A restore that was ended: there is no half of an image to go on with.
fn ended(task: &Task, existed: bool, is_first: bool) -> anyhow::Error {
    let (disk, path) = (&task.disk.key, task.path.display());
    let left = if existed {
        format!("disk `{disk}` in {path} is incomplete and of no use")
    } else {
        format!("nothing of disk `{disk}` is left at {path}")
    };
    let hint = if is_first {
        "a restore is not gone on with: run the command again"
    } else {
        "the disks that are listed are complete: restore the others with `--disk DISK=PATH`"
    };
    Failure::hinted(Kind::Interrupted, format!("interrupted: {left}"), hint)
}
