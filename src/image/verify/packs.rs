//! The round through all packs: each is read whole, from its beginning to its end, those that were not checked for longest first.

use std::collections::HashSet;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::super::condemned::Condemned;
use super::super::error::{Error, Result};
use super::super::ids::ObjectId;
use super::super::pack;
use super::super::quarantine::Bad;
use super::checks::Checks;
use super::places::Places;
use super::structure::Structure;
use super::{Hurts, PackReport, Verify, VerifyReport, in_parallel, lock};
use crate::clock;

/// How often what was checked is written down, unless that is said.
const SAVE: Duration = Duration::from_secs(60);

/// What the workers share.
struct Round {
    checks: Checks,
    flushed: Instant,
    failure: Option<Error>,
    bad: Vec<Bad>,
    blocks: u64,
    bytes: u64,
    packs: u64,
    pack_bytes: u64,
    /// Packs that prune deletes, or has.
    gone: u64,
}

impl Verify<'_> {
    /// Reads the packs whose turn it is.
    pub(super) fn packs(&mut self, structure: &Structure, report: &mut VerifyReport) -> Result<()> {
        let store = self.repo.store();
        let mut damaged = Vec::new();
        let checks = Checks::read(store, &mut damaged)?;
        for error in damaged {
            self.damaged(error, Hurts::new())?;
        }
        let (turn, condemned) = self.whose_turn(structure, &checks)?;
        let round = Mutex::new(Round {
            checks,
            flushed: clock::now(),
            failure: None,
            bad: Vec::new(),
            blocks: 0,
            bytes: 0,
            packs: 0,
            pack_bytes: 0,
            gone: condemned,
        });
        self.options
            .begin("verify", turn.iter().map(|(_, size)| size).sum());
        in_parallel(self.threads, 1, &turn, &|| self.is_late(), &|packs| {
            packs
                .iter()
                .try_for_each(|(pack, size)| self.read_pack(*pack, *size, &round))
        })?;
        let mut round = round
            .into_inner()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        self.found.append(&mut round.bad);
        // What was found is to outlive a kill before the packs count as checked.
        if let Err(error) = self.repo.quarantine(&self.found) {
            round.failure.get_or_insert(error);
        }
        let exists = |pack| structure.packs.contains_key(&pack);
        let written = match round.failure {
            Some(error) => Err(error),
            None => round.checks.fold(store, &exists),
        };
        self.note(
            "which packs were checked is not written down, the next run begins with them again",
            written,
        );
        report.checked_blocks = round.blocks;
        report.checked_bytes = round.bytes;
        let last: Vec<Option<Timestamp>> = structure
            .packs
            .keys()
            .map(|pack| round.checks.last(*pack))
            .collect();
        let sizes = structure.packs.values().map(|file| file.size);
        let packs = PackReport {
            checked: round.packs,
            checked_bytes: round.pack_bytes,
            all: structure.packs.len() as u64,
            all_bytes: sizes.sum(),
            never: last.iter().filter(|at| at.is_none()).count() as u64,
            oldest: last.into_iter().flatten().min(),
        };
        report.complete = packs.checked + round.gone >= packs.all;
        report.packs = Some(packs);
        Ok(())
    }

    /// The packs of this run, in order: the never checked ones, then the oldest. And how many are left out since they are about
    /// to be deleted.
    fn whose_turn(
        &self,
        structure: &Structure,
        checks: &Checks,
    ) -> Result<(Vec<(ObjectId, u64)>, u64)> {
        let condemned = match Condemned::read(self.repo.store()) {
            Ok(condemned) => condemned.packs,
            Err(Error::Corrupt { .. } | Error::Unsupported(_)) => HashSet::new(),
            Err(error) => return Err(error),
        };
        let before = self
            .options
            .older_than
            .and_then(|age| clock::utc_now().checked_sub(age).ok());
        let files = structure
            .packs
            .iter()
            .map(|(pack, file)| (*pack, file.size));
        let mut turn: Vec<(ObjectId, u64)> = files
            .filter(|(pack, _)| !condemned.contains(pack))
            .filter(|(pack, _)| {
                let last = checks.last(*pack);
                before.is_none_or(|before| last.is_none_or(|last| last <= before))
            })
            .collect();
        turn.sort_unstable_by_key(|(pack, _)| (checks.last(*pack), *pack));
        if let Some(share) = self.options.share {
            let all: u64 = structure.packs.values().map(|file| file.size).sum();
            keep_share(&mut turn, all, share);
        }
        let condemned = structure
            .packs
            .keys()
            .filter(|pack| condemned.contains(pack));
        Ok((turn, condemned.count() as u64))
    }

    fn read_pack(&self, id: ObjectId, size: u64, round: &Mutex<Round>) -> Result<()> {
        let store = self.repo.store();
        let object = pack::name(id);
        let mut reader = Places::new(self.repo, Some(self.options));
        let read = match pack::open(store, &object) {
            Ok(mut opened) => {
                let places = &mut opened.entries;
                places.retain(|(id, location)| !self.quarantine.has(*id, location.pack));
                reader.read(places)
            }
            // Said already; its blocks were read by the index.
            Err(Error::Corrupt { .. } | Error::Unsupported(_)) => Ok(Vec::new()),
            Err(error) => Err(error),
        };
        let mut bad = match read {
            Ok(bad) => bad,
            // Pruned meanwhile.
            Err(error) if error.is_not_found() => {
                lock(round).gone += 1;
                return Ok(());
            }
            // The next run reads it, and finds the same.
            Err(Error::Interrupted) => return Ok(()),
            Err(error) => return Err(error),
        };
        // Its list and its frame.
        self.options.done(size.saturating_sub(reader.told));
        let mut round = lock(round);
        round.bad.append(&mut bad);
        round.blocks += reader.blocks;
        round.bytes += reader.bytes;
        round.packs += 1;
        round.pack_bytes += size;
        round.checks.done(id, clock::utc_now());
        if clock::now().duration_since(round.flushed) >= self.options.save_every.unwrap_or(SAVE) {
            round.flushed = clock::now();
            // What was found is to outlive a kill before the packs count as checked.
            let bad = std::mem::take(&mut round.bad);
            let recorded = self.repo.quarantine(&bad);
            round.bad = bad;
            let written = recorded.and_then(|()| round.checks.flush(store));
            round.failure = written.err();
        }
        Ok(())
    }
}

/// Keeps the first packs that together have this share of all bytes; at least one.
fn keep_share(turn: &mut Vec<(ObjectId, u64)>, all: u64, percent: f64) {
    // A share of bytes needs no exactness.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a part of a number of bytes, rounded"
    )]
    let wanted = (all as f64 * (percent / 100.0).clamp(0.0, 1.0)).ceil() as u64;
    let mut sum = 0;
    let count = turn
        .iter()
        .take_while(|(_, size)| {
            let more = sum < wanted;
            sum += size;
            more
        })
        .count();
    turn.truncate(count.max(1));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_shares_of_a_tenth_are_all() {
        let packs: Vec<(ObjectId, u64)> = (0..37)
            .map(|n| (ObjectId::from_bytes([n; 16]), 1000 + u64::from(n) * 77))
            .collect();
        let all = packs.iter().map(|(_, size)| size).sum();
        let mut left = packs;
        for _ in 0..10 {
            let mut turn = left.clone();
            keep_share(&mut turn, all, 10.0);
            left.drain(..turn.len());
        }
        assert!(left.is_empty(), "{left:?}");
        let mut one = vec![(ObjectId::from_bytes([1; 16]), 5)];
        keep_share(&mut one, 5, 0.0);
        assert_eq!(one.len(), 1);
    }
}
