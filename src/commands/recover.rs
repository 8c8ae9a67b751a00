//! `recover`: what dead runs left in a VM, or of all of this host.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

use super::several;
use crate::cli::TargetArgs;
use crate::exit::{Failure, Kind};
use crate::hoststate::{self, Journal, TargetState};
use crate::image::Closed;
use crate::qmp;
use crate::qmp::agent::{Address, THAW_FOR};
use crate::qmp::names::{PREFIX, RunName};
use crate::qmp::{orphans, release, socket};
use crate::report::Outcome;
use crate::settle;
use crate::target::Target;

/// How long a live run's batch is waited for.
const LOCK_WAIT: Duration = Duration::from_secs(30);

/// `recover`: one target, several domains, or without any target whatever the journals of this host are about.
pub(super) fn run(
    args: &TargetArgs,
    repo: Option<&Path>,
    interrupted: &AtomicBool,
) -> Result<Outcome> {
    if args.target.is_none() && !args.all {
        return Ok(everywhere(args, repo));
    }
    several::each(args, &[], interrupted, |args| recover(args, repo))
}

/// All targets that have a journal on this host.
fn everywhere(args: &TargetArgs, repo: Option<&Path>) -> Outcome {
    let mut outcome = Outcome::default();
    for key in hoststate::keys() {
        let opened = TargetState::open(&key).and_then(|state| Ok((state.journals()?, state)));
        let (journals, state) = match opened {
            Ok(opened) => opened,
            // The others are taken back all the same.
            Err(error) => {
                outcome.join(&key, Err(error.into()));
                continue;
            }
        };
        let Some(journal) = journals.into_iter().next() else {
            continue;
        };
        if let Err(error) = state.lock_target("forerun recover", Duration::ZERO) {
            // Its journal is that of a run at work.
            outcome.line(format!("{key}: {error}"));
            continue;
        }
        let (shown, one) = match target_of(&journal, &key) {
            Ok(target) => {
                let one = TargetArgs {
                    target: Some(target),
                    connect: journal
                        .found()
                        .and_then(|found| found.connect.clone())
                        .or_else(|| args.connect.clone()),
                    // A VM without a UUID has the key that it was given.
                    name: Some(key.clone()).filter(|_| journal.found().is_some()),
                    ..args.clone()
                };
                let found = journal.found().map(|found| found.target.clone());
                (found.unwrap_or_else(|| key.clone()), recover(&one, repo))
            }
            Err(error) => (key.clone(), Err(error)),
        };
        outcome.join(&shown, one);
    }
    if outcome.targets.is_empty() && outcome.errors.is_empty() && outcome.lines.is_empty() {
        outcome.line(format!(
            "no journal in {}: nothing was left behind by runs of this host",
            hoststate::root().display()
        ));
    }
    outcome
}

/// As what the VM of a journal is found again: a domain by its UUID, which is the key, whatever it is called by now.
fn target_of(journal: &Journal, key: &str) -> Result<Target> {
    let spelled = match journal.found() {
        Some(found) if found.connect.is_some() => key.to_owned(),
        Some(found) => found.target.clone(),
        None => format!("qmp:{}", journal.monitor().display()),
    };
    spelled.parse().map_err(|why: String| {
        Failure::plain(
            Kind::Attention,
            format!("the journal {}: {why}", journal.path().display()),
        )
    })
}

/// `recover`.
fn recover(args: &TargetArgs, repo: Option<&Path>) -> Result<Outcome> {
    let repository = repo
        .map(Closed::at)
        .transpose()?
        .map(|repo| repo.id().short());
    let mut outcome = Outcome::default();
    let mut removed = Vec::new();
    let mut unthawed: Vec<Address> = Vec::new();
    let target = args.named()?.to_string();
    match super::find(args, false) {
        Ok(vm) => {
            let mut hold = vm.hold(&RunName::new("00000000"), "forerun recover")?;
            removed.append(&mut hold.recovered);
            unthawed.append(&mut hold.unthawed);
            outcome.warnings.append(&mut hold.failed_hooks);
            let directory = vm.state.directory();
            if let Some(repository) = &repository {
                let left = orphans::of(&mut hold.monitor, directory, Some(repository))?;
                removed.extend(release::release(&mut hold.monitor, &left, THAW_FOR)?.removed);
            }
            let foreign = orphans::of(&mut hold.monitor, directory, None)?;
            if !foreign.is_empty() {
                outcome.warnings.push(format!(
                    "{} things whose names begin with `{PREFIX}` stay in the VM: no journal of this host lists them; name their repository with `--repo`",
                    foreign.len()
                ));
            }
        }
        Err(error) => match (args.named()?, kind_of(&error)) {
            // The VM is off: what its journals list on the file system is settled all the same.
            (Target::Qmp(socket), Some(Gone::Off)) => {
                let off = |_: &str, journal: &Journal| journal.monitor() == socket;
                removed = recover_off(off, &mut outcome.warnings)?;
            }
            (Target::Name(name), Some(Gone::NoDomain)) => {
                let keys = keys_of(name)?;
                let Some(key) = keys.first() else {
                    return Err(error);
                };
                let renamed = TargetArgs {
                    target: Some(Target::Name(key.clone())),
                    ..args.clone()
                };
                if key != name && super::find(&renamed, false).is_ok() {
                    return recover(&renamed, repo);
                }
                removed = recover_off(|of, _| of == key, &mut outcome.warnings)?;
            }
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
        outcome.line(format!("{target}: nothing was left behind"));
    }
    for what in &removed {
        outcome.line(format!("{target}: took back {what}"));
    }
    outcome
        .targets
        .push(json!({ "target": target, "removed": Value::from(removed) }));
    Ok(outcome)
}

/// What kind of absence an error tells of.
enum Gone {
    /// Nothing answers at a socket.
    Off,
    /// libvirt has no such domain.
    NoDomain,
}

fn kind_of(error: &anyhow::Error) -> Option<Gone> {
    error.chain().find_map(|cause| match cause.downcast_ref()? {
        qmp::Error::Unreachable { .. } => Some(Gone::Off),
        qmp::Error::NoDomain { .. } => Some(Gone::NoDomain),
        _ => None,
    })
}

/// The targets whose journals know a domain of this name or UUID.
fn keys_of(name: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for key in hoststate::keys() {
        let journals = match TargetState::open(&key)?.journals() {
            // Perhaps another VM's.
            Err(error) if key != name => {
                tracing::warn!("{error:#}");
                continue;
            }
            journals => journals?,
        };
        let called = |journal: &Journal| {
            journal.found().is_some_and(|found| {
                found.connect.is_some() && (found.target == name || key == name)
            })
        };
        if journals.iter().any(called) {
            found.push(key);
        }
    }
    Ok(found)
}

/// Settles the chosen journals of VMs that are off.
fn recover_off(
    chosen: impl Fn(&str, &Journal) -> bool,
    warnings: &mut Vec<String>,
) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    let (mut unread, mut found) = (None, false);
    for key in hoststate::keys() {
        let state = TargetState::open(&key)?;
        match state.journals() {
            Ok(journals) if journals.iter().any(|journal| chosen(&key, journal)) => found = true,
            Ok(_) => continue,
            // Perhaps another VM's.
            Err(error) => {
                unread.get_or_insert(error);
                continue;
            }
        }
        let _lock = state.lock_target("forerun recover", LOCK_WAIT)?;
        state.remove_unwritten()?;
        for mut journal in state.journals()? {
            if !chosen(&key, &journal) {
                continue;
            }
            // A socket that we may not open looks like a VM that is off, and so does a domain of another hypervisor.
            let process = journal.process();
            if socket::start_time(process.pid) == Some(process.start) {
                return Err(Failure::hinted(
                    Kind::Attention,
                    format!(
                        "the VM's QEMU (pid {}) runs, but its socket cannot be reached",
                        process.pid
                    ),
                    "run `recover` as a user who may open the QMP socket; name the hypervisor of a domain with `--connect URI`",
                ));
            }
            let taken = settle::take_back(&mut journal, None, None, THAW_FOR)?;
            removed.extend(taken.removed);
            warnings.extend(taken.failed_hooks);
        }
    }
    if let (Some(error), false) = (unread, found) {
        return Err(error.into());
    }
    Ok(removed)
}
