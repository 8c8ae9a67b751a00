//! `verify` and `check`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

use super::secret;
use crate::cli::RepoArgs;
use crate::clock;
use crate::exit::Kind;
use crate::image::{
    self, Damage, NOT_INDEXED, Need, PackReport, PointId, Repository, VerifyOptions,
};
use crate::progress::Progress;
use crate::report::{Bar, Outcome, Style};
use crate::throttle::Throttle;
use crate::units::Bytes;

/// Damaged objects of a kind that are told one by one.
const DETAILS: usize = 20;
/// Points that are told of each.
const HURTS: usize = 5;
/// Characters of what is said of each.
const WORDS: usize = 400;
/// Entries of a list in JSON.
const LISTED: usize = 1000;

/// How much to verify, and how fast.
pub(super) struct Limits {
    pub(super) max_duration: Option<Duration>,
    pub(super) share: Option<f64>,
    pub(super) older_than: Option<Duration>,
    pub(super) rate: Option<u64>,
}

pub(super) fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn chosen(repo: &Repository, points: &[String]) -> Result<Option<Vec<PointId>>> {
    let chosen: Vec<PointId> = points
        .iter()
        .map(|point| Ok(repo.resolve(point)?.id))
        .collect::<Result<_>>()?;
    Ok((!chosen.is_empty()).then_some(chosen))
}

/// What `verify` and `check` have in common: what is chosen, who is told, and who may end it.
fn options(
    repo: &Repository,
    points: &[String],
    progress: &Arc<Progress>,
    interrupted: Arc<AtomicBool>,
) -> Result<VerifyOptions> {
    let progress = Arc::clone(progress);
    let watch = move |phase: &str, bytes: u64, total: u64| progress.told(phase, bytes, total);
    Ok(VerifyOptions {
        points: chosen(repo, points)?,
        threads: threads(),
        interrupted: Some(interrupted),
        progress: Some(Arc::new(watch)),
        ..VerifyOptions::default()
    })
}

/// `verify`.
pub(super) fn verify(
    args: &RepoArgs,
    points: &[String],
    limits: &Limits,
    style: Style,
    interrupted: Arc<AtomicBool>,
) -> Result<Outcome> {
    let repo = secret::open(args)?;
    let throttle = limits.rate.map(|rate| Throttle::new(Some(rate)));
    let progress = Arc::new(Progress::default());
    let ends = Arc::clone(&interrupted);
    let options = VerifyOptions {
        max_duration: limits.max_duration,
        share: limits.share,
        older_than: limits.older_than,
        pace: throttle.map(|throttle| {
            let pace = move |bytes| {
                throttle.wait(bytes, &|| !ends.load(Ordering::Relaxed));
            };
            Arc::new(pace) as _
        }),
        ..options(&repo, points, &progress, interrupted)?
    };
    let bar = Bar::show(Arc::clone(&progress), style);
    let report = repo.verify(&options)?;
    drop(bar);
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
    hint_repair(&mut outcome, &damage);
    outcome.warnings.extend(report.notes);
    outcome.more.insert(
        "verify".to_owned(),
        json!({
            "points": report.points, "blocks": report.checked_blocks, "bytes": report.checked_bytes,
            "complete": report.complete, "healed": report.healed, "sound_again": report.sound_again,
            "damage": damage.list, "damaged": damage.count, "truncated": damage.truncated,
            "packs": report.packs.map(|packs| json!({
                "checked": packs.checked, "checked_bytes": packs.checked_bytes, "all": packs.all,
                "all_bytes": packs.all_bytes, "never": packs.never, "oldest": packs.oldest,
            })),
        }),
    );
    if report.interrupted {
        outcome.errors.push(image::Error::Interrupted.into());
    }
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
pub(super) fn check(
    args: &RepoArgs,
    points: &[String],
    style: Style,
    interrupted: Arc<AtomicBool>,
) -> Result<Outcome> {
    let begin = clock::now();
    let repo = secret::open(args)?;
    let progress = Arc::new(Progress::default());
    let options = options(&repo, points, &progress, interrupted)?;
    let bar = Bar::show(Arc::clone(&progress), style);
    let report = repo.check_with(&options)?;
    drop(bar);
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
    hint_repair(&mut outcome, &damage);
    outcome.warnings.extend(report.notes);
    outcome.more.insert(
        "check".to_owned(),
        json!({
            "points": report.points, "layers": report.layers, "sessions": report.sessions,
            "packs": report.packs, "blocks": report.blocks, "entries": report.entries,
            "took_ms": took_ms, "damage": damage.list, "damaged": damage.count,
            "truncated": damage.truncated,
        }),
    );
    Ok(outcome)
}

/// Damage as JSON tells of it.
pub(super) struct Told {
    pub(super) list: Vec<Value>,
    pub(super) count: usize,
    /// How many are left out of the list.
    pub(super) truncated: usize,
    /// Blocks that are needed and that the index lacks.
    pub(super) not_indexed: usize,
}

/// Blocks that the index does not know.
const LACKS: &str = "blocks that the index lacks";

/// What one kind of damage is called: a directory of the repository, or blocks that are nowhere.
fn kind(damage: &Damage) -> &str {
    if damage.what.contains(NOT_INDEXED) {
        return LACKS;
    }
    damage.object.split(['/', ' ']).next().unwrap_or_default()
}

/// The way out when the index lacks what is needed.
fn hint_repair(outcome: &mut Outcome, damage: &Told) {
    if damage.not_indexed > 0 {
        outcome.line(format!(
            "the index lacks {} blocks that are needed: `forerun repair index` finds all that only the index has lost",
            damage.not_indexed
        ));
    }
}

/// Tells of damage: of what somebody needs as an error, which makes the exit code, of the rest as a warning. Of each kind only
/// some is told in full.
pub(super) fn tell(outcome: &mut Outcome, found: &[Damage]) -> Told {
    let (needed, others): (Vec<&Damage>, Vec<&Damage>) =
        found.iter().partition(|found| found.need == Need::Somebody);
    let mut kinds: BTreeMap<&str, Vec<&Damage>> = BTreeMap::new();
    for damage in &needed {
        kinds.entry(kind(damage)).or_default().push(damage);
    }
    for (kind, damage) in &kinds {
        tell_kind(outcome, kind, damage);
    }
    let hurt: BTreeSet<PointId> = needed
        .iter()
        .flat_map(|damage| damage.hurts.iter().map(|(point, _)| *point))
        .collect();
    if needed.len() > 1 && !hurt.is_empty() {
        let names: Vec<String> = hurt.iter().map(PointId::to_string).collect();
        outcome.line(format!("hurt in all: {}", some_of(&names)));
    }
    if !needed.is_empty() {
        outcome.kind = Some(Kind::Corrupt);
    }
    let what = "no point needs it; `forerun prune` removes it";
    for damage in others.iter().take(DETAILS) {
        let (object, how) = (&damage.object, shortened(&damage.what));
        outcome.warnings.push(format!("{object}: {how}: {what}"));
    }
    if others.len() > DETAILS {
        let more = others.len() - DETAILS;
        outcome
            .warnings
            .push(format!("and {more} more damaged objects: {what}"));
    }
    let list: Vec<Value> = needed
        .iter()
        .chain(&others)
        .take(LISTED)
        .map(|damage| {
            let hurts = damage.hurts.iter().take(LISTED);
            let hurts: Vec<Value> = hurts
                .map(|(point, disk)| json!({ "point": point, "disk": disk }))
                .collect();
            json!({
                "object": damage.object, "what": damage.what, "hurts": hurts,
                "hurts_truncated": damage.hurts.len() - hurts.len(),
                "needed": damage.need == Need::Somebody,
            })
        })
        .collect();
    Told {
        count: found.len(),
        truncated: found.len() - list.len(),
        list,
        not_indexed: kinds.get(LACKS).map_or(0, Vec::len),
    }
}

/// Tells of what is needed and of one kind.
fn tell_kind(outcome: &mut Outcome, kind: &str, damage: &[&Damage]) {
    for damage in damage.iter().take(DETAILS) {
        outcome.line(format!(
            "DAMAGED {}: {}",
            damage.object,
            shortened(&damage.what)
        ));
        let hurts: Vec<String> = damage
            .hurts
            .iter()
            .map(|(point, disk)| match disk {
                Some(disk) => format!("{point}, disk {disk}"),
                None => point.to_string(),
            })
            .collect();
        for hurt in hurts.iter().take(HURTS) {
            outcome.line(format!("  hurts point {hurt}"));
        }
        if hurts.len() > HURTS {
            outcome.line(format!("  and {} more", hurts.len() - HURTS));
        }
    }
    if damage.len() > DETAILS {
        let more = damage.len() - DETAILS;
        outcome.line(format!("and {more} more ({kind})"));
    }
}

/// The first of some names, and how many more there are.
fn some_of(names: &[String]) -> String {
    let first = names.iter().take(DETAILS).cloned().collect::<Vec<_>>();
    match names.len() - first.len() {
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}

/// What a person reads of a long list of faults.
fn shortened(what: &str) -> String {
    match what.char_indices().nth(WORDS) {
        Some((end, _)) => format!("{} ...", &what[..end]),
        None => what.to_owned(),
    }
}
