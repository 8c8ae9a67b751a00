//! `prune`.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use serde_json::json;

use super::{counted, secret};
use crate::cli::PruneArgs;
use crate::exit::Kind;
use crate::image::{Packs, PruneOptions, PruneReport};
use crate::progress::Progress;
use crate::report::{Bar, Outcome, Style};
use crate::units::Bytes;

pub(super) fn prune(args: &PruneArgs, style: Style, interrupted: &AtomicBool) -> Result<Outcome> {
    let repo = secret::open(&args.repo)?;
    let options = PruneOptions {
        dry_run: args.dry_run,
        max_repack: args.max_repack.unwrap_or(u64::MAX),
        interrupted: Some(interrupted),
    };
    let progress = Arc::new(Progress::default());
    let bar = Bar::show(Arc::clone(&progress), style);
    let watch = |phase: &str, amount: u64, total: u64| progress.told(phase, amount, total);
    let report = repo
        .prune(&options, &watch)
        .context("prune (points, sessions and readers keep all that they need)")?;
    drop(bar);
    Ok(outcome(&report, args.dry_run))
}

fn outcome(report: &PruneReport, dry_run: bool) -> Outcome {
    let mut outcome = Outcome::default();
    let would = if dry_run { "would be " } else { "" };
    let mut line = |packs: Packs, what: &str| {
        if packs.packs > 0 {
            outcome.line(format!(
                "{}, {}: {what}",
                counted(packs.packs, "pack"),
                Bytes(packs.bytes)
            ));
        }
    };
    line(report.deleted, &format!("{would}deleted"));
    line(
        report.repacked,
        &format!(
            "among these, mostly dead; their live blocks, {}, {} new packs",
            Bytes(report.rewritten_bytes),
            if dry_run {
                "would be copied to"
            } else {
                "are in"
            }
        ),
    );
    line(
        report.spared,
        "kept, since somebody referred to them at the last moment",
    );
    line(
        report.kept_for_sessions,
        "kept for sessions that may be about to refer to them",
    );
    line(report.kept_partly_dead, "kept although partly dead");
    line(report.kept_damaged, "kept since they are damaged");
    for (count, what) in [
        (report.layers, "map layers that no point has"),
        (report.sessions, "removals of sessions that were cut short"),
        (report.leases, "leases of readers who died"),
        (report.quarantine, "records of bad blocks that are gone"),
    ] {
        if count > 0 {
            outcome.line(format!("{count} {what}: {would}removed"));
        }
    }
    if report.finished_earlier {
        outcome.line("an earlier prune was cut short: its deletions go on from there");
    }
    let freed = report.freed_bytes();
    outcome.line(format!(
        "{} {} of {}",
        Bytes(freed.unsigned_abs()),
        match (freed < 0, dry_run) {
            (true, _) => "more are taken",
            (false, true) => "would be free",
            (false, false) => "are free now",
        },
        counted(report.packs, "pack")
    ));
    if report.no_room {
        outcome.warnings.push(
            "there was no room to copy live blocks out of packs that are mostly dead: prune again now that there is more"
                .to_owned(),
        );
    }
    for damage in &report.damaged {
        outcome.warnings.push(format!("{damage}: it stays"));
        outcome.kind = Some(Kind::Corrupt);
    }
    let mut document = json!(report);
    document["dry_run"] = json!(dry_run);
    document["freed_bytes"] = json!(freed);
    outcome.more.insert("prune".to_owned(), document);
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_copied_out_of_packs_is_told_in_words() {
        let packs = |packs, bytes| Packs { packs, bytes };
        let report = PruneReport {
            packs: 40,
            deleted: packs(38, 9 << 20),
            repacked: packs(1, 4 << 20),
            rewritten_bytes: 1 << 20,
            ..PruneReport::default()
        };
        assert_eq!(
            outcome(&report, true).lines,
            [
                "38 packs, 9 MiB: would be deleted",
                "1 pack, 4 MiB: among these, mostly dead; their live blocks, 1 MiB, would be copied to new packs",
                "8 MiB would be free of 40 packs",
            ]
        );
        let done = outcome(&report, false).lines;
        assert!(done[1].ends_with("1 MiB, are in new packs"), "{}", done[1]);
    }
}
