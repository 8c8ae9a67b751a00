//! The order of a prune.

use std::collections::HashSet;

use super::super::condemned::Condemned;
use super::super::error::{Error, Result};
use super::super::ids::ObjectId;
use super::super::pack;
use super::super::repo::Repository;
use super::super::store::{RESERVE, RESERVE_BYTES};
use super::mark::Mark;
use super::{PruneOptions, PruneReport, Watch, litter, plan, repack, sweep};

impl Repository {
    /// Deletes what no point, session or reader needs. `progress` is called with a phase and its total, then with an empty name
    /// and how much more is done.
    pub fn prune(
        &self,
        options: &PruneOptions<'_>,
        progress: &dyn Fn(&str, u64, u64),
    ) -> Result<PruneReport> {
        let watch = Watch {
            interrupted: options.interrupted,
            progress,
        };
        let mut report = PruneReport::default();
        if options.dry_run {
            dry_run(self, options, &watch, &mut report)?;
            return Ok(report);
        }
        let lock = || self.store().lock("prune", "pruning");
        let _lock = with_reserve(self, lock)?;
        let pruned = with_reserve(self, || {
            report = PruneReport::default();
            prune(self, options, &watch, &mut report)
        });
        // It is made again when there is room, also after a failure.
        match self.keep_reserve() {
            Ok(()) | Err(Error::NoSpace { .. }) => {}
            Err(error) => tracing::debug!(%error, "the reserve is not made"),
        }
        pruned.map(|()| report)
    }

    /// Makes the object that is deleted when there is no room to free any.
    pub(in crate::image) fn keep_reserve(&self) -> Result<()> {
        match self.store().size(RESERVE) {
            Err(error) if error.is_not_found() => {}
            other => return other.map(drop),
        }
        match self.store().put(RESERVE, &vec![0; RESERVE_BYTES]) {
            Err(Error::Exists { .. }) => Ok(()),
            other => other,
        }
    }
}

/// Does something that needs a little room to make more: without any, the reserve goes, and it is done again.
fn with_reserve<T>(repo: &Repository, mut work: impl FnMut() -> Result<T>) -> Result<T> {
    match work() {
        Err(Error::NoSpace { .. }) => {
            repo.store().delete(&[RESERVE.to_owned()])?;
            work()
        }
        other => other,
    }
}

fn prune(
    repo: &Repository,
    options: &PruneOptions<'_>,
    watch: &Watch<'_>,
    report: &mut PruneReport,
) -> Result<()> {
    let (number, head) = Condemned::read_head(repo.store())?;
    let damaged_head = head.is_err();
    let head = match head {
        Ok(head) => head,
        // It might name any pack. What it had deleted already is told by the index, which still names it.
        Err(error) => {
            report.damaged.push(error.to_string());
            Condemned {
                generation: number,
                ..Condemned::default()
            }
        }
    };
    let layers = litter::list_layers(repo)?;
    // Before the mark: a pack of a session that is not there then is no longer on its way.
    let packs = plan::list(repo)?;
    report.packs = packs.len() as u64;
    let mut mark = Mark::make(repo, watch)?;
    litter::layers(repo, &mark, &layers, false, report)?;
    litter::sessions(repo, false, report)?;
    litter::leases(repo, &mark, false, report)?;
    let mut generation = head.generation;
    if !head.packs.is_empty() {
        report.finished_earlier = true;
        sweep::finish(repo, &mark, head, watch, report)?;
        generation = Condemned::generation(repo.store())?;
    }
    let packs: HashSet<ObjectId> = plan::list(repo)?.intersection(&packs).copied().collect();
    watch.begin("read the index", 0);
    let plan = plan::make(repo, &mark, &packs, options.max_repack, report)?;
    plan::quarantine(repo, &plan.lost)?;
    let repacked = repack::repack(repo, &mark, &packs, &plan, watch, report)?;
    for pack in &repacked {
        report.repacked.add(repo.store().size(&pack::name(*pack))?);
    }
    let mut going: HashSet<ObjectId> = plan.dead.iter().copied().collect();
    going.extend(repacked);
    going.extend(plan.missing);
    if !going.is_empty() || damaged_head {
        watch.go_on()?;
        generation += 1;
        Condemned::put(repo.store(), generation, &going, sweep::BY)?;
        watch.begin("mark again", 0);
        mark.extend()?;
        let head = Condemned {
            generation,
            packs: going,
        };
        sweep::finish(repo, &mark, head, watch, report)?;
    }
    watch.go_on()?;
    watch.begin("merge the index", 0);
    match repo.index().merge_all() {
        // Everything is found without the merge.
        Err(error @ (Error::Busy { .. } | Error::NoSpace { .. })) => {
            tracing::warn!(%error, "the index runs are not merged");
        }
        other => other?,
    }
    // A prune that was cut off at its very end leaves some.
    Condemned::drop_older(repo.store(), u64::MAX)?;
    report.references = mark.references;
    // What is bad in a pack that is lost waits to be healed.
    let mut packs = plan::list(repo)?;
    packs.extend(plan.lost);
    litter::quarantine(repo, &packs, report)
}

fn dry_run(
    repo: &Repository,
    options: &PruneOptions<'_>,
    watch: &Watch<'_>,
    report: &mut PruneReport,
) -> Result<()> {
    let head = Condemned::read(repo.store())?;
    let layers = litter::list_layers(repo)?;
    let packs = plan::list(repo)?;
    report.packs = packs.len() as u64;
    let mark = Mark::make(repo, watch)?;
    report.references = mark.references;
    report.finished_earlier = !head.packs.is_empty();
    litter::layers(repo, &mark, &layers, true, report)?;
    litter::sessions(repo, true, report)?;
    litter::leases(repo, &mark, true, report)?;
    watch.begin("read the index", 0);
    let plan = plan::make(repo, &mark, &packs, options.max_repack, report)?;
    for pack in &plan.dead {
        report.deleted.add(repo.store().size(&pack::name(*pack))?);
    }
    for (pack, live) in &plan.repack {
        let bytes = repo.store().size(&pack::name(*pack))?;
        report.deleted.add(bytes);
        report.repacked.add(bytes);
        report.rewritten_bytes += live;
    }
    Ok(())
}
