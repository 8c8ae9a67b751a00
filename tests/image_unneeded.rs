//! Damage to what nobody needs is told apart from damage that hurts, and a prune takes it away; and of two copies it keeps the
//! one whose pack can be read.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by it, and its files need not be durable"
)]

mod image_common;

use std::collections::BTreeSet;
use std::path::PathBuf;

use forerun::image::{
    Manifest, Need, PruneOptions, PruneReport, Repository, Session, VerifyOptions, VerifyReport,
};
use image_common::{BLOCK, Bench, backup_of, copy, id_of, mixed, restore};
use serde_json::json;

const BLOCKS: u64 = 8;

/// A block that does not compress, of its own.
fn noise(seed: u64) -> Vec<u8> {
    let words = (0..BLOCK as u64 / 8).map(|word| mixed(seed << 32 | word));
    words.flat_map(u64::to_le_bytes).collect()
}

fn disk(seeds: impl IntoIterator<Item = u64>) -> Vec<u8> {
    seeds.into_iter().flat_map(noise).collect()
}

fn all() -> BTreeSet<u64> {
    (0..BLOCKS).collect()
}

fn again(bench: &Bench) -> Repository {
    Repository::open(&bench.path()).unwrap()
}

fn verify(bench: &Bench) -> VerifyReport {
    again(bench).verify(&VerifyOptions::default()).unwrap()
}

fn prune(bench: &Bench) -> PruneReport {
    let options = PruneOptions::default();
    again(bench).prune(&options, &|_, _, _| ()).unwrap()
}

fn packs(bench: &Bench) -> BTreeSet<PathBuf> {
    let objects = bench.objects("packs/").into_iter();
    objects.map(|object| bench.path().join(object)).collect()
}

fn change(path: &PathBuf, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).unwrap();
    change(&mut bytes);
    // Anew, since readers may have the old one open.
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// Makes a stored block bad, wherever it is.
fn spoil(bench: &Bench, plain: &[u8]) {
    let id = *id_of(plain).as_bytes();
    let mut found = false;
    for path in packs(bench) {
        let bytes = std::fs::read(&path).unwrap();
        let begin = bytes.windows(4 + 4 + 32);
        let at = begin
            .enumerate()
            .find(|(_, entry)| entry.starts_with(b"fBlk") && entry[8..] == id);
        if let Some((at, _)) = at {
            change(&path, |bytes| bytes[at + 52 + 100] ^= 1);
            found = true;
        }
    }
    assert!(found, "the block is nowhere");
}

/// A point of eight blocks, of which another point, that is gone, had one more.
fn with_a_dead_block() -> (Bench, Manifest, Vec<u8>) {
    let bench = Bench::new(0);
    let old = disk([1, 2, 3, 4, 5, 6, 7, 99]);
    let gone = backup_of(&bench.repo, "a", &old, &all(), None).unwrap();
    let kept = disk([1, 2, 3, 4, 5, 6, 7, 1]);
    let point = backup_of(&bench.repo, "b", &kept, &all(), None).unwrap();
    bench.repo.withdraw(gone.id).unwrap();
    prune(&bench);
    (bench, point, kept)
}

#[test]
fn a_bad_block_that_nobody_needs_is_no_error_and_goes_with_a_prune() {
    let (bench, point, kept) = with_a_dead_block();
    spoil(&bench, &noise(99));
    for _ in 0..2 {
        let damage = verify(&bench).damage;
        assert_eq!(damage.len(), 1, "{damage:?}");
        assert_eq!((damage[0].need, damage[0].hurts.len()), (Need::Nobody, 0));
        let checked = again(&bench).check(Some(&[point.id]), 2).unwrap().damage;
        assert_eq!(checked.len(), 1);
        assert_eq!(checked[0].need, Need::Nobody);
    }
    let report = prune(&bench);
    assert_eq!((report.repacked.packs, report.damaged.len()), (1, 0));
    let report = verify(&bench);
    assert_eq!((&*report.damage, report.notes.len()), (&[][..], 0));
    assert_eq!(bench.objects("quarantine/"), Vec::<String>::new());
    assert!(restore(&again(&bench), &point.disks[0]).unwrap() == kept);
    // It is not done again and again.
    assert_eq!(prune(&bench).repacked.packs, 0);
}

#[test]
fn what_is_live_beside_it_and_bad_as_well_keeps_the_pack() {
    let (bench, point, _) = with_a_dead_block();
    // Those that are in one pack with it.
    spoil(&bench, &noise(99));
    spoil(&bench, &noise(7));
    let damage = verify(&bench).damage;
    assert_eq!(damage.len(), 1, "{damage:?}");
    assert_eq!(damage[0].need, Need::Somebody);
    assert_eq!(damage[0].hurts, [(point.id, Some("vda".into()))].into());
    let before = packs(&bench);
    assert_eq!(prune(&bench).rewritten_bytes, 0);
    assert_eq!(packs(&bench), before);
}

#[test]
fn a_pack_that_is_missing_or_whose_list_is_damaged_is_nobodys_when_all_in_it_is() {
    for missing in [true, false] {
        let mut bench = Bench::new(0);
        let gone = backup_of(&bench.repo, "a", &disk(20..28), &all(), None).unwrap();
        let dead = packs(&bench);
        bench.disk = disk(1..9);
        bench.dirty = all();
        let point = bench.backup();
        bench.repo.withdraw(gone.id).unwrap();
        for path in &dead {
            if missing {
                std::fs::remove_file(path).unwrap();
            } else {
                change(path, |bytes| bytes.truncate(bytes.len() - 1));
            }
        }
        let damage = verify(&bench).damage;
        assert_eq!(damage.len(), dead.len(), "{damage:?}");
        assert!(damage.iter().all(|damage| damage.need == Need::Nobody));
        prune(&bench);
        assert_eq!(verify(&bench).damage, []);
        assert!(restore(&again(&bench), &point.disks[0]).unwrap() == bench.disk);
    }
}

#[test]
fn a_block_beneath_a_newer_layer_and_one_of_a_session_are_told_apart() {
    let mut bench = Bench::new(4 * BLOCK);
    bench.write(0, &disk([1, 2, 3, 4]));
    let first = bench.backup();
    bench.write(0, &noise(5));
    bench.backup();
    bench.repo.withdraw(first.id).unwrap();
    spoil(&bench, &noise(1));
    let damage = verify(&bench).damage;
    assert_eq!((damage.len(), damage[0].need), (1, Need::Nobody));
    // As soon as a session proves it, it is needed.
    let session = Session::create(&bench.repo, "other", &json!({})).unwrap();
    copy(&bench.repo, &session, &noise(6), &[0]).unwrap();
    spoil(&bench, &noise(6));
    let damage = verify(&bench).damage;
    let needs: Vec<Need> = damage.iter().map(|damage| damage.need).collect();
    assert_eq!(needs.len(), 2);
    assert!(needs.contains(&Need::Somebody) && needs.contains(&Need::Nobody));
}

#[test]
fn of_two_copies_a_prune_keeps_the_one_whose_pack_can_be_read() {
    // Which one counts is decided by the random names of the packs: both come about.
    for round in 0..8_u64 {
        let bench = Bench::new(0);
        let content = disk(1..=BLOCKS);
        let point = backup_of(&bench.repo, "a", &content, &all(), None).unwrap();
        let first = packs(&bench);
        // Two hosts stored the same at the same time.
        let elsewhere = Bench::new(0);
        let mut writer = bench.repo.pack_writer("other");
        for plain in content.chunks(BLOCK) {
            let encoded = elsewhere.repo.encode(plain).unwrap();
            writer.put(encoded).unwrap();
        }
        writer.seal().unwrap();
        let second: BTreeSet<PathBuf> = packs(&bench).difference(&first).cloned().collect();
        assert_eq!(second.len(), 1);
        let (hurt, sound) = if round % 2 == 0 {
            (first, second)
        } else {
            (second, first)
        };
        for path in &hurt {
            change(path, |bytes| {
                let at = bytes.len() - 48 - 20;
                bytes[at] ^= 1;
            });
        }
        prune(&bench);
        assert_eq!(packs(&bench), sound);
        assert_eq!(verify(&bench).damage, []);
        // The list of what is left is all that is needed.
        for object in bench.objects("index/") {
            std::fs::remove_file(bench.path().join(object)).unwrap();
        }
        assert_eq!(again(&bench).rebuild_index().unwrap().damaged.len(), 0);
        assert!(restore(&again(&bench), &point.disks[0]).unwrap() == content);
    }
}
