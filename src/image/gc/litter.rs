//! What goes without a second look, since nobody can begin to refer to it: map layers that no root has, what is left of removed
//! sessions, leases of dead readers, records of bad blocks in packs that are gone.
//!
//! Map layers are never found by their content: a new root has them from an older one. So a layer that was listed before
//! everything was marked, that no root has, and whose session is gone, stays without one.

use std::collections::HashSet;
use std::sync::Arc;

use super::super::error::{Error, Result};
use super::super::ids::ObjectId;
use super::super::map::{Layer, LayerMeta, MAP};
use super::super::quarantine::Quarantine;
use super::super::repo::Repository;
use super::super::session;
use super::super::store::Store;
use super::PruneReport;
use super::mark::Mark;

/// The names of all map layers, past any cache: to be listed before the mark.
pub(super) fn list_layers(repo: &Repository) -> Result<Vec<String>> {
    repo.store().list_fresh("maps/")
}

/// Deletes layers that no root has, of those that were listed before.
pub(super) fn layers(
    repo: &Repository,
    mark: &Mark<'_>,
    listed: &[String],
    dry_run: bool,
    report: &mut PruneReport,
) -> Result<()> {
    let mut gone = Vec::new();
    for object in listed {
        let Some(Ok(id)) = object.strip_prefix("maps/").map(str::parse::<ObjectId>) else {
            continue;
        };
        if !mark.has_layer(id) && !may_be_taken(repo.store_arc(), mark, object)? {
            gone.push(object.clone());
        }
    }
    report.layers = gone.len() as u64;
    if dry_run {
        return Ok(());
    }
    repo.store().delete(&gone)
}

/// Whether a session may be about to publish a point with this layer.
fn may_be_taken(store: &Arc<dyn Store>, mark: &Mark<'_>, object: &str) -> Result<bool> {
    match Layer::open(store, object, MAP, None) {
        Ok(layer) => match serde_json::from_slice::<LayerMeta>(&layer.meta) {
            Ok(meta) => Ok(mark.is_alive(meta.session)),
            Err(_) => Ok(mark.any_session()),
        },
        Err(Error::Corrupt { .. }) => Ok(mark.any_session()),
        // Its session has merged it into another, or is gone.
        Err(error) if error.is_not_found() => Ok(true),
        Err(error) => Err(error),
    }
}

/// Finishes removals of sessions that were cut short.
pub(super) fn sessions(repo: &Repository, dry_run: bool, report: &mut PruneReport) -> Result<()> {
    for id in session::remains(repo)? {
        report.sessions += 1;
        if !dry_run {
            session::remove(repo, id)?;
        }
    }
    Ok(())
}

/// Removes the leases of dead readers.
pub(super) fn leases(
    repo: &Repository,
    mark: &Mark<'_>,
    dry_run: bool,
    report: &mut PruneReport,
) -> Result<()> {
    let dead = mark.dead_leases();
    report.leases = dead.len() as u64;
    if dry_run {
        return Ok(());
    }
    repo.store().delete(dead)
}

/// Removes records of bad blocks of which every pack is gone: as long as one is there, others must know that the block is bad in it.
pub(super) fn quarantine(
    repo: &Repository,
    packs: &HashSet<ObjectId>,
    report: &mut PruneReport,
) -> Result<()> {
    let mut damaged = Vec::new();
    let records = Quarantine::records(repo.store(), &mut damaged)?;
    let gone: Vec<String> = records
        .into_iter()
        .filter(|(_, record)| record.blocks.iter().all(|bad| !packs.contains(&bad.pack)))
        .map(|(object, _)| object)
        .collect();
    report.quarantine = gone.len() as u64;
    report
        .damaged
        .extend(damaged.iter().map(ToString::to_string));
    repo.store().delete(&gone)
}
