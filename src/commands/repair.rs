//! `repair`.

use anyhow::Result;
use serde_json::json;

use super::{secret, verify};
use crate::cli::{Repair, RepoArgs};
use crate::exit::{Failure, Kind};
use crate::hoststate::TargetState;
use crate::image;
use crate::replicate;
use crate::report::Outcome;
use crate::session::{Session, is_withdrawn_key};

/// `repair`.
pub(super) fn repair(what: &Repair) -> Result<Outcome> {
    match what {
        Repair::Index(args) => index(args),
        Repair::NewId {
            repo,
            drop_sessions,
        } => new_id(repo, *drop_sessions),
    }
}

/// The packs tell what is in them; whether that is all that points need is found out by a check.
fn index(args: &RepoArgs) -> Result<Outcome> {
    let repo = secret::open(args)?;
    let rebuilt = repo.rebuild_index()?;
    let mut outcome = Outcome::default();
    outcome.line(format!(
        "made the index anew: {} blocks, from the footers of {} packs",
        rebuilt.blocks, rebuilt.packs
    ));
    let left_out: Vec<String> = rebuilt.damaged.iter().map(ToString::to_string).collect();
    if !left_out.is_empty() {
        outcome.line(format!(
            "{} packs have damaged lists: of these the index has what it had before",
            left_out.len()
        ));
    }
    let checked = repo.check(None, verify::threads())?;
    let damage = verify::tell(&mut outcome, &checked.damage);
    if damage.not_indexed > 0 {
        outcome.line(format!(
            "{} blocks that are needed are in no pack that is there: put lost packs back from a copy of the repository and run `forerun repair index` again",
            damage.not_indexed
        ));
    }
    outcome.warnings.extend(checked.notes);
    outcome.more.insert(
        "repair".to_owned(),
        json!({
            "blocks": rebuilt.blocks, "packs": rebuilt.packs, "left_out": left_out,
            "damage": damage.list, "damaged": damage.count, "truncated": damage.truncated,
        }),
    );
    Ok(outcome)
}

/// A session belongs to the old id, as its bitmaps do: it goes first. What dropped sessions withdrew is of use until no bitmap
/// of the old id is believed: it goes last.
fn new_id(args: &RepoArgs, drop_sessions: bool) -> Result<Outcome> {
    let repo = secret::open(args)?;
    repo.expect_renewable()?;
    let old = repo.id();
    let sessions = image::Session::list(&repo)?;
    let keys: Vec<String> = sessions
        .sessions
        .iter()
        .map(|session| session.key().to_owned())
        // A copy on its way here has nothing to do with bitmaps.
        .filter(|key| !replicate::is_session_key(key) && !is_withdrawn_key(key))
        .collect();
    let damaged: Vec<String> = sessions
        .damaged
        .iter()
        .map(|(id, _)| id.to_string())
        .collect();
    if !drop_sessions && (!keys.is_empty() || !damaged.is_empty()) {
        let names: Vec<String> = keys.into_iter().chain(damaged).collect();
        return Err(Failure::hinted(
            Kind::Failed,
            format!(
                "it has sessions, of bitmaps of its old id: {}",
                names.join(", ")
            ),
            "give them up with `--drop-sessions`; the repository that this one was copied from keeps its own",
        ));
    }
    // All runs are known to have ended before the first session goes.
    let mut runs = Vec::new();
    for key in &keys {
        let state = TargetState::open(key)?;
        runs.push(state.lock_run(&old.short(), "forerun repair new-id")?);
    }
    for key in &keys {
        Session::give_up(&repo, key)?;
    }
    for (id, _) in sessions.damaged {
        image::Session::remove_damaged(&repo, id)?;
    }
    let new = repo.renew_id()?;
    let repo = secret::open(args)?;
    let mut outcome = Outcome::default();
    // Also those that giving up has just made.
    for session in image::Session::list(&repo)?.sessions {
        if is_withdrawn_key(session.key()) {
            session.remove()?;
        } else if !replicate::is_session_key(session.key()) {
            outcome.warnings.push(format!(
                "a session of {} began meanwhile under the old id: give it up with `forerun drop-session`",
                session.key()
            ));
        }
    }
    outcome.line(format!(
        "repository {old} is now {new}; the next backup of each VM reads its disks in full and stores what differs"
    ));
    outcome.more.insert(
        "repair".to_owned(),
        json!({ "old": old, "new": new, "dropped": keys }),
    );
    Ok(outcome)
}
