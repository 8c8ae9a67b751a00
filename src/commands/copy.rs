//! `copy`.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use serde_json::{Value, json};

use super::forget::keys;
use super::repository::name_of;
use super::secret;
use crate::cli::{RepoArgs, ToArgs};
use crate::clock;
use crate::exit::{Kind, classify};
use crate::image::{Error, Manifest, Repository};
use crate::progress::Progress;
use crate::replicate::{Copied, Options, Replication};
use crate::report::{Bar, Outcome, Style};
use crate::units::Bytes;

/// Copies the named points, or without names all of the targets. A damaged point is reported and hinders no other.
pub(super) fn copy(
    from: &RepoArgs,
    to: &ToArgs,
    points: &[String],
    targets: &[String],
    rate: Option<u64>,
    style: Style,
    interrupted: Arc<AtomicBool>,
) -> Result<Outcome> {
    let from = secret::open(from)?;
    let to = secret::open_second(to)?;
    let progress = Arc::new(Progress::default());
    let options = Options {
        rate,
        ..Options::default()
    };
    let replication = Replication::new(&from, &to, options, &progress)?.ended_by(interrupted);
    let mut outcome = Outcome::default();
    let mut failed = Vec::new();
    let chosen = if points.is_empty() {
        let all = from.points()?;
        for error in all.damaged {
            failed.push(json!({ "point": Value::Null, "what": error.to_string() }));
            outcome.line(format!("NOT COPIED: {error}"));
        }
        let keys = keys(&from, targets)?;
        let mut chosen = all.points;
        chosen.retain(|point| targets.is_empty() || keys.contains(&point.target.key));
        chosen
    } else {
        named(&from, points)?
    };
    let (mut copied, mut skipped) = (Vec::new(), Vec::new());
    let bar = Bar::show(Arc::clone(&progress), style);
    for point in &chosen {
        let name = format!(
            "{}  {}  {}",
            point.id,
            clock::local(point.instant),
            name_of(point)
        );
        match replication.copy(point.id) {
            Ok(Copied::Skipped) => {
                skipped.push(point.id);
            }
            Ok(Copied::Done { read, stored, base }) => {
                outcome.line(format!(
                    "{name}: read {}, stored {}",
                    Bytes(read),
                    Bytes(stored)
                ));
                copied.push(json!({
                    "point": point.id, "read": read, "stored": stored, "base": base,
                }));
            }
            Err(error) if points.is_empty() && forgotten(&from, point, &error) => {
                outcome
                    .warnings
                    .push(format!("point {} was forgotten meanwhile", point.id));
            }
            Err(error) if classify(&error).0 == Kind::Corrupt => {
                outcome.line(format!("{name}: NOT COPIED: {error:#}"));
                failed.push(json!({ "point": point.id, "what": format!("{error:#}") }));
            }
            Err(error) => {
                outcome
                    .errors
                    .push(error.context(format!("copy point {}", point.id)));
                break;
            }
        }
    }
    drop(bar);
    outcome.line(format!(
        "copied {}, there already {}, damaged {}",
        copied.len(),
        skipped.len(),
        failed.len()
    ));
    if from.is_encrypted() && !to.is_encrypted() && !copied.is_empty() {
        outcome.line(
            "the second repository is not encrypted: disks, TPM state and passwords of definitions are readable there"
                .to_owned(),
        );
    }
    if !failed.is_empty() {
        outcome.kind = Some(Kind::Corrupt);
    }
    outcome.more.insert(
        "copy".to_owned(),
        json!({ "to": to.id(), "to_encrypted": to.is_encrypted(), "copied": copied, "skipped": skipped, "failed": failed }),
    );
    Ok(outcome)
}

/// The named points, oldest first: each is the base of the next.
fn named(from: &Repository, points: &[String]) -> Result<Vec<Manifest>> {
    let named = points.iter().map(|point| Ok(from.resolve(point)?));
    let mut named: Vec<Manifest> = named.collect::<Result<_>>()?;
    named.sort_by_key(|point| (point.instant, point.id));
    named.dedup_by_key(|point| point.id);
    Ok(named)
}

/// Whether a point failed because it went meanwhile.
fn forgotten(from: &Repository, point: &Manifest, error: &anyhow::Error) -> bool {
    let gone = error.chain().any(|cause| {
        cause
            .downcast_ref::<Error>()
            .is_some_and(|error| error.is_not_found() || error.is_corrupt())
    });
    gone && from
        .point(point.id)
        .is_err_and(|error| error.is_not_found())
}
