//! `inspect`, `status`, `untrack` and `recover`.

use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use crate::bitmap::name;
use crate::bitmap::track::{self, Tracked};
use crate::cli::{RepoTargetArgs, TargetArgs};
use crate::exit::{Failure, Kind};
use crate::hoststate::{self, TargetState};
use crate::image::Repository;
use crate::qmp::agent::{Address, THAW_FOR};
use crate::qmp::command::{action_remove_bitmap, transaction};
use crate::qmp::graph;
use crate::qmp::names::{PREFIX, RunName};
use crate::qmp::{export, orphans, release, socket};
use crate::report::Outcome;
use crate::session::Session;
use crate::settle;
use crate::target::Target;
use crate::units::Bytes;
use crate::vm::seen;

/// A run that makes nothing: only its name is needed.
fn looking() -> RunName {
    RunName::new("00000000")
}

/// `inspect`.
pub(super) fn inspect(args: &TargetArgs) -> Result<Outcome> {
    let vm = super::find(args)?;
    let mut hold = vm.hold(&looking(), "forerun inspect")?;
    let machine = hold.machine()?;
    let mut outcome = Outcome::default();
    let name = machine.name.as_deref().unwrap_or("-");
    outcome.line(format!(
        "{}  key {}  name {name}  state {}",
        vm.target, vm.key, machine.state
    ));
    for disk in &machine.disks {
        let tracking = match &disk.transient {
            None => "persistent bitmaps".to_owned(),
            Some(why) => format!("transient bitmaps ({why})"),
        };
        outcome.line(format!(
            "  disk {}  {}  {}  {}  node {}  {tracking}",
            disk.key,
            disk.device,
            disk.format,
            Bytes(disk.size),
            disk.node
        ));
        for layer in &disk.chain {
            outcome.line(format!("    image {} ({})", layer.filename, layer.driver));
        }
        for bitmap in &disk.bitmaps {
            let state = match (bitmap.inconsistent, bitmap.recording) {
                (true, _) => "inconsistent",
                (_, true) => "recording",
                (_, false) => "disabled",
            };
            outcome.line(format!(
                "    bitmap {} {state}, {} dirty",
                bitmap.name,
                Bytes(bitmap.count)
            ));
        }
        if disk.decrypted {
            outcome
                .line("    encrypted, and decrypted by QEMU: needs --allow-plaintext".to_owned());
        }
        for filter in &disk.foreign_filters {
            outcome.line(format!("    a block job's filter is on it: {filter}"));
        }
    }
    for left in &machine.left_out {
        let word = if left.refused { "REFUSED" } else { "skipped" };
        outcome.line(format!("  {word} {}: {}", left.device, left.reason));
    }
    for job in &machine.jobs {
        outcome.line(format!("  job {} ({}, {})", job.id, job.kind, job.state));
    }
    for export in &machine.exports {
        outcome.line(format!("  export {} of node {}", export.id, export.kind));
    }
    let server = match machine.disks.first() {
        Some(disk) if !vm.offline() => export::server_runs(&mut hold.monitor, &disk.node)?,
        _ => None,
    };
    if server == Some(true) {
        outcome.line("  an NBD server runs: a backup waits until it is stopped".to_owned());
    }
    if machine.left_out.iter().any(|left| left.refused) {
        outcome.kind = Some(Kind::Attention);
    }
    outcome.targets.push(json!({
        "target": vm.target.to_string(), "key": vm.key, "machine": machine,
        "nbd_server": server,
    }));
    Ok(outcome)
}

/// `status`.
pub(super) fn status(args: &RepoTargetArgs) -> Result<Outcome> {
    let repo = Repository::open(&args.repo.repo)?;
    let vm = super::find(&args.target)?;
    let mut hold = vm.hold(&looking(), "forerun status")?;
    hold.look()?;
    let session = Session::open(&repo, &vm.key)?;
    let mut outcome = Outcome::default();
    let mut disks = Vec::new();
    for disk in hold.disks() {
        let (tracked, confirmed) = match session.state.disks.get(&disk.key) {
            Some(tracked) => (Some(tracked), session.state.confirmed(tracked)),
            None => (session.bases.get(&disk.key), true),
        };
        let (state, dirty, doubt) = describe(tracked, confirmed, disk);
        outcome.line(format!(
            "{}  {state}, at most {} to copy",
            disk.key,
            Bytes(dirty)
        ));
        disks.push(json!({
            "disk": disk.key, "size": disk.size, "state": state, "dirty": dirty, "doubt": doubt,
        }));
    }
    let session_id = session.id().map(|id| id.to_string());
    let parent = session.parent.map(|id| id.to_string());
    let words = |id: &Option<String>| id.clone().unwrap_or_else(|| "none".to_owned());
    outcome.line(format!(
        "session {}  last point {}",
        words(&session_id),
        words(&parent)
    ));
    let found = orphans::of(&mut hold.monitor, None)?;
    if !found.is_empty() {
        outcome.warnings.push(format!(
            "{} things that no journal lists are in the VM; `forerun recover` takes them back",
            found.len()
        ));
    }
    outcome.targets.push(json!({
        "target": vm.target.to_string(), "key": vm.key, "disks": disks, "session": session_id,
        "last_point": parent, "leftovers": found,
    }));
    Ok(outcome)
}

fn describe(
    tracked: Option<&Tracked>,
    confirmed: bool,
    disk: &graph::Disk,
) -> (&'static str, u64, Option<String>) {
    let Some(tracked) = tracked else {
        return ("not followed yet", disk.size, None);
    };
    match track::trust(tracked, confirmed, &seen(disk)) {
        Err(why) => ("to be read in full", disk.size, Some(why)),
        Ok(chain) => {
            let count = |named: &track::Named| {
                let found = disk.bitmaps.iter().find(|bitmap| bitmap.name == named.name);
                found.map_or(0, |bitmap| bitmap.count)
            };
            let dirty: u64 = chain.iter().map(count).sum();
            let whole = if tracked.whole.is_some() {
                disk.size
            } else {
                0
            };
            ("followed", dirty.max(whole).min(disk.size), None)
        }
    }
}

/// `untrack`.
pub(super) fn untrack(args: &RepoTargetArgs) -> Result<Outcome> {
    let repo = Repository::open(&args.repo.repo)?;
    let short = repo.id().short();
    let vm = super::find(&args.target)?;
    let _run = vm.state.lock_run(&short, "forerun untrack")?;
    let mut hold = vm.hold(&RunName::new(&short), "forerun untrack")?;
    // All disks: one that cannot be backed up must not stand in the way out.
    let bitmaps: Vec<(String, String)> = hold
        .machine()?
        .disks
        .iter()
        .flat_map(|disk| {
            disk.bitmaps
                .iter()
                .map(|bitmap| (disk.node.clone(), bitmap.name.clone()))
        })
        .filter(|(_, name)| name::belongs_to(name, &short))
        .collect();
    let actions: Vec<Value> = bitmaps
        .iter()
        .map(|(node, name)| action_remove_bitmap(node, name))
        .collect();
    transaction(&mut hold.monitor, &actions)?;
    let mut outcome = Outcome::default();
    outcome.line(format!(
        "{}: bitmaps removed: {}; the next backup reads the disks in full",
        vm.target,
        bitmaps.len()
    ));
    outcome.targets.push(json!({
        "target": vm.target.to_string(), "key": vm.key,
        "removed": bitmaps.iter().map(|(_, name)| name).collect::<Vec<_>>(),
    }));
    Ok(outcome)
}

/// `recover`.
pub(super) fn recover(args: &TargetArgs, repo: Option<&Path>) -> Result<Outcome> {
    let repository = repo
        .map(Repository::open)
        .transpose()?
        .map(|repo| repo.id().short());
    let mut outcome = Outcome::default();
    let mut removed = Vec::new();
    let mut unthawed: Vec<Address> = Vec::new();
    match super::find(args) {
        Ok(vm) => {
            let mut hold = vm.hold(&looking(), "forerun recover")?;
            removed.append(&mut hold.recovered);
            unthawed.append(&mut hold.unthawed);
            if let Some(repository) = &repository {
                let left = orphans::of(&mut hold.monitor, Some(repository))?;
                removed.extend(release::release(&mut hold.monitor, &left, THAW_FOR)?.removed);
            }
            let foreign = orphans::of(&mut hold.monitor, None)?;
            if !foreign.is_empty() {
                outcome.warnings.push(format!(
                    "{} things whose names begin with `{PREFIX}` stay in the VM: no journal of this host lists them; name their repository with `--repo`",
                    foreign.len()
                ));
            }
        }
        Err(error) => match &args.target {
            // The VM is off: what its journals list on the file system is settled all the same.
            Target::Qmp(socket) if is_off(&error) => removed = recover_off(socket)?,
            _ => return Err(error),
        },
    }
    for agent in &unthawed {
        outcome.kind = Some(Kind::Attention);
        outcome.warnings.push(format!(
            "the guest agent {agent} does not say that the file systems are thawed: look at the guest, then run `recover` again"
        ));
    }
    if removed.is_empty() && unthawed.is_empty() {
        outcome.line(format!("{}: nothing was left behind", args.target));
    }
    for what in &removed {
        outcome.line(format!("{}: took back {what}", args.target));
    }
    let target = args.target.to_string();
    outcome
        .targets
        .push(json!({ "target": target, "removed": Value::from(removed) }));
    Ok(outcome)
}

fn is_off(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        matches!(
            cause.downcast_ref(),
            Some(crate::qmp::Error::Unreachable { .. })
        )
    })
}

/// Settles the journals of a VM that is off, found by its socket.
fn recover_off(socket: &Path) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    let root = hoststate::root();
    let Ok(entries) = std::fs::read_dir(&root) else {
        return Ok(removed);
    };
    for entry in entries.flatten() {
        let Some(key) = entry.file_name().to_str().map(str::to_owned) else {
            continue;
        };
        let state = TargetState::open(&key)?;
        let journals = state.journals()?;
        if !journals.iter().any(|journal| journal.monitor() == socket) {
            continue;
        }
        let _lock = state.lock_target("forerun recover", std::time::Duration::from_secs(30))?;
        state.remove_unwritten()?;
        for mut journal in state.journals()? {
            if journal.monitor() == socket {
                // A socket that we may not open looks like a VM that is off.
                let process = journal.process();
                if socket::start_time(process.pid) == Some(process.start) {
                    return Err(Failure::hinted(
                        Kind::Attention,
                        format!(
                            "the VM's QEMU (pid {}) runs, but its socket cannot be reached",
                            process.pid
                        ),
                        "run `recover` as a user who may open the QMP socket",
                    ));
                }
                removed.extend(settle::take_back(&mut journal, None, THAW_FOR)?.removed);
            }
        }
    }
    Ok(removed)
}
