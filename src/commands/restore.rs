//! `restore`.

use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use serde_json::{Value, json};

use super::{define, secret};
use crate::cli::{Format, RestoreArgs};
use crate::exit::{Failure, Kind};
use crate::image::{DiskPoint, Manifest};
use crate::offline::image_format;
use crate::progress::Progress;
use crate::report::{Bar, Outcome, Style};
use crate::restore::{self, Task, Watch};
use crate::units::Bytes;

/// Plans first: nothing is written before every target is known to be good.
pub(super) fn restore(
    args: &RestoreArgs,
    style: Style,
    interrupted: &AtomicBool,
) -> Result<Outcome> {
    let repo = secret::open(&args.repo)?;
    let point = repo.resolve(&args.point)?;
    let mut tasks = disks(args, &point)?;
    // From here on a forget and a prune take nothing of it away.
    let _lease = repo.lease(&[&point], "forerun restore")?;
    let domain = args
        .define
        .then(|| define::plan(args, &repo, &point, &tasks));
    let domain = domain.transpose()?;
    if let Some(directory) = args.output.as_deref().filter(|_| !args.disk_only) {
        for (stored, file) in point.files() {
            let path = match &domain {
                Some(domain) => domain.place(file),
                None => Some(directory.join(plain_name(&file.name)?)),
            };
            if let Some(path) = path {
                tasks.push(Task {
                    disk: stored.clone(),
                    path,
                    qcow2: false,
                    create: Vec::new(),
                });
            }
        }
    }
    restore::check(&tasks, args.force)?;
    if let Some(directory) = &args.output {
        restore::make_directory(directory, args.define)?;
    }
    if let Some(domain) = &domain {
        domain.make_directories()?;
    }
    let progress = Arc::new(Progress::default());
    let bar = Bar::show(Arc::clone(&progress), style);
    let mut outcome = Outcome::default();
    let (mut restored, mut files) = (Vec::new(), Vec::new());
    for task in &tasks {
        let file = task.disk.file.as_ref();
        let shown = file.map_or(&task.disk.key, |file| &file.name);
        progress.begin(&format!("restore {shown}"), task.disk.size);
        let existed = task.path.exists();
        let other = other_format(args, task)?;
        let watch = Watch {
            progress: &progress,
            interrupted,
        };
        match restore::apply(&repo, task, args.force, &watch) {
            Err(_) if interrupted.load(Ordering::Relaxed) => {
                outcome
                    .errors
                    .push(ended(task, existed, restored.is_empty()));
                break;
            }
            done => done?,
        }
        outcome.warnings.extend(other);
        outcome.line(format!(
            "{shown}  {}  {}",
            Bytes(task.disk.size),
            task.path.display()
        ));
        match file {
            None => restored.push(json!({
                "disk": task.disk.key, "size": task.disk.size, "path": task.path,
                "format": ending(task.qcow2),
            })),
            Some(file) => files.push(json!({
                "name": file.name, "role": file.role, "size": task.disk.size, "path": task.path,
            })),
        }
    }
    drop(bar);
    if args.output.is_some() {
        for name in point.without() {
            outcome.line(format!(
                "{name}  not in this point: it was left out of the backup"
            ));
        }
    }
    outcome
        .more
        .insert("without".to_owned(), json!(point.without()));
    outcome.more.insert("point".to_owned(), json!(point.id));
    outcome.more.insert("restored".to_owned(), restored.into());
    outcome.more.insert("files".to_owned(), files.into());
    if let Some(domain) = domain.filter(|_| outcome.errors.is_empty()) {
        domain.define(args, &tasks, &mut outcome)?;
    }
    Ok(outcome)
}

fn disks(args: &RestoreArgs, point: &Manifest) -> Result<Vec<Task>> {
    let mut tasks = Vec::new();
    let said = |disk: &DiskPoint| match args.format {
        Some(format) => Some(format == Format::Qcow2),
        None => args.define.then(|| disk.format == "qcow2"),
    };
    let task = |disk: &DiskPoint, path: PathBuf, qcow2: bool| Task {
        path,
        create: create_options(point, disk),
        disk: disk.clone(),
        qcow2,
    };
    let mut named = Vec::new();
    for words in &args.disk {
        let Some((key, path)) = words.split_once('=') else {
            let message = format!("`{words}` is not DISK=PATH");
            return Err(Failure::plain(Kind::Usage, message));
        };
        let Some(disk) = point.guest_disks().find(|disk| disk.key == key) else {
            let keys: Vec<&str> = point.guest_disks().map(|disk| disk.key.as_str()).collect();
            return Err(Failure::hinted(
                Kind::Usage,
                format!("the point has no disk `{key}`"),
                format!("its disks are: {}", keys.join(", ")),
            ));
        };
        named.push(key);
        let qcow2 = said(disk).map_or_else(|| expects_qcow2(Path::new(path)), Ok)?;
        tasks.push(task(disk, path.into(), qcow2));
    }
    if let Some(directory) = &args.output {
        for disk in point.guest_disks() {
            if !named.contains(&disk.key.as_str()) {
                let qcow2 = said(disk).unwrap_or(false);
                let name = format!("{}.{}", disk.key, ending(qcow2));
                tasks.push(task(disk, directory.join(name), qcow2));
            }
        }
    }
    Ok(tasks)
}

fn ending(qcow2: bool) -> &'static str {
    if qcow2 { "qcow2" } else { "raw" }
}

/// The format of the image that is there already; an empty file has none, nor has what is no file or device.
fn format_there(path: &Path) -> Result<Option<&'static str>> {
    let there = std::fs::metadata(path)
        .ok()
        .filter(|meta| meta.file_type().is_block_device() || meta.is_file() && meta.len() > 0);
    there.map(|_| image_format(path)).transpose()
}

/// Whether whoever uses the image at this path takes it for qcow2: a raw one in its place would not start. A device's name
/// says nothing.
fn expects_qcow2(path: &Path) -> Result<bool> {
    let is_device = std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device());
    let ends = path
        .extension()
        .is_some_and(|end| end.eq_ignore_ascii_case("qcow2"));
    Ok(ends && !is_device || format_there(path)? == Some("qcow2"))
}

/// What to say when an image is overwritten by one of the other format. A domain that is defined with it knows.
fn other_format(args: &RestoreArgs, task: &Task) -> Result<Option<String>> {
    if args.define || task.disk.file.is_some() {
        return Ok(None);
    }
    let now = ending(task.qcow2);
    let was = format_there(&task.path)?.filter(|was| *was != now);
    Ok(was.map(|was| {
        format!(
            "{} was a {was} image and is {now} now: tell the VM that uses it (`<driver type='{now}'/>`), or restore it once more with `--force --format {was}`",
            task.path.display()
        )
    }))
}

/// A file's name that leads nowhere else.
pub(super) fn plain_name(name: &str) -> Result<&str> {
    let mut parts = Path::new(name).components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(only)), None) if only == name => Ok(name),
        _ => Err(Failure::plain(
            Kind::Corrupt,
            format!("the point has a file of the name `{name}`, which is none"),
        )),
    }
}

/// How the image was made that a disk was read from, as far as its header tells.
fn create_options(point: &Manifest, disk: &DiskPoint) -> Vec<String> {
    if disk.format != "qcow2" {
        return Vec::new();
    }
    let machine = point.machine.pointer("/disks").and_then(Value::as_array);
    let was = machine.and_then(|disks| disks.iter().find(|was| was["key"] == *disk.key));
    let Some(was) = was else { return Vec::new() };
    let header = was.pointer("/chain/0/header").unwrap_or(&Value::Null);
    let options = [
        ("compat", &header["compat"]),
        ("cluster_size", &header["cluster-size"]),
        ("refcount_bits", &header["refcount-bits"]),
        ("extended_l2", &header["extended-l2"]),
        ("compression_type", &header["compression-type"]),
        ("lazy_refcounts", &was["lazy_refcounts"]),
    ];
    let worded = options.into_iter().filter_map(|(name, value)| {
        let value = match value {
            Value::Bool(true) => "on".to_owned(),
            Value::Number(number) => number.to_string(),
            Value::String(text) if text.chars().all(|c| c.is_ascii_alphanumeric() || c == '.') => {
                text.clone()
            }
            _ => return None,
        };
        Some(format!("{name}={value}"))
    });
    worded.collect()
}

/// A restore that was ended: there is no half of an image to go on with.
fn ended(task: &Task, existed: bool, is_first: bool) -> anyhow::Error {
    let (what, path) = (task.what(), task.path.display());
    let left = if existed {
        format!("{what} in {path} is incomplete and of no use")
    } else {
        format!("nothing of {what} is left at {path}")
    };
    let hint = if is_first {
        "a restore is not gone on with: run the command again"
    } else {
        "the disks that are listed are complete: restore the others with `--disk DISK=PATH`"
    };
    Failure::hinted(Kind::Interrupted, format!("interrupted: {left}"), hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_name_leads_nowhere_else() {
        assert_eq!(plain_name("tpm2-00.permall").unwrap(), "tpm2-00.permall");
        for bad in ["", ".", "..", "/etc/passwd", "../x", "a/b", "a/"] {
            assert!(plain_name(bad).is_err(), "{bad}");
        }
    }
}
