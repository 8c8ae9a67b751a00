//! `track`, `changed`, `precopy`, `backup` and `run`.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Result;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::secret;
use crate::backup::{Options, Point, Quiesce, Runner};
use crate::cli::{FreezeArgs, FreezeMethod, PaceArgs, RepoTargetArgs, TargetArgs};
use crate::clock;
use crate::exit::{Kind, classify};
use crate::load::config::Config;
use crate::progress::Progress;
use crate::qmp::freeze::Method;
use crate::report::{Bar, Outcome, Style};
use crate::schedule::{self, Due};
use crate::units::Bytes;

/// What ends a `precopy`.
pub(super) struct Limits {
    pub(super) once: bool,
    pub(super) until: Option<String>,
    pub(super) converge: Option<u64>,
}

fn options(pace: Option<&PaceArgs>, freeze: Option<&FreezeArgs>, doing: &str) -> Options {
    let named = freeze.and_then(|freeze| freeze.method);
    Options {
        load: pace.map_or_else(Config::default, |pace| pace.load.config(Some(pace))),
        repository: None,
        method: match named {
            Some(FreezeMethod::Snapshot) => Method::Snapshot,
            _ => Method::Fleece,
        },
        method_named: named.is_some(),
        quiesce: freeze.map_or(Quiesce::Never, |freeze| freeze.quiesce),
        freeze_timeout: freeze.map_or(Duration::ZERO, |freeze| freeze.freeze_timeout),
        agent: freeze.and_then(|freeze| freeze.agent.clone()),
        scratch: freeze.and_then(|freeze| freeze.scratch.clone()),
        scratch_reserve: freeze.and_then(|freeze| freeze.scratch_reserve),
        deadline: freeze.map_or(Duration::from_secs(10), |freeze| freeze.deadline),
        commit_deadline: freeze.map_or(Duration::ZERO, |freeze| freeze.commit_deadline),
        doing: format!("forerun {doing}"),
    }
}

struct Begun {
    runner: Runner,
    target: String,
    key: String,
    progress: Arc<Progress>,
}

fn begin(
    args: &RepoTargetArgs,
    pace: Option<&PaceArgs>,
    freeze: Option<&FreezeArgs>,
    doing: &str,
    interrupted: Arc<AtomicBool>,
) -> Result<Begun> {
    let mut repo = secret::open(&args.repo)?;
    if let Some(compression) = pace.and_then(|pace| pace.compression) {
        repo = repo.with_compression(compression);
    }
    let vm = super::find(&args.target, repo.is_encrypted())?;
    let progress = Arc::new(Progress::default());
    let (target, key) = (vm.target.to_string(), vm.key.clone());
    let options = Options {
        repository: Some(args.repo.repo.clone()),
        ..options(pace, freeze, doing)
    };
    let runner = Runner::begin(vm, repo, options, Arc::clone(&progress), interrupted)?;
    Ok(Begun {
        runner,
        target,
        key,
        progress,
    })
}

/// `track`.
pub(super) fn track(args: &RepoTargetArgs, interrupted: Arc<AtomicBool>) -> Result<Outcome> {
    let mut begun = begin(args, None, None, "track", interrupted)?;
    let started = begun.runner.track()?;
    let mut outcome = Outcome::default();
    let state = if started {
        "following changes from now on"
    } else {
        "changes are followed already"
    };
    outcome.line(format!("{}: {state}", begun.target));
    for note in std::mem::take(&mut begun.runner.warnings) {
        outcome.line(format!("  {note}"));
    }
    outcome
        .targets
        .push(json!({ "target": begun.target, "key": begun.key, "started": started }));
    Ok(outcome)
}

/// `changed`.
pub(super) fn changed(args: &RepoTargetArgs, interrupted: Arc<AtomicBool>) -> Result<Outcome> {
    let mut begun = begin(args, None, None, "changed", interrupted)?;
    let changed = begun.runner.changed()?;
    let mut outcome = Outcome::default();
    for disk in &changed {
        let bytes: u64 = disk.extents.iter().map(|extent| extent.length).sum();
        let why = disk
            .whole
            .as_ref()
            .map(|why| format!(" (all of it: {why})"))
            .unwrap_or_default();
        outcome.line(format!(
            "{}: {} in {} extents{why}",
            disk.disk,
            Bytes(bytes),
            disk.extents.len()
        ));
    }
    outcome
        .targets
        .push(json!({ "target": begun.target, "key": begun.key, "disks": changed }));
    outcome.warnings.append(&mut begun.runner.warnings);
    Ok(outcome)
}

/// `precopy`.
pub(super) fn precopy(
    args: &RepoTargetArgs,
    pace: &PaceArgs,
    limits: &Limits,
    style: Style,
    interrupted: Arc<AtomicBool>,
) -> Result<Outcome> {
    let until = limits.until.as_deref().map(schedule::parse).transpose()?;
    let mut begun = begin(args, Some(pace), None, "precopy", interrupted)?;
    let bar = Bar::show(Arc::clone(&begun.progress), style);
    begun.progress.begin("copy ahead", 0);
    let until = until.map(super::super::schedule::Due::deadline);
    let left = begun.runner.precopy(limits.once, until, limits.converge);
    drop(bar);
    let (left, reached) = match left {
        Ok(left) => left,
        Err(error) => return Ok(failed(begun, error)),
    };
    let mut outcome = Outcome::default();
    let bytes = begun.runner.bytes;
    let rescanned = begun.runner.rescans();
    outcome.line(format!(
        "{}: copied {} ahead ({} for nothing), about {} left",
        begun.target,
        Bytes(bytes.precopied),
        Bytes(bytes.superseded),
        Bytes(left)
    ));
    for disk in &rescanned {
        outcome.line(format!("  {} is read in full: {}", disk.disk, disk.reason));
    }
    outcome.targets.push(json!({
        "target": begun.target, "key": begun.key, "bytes": bytes, "residual": left,
        "rescanned": rescanned, "load": begun.runner.load_report(),
    }));
    outcome.warnings.append(&mut begun.runner.warnings);
    if !reached {
        outcome.kind = Some(Kind::Missed);
        outcome
            .warnings
            .push("more is left than `--converge` asks for".to_owned());
    }
    Ok(outcome)
}

/// `backup`.
pub(super) fn backup(
    args: &RepoTargetArgs,
    pace: &PaceArgs,
    freeze: &FreezeArgs,
    style: Style,
    interrupted: Arc<AtomicBool>,
) -> Result<Outcome> {
    let due = clock::utc_now();
    let mut begun = begin(args, Some(pace), Some(freeze), "backup", interrupted)?;
    let bar = Bar::show(Arc::clone(&begun.progress), style);
    let point = begun.runner.backup(due);
    drop(bar);
    Ok(match point {
        Ok(point) => finished(begun, &point, None),
        Err(error) => failed(begun, error),
    })
}

/// The time of one of several targets, before the next one gets its turn.
const TURN: Duration = Duration::from_secs(60);

/// The first half of `run` on several targets: each in turn copies ahead, until the backup is due. What fails now is told by
/// the backup that follows.
pub(super) fn copy_ahead_in_turns(
    args: &RepoTargetArgs,
    targets: &[TargetArgs],
    pace: &PaceArgs,
    freeze: &FreezeArgs,
    at: Due,
    interrupted: &Arc<AtomicBool>,
) -> Result<()> {
    let deadline = at.deadline();
    while !deadline.passed() {
        for target in targets {
            let shown = target.named()?;
            let single = RepoTargetArgs {
                target: target.clone(),
                repo: args.repo.clone(),
            };
            let turn = begin(
                &single,
                Some(pace),
                Some(freeze),
                "run",
                Arc::clone(interrupted),
            )
            .and_then(|mut begun| {
                let until = deadline.at_most(TURN);
                begun.runner.precopy(false, Some(until), None).map(drop)
            });
            match turn {
                Err(error) if classify(&error).0 == Kind::Interrupted => return Err(error),
                Err(error) => {
                    tracing::warn!("{shown}: {error:#}");
                    clock::sleep(Duration::from_secs(1).min(deadline.left()));
                }
                Ok(()) => {}
            }
        }
    }
    Ok(())
}

/// `run`.
pub(super) fn run(
    args: &RepoTargetArgs,
    pace: &PaceArgs,
    freeze: &FreezeArgs,
    at: Due,
    style: Style,
    interrupted: Arc<AtomicBool>,
) -> Result<Outcome> {
    let mut begun = begin(args, Some(pace), Some(freeze), "run", interrupted)?;
    let bar = Bar::show(Arc::clone(&begun.progress), style);
    let deadline = at.deadline();
    if !deadline.passed() {
        begun.progress.begin("copy ahead", 0);
        if let Err(error) = begun.runner.precopy(false, Some(deadline), None) {
            return Ok(failed(begun, error));
        }
    }
    let point = begun.runner.backup(at.due);
    drop(bar);
    let late = at.late.then_some(at.due);
    Ok(match point {
        Ok(point) => finished(begun, &point, late),
        Err(error) => failed(begun, error),
    })
}

/// A run that failed: what happened on the way is told all the same.
fn failed(mut begun: Begun, error: anyhow::Error) -> Outcome {
    Outcome {
        warnings: std::mem::take(&mut begun.runner.warnings),
        errors: vec![error],
        ..Outcome::default()
    }
}

fn finished(mut begun: Begun, point: &Point, late: Option<Timestamp>) -> Outcome {
    let mut outcome = Outcome::default();
    let bytes = point.bytes;
    outcome.line(format!(
        "{}: point {} of {}",
        begun.target, point.id, point.instant
    ));
    outcome.line(format!(
        "  precopied {}, superseded {}, residual {}, stored {}",
        Bytes(bytes.precopied),
        Bytes(bytes.superseded),
        Bytes(bytes.residual),
        Bytes(bytes.stored)
    ));
    outcome.line(format!(
        "  freeze {} ms, guest released after {} ms, window {:.1} s",
        point.freeze_ms,
        point.released_ms,
        seconds(point.window_ms)
    ));
    for disk in &point.rescanned {
        outcome.line(format!("  {} was read in full: {}", disk.disk, disk.reason));
    }
    let point_json = serde_json::to_value(point).unwrap_or(Value::Null);
    outcome.targets.push(json!({
        "target": begun.target, "key": begun.key, "point": point_json, "late": late.is_some(),
        "load": begun.runner.load_report(),
    }));
    outcome.warnings.append(&mut begun.runner.warnings);
    if let Some(due) = late {
        outcome
            .warnings
            .push(format!("the backup was due at {due} and began late"));
    }
    outcome
}

#[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
fn seconds(millis: u64) -> f64 {
    millis as f64 / 1000.0
}
