//! `verify` and `check`.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

use super::secret;
use crate::cli::RepoArgs;
use crate::clock;
use crate::exit::Kind;
use crate::image::{Damage, NOT_INDEXED, PackReport, PointId, Repository, VerifyOptions};
use crate::report::Outcome;
use crate::throttle::Throttle;
use crate::units::Bytes;

/// How much to verify, and how fast.
pub(super) struct Limits {
    pub(super) max_duration: Option<Duration>,
    pub(super) share: Option<f64>,
    pub(super) older_than: Option<Duration>,
    pub(super) rate: Option<u64>,
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn chosen(repo: &Repository, points: &[String]) -> Result<Option<Vec<PointId>>> {
    let chosen: Vec<PointId> = points
        .iter()
        .map(|point| Ok(repo.resolve(point)?.id))
        .collect::<Result<_>>()?;
    Ok((!chosen.is_empty()).then_some(chosen))
}

/// `verify`.
pub(super) fn verify(args: &RepoArgs, points: &[String], limits: &Limits) -> Result<Outcome> {
    let repo = secret::open(args)?;
    let throttle = limits.rate.map(|rate| Throttle::new(Some(rate)));
    let report = repo.verify(&VerifyOptions {
        points: chosen(&repo, points)?,
        threads: threads(),
        max_duration: limits.max_duration,
        share: limits.share,
        older_than: limits.older_than,
        pace: throttle.map(|throttle| {
            let pace = move |bytes| {
                throttle.wait(bytes, &|| true);
            };
            Arc::new(pace) as _
        }),
        save_every: None,
    })?;
    let mut outcome = Outcome::default();
    let extent = if report.complete {
        "everything"
    } else {
        "a part"
    };
    outcome.line(format!(
        "checked {extent}: {} points, {} blocks, {}",
        report.points,
        report.checked_blocks,
        Bytes(report.checked_bytes)
    ));
    if let Some(packs) = &report.packs {
        outcome.line(round(packs));
    }
    if report.healed > 0 {
        outcome.line(format!(
            "healed: {} blocks are bad where they were stored first, and were stored anew since",
            report.healed
        ));
    }
    if report.sound_again > 0 {
        outcome.line(format!(
            "sound again: {} blocks had been bad and can be read now",
            report.sound_again
        ));
    }
    let damage = tell(&mut outcome, &report.damage);
    outcome.warnings.extend(report.notes);
    outcome.more.insert(
        "verify".to_owned(),
        json!({
            "points": report.points, "blocks": report.checked_blocks, "bytes": report.checked_bytes,
            "complete": report.complete, "damage": damage, "healed": report.healed,
            "sound_again": report.sound_again,
            "packs": report.packs.map(|packs| json!({
                "checked": packs.checked, "checked_bytes": packs.checked_bytes, "all": packs.all,
                "all_bytes": packs.all_bytes, "never": packs.never, "oldest": packs.oldest,
            })),
        }),
    );
    Ok(outcome)
}

/// How far the round through all packs is.
fn round(packs: &PackReport) -> String {
    let rest = match (packs.never, packs.oldest) {
        (0, None) => String::new(),
        (0, Some(oldest)) => format!(", all have been since {oldest}"),
        (never, _) => format!(", {never} were never checked"),
    };
    format!(
        "packs: {} of {} ({} of {}){rest}",
        packs.checked,
        packs.all,
        Bytes(packs.checked_bytes),
        Bytes(packs.all_bytes)
    )
}

/// `check`.
pub(super) fn check(args: &RepoArgs, points: &[String]) -> Result<Outcome> {
    let begin = clock::now();
    let repo = secret::open(args)?;
    let report = repo.check(chosen(&repo, points)?.as_deref(), threads())?;
    let took_ms = u64::try_from((clock::now() - begin).as_millis()).unwrap_or(u64::MAX);
    let mut outcome = Outcome::default();
    outcome.line(format!(
        "checked the structure of {} points, {} layers, {} sessions, {} packs; {} blocks, {} index entries; in {}.{:03} s",
        report.points,
        report.layers,
        report.sessions,
        report.packs,
        report.blocks,
        report.entries,
        took_ms / 1000,
        took_ms % 1000
    ));
    let damage = tell(&mut outcome, &report.damage);
    outcome.warnings.extend(report.notes);
    outcome.more.insert(
        "check".to_owned(),
        json!({
            "points": report.points, "layers": report.layers, "sessions": report.sessions,
            "packs": report.packs, "blocks": report.blocks, "entries": report.entries,
            "took_ms": took_ms, "damage": damage,
        }),
    );
    Ok(outcome)
}

/// Tells of damage; any makes the exit code that of damage.
fn tell(outcome: &mut Outcome, found: &[Damage]) -> Vec<Value> {
    let mut damage = Vec::new();
    for found in found {
        outcome.line(format!("DAMAGED {}: {}", found.object, found.what));
        for (point, disk) in &found.hurts {
            let disk = disk
                .as_deref()
                .map(|disk| format!(", disk {disk}"))
                .unwrap_or_default();
            outcome.line(format!("  hurts point {point}{disk}"));
        }
        let hurts: Vec<Value> = found
            .hurts
            .iter()
            .map(|(point, disk)| json!({ "point": point, "disk": disk }))
            .collect();
        damage.push(json!({ "object": found.object, "what": found.what, "hurts": hurts }));
    }
    if found.iter().any(|found| found.what.contains(NOT_INDEXED)) {
        outcome.line("`forerun repair index` finds blocks that only the index has lost".to_owned());
    }
    if !found.is_empty() {
        outcome.kind = Some(Kind::Corrupt);
    }
    damage
}
