//! `track`, `changed`, `precopy`, `backup` and `run`.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Result;
use clap::ValueEnum as _;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::secret;
use crate::backup::{Options, Point, Quiesce, Runner};
use crate::cli::{FreezeArgs, FreezeMethod, PaceArgs, RepoTargetArgs};
use crate::clock;
use crate::exit::Kind;
use crate::hooks::{Hooks, When};
use crate::image::{self, Repository};
use crate::load::config::Config;
use crate::plan::Limits;
use crate::progress::Progress;
use crate::qmp::freeze::Method;
use crate::report::{self, Bar, Outcome, Style};
use crate::schedule::{self, Due};
use crate::units::Bytes;
use crate::vm::Vm;

/// What ends a `precopy`.
pub(super) struct Ends {
    pub(super) once: bool,
    pub(super) until: Option<String>,
    pub(super) converge: Option<u64>,
    pub(super) audit: f64,
}

/// What a run has before it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Plan {
    pub(super) limits: Limits,
    pub(super) hard: bool,
    pub(super) audit: f64,
}

/// How a backup is made.
#[derive(Clone, Copy)]
pub(super) struct How<'a> {
    pub(super) pace: &'a PaceArgs,
    pub(super) freeze: &'a FreezeArgs,
    pub(super) plan: Plan,
    pub(super) style: Style,
    pub(super) interrupted: &'a Arc<AtomicBool>,
}

fn options(
    pace: Option<&PaceArgs>,
    freeze: Option<&FreezeArgs>,
    plan: Plan,
    doing: &str,
    told: Vec<(String, String)>,
) -> Options {
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
        hooks: freeze.map_or_else(Hooks::default, |freeze| freeze.hooks.hooks(told)),
        agent: freeze.and_then(|freeze| freeze.agent.clone()),
        scratch: freeze.and_then(|freeze| freeze.scratch.clone()),
        scratch_reserve: freeze.and_then(|freeze| freeze.scratch_reserve),
        deadline: freeze.map_or(Duration::from_secs(10), |freeze| freeze.deadline),
        commit_deadline: freeze.map_or(Duration::ZERO, |freeze| freeze.commit_deadline),
        doing: format!("forerun {doing}"),
        limits: plan.limits,
        hard: plan.hard,
        urgent: Arc::default(),
        audit: Some(plan.audit).filter(|share| *share > 0.0),
        host: pace.map(|pace| pace.host.limits()),
    }
}

/// A run that has begun on a target.
pub(super) struct Begun {
    pub(super) runner: Runner,
    pub(super) target: String,
    pub(super) key: String,
    progress: Arc<Progress>,
    hooks: Hooks,
}

/// What the hooks of a run are told of it.
fn told(args: &RepoTargetArgs, vm: &Vm, freeze: Option<&FreezeArgs>) -> Vec<(String, String)> {
    let repo = std::path::absolute(&args.repo.repo);
    let repo = repo.unwrap_or_else(|_| args.repo.repo.clone());
    let quiesce = freeze.and_then(|freeze| freeze.quiesce.to_possible_value());
    let quiesce = quiesce.map_or_else(String::new, |value| value.get_name().to_owned());
    [
        ("TARGET", vm.target.to_string()),
        ("KEY", vm.key.clone()),
        ("REPO", repo.display().to_string()),
        ("QUIESCE", quiesce),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec()
}

/// Begins a run on a target.
pub(super) fn begin(
    args: &RepoTargetArgs,
    pace: Option<&PaceArgs>,
    freeze: Option<&FreezeArgs>,
    plan: Plan,
    doing: &str,
    interrupted: Arc<AtomicBool>,
) -> Result<Begun> {
    let repo = secret::open(&args.repo)?;
    begin_in(repo, args, pace, freeze, plan, doing, interrupted)
}

/// As [`begin`], in a repository that is open.
fn begin_in(
    mut repo: Repository,
    args: &RepoTargetArgs,
    pace: Option<&PaceArgs>,
    freeze: Option<&FreezeArgs>,
    plan: Plan,
    doing: &str,
    interrupted: Arc<AtomicBool>,
) -> Result<Begun> {
    if let Some(compression) = pace.and_then(|pace| pace.compression) {
        repo = repo.with_compression(compression);
    }
    let vm = super::find(&args.target, repo.is_encrypted())?;
    let progress = Arc::new(Progress::default());
    let (target, key) = (vm.target.to_string(), vm.key.clone());
    let options = Options {
        repository: Some(args.repo.repo.clone()),
        ..options(pace, freeze, plan, doing, told(args, &vm, freeze))
    };
    let hooks = options.hooks.clone();
    let runner = Runner::begin(vm, repo, options, Arc::clone(&progress), interrupted)?;
    Ok(Begun {
        runner,
        target,
        key,
        progress,
        hooks,
    })
}

/// `track`.
pub(super) fn track(args: &RepoTargetArgs, interrupted: Arc<AtomicBool>) -> Result<Outcome> {
    let mut begun = begin(args, None, None, Plan::default(), "track", interrupted)?;
    let started = begun.runner.track()?;
    let mut outcome = Outcome::default();
    let state = if started {
        "following changes from now on"
    } else {
        "changes are followed already"
    };
    outcome.line(format!("{}: {state}", begun.target));
    let notes = std::mem::take(&mut begun.runner.warnings);
    for note in &notes {
        outcome.line(format!("  {note}"));
    }
    outcome.targets.push(json!({
        "target": begun.target, "key": begun.key, "started": started, "notes": notes,
    }));
    Ok(outcome)
}

/// `changed`.
pub(super) fn changed(args: &RepoTargetArgs, interrupted: Arc<AtomicBool>) -> Result<Outcome> {
    let mut begun = begin(args, None, None, Plan::default(), "changed", interrupted)?;
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
            "{}: {} in {}{why}",
            disk.disk,
            Bytes(bytes),
            super::counted(disk.extents.len(), "extent")
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
    ends: &Ends,
    style: Style,
    interrupted: Arc<AtomicBool>,
) -> Result<Outcome> {
    let until = ends.until.as_deref().map(schedule::parse).transpose()?;
    let plan = Plan {
        audit: ends.audit,
        ..Plan::default()
    };
    let mut begun = begin(args, Some(pace), None, plan, "precopy", interrupted)?;
    let bar = Bar::show(Arc::clone(&begun.progress), style);
    begun.progress.begin("copy ahead", 0);
    let until = until.map(super::super::schedule::Due::deadline);
    let left = begun.runner.precopy(ends.once, until, ends.converge);
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
pub(super) fn backup(args: &RepoTargetArgs, how: &How) -> Result<Outcome> {
    let due = clock::utc_now();
    let mut begun = begin_backup(args, how, "backup")?;
    let bar = Bar::show(Arc::clone(&begun.progress), how.style);
    let point = begun.runner.backup(due);
    drop(bar);
    Ok(ended(begun, point, None))
}

/// Begins a run that ends with a backup.
fn begin_backup(args: &RepoTargetArgs, how: &How, doing: &str) -> Result<Begun> {
    begin_backup_in(secret::open(&args.repo)?, args, how, doing)
}

/// As [`begin_backup`], in a repository that is open.
pub(super) fn begin_backup_in(
    repo: Repository,
    args: &RepoTargetArgs,
    how: &How,
    doing: &str,
) -> Result<Begun> {
    let interrupted = Arc::clone(how.interrupted);
    let (pace, freeze) = (Some(how.pace), Some(how.freeze));
    begin_in(repo, args, pace, freeze, how.plan, doing, interrupted)
}

/// `run`.
pub(super) fn run(args: &RepoTargetArgs, how: &How, at: Due) -> Result<Outcome> {
    let mut begun = begin_backup(args, how, "run")?;
    report::meanwhile(how.style, &at.to_string());
    let bar = Bar::show(Arc::clone(&begun.progress), how.style);
    let point = ahead_and_backup(&mut begun, Some(at));
    drop(bar);
    Ok(ended(begun, point, at.late.then_some(at.due)))
}

/// Copies ahead until the backup is due, if it is not due now, and makes it.
pub(super) fn ahead_and_backup(begun: &mut Begun, at: Option<Due>) -> Result<Point> {
    let Some(at) = at else {
        return begun.runner.backup(clock::utc_now());
    };
    let deadline = at.deadline();
    if !deadline.passed() {
        begun.progress.begin("copy ahead", 0);
        begun.runner.note_due(at.due);
        begun.runner.precopy_before(deadline)?;
    }
    begun.runner.backup(at.due)
}

/// The end of a backup, and the hook that comes after it.
pub(super) fn ended(begun: Begun, point: Result<Point>, late: Option<Timestamp>) -> Outcome {
    let hook = begun.hooks.of(When::PostBackup);
    let mut more = Vec::new();
    let mut outcome = match point {
        Ok(point) => {
            let level = point.quiesce.name().to_owned();
            more.extend([("POINT", point.id.to_string()), ("CONSISTENCY", level)]);
            finished(begun, &point, late)
        }
        Err(error) => failed(begun, error),
    };
    if let Some(mut hook) = hook {
        let (status, code) = match outcome.ends_as() {
            Some(kind) => (kind.name(), kind.code()),
            None => ("done", 0),
        };
        more.extend([("STATUS", status.to_owned()), ("EXIT", code.to_string())]);
        for (name, value) in more {
            hook = hook.tell(name, value);
        }
        if let Err(error) = hook.run(&|| false) {
            outcome.warnings.push(error.to_string());
        }
    }
    outcome
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
        begun.target,
        point.id,
        clock::local(point.instant)
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
    if let Some(predicted) = point.residual.predicted {
        outcome.line(format!(
            "  expected: residual {}, window {:.1} s",
            Bytes(predicted),
            seconds(point.window.predicted_ms.unwrap_or(0))
        ));
    }
    outcome.line(format!("  {}", consistency(point)));
    if let Some(together) = &point.together {
        outcome.line(format!(
            "  together with {} within {} ms{}",
            super::counted(together.targets.len().saturating_sub(1), "other"),
            together.spread_ms,
            if together.one_instant {
                ": one instant"
            } else {
                ", not all of them quiesced"
            }
        ));
    }
    if !point.files.is_empty() {
        let names = point.files.iter().map(|file| file.name.as_str());
        let names: Vec<&str> = names.collect();
        outcome.line(format!("  of the domain: {}", names.join(", ")));
    }
    for disk in &point.rescanned {
        outcome.line(format!("  {} was read in full: {}", disk.disk, disk.reason));
    }
    if let Some(missed) = &point.missed {
        outcome.kind = Some(Kind::Missed);
        outcome.line(format!("  MISSED: {missed}"));
    }
    let point_json = serde_json::to_value(point).unwrap_or(Value::Null);
    outcome.targets.push(json!({
        "target": begun.target, "key": begun.key, "point": point_json, "late": late.is_some(),
        "load": begun.runner.load_report(),
    }));
    outcome.warnings.append(&mut begun.runner.warnings);
    if let Some(due) = late {
        outcome.warnings.push(format!(
            "the backup was due at {} and began late",
            clock::local(due)
        ));
    }
    outcome
}

/// What the guest knew of the instant, in words.
fn consistency(point: &Point) -> String {
    match (point.quiesce, point.file_systems, &point.not_quiesced) {
        (image::Quiesce::Quiesced, Some(count), _) => {
            format!("quiesced: {}", super::counted(count, "file system"))
        }
        (level, _, Some(why)) => format!("{}: {why}", level.name()),
        (level, ..) => level.name().to_owned(),
    }
}

#[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
fn seconds(millis: u64) -> f64 {
    millis as f64 / 1000.0
}
