//! `--together`: the points of several targets at one instant, each target's run in a thread of its own.

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde_json::json;

use super::backup::{Begun, How, begin_backup, ended};
use crate::backup;
use crate::cli::{RepoTargetArgs, TargetArgs};
use crate::clock;
use crate::report::Outcome;
use crate::schedule::Due;

/// Backs the targets up together, or the one that was named. `at` is when that was due, if not now.
pub(super) fn backup(
    args: &RepoTargetArgs,
    targets: Option<Vec<TargetArgs>>,
    how: &How,
    at: Option<Due>,
) -> Result<Outcome> {
    let targets = targets.unwrap_or_else(|| vec![args.target.clone()]);
    let due = at.map_or_else(clock::utc_now, |at| at.due);
    let late = at.filter(|at| at.late).map(|at| at.due);
    let names: Vec<String> = targets
        .iter()
        .map(|target| Ok(target.named()?.to_string()))
        .collect::<Result<_>>()?;
    // One after the other, so that a passphrase is asked for in peace. Who cannot begin has no seat.
    let begun: Vec<Result<Begun>> = targets
        .iter()
        .zip(backup::seats(names.clone()))
        .map(|(target, seat)| {
            let single = RepoTargetArgs {
                target: target.clone(),
                repo: args.repo.clone(),
            };
            let mut begun = begin_backup(&single, how, "backup")?;
            begun.runner.join(seat);
            Ok(begun)
        })
        .collect();
    let mut all = Outcome::default();
    for (name, one) in names.iter().zip(run(begun, due, late)) {
        all.join(name, one);
    }
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

/// The runs, each in its thread, and how they ended, in their order.
fn run(begun: Vec<Result<Begun>>, due: Timestamp, late: Option<Timestamp>) -> Vec<Result<Outcome>> {
    std::thread::scope(|scope| {
        let one = |begun: Result<Begun>| {
            begun.and_then(|mut begun| {
                let name = format!("backup {}", begun.target);
                let work = move || {
                    let point = begun.runner.backup(due);
                    ended(begun, point, late)
                };
                let thread = std::thread::Builder::new().name(name);
                thread.spawn_scoped(scope, work).context("start a thread")
            })
        };
        let threads: Vec<_> = begun.into_iter().map(one).collect();
        let end = |thread: Result<std::thread::ScopedJoinHandle<'_, Outcome>>| {
            let ended = thread?.join();
            ended.map_err(|_| anyhow::anyhow!("its run broke off, which is an error of forerun"))
        };
        threads.into_iter().map(end).collect()
    })
}
