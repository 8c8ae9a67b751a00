//! `stats`.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::repository::name_of;
use super::{counted, secret};
use crate::cli::RepoArgs;
use crate::clock;
use crate::exit::Kind;
use crate::image::{Amount, Manifest, PointId, PointStats, Repository, Sizes, Stats};
use crate::report::Outcome;
use crate::units::Bytes;

/// What is shown of the points.
enum Shown {
    All,
    Target(String),
    Point(PointStats),
}

/// Counts everything, and shows all or a part of it.
pub(super) fn stats(args: &RepoArgs, of: Option<&str>) -> Result<Outcome> {
    let repo = secret::open(args)?;
    let manifests = repo.points()?.points;
    let names: BTreeMap<&str, &str> = manifests
        .iter()
        .map(|point| (point.target.key.as_str(), name_of(point)))
        .collect();
    // A wrong name is told before the work.
    let chosen = of.map(|name| choose(&repo, &manifests, name)).transpose()?;
    let stats = repo.stats()?;
    let shown = match chosen {
        None => Shown::All,
        Some((key, None)) => Shown::Target(key),
        Some((_, Some(id))) => match stats.points.iter().find(|point| point.id == id) {
            Some(point) => Shown::Point(point.clone()),
            None => anyhow::bail!("point {id} was forgotten meanwhile"),
        },
    };
    let mut outcome = Outcome::default();
    if let Shown::All = shown {
        whole(&stats, &mut outcome);
    }
    let of_target = |key: &str| match &shown {
        Shown::All => true,
        Shown::Target(target) => target == key,
        Shown::Point(_) => false,
    };
    for (key, amount) in stats.targets.iter().filter(|(key, _)| of_target(key)) {
        let name = names.get(key.as_str()).copied().unwrap_or(key);
        let points = stats.points.iter().filter(|point| point.target == *key);
        outcome.line(format!(
            "{name} ({key}), {}",
            counted(points.clone().count() as u64, "point")
        ));
        lines("  ", amount, &mut outcome);
        for point in points.clone() {
            outcome.line(format!(
                "  {}  {}  data {}, only here {}",
                point.id,
                clock::local(point.instant),
                Bytes(point.amount.data),
                Bytes(point.amount.only.stored)
            ));
        }
        let points: Vec<Value> = points.map(of_point).collect();
        outcome.targets.push(json!({
            "target": name, "key": key, "amount": amount_of(amount), "points": points,
        }));
    }
    if let Shown::Point(point) = &shown {
        outcome.line(format!("{}  {}", point.id, clock::local(point.instant)));
        lines("  ", &point.amount, &mut outcome);
        outcome.more.insert("point".to_owned(), of_point(point));
    }
    for error in &stats.damaged {
        let words = format!("not counted, it cannot be read: {error}");
        outcome.warnings.push(words);
        outcome.kind = Some(Kind::Corrupt);
    }
    if stats.missing > 0 {
        let missing = stats.missing;
        outcome.warnings.push(format!(
            "{missing} blocks are needed and in no index: run `forerun verify`"
        ));
        outcome.kind = Some(Kind::Corrupt);
    }
    Ok(outcome)
}

/// The key of the target of this name, or that and the id of the point.
fn choose(repo: &Repository, points: &[Manifest], name: &str) -> Result<(String, Option<PointId>)> {
    let of_target = points.iter().find(|point| point.target.is_called(name));
    if let Some(point) = of_target {
        return Ok((point.target.key.clone(), None));
    }
    let point = repo.resolve(name)?;
    Ok((point.target.key, Some(point.id)))
}

/// How often `a` has `b`, in hundredths; null when there is nothing.
fn times(a: u64, b: u64) -> Value {
    let hundredths = (u128::from(a) * 100).checked_div(u128::from(b));
    match hundredths.and_then(|ratio| u32::try_from(ratio).ok()) {
        Some(ratio) => json!(f64::from(ratio) / 100.0),
        None => Value::Null,
    }
}

fn whole(stats: &Stats, outcome: &mut Outcome) {
    let sum = |of: fn(&Amount) -> u64| stats.targets.values().map(of).sum::<u64>();
    let (logical, data) = (sum(|amount| amount.logical), sum(|amount| amount.data));
    let Sizes { plain, stored, .. } = stats.referred;
    outcome.line(format!(
        "{} of {}: {} on disks, {} without zeros",
        counted(stats.points.len() as u64, "point"),
        counted(stats.targets.len() as u64, "target"),
        Bytes(logical),
        Bytes(data)
    ));
    let (dedup, compression) = (times(data, plain), times(plain, stored));
    outcome.line(format!(
        "deduplicated to {} ({dedup} times), compressed to {} ({compression} times)",
        Bytes(plain),
        Bytes(stored)
    ));
    if stats.sessions_only.blocks > 0 {
        outcome.line(format!(
            "of that only for unfinished sessions: {}",
            Bytes(stats.sessions_only.stored)
        ));
    }
    let mut objects = Map::new();
    for (kind, found) in &stats.objects {
        outcome.line(format!("{kind:9}{} in {}", Bytes(found.bytes), found.count));
        let value = json!({ "count": found.count, "bytes": found.bytes });
        objects.insert((*kind).to_owned(), value);
    }
    outcome.more.insert(
        "stats".to_owned(),
        json!({
            "points": stats.points.len(), "logical": logical, "data": data,
            "referred": sizes(stats.referred), "sessions_only": sizes(stats.sessions_only),
            "dedup": dedup, "compression": compression, "objects": objects,
        }),
    );
}

fn lines(indent: &str, amount: &Amount, outcome: &mut Outcome) {
    outcome.line(format!(
        "{indent}{} on disks, {} without zeros",
        Bytes(amount.logical),
        Bytes(amount.data)
    ));
    outcome.line(format!(
        "{indent}refers to {}, stored in {}; only here: {}, stored in {}",
        Bytes(amount.refers.plain),
        Bytes(amount.refers.stored),
        Bytes(amount.only.plain),
        Bytes(amount.only.stored)
    ));
}

fn sizes(sizes: Sizes) -> Value {
    json!({ "blocks": sizes.blocks, "plain": sizes.plain, "stored": sizes.stored })
}

fn amount_of(amount: &Amount) -> Value {
    json!({
        "logical": amount.logical, "data": amount.data,
        "refers": sizes(amount.refers), "only": sizes(amount.only),
    })
}

fn of_point(point: &PointStats) -> Value {
    json!({ "point": point.id, "instant": point.instant, "amount": amount_of(&point.amount) })
}
