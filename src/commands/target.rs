//! `inspect`, `untrack` and `drop-session`.

use anyhow::Result;
use serde_json::{Value, json};

use super::secret;
use crate::bitmap::name;
use crate::cli::{RepoArgs, RepoTargetArgs, TargetArgs};
use crate::exit::{Failure, Kind};
use crate::hoststate::TargetState;
use crate::image::{self, Closed, Repository};
use crate::qmp::command::{action_remove_bitmap, transaction};
use crate::qmp::export;
use crate::qmp::names::RunName;
use crate::replicate;
use crate::report::Outcome;
use crate::session::{Session, is_withdrawn_key};
use crate::target::{Choice, Target};
use crate::units::Bytes;
use crate::vm::{Hold, SAVED, Vm};

/// A run that makes nothing: only its name is needed.
pub(super) fn looking() -> RunName {
    RunName::new("00000000")
}

/// `inspect`.
pub(super) fn inspect(args: &TargetArgs) -> Result<Outcome> {
    let vm = super::find(args, false)?;
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
            outcome.line(
                "    encrypted, and decrypted by QEMU: needs an encrypted repository or --allow-plaintext"
                    .to_owned(),
            );
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
    let agent = match &vm.domain {
        Some(domain) if !vm.offline() => domain.agent_connected()?,
        _ => None,
    };
    if let Some(connected) = agent {
        let word = if connected {
            "connected"
        } else {
            "not connected: the guest is not quiesced"
        };
        outcome.line(format!("  guest agent {word}"));
    }
    if machine.state == SAVED {
        outcome.line(
            "  a managed save has the guest's memory: a point holds the disks as after a power cut; remove it before they are restored (`virsh managedsave-remove`)"
                .to_owned(),
        );
    }
    if server == Some(true) {
        outcome.line("  an NBD server runs: a backup waits until it is stopped".to_owned());
    }
    if machine.left_out.iter().any(|left| left.refused) {
        outcome.kind = Some(Kind::Attention);
    }
    outcome.targets.push(json!({
        "target": vm.target.to_string(), "key": vm.key, "machine": machine,
        "nbd_server": server, "agent_connected": agent,
    }));
    Ok(outcome)
}

/// `inspect` without a target: a line a domain.
pub(super) fn overview(args: &TargetArgs) -> Result<Outcome> {
    let whole = inspect(args)?;
    let mut outcome = Outcome {
        lines: Vec::new(),
        kind: None,
        ..whole
    };
    let text = |value: &Value, key: &str| value[key].as_str().unwrap_or("").to_owned();
    for target in &outcome.targets {
        let machine = &target["machine"];
        let all = |key: &str| machine[key].as_array().cloned().unwrap_or_default();
        let disks = all("disks")
            .into_iter()
            .map(|disk| match disk["transient"].as_str() {
                None => text(&disk, "key"),
                Some(_) => format!("{} (read in full after a restart)", text(&disk, "key")),
            });
        let refused = all("left_out")
            .into_iter()
            .filter(|left| left["refused"] == true);
        let refused = refused.map(|left| {
            format!(
                "{} REFUSED: {}",
                text(&left, "device"),
                text(&left, "reason")
            )
        });
        let how: Vec<String> = disks.chain(refused).collect();
        outcome.lines.push(format!(
            "{}  {}  {}",
            text(target, "target"),
            text(machine, "state"),
            how.join(", ")
        ));
    }
    Ok(outcome)
}

/// `untrack`.
pub(super) fn untrack(args: &RepoTargetArgs) -> Result<Outcome> {
    let short = Closed::at(&args.repo.repo)?.id().short();
    let vm = super::find(&args.target, false)?;
    let _run = vm.state.lock_run(&short, "forerun untrack")?;
    let mut hold = vm.hold(&RunName::new(&short), "forerun untrack")?;
    let removed = remove_bitmaps(&mut hold, |name| name::belongs_to(name, &short))?;
    let mut outcome = Outcome::default();
    outcome.line(format!(
        "{}: bitmaps removed: {}; the next backup reads the disks in full",
        vm.target,
        removed.len()
    ));
    outcome.targets.push(json!({
        "target": vm.target.to_string(), "key": vm.key, "removed": removed,
    }));
    Ok(outcome)
}

/// Removes bitmaps by their names. From all disks: one that cannot be backed up must not stand in the way out.
fn remove_bitmaps(hold: &mut Hold, chosen: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let machine = hold.machine()?;
    let (mut actions, mut names) = (Vec::new(), Vec::new());
    for disk in &machine.disks {
        for bitmap in disk.bitmaps.iter().filter(|bitmap| chosen(&bitmap.name)) {
            actions.push(action_remove_bitmap(&disk.node, &bitmap.name));
            names.push(bitmap.name.clone());
        }
    }
    transaction(&mut hold.monitor, &actions)?;
    Ok(names)
}

/// `drop-session`.
pub(super) fn drop_session(
    args: &RepoArgs,
    target: &Target,
    name: Option<&str>,
) -> Result<Outcome> {
    let repo = secret::open(args)?;
    let short = repo.id().short();
    let spelled = target.to_string();
    let vm = match target {
        Target::Qmp(_) => Some(Vm::find(target, None, name, Choice::default())),
        // A name may be one that only the repository knows.
        Target::Name(_) => Vm::find(target, None, name, Choice::default()).ok().map(Ok),
        Target::Disk(_) => None,
    };
    let points = repo.points()?.points;
    let known = points.iter().find(|point| point.target.is_called(&spelled));
    let key = match (&vm, known) {
        (Some(Ok(vm)), _) => vm.key.clone(),
        (_, Some(point)) => point.target.key.clone(),
        _ => name.unwrap_or(&spelled).to_owned(),
    };
    let Some(session) = image::Session::find(&repo, &key)? else {
        return Err(no_session(&repo, &spelled));
    };
    if let Some(_copy) = replicate::lock_session(&repo, &key)? {
        let id = session.id();
        session.remove()?;
        let mut outcome = Outcome::default();
        outcome.line(format!(
            "dropped session {id} of {key}; the next copy begins anew"
        ));
        let target = json!({ "target": spelled, "key": key, "session": id, "removed": [] });
        outcome.targets.push(target);
        return Ok(outcome);
    }
    let state = TargetState::open(&key)?;
    let _run = state.lock_run(&short, "forerun drop-session")?;
    let Some((id, bitmaps)) = Session::give_up(&repo, &key)? else {
        return Err(no_session(&repo, &spelled));
    };
    let mut outcome = Outcome::default();
    outcome.line(format!(
        "dropped session {id} of {key}; the next backup reads its disks in full"
    ));
    // It is dropped, whether or not its bitmaps can be removed now.
    let removed = vm.map(|vm| {
        let mut hold = vm?.hold(&RunName::new(&short), "forerun drop-session")?;
        remove_bitmaps(&mut hold, |name| bitmaps.contains(name))
    });
    let removed = match removed {
        Some(Ok(removed)) => removed,
        Some(Err(error)) => {
            outcome.line(format!(
                "its bitmaps stay in the VM until the next backup: {error:#}"
            ));
            Vec::new()
        }
        None => Vec::new(),
    };
    outcome
        .targets
        .push(json!({ "target": spelled, "key": key, "session": id, "removed": removed }));
    Ok(outcome)
}

fn no_session(repo: &Repository, target: &str) -> anyhow::Error {
    let keys: Vec<String> = image::Session::list(repo)
        .map(|found| found.sessions)
        .unwrap_or_default()
        .iter()
        .map(|session| session.key().to_owned())
        // Not what dropped ones left behind.
        .filter(|key| !is_withdrawn_key(key))
        .collect();
    let hint = if keys.is_empty() {
        "there are no sessions".to_owned()
    } else {
        format!("sessions: {}", keys.join(", "))
    };
    Failure::hinted(Kind::Failed, format!("no session of `{target}`"), hint)
}
