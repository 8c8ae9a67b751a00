//! `audit`.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use serde_json::json;

use super::backup::{Plan, begin};
use crate::cli::{AuditArgs, RepoTargetArgs};
use crate::clock::Deadline;
use crate::report::Outcome;
use crate::units::Bytes;

/// `audit`.
pub(super) fn audit(
    target: &RepoTargetArgs,
    args: &AuditArgs,
    interrupted: Arc<AtomicBool>,
) -> Result<Outcome> {
    let until = args.max_duration.map(Deadline::after);
    let mut begun = begin(
        target,
        Some(&args.pace),
        None,
        Plan::default(),
        "audit",
        interrupted,
    )?;
    let report = begun.runner.audit(args.share.unwrap_or(100.0), until)?;
    let mut outcome = Outcome::default();
    let how = match (report.findings.is_empty(), report.complete) {
        (false, _) => "BITMAPS HAVE MISSED CHANGES",
        (true, true) => "as stored",
        (true, false) => "as stored; the next audit goes on from there",
    };
    outcome.line(format!(
        "{}: {} of {} read: {how}",
        begun.target,
        Bytes(report.checked),
        Bytes(report.size)
    ));
    for finding in &report.findings {
        outcome.line(format!(
            "  {}: {} blocks differ and no bitmap holds them; it is read in full from now on",
            finding.disk, finding.blocks
        ));
        for suspect in &finding.suspects {
            outcome.line(format!("    suspect: point {suspect}"));
        }
    }
    outcome
        .targets
        .push(json!({ "target": begun.target, "key": begun.key, "audit": report }));
    outcome.warnings.append(&mut begun.runner.warnings);
    Ok(outcome)
}
