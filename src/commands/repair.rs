//! `repair`.

use anyhow::Result;
use serde_json::json;

use super::secret;
use crate::cli::{Repair, RepoArgs};
use crate::exit::Kind;
use crate::report::Outcome;

/// `repair`.
pub(super) fn repair(args: &RepoArgs, what: Repair) -> Result<Outcome> {
    match what {
        Repair::Index => index(args),
    }
}

fn index(args: &RepoArgs) -> Result<Outcome> {
    let rebuilt = secret::open(args)?.rebuild_index()?;
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
