//! `forget`, `pin` and `unpin`.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use jiff::tz::TimeZone;
use serde_json::{Value, json};

use super::repository::name_of;
use super::{counted, secret};
use crate::cli::{ForgetArgs, KeepArgs, RepoArgs};
use crate::clock;
use crate::exit::{Failure, Kind};
use crate::image::{Error, ForgetPlan, Manifest, PointId, Policy, Repository, Selection};
use crate::report::Outcome;

/// `forget`.
pub(super) fn forget(repo: &RepoArgs, args: &ForgetArgs) -> Result<Outcome> {
    let repo = secret::open(repo)?;
    let selection = if args.point.is_empty() {
        by_policy(&repo, args)?
    } else {
        let ids = args.point.iter().map(|point| point_id(&repo, point));
        Selection::Points {
            points: ids.collect::<Result<_>>()?,
            allow_last: args.allow_last,
        }
    };
    let plan = if args.dry_run {
        repo.plan_forget(&selection)?
    } else {
        repo.forget(&selection)?
    };
    Ok(report(plan, args.dry_run))
}

/// The point that is named; a damaged one has no name but its full id.
fn point_id(repo: &Repository, text: &str) -> Result<PointId> {
    match text.parse() {
        Ok(id) => Ok(id),
        Err(_) => Ok(repo.resolve(text)?.id),
    }
}

fn by_policy(repo: &Repository, args: &ForgetArgs) -> Result<Selection> {
    let policy = policy(&args.keep);
    if policy.is_empty() {
        return Err(Failure::hinted(
            Kind::Usage,
            "nothing says what to keep, and everything is not forgotten by leaving it out",
            "give a rule such as `--keep-daily 14`, or name points with `--point`",
        ));
    }
    if args.targets.is_empty() && !args.all_targets {
        return Err(Failure::hinted(
            Kind::Usage,
            "nothing says whose points to forget",
            "name targets, or give `--all-targets`",
        ));
    }
    let zone = match &args.tz {
        None => clock::local_now().time_zone().clone(),
        Some(name) => TimeZone::get(name).map_err(|error| {
            Failure::hinted(
                Kind::Usage,
                format!("`{name}` is no time zone: {error}"),
                "write a name such as UTC or Europe/Berlin",
            )
        })?,
    };
    let targets = if args.all_targets {
        None
    } else {
        Some(keys(repo, &args.targets)?)
    };
    Ok(Selection::Policy {
        policy,
        zone,
        targets,
    })
}

fn policy(keep: &KeepArgs) -> Policy {
    Policy {
        last: keep.keep_last.unwrap_or(0),
        hourly: keep.keep_hourly.unwrap_or(0),
        daily: keep.keep_daily.unwrap_or(0),
        weekly: keep.keep_weekly.unwrap_or(0),
        monthly: keep.keep_monthly.unwrap_or(0),
        yearly: keep.keep_yearly.unwrap_or(0),
        within: keep.keep_within,
    }
}

/// No point is of a target of this name; the hint tells the names that there are.
pub(super) fn no_target(points: &[Manifest], name: &str) -> anyhow::Error {
    let known: BTreeMap<&str, &str> = points
        .iter()
        .map(|point| (point.target.key.as_str(), name_of(point)))
        .collect();
    let known: Vec<String> = known
        .into_iter()
        .map(|(key, name)| format!("{name} ({key})"))
        .collect();
    let hint = match known.as_slice() {
        [] => "the repository has no points".to_owned(),
        known => format!("targets: {}", known.join(", ")),
    };
    let message = format!("no point that can be read is of a target `{name}`");
    Failure::hinted(Kind::Failed, message, hint)
}

/// The keys of the targets of these names, each of which is that of one target.
pub(super) fn keys(repo: &Repository, names: &[String]) -> Result<BTreeSet<String>> {
    let points = repo.points()?.points;
    let mut all = BTreeSet::new();
    for name in names {
        let called = points.iter().filter(|point| point.target.is_called(name));
        let found: BTreeSet<&str> = called.map(|point| point.target.key.as_str()).collect();
        let list = |keys: &BTreeSet<&str>| keys.iter().copied().collect::<Vec<_>>().join(", ");
        match found.len() {
            0 => return Err(no_target(&points, name)),
            1 => all.extend(found.into_iter().map(str::to_owned)),
            _ => {
                return Err(Failure::hinted(
                    Kind::Failed,
                    format!("`{name}` is the name of {} targets", found.len()),
                    format!("name one by its key: {}", list(&found)),
                ));
            }
        }
    }
    Ok(all)
}

fn report(plan: ForgetPlan, dry_run: bool) -> Outcome {
    let mut outcome = Outcome::default();
    let gone = if dry_run { "would forget" } else { "forgot" };
    let mut count = plan.damaged.len();
    for target in &plan.targets {
        let any = target.kept.first().map(|(point, _)| point);
        let any = any.or(target.forgotten.first());
        let name = any.map_or(target.key.as_str(), name_of);
        outcome.line(format!("{name} ({})", target.key));
        let mut lines = Vec::new();
        for (point, reasons) in &target.kept {
            let reasons: Vec<String> = reasons.iter().map(ToString::to_string).collect();
            lines.push((point, format!("keep    {}", reasons.join(", "))));
        }
        for point in &target.forgotten {
            lines.push((point, "forget".to_owned()));
        }
        lines.sort_by_key(|(point, _)| (point.instant, point.id));
        for (point, what) in lines {
            let line = format!("  {}  {}  {what}", point.id, clock::local(point.instant));
            outcome.line(line.trim_end());
        }
        count += target.forgotten.len();
        let brief = |point: &Manifest| json!({ "point": point.id, "instant": point.instant });
        let kept: Vec<Value> = target
            .kept
            .iter()
            .map(|(point, reasons)| {
                json!({ "point": point.id, "instant": point.instant, "reasons": reasons })
            })
            .collect();
        outcome.targets.push(json!({
            "target": name, "key": target.key, "kept": kept,
            "forgotten": target.forgotten.iter().map(brief).collect::<Vec<_>>(),
        }));
    }
    for point in &plan.damaged {
        outcome.line(format!("{point}  damaged  forget"));
    }
    let points = counted(count as u64, "point");
    outcome.line(format!(
        "{gone} {points}; their space comes back with `forerun prune`"
    ));
    outcome.warnings = plan.warnings;
    outcome.more.insert(
        "forget".to_owned(),
        json!({ "dry_run": dry_run, "damaged": plan.damaged, "stray_pins": plan.stray_pins }),
    );
    outcome
}

/// `pin`.
pub(super) fn pin(repo: &RepoArgs, point: &str, reason: Option<String>) -> Result<Outcome> {
    let repo = secret::open(repo)?;
    let point = repo.resolve(point)?;
    let pin = match repo.pin(point.id, reason) {
        Err(Error::Exists { .. }) => {
            let why = repo.pins()?.reason(point.id).map(str::to_owned);
            let why = why.map_or(String::new(), |why| format!(": {why}"));
            return Err(Failure::hinted(
                Kind::Failed,
                format!("point {} is pinned already{why}", point.id),
                format!("to change the reason, `forerun unpin {}` first", point.id),
            ));
        }
        other => other?,
    };
    let mut outcome = Outcome::default();
    outcome.line(format!(
        "pinned {} of {} of {}",
        point.id,
        clock::local(point.instant),
        name_of(&point)
    ));
    outcome.more.insert("point".to_owned(), json!(point.id));
    outcome.more.insert(
        "pinned".to_owned(),
        json!({ "reason": pin.reason, "since": pin.since }),
    );
    Ok(outcome)
}

/// `unpin`.
pub(super) fn unpin(repo: &RepoArgs, point: &str) -> Result<Outcome> {
    let repo = secret::open(repo)?;
    let id = point_id(&repo, point)?;
    let mut outcome = Outcome::default();
    if repo.unpin(id)? {
        outcome.line(format!("unpinned {id}"));
    } else {
        outcome.warnings.push(format!("point {id} was not pinned"));
    }
    outcome.more.insert("point".to_owned(), json!(id));
    Ok(outcome)
}
