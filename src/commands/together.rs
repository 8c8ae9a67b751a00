//! Several targets at the same time, each target's run in a thread of its own: `run` on several, which the host's budget
//! alone puts in order, and `--together`, whose points are of one instant.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use super::backup::{Begun, How, ahead_and_backup, begin_backup_in, ended};
use super::secret;
use crate::backup::{self, Seat};
use crate::cli::{RepoTargetArgs, TargetArgs};
use crate::clock;
use crate::exit::{Kind, classify};
use crate::image::Repository;
use crate::report::{self, Outcome};
use crate::schedule::Due;

/// Between two tries to begin, of a target that cannot be begun with before its backup is due.
const AGAIN: Duration = Duration::from_secs(10);
/// Between two looks whether it is time for that, or the end is asked for.
const LOOK: Duration = Duration::from_millis(100);

/// A target of several.
struct Part {
    args: RepoTargetArgs,
    name: String,
    seat: Option<Seat>,
}

/// `run` on several targets.
pub(super) fn run(
    args: &RepoTargetArgs,
    targets: &[TargetArgs],
    how: &How,
    at: Due,
) -> Result<Outcome> {
    let parts = parts(args, targets)?;
    let repo = secret::open(&args.repo)?;
    report::meanwhile(how.style, &at.to_string());
    Ok(in_threads(parts, how, &repo, "run", Some(at)))
}

/// Backs the targets up together, or the one that was named. `at` is when that is due, if not now.
pub(super) fn backup(
    args: &RepoTargetArgs,
    targets: Option<Vec<TargetArgs>>,
    how: &How,
    at: Option<Due>,
) -> Result<Outcome> {
    let targets = targets.unwrap_or_else(|| vec![args.target.clone()]);
    let mut parts = parts(args, &targets)?;
    let names = parts.iter().map(|part| part.name.clone()).collect();
    for (part, seat) in parts.iter_mut().zip(backup::seats(names)) {
        part.seat = Some(seat);
    }
    let mut all = in_threads(parts, how, &secret::open(&args.repo)?, "backup", at);
    let common = |target: &serde_json::Value| {
        let found = target.pointer("/point/together")?;
        (!found.is_null()).then(|| found.clone())
    };
    // All who have one have the same.
    let common = all.targets.iter().find_map(common);
    if let Some(common) = common {
        all.line(format!(
            "together: {} targets within {} ms, one instant: {}",
            common["targets"].as_array().map_or(0, Vec::len),
            common["spread_ms"],
            common["one_instant"]
        ));
        all.more.insert("together".to_owned(), common);
    } else {
        all.more.insert("together".to_owned(), json!(null));
    }
    Ok(all)
}

fn parts(args: &RepoTargetArgs, targets: &[TargetArgs]) -> Result<Vec<Part>> {
    let part = |target: &TargetArgs| {
        Ok(Part {
            args: RepoTargetArgs {
                target: target.clone(),
                repo: args.repo.clone(),
            },
            name: target.named()?.to_string(),
            seat: None,
        })
    };
    targets.iter().map(part).collect()
}

/// The runs, each in its thread, and how they ended, in the order of the targets. The repository was opened before: a
/// passphrase is asked for once, and in peace.
fn in_threads(
    parts: Vec<Part>,
    how: &How,
    repo: &Repository,
    doing: &str,
    at: Option<Due>,
) -> Outcome {
    let names: Vec<String> = parts.iter().map(|part| part.name.clone()).collect();
    let ends = std::thread::scope(|scope| {
        let one = |part: Part| {
            let thread = std::thread::Builder::new().name(format!("{doing} {}", part.name));
            let work = move || {
                // Who cannot begin has no seat: it goes with the part.
                let mut begun = begin(part, how, repo, doing, at)?;
                let point = ahead_and_backup(&mut begun, at);
                Ok(ended(
                    begun,
                    point,
                    at.filter(|at| at.late).map(|at| at.due),
                ))
            };
            thread.spawn_scoped(scope, work).context("start a thread")
        };
        let threads: Vec<_> = parts.into_iter().map(one).collect();
        let end = |thread: Result<std::thread::ScopedJoinHandle<'_, Result<Outcome>>>| {
            let ended = thread?.join();
            ended.unwrap_or_else(|_| {
                Err(anyhow::anyhow!(
                    "its run broke off, which is an error of forerun"
                ))
            })
        };
        threads.into_iter().map(end).collect::<Vec<_>>()
    });
    let mut all = Outcome::default();
    for (name, one) in names.iter().zip(ends) {
        all.join(name, one);
    }
    all
}

/// Begins the run of a target. What keeps it from that now may be over before its backup is due.
fn begin(part: Part, how: &How, repo: &Repository, doing: &str, at: Option<Due>) -> Result<Begun> {
    let due = at.map(Due::deadline);
    let mut trouble = String::new();
    loop {
        let begun = begin_backup_in(repo.clone(), &part.args, how, doing);
        let error = match begun {
            Ok(mut begun) => {
                if let Some(seat) = part.seat {
                    begun.runner.join(seat);
                }
                return Ok(begun);
            }
            Err(error) => error,
        };
        // What was asked for wrongly does not come right by itself.
        let wrong = classify(&error).0 == Kind::Usage;
        let Some(due) = due.filter(|due| !wrong && !due.passed()) else {
            return Err(error);
        };
        let words = format!("{error:#}");
        if words != trouble {
            tracing::warn!("{}: {words}; trying again", part.name);
            trouble = words;
        }
        let again = due.at_most(AGAIN);
        while !again.passed() {
            if how.interrupted.load(Ordering::Relaxed) {
                return Err(error);
            }
            clock::sleep(LOOK.min(again.left()));
        }
    }
}
