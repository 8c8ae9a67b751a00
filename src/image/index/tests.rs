//! The index against a model of it: whatever is published, merged, taken out or cut off by a crash, every location that was
//! published and whose pack was not taken out is found.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests fail by it"
)]

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::super::codec::Codec;
use super::super::condemned::Condemned;
use super::super::memory::{Fate, Memory, Objects};
use super::super::quarantine::{Bad, Quarantine};
use super::*;

/// Entries of a part here: a merge makes several.
const SMALL_PART: u64 = 100;

/// Every block with the packs that it is in.
type Model = BTreeMap<BlockId, BTreeSet<ObjectId>>;

fn block(number: u16) -> BlockId {
    BlockId::of(&number.to_le_bytes())
}

fn pack_id(number: u8) -> ObjectId {
    ObjectId::from_bytes([number; 16])
}

fn entry(number: u16, pack: u8) -> (BlockId, Location) {
    let location = Location {
        pack: pack_id(pack),
        offset: u32::from(number) * 100,
        stored: 7,
        plain: 100,
        codec: Codec::Lz4,
    };
    (block(number), location)
}

fn entries(blocks: std::ops::Range<u16>, pack: u8) -> Vec<(BlockId, Location)> {
    blocks.map(|number| entry(number, pack)).collect()
}

fn store() -> Memory {
    Memory::new(Objects::new(), None, Fate::Lost)
}

fn index(store: &Memory) -> Index {
    Index::with_parts(Arc::new(store.clone()), SMALL_PART)
}

fn add(model: &mut Model, entries: &[(BlockId, Location)]) {
    for (id, location) in entries {
        model.entry(*id).or_default().insert(location.pack);
    }
}

fn take_out(model: &mut Model, packs: &HashSet<ObjectId>) {
    for found in model.values_mut() {
        found.retain(|pack| !packs.contains(pack));
    }
    model.retain(|_, packs| !packs.is_empty());
}

/// What a sweep gives.
fn swept(index: &Index) -> Model {
    let mut model = Model::new();
    index
        .sweep(&mut |id, locations| {
            let packs: BTreeSet<_> = locations.iter().map(|location| location.pack).collect();
            assert_eq!(packs.len(), locations.len(), "a location twice");
            assert!(model.insert(id, packs).is_none(), "a block twice");
            Ok(())
        })
        .unwrap();
    model
}

fn found(index: &Index, id: BlockId) -> BTreeSet<ObjectId> {
    let all = index.locate_all(id).unwrap();
    all.iter().map(|(location, _)| location.pack).collect()
}

/// Whether the index is the model; `more` allows entries that a crash left.
fn check(index: &Index, model: &Model, more: bool, case: &str) {
    for (id, packs) in model {
        let found = found(index, *id);
        assert!(found.is_superset(packs), "{case}: {id} is not found");
        assert!(more || &found == packs, "{case}: {id} is where it is not");
        assert!(index.locate(*id).unwrap().is_some(), "{case}: {id}");
    }
    if !more {
        assert_eq!(&swept(index), model, "{case}");
        assert_eq!(index.locate(block(60_000)).unwrap(), None, "{case}");
    }
}

/// Nine groups with copies of blocks between them, merged into parts.
fn filled(index: &Index) -> Model {
    let mut model = Model::new();
    for pack in 0..12 {
        let first = u16::from(pack) * 50;
        let entries = entries(first..first + 130, pack);
        add(&mut model, &entries);
        index.publish(entries).unwrap();
    }
    model
}

#[test]
fn parts_of_a_group_have_one_list_of_packs_and_all_copies_of_a_block() {
    let store = store();
    let index = index(&store);
    let model = filled(&index);
    check(&index, &model, false, "filled");
    let snapshot = index.fresh().unwrap();
    let groups = snapshot.groups();
    assert!(groups.len() <= GROUPS);
    let parts = &groups[0].runs;
    assert!(parts.len() > 2, "{}", parts.len());
    for run in parts {
        assert!(run.entries < SMALL_PART + 12);
        assert!(Arc::ptr_eq(&run.packs, &parts[0].packs));
        let others = parts.iter().filter(|other| other.covers(run.first));
        assert_eq!(others.count(), 1);
    }
    assert!(index.audit().unwrap().damaged.is_empty());
}

#[test]
fn many_copies_of_a_block_cross_pages() {
    let store = store();
    let index = index(&store);
    let mut copies: Vec<_> = (0..250).map(|pack| entry(1, pack)).collect();
    copies.extend(entries(2..40, 3));
    let mut model = Model::new();
    add(&mut model, &copies);
    index.publish(copies).unwrap();
    check(&index, &model, false, "published");
    let packs = (0..249).map(pack_id).collect();
    index.rewrite_without(&packs).unwrap();
    take_out(&mut model, &packs);
    check(&index, &model, false, "rewritten");
}

#[test]
fn excluded_locations_are_the_last_to_be_used() {
    let store = store();
    let index = index(&store);
    index.publish(entries(0..20, 1)).unwrap();
    index.publish(entries(10..20, 2)).unwrap();
    assert_eq!(index.generation().unwrap(), 0);
    Condemned::put(&store, 1, &[pack_id(1)].into(), "a test").unwrap();
    // The snapshot does not know yet.
    assert!(index.locate(block(3)).unwrap().is_some());
    index.refresh().unwrap();
    assert_eq!(index.generation().unwrap(), 1);
    assert_eq!(index.locate(block(3)).unwrap(), None);
    assert_eq!(index.locate_stored(block(3)).unwrap().pack, pack_id(1));
    assert_eq!(index.locate(block(13)).unwrap().unwrap().pack, pack_id(2));
    let bad = Bad {
        id: block(13),
        pack: pack_id(2),
        what: "a test".into(),
    };
    Quarantine::add(&store, &[bad]).unwrap();
    index.refresh().unwrap();
    assert!(index.is_quarantined(block(13)).unwrap());
    assert!(!index.is_quarantined(block(14)).unwrap());
    assert_eq!(index.locate(block(13)).unwrap(), None);
    assert!(index.locate(block(14)).unwrap().is_some());
    let all = index.locate_all(block(13)).unwrap();
    assert!(all.iter().all(|(_, excluded)| *excluded) && all.len() == 2);
    // An empty head: the packs were spared. The quarantine stays.
    Condemned::put(&store, 2, &HashSet::new(), "a test").unwrap();
    Condemned::drop_older(&store, 2).unwrap();
    index.refresh().unwrap();
    assert_eq!(index.generation().unwrap(), 2);
    assert_eq!(index.locate(block(13)).unwrap().unwrap().pack, pack_id(1));
}

#[test]
fn a_damaged_condemned_list_excludes_all_and_hides_nothing_from_readers() {
    let store = store();
    let index = index(&store);
    index.publish(entries(0..20, 1)).unwrap();
    store.put("condemned/0000000000000003", b"damaged").unwrap();
    index.refresh().unwrap();
    assert_eq!(index.generation().unwrap(), 3);
    let error = index.locate(block(3)).unwrap_err();
    assert!(error.to_string().starts_with("condemned/"), "{error}");
    assert_eq!(index.locate(block(99)).unwrap(), None);
    assert_eq!(index.locate_stored(block(3)).unwrap().pack, pack_id(1));
}

#[test]
fn who_deletes_runs_waits_for_the_lock_and_then_says_who_has_it() {
    let store = store();
    let index = index(&store);
    index.publish(entries(0..20, 1)).unwrap();
    let held = store.lock("index", "a merge").unwrap();
    let error = index.rewrite_without(&[pack_id(1)].into()).unwrap_err();
    assert!(matches!(error, Error::Busy { .. }), "{error}");
    // A writer does not wait.
    for pack in 2..12 {
        index.publish(entries(0..20, pack)).unwrap();
    }
    assert!(index.fresh().unwrap().groups().len() > GROUPS);
    drop(held);
    index.publish(entries(0..20, 12)).unwrap();
    assert!(index.fresh().unwrap().groups().len() <= GROUPS);
    // What writers left, a prune merges.
    let held = store.lock("index", "a merge").unwrap();
    for pack in 13..23 {
        index.publish(entries(0..20, pack)).unwrap();
    }
    drop(held);
    index.merge_all().unwrap();
    assert!(index.fresh().unwrap().groups().len() <= GROUPS);
    for pack in 2..23 {
        let places = index.locate_all(entries(7..8, pack)[0].0).unwrap();
        assert!(places.iter().any(|(place, _)| place.pack == pack_id(pack)));
    }
}

#[test]
fn a_flipped_byte_of_a_run_hides_no_block_and_verify_sees_it() {
    let sound = store();
    index(&sound).publish(entries(0..100, 1)).unwrap();
    let (name, bytes) = sound.objects().pop_first().unwrap();
    for position in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[position] ^= 1 << (position % 8);
        let objects = [(name.clone(), bad)].into();
        let store = Memory::new(objects, None, Fate::Lost);
        let index = index(&store);
        for number in [0, 50, 99] {
            match index.locate(block(number)) {
                Ok(location) => assert_eq!(location, Some(entry(number, 1).1), "{position}"),
                Err(error) => assert!(error.is_corrupt(), "{position}: {error}"),
            }
        }
        let damage = index.audit().unwrap().damaged;
        assert_eq!(damage.len(), 1, "{position}");
    }
}

#[test]
fn entries_in_any_order_become_one_group() {
    let store = store();
    let mut model = Model::new();
    let mut spill = Spill::with_limits(&store, SMALL_PART, 90, 3);
    for number in 0..40_u16 {
        let first = number * 7 % 40 * 31;
        let entries = entries(first..first + 60, number as u8);
        add(&mut model, &entries);
        spill.add(entries).unwrap();
    }
    let count: usize = model.values().map(BTreeSet::len).sum();
    assert_eq!(spill.finish().unwrap(), count as u64);
    let index = index(&store);
    assert_eq!(index.fresh().unwrap().groups().len(), 1);
    assert!(index.fresh().unwrap().runs.len() > 10);
    check(&index, &model, false, "spilled");
}

/// What crashes, on an index that [`filled`] made.
fn work(index: &Index, part: u8) -> Result<()> {
    match part {
        // Twelve groups were seven; these are enough for the next merge.
        0 => (20..26).try_for_each(|pack| index.publish(entries(0..30, pack))),
        1 => index.rewrite_without(&[pack_id(2), pack_id(7)].into()),
        _ => {
            let store = &*index.store;
            let mut spill = Spill::with_limits(store, SMALL_PART, 50, 2);
            (30..35).try_for_each(|pack| spill.add(entries(100..140, pack)))?;
            spill.finish()?;
            index.mark_stale();
            Ok(())
        }
    }
}

#[test]
fn a_crash_at_any_operation_hides_no_block() {
    let before = store();
    let model = filled(&index(&before));
    for part in 0..3 {
        let whole = Memory::new(before.objects(), None, Fate::Lost);
        work(&index(&whole), part).unwrap();
        assert!(whole.operations() > 5);
        for at in 1..=whole.operations() {
            for fate in [Fate::Lost, Fate::Done] {
                let case = format!("part {part}: {fate:?} at {at} of {}", whole.operations());
                let store = Memory::new(before.objects(), Some(at), fate);
                // A merge that fails is none of the writer's business.
                work(&index(&store), part).ok();
                let after = Memory::new(store.objects(), None, fate);
                let index = index(&after);
                let mut model = model.clone();
                if part == 1 {
                    take_out(&mut model, &[pack_id(2), pack_id(7)].into());
                }
                check(&index, &model, true, &case);
                work(&index, part).unwrap();
                match part {
                    0 => (20..26).for_each(|pack| add(&mut model, &entries(0..30, pack))),
                    1 => {}
                    _ => (30..35).for_each(|pack| add(&mut model, &entries(100..140, pack))),
                }
                check(&index, &model, false, &case);
            }
        }
    }
}

#[test]
fn merging_bounds_the_runs_and_does_not_rewrite_the_big_ones_each_time() {
    let mut sizes: Vec<u64> = Vec::new();
    let (mut written, mut total) = (0_u64, 0_u64);
    for round in 0..3000_u64 {
        let new = 1000 + round % 700;
        total += new;
        sizes.push(new);
        sizes.sort_by_key(|size| Reverse(*size));
        let count = choose_count(&sizes, u64::MAX);
        if count > 0 {
            let merged: u64 = sizes.drain(sizes.len() - count..).sum();
            written += merged;
            sizes.push(merged);
            sizes.sort_by_key(|size| Reverse(*size));
        }
        assert!(sizes.len() <= GROUPS, "{sizes:?}");
    }
    assert!(written < total * 12, "{written} of {total}");
}

/// What a writer merges stays in proportion also beyond what it may merge at once, and only full groups remain.
#[test]
fn without_a_prune_groups_grow_full_one_by_one_and_nothing_is_merged_again_and_again() {
    const LIMIT: u64 = 1 << 20;
    let mut sizes: Vec<u64> = Vec::new();
    let (mut total, mut written) = (0, 0);
    for step in 0..40_000_u64 {
        let new = 100 + step * 7919 % 1500;
        total += new;
        sizes.push(new);
        sizes.sort_by_key(|size| Reverse(*size));
        let count = choose_count(&sizes, LIMIT);
        if count > 0 {
            let merged: u64 = sizes.drain(sizes.len() - count..).sum();
            assert!(merged <= LIMIT);
            written += merged;
            sizes.push(merged);
            sizes.sort_by_key(|size| Reverse(*size));
        }
        let full = sizes.iter().filter(|size| **size >= LIMIT / 2).count();
        assert!(sizes.len() - full <= GROUPS, "{sizes:?}");
    }
    assert!(total > 30 * LIMIT);
    assert!(sizes.len() as u64 <= 2 * total / LIMIT + 9, "{sizes:?}");
    assert!(written < total * 20, "{written} of {total}");
}

#[test]
fn a_writer_does_not_merge_for_long() {
    let sizes = [
        1 << 27,
        1 << 26,
        1 << 26,
        1 << 26,
        1 << 26,
        1 << 26,
        1 << 26,
        1 << 26,
        9,
    ];
    assert_eq!(choose_count(&sizes, QUICK_MERGE), 0);
    assert!(choose_count(&sizes, u64::MAX) >= 2);
}

#[derive(Debug, Clone)]
enum Step {
    Publish { first: u16, count: u16, pack: u8 },
    Without(Vec<u8>),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        9 => (0..300_u16, 1..200_u16, 0..40_u8)
            .prop_map(|(first, count, pack)| Step::Publish { first, count, pack }),
        1 => proptest::collection::vec(0..40_u8, 1..20).prop_map(Step::Without),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn whatever_happens_the_index_is_its_model(
        steps in proptest::collection::vec(step(), 1..40), part in 1..300_u64
    ) {
        let store = store();
        let index = Index::with_parts(Arc::new(store.clone()), part);
        let mut model = Model::new();
        for step in steps {
            match step {
                Step::Publish { first, count, pack } => {
                    let entries = entries(first..first + count, pack);
                    add(&mut model, &entries);
                    index.publish(entries).unwrap();
                }
                Step::Without(packs) => {
                    let packs = packs.into_iter().map(pack_id).collect();
                    index.rewrite_without(&packs).unwrap();
                    take_out(&mut model, &packs);
                }
            }
        }
        prop_assert!(index.fresh().unwrap().groups().len() <= GROUPS);
        prop_assert!(index.audit().unwrap().damaged.is_empty());
        check(&index, &model, false, "the model");
        check(&Index::with_parts(Arc::new(store.clone()), part), &model, false, "opened anew");
    }
}
