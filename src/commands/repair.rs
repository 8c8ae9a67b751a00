//! `repair`.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use crate::cli::Repair;
use crate::exit::Kind;
use crate::image::Repository;
use crate::report::Outcome;

/// `repair`.
pub(super) fn repair(path: &Path, what: Repair) -> Result<Outcome> {
    match what {
        Repair::Index => index(path),
    }
}

fn index(path: &Path) -> Result<Outcome> {
    let rebuilt = Repository::open(path)?.rebuild_index()?;
    let mut outcome = Outcome::default();
    outcome.line(format!(
        "made the index anew: {} blocks, from the footers of {} packs",
        rebuilt.blocks, rebuilt.packs
    ));
    let mut left_out = Vec::new();
    for error in &rebuilt.damaged {
        outcome.line(format!("DAMAGED {error}"));
        left_out.push(error.to_string());
    }
    if !left_out.is_empty() {
        outcome.line(
            "of a damaged pack the index has what it had before; `forerun verify` tells whom it hurts",
        );
        outcome.kind = Some(Kind::Corrupt);
    }
    outcome.more.insert(
        "repair".to_owned(),
        json!({ "blocks": rebuilt.blocks, "packs": rebuilt.packs, "left_out": left_out }),
    );
    Ok(outcome)
}
