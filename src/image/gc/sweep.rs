//! From condemned to gone: packs that somebody referred to at the last moment are spared, the others deleted, and the index and the
//! list forget them. Also how a prune goes on that another one began.

use std::collections::HashSet;

use super::super::condemned::Condemned;
use super::super::error::Result;
use super::super::ids::ObjectId;
use super::super::pack;
use super::super::quarantine::Quarantine;
use super::super::repo::Repository;
use super::mark::Mark;
use super::plan::{self, Sound};
use super::{PruneReport, Watch};

/// Packs that are deleted at a time.
const AT_A_TIME: usize = 64;
/// Who writes condemned lists.
pub(super) const BY: &str = "prune";

/// Finishes what the head of the condemned lists says. The mark is of after the head was put.
pub(super) fn finish(
    repo: &Repository,
    mark: &Mark<'_>,
    head: Condemned,
    watch: &Watch<'_>,
    report: &mut PruneReport,
) -> Result<()> {
    let store = repo.store();
    let there = plan::list(repo)?;
    let spared = spared(repo, mark, &head.packs, &there)?;
    let Condemned {
        mut generation,
        packs: mut going,
    } = head;
    if !spared.is_empty() {
        for pack in &spared {
            report.spared.add(store.size(&pack::name(*pack))?);
        }
        going.retain(|pack| !spared.contains(pack));
        generation += 1;
        Condemned::put(store, generation, &going, BY)?;
    }
    watch.begin("delete packs", going.len() as u64);
    let mut objects: Vec<ObjectId> = going.intersection(&there).copied().collect();
    objects.sort_unstable();
    for some in objects.chunks(AT_A_TIME) {
        watch.go_on()?;
        let names: Vec<String> = some.iter().map(|pack| pack::name(*pack)).collect();
        for name in &names {
            report.deleted.add(store.size(name)?);
        }
        store.delete(&names)?;
        watch.done(some.len() as u64);
    }
    watch.go_on()?;
    watch.begin("take them out of the index", 0);
    if !going.is_empty() {
        repo.index().rewrite_without(&going)?;
    }
    generation += 1;
    Condemned::put(store, generation, &HashSet::new(), BY)?;
    Condemned::drop_older(store, generation)
}

/// Condemned packs with a block that is referred to and is nowhere else. One that is not there any more cannot be spared: an earlier
/// prune had found that nothing needs it.
fn spared(
    repo: &Repository,
    mark: &Mark<'_>,
    condemned: &HashSet<ObjectId>,
    there: &HashSet<ObjectId>,
) -> Result<HashSet<ObjectId>> {
    let quarantine = Quarantine::read(repo.store())?;
    let sound = Sound {
        packs: there,
        condemned,
        quarantine: &quarantine,
        weak: &HashSet::new(),
    };
    let mut spared = HashSet::new();
    repo.index().sweep(&mut |id, locations| {
        let concerned = locations
            .iter()
            .any(|location| condemned.contains(&location.pack));
        if concerned && mark.has(id) && !locations.iter().any(|other| sound.has(id, other)) {
            let here = locations.iter().map(|location| location.pack);
            spared.extend(here.filter(|pack| condemned.contains(pack) && there.contains(pack)));
        }
        Ok(())
    })?;
    Ok(spared)
}
