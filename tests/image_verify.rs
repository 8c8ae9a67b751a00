//! The round of verification through all packs, the quarantine, and healing, on the store.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by it, and its files need not be durable"
)]

mod image_common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use forerun::image::{Encoded, Error, Manifest, Repository, Session, VerifyOptions, VerifyReport};
use image_common::{BLOCK, Bench, id_of, restore};
use serde_json::{Value, json};

/// A block that does not compress, of its own.
fn noise(seed: u32) -> Vec<u8> {
    let mut state = u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = vec![0; BLOCK];
    for word in bytes.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    bytes
}

/// A repository of this many points, each with a pack of one block of its own; the points and what they hold.
fn rounds(count: u32) -> (Bench, Vec<(Manifest, Vec<u8>)>) {
    let mut bench = Bench::new(count as usize * BLOCK);
    let mut points = Vec::new();
    for number in 0..count {
        bench.write(number as usize * BLOCK, &noise(number + 1));
        points.push((bench.backup(), bench.disk.clone()));
    }
    (bench, points)
}

fn verify(repo: &Repository, options: &VerifyOptions) -> VerifyReport {
    let report = repo.verify(options).unwrap();
    assert_eq!(report.notes, Vec::<String>::new());
    report
}

fn share(percent: f64) -> VerifyOptions {
    VerifyOptions {
        share: Some(percent),
        ..VerifyOptions::default()
    }
}

/// When which pack was checked, as the repository says.
fn checked(bench: &Bench) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for object in bench.objects("checks/") {
        let bytes = bench.repo.store().get(&object).unwrap();
        let line = bytes.iter().position(|byte| *byte == b'\n').unwrap();
        let record: Value = serde_json::from_slice(&bytes[line + 1..]).unwrap();
        for group in record["checked"].as_array().unwrap() {
            for pack in group["packs"].as_array().unwrap() {
                let at = group["at"].as_str().unwrap().to_owned();
                found.insert(pack.as_str().unwrap().to_owned(), at);
            }
        }
    }
    found
}

/// The file of the pack that has this block as its first, and where the block's stored bytes begin in it.
fn pack_of(bench: &Bench, plain: &[u8]) -> PathBuf {
    let id = *id_of(plain).as_bytes();
    let packs = bench.objects("packs/").into_iter();
    let mut paths = packs.map(|object| bench.path().join(object));
    paths
        .find(|path| std::fs::read(path).unwrap()[24..56] == id)
        .unwrap()
}

const STORED: usize = 16 + 52;

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    // Anew, since readers may have the old one open.
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// Another process.
fn again(bench: &Bench) -> Repository {
    Repository::open(&bench.path()).unwrap()
}

#[test]
fn shares_go_round_through_all_packs_the_oldest_first() {
    let (bench, _) = rounds(6);
    let mut known = BTreeMap::new();
    for done in 1..=6_u64 {
        // Less than one pack is one pack.
        let report = verify(&bench.repo, &share(1.0));
        let packs = report.packs.unwrap();
        assert_eq!((packs.checked, packs.never, packs.all), (1, 6 - done, 6));
        assert!(!report.complete);
        let now = checked(&bench);
        assert_eq!(now.len() as u64, done, "one more, and none twice");
        known = now;
    }
    assert_eq!(bench.objects("checks/").len(), 1, "all are in one object");
    // From now on the one goes first that was not looked at for longest.
    for _ in 0..6 {
        let report = verify(&bench.repo, &share(1.0));
        let now = checked(&bench);
        let changed: Vec<_> = now
            .iter()
            .filter(|(pack, at)| &known[*pack] != *at)
            .collect();
        let oldest = known.iter().min_by_key(|(_, at)| (*at).clone()).unwrap();
        assert_eq!(changed.len(), 1);
        assert_eq!(changed[0].0, oldest.0);
        let oldest = now.values().min().unwrap();
        assert_eq!(&report.packs.unwrap().oldest.unwrap().to_string(), oldest);
        known = now;
    }
    // A new pack is the first of all.
    let mut bench = bench;
    bench.write(0, &noise(99));
    bench.backup();
    assert_eq!(verify(&bench.repo, &share(1.0)).packs.unwrap().never, 0);
    let young = VerifyOptions {
        older_than: Some(Duration::from_secs(3600)),
        ..VerifyOptions::default()
    };
    let report = verify(&bench.repo, &young);
    assert_eq!((report.packs.unwrap().checked, report.complete), (0, false));
    let report = verify(&bench.repo, &VerifyOptions::default());
    assert_eq!((report.packs.unwrap().checked, report.complete), (7, true));
}

#[test]
fn a_killed_run_is_gone_on_with_and_one_without_time_does_nothing() {
    let (bench, points) = rounds(6);
    let late = VerifyOptions {
        max_duration: Some(Duration::ZERO),
        ..VerifyOptions::default()
    };
    let report = verify(&bench.repo, &late);
    assert_eq!((report.complete, report.checked_blocks), (false, 0));
    assert_eq!(report.packs.unwrap().never, 6);
    // It dies at the fourth pack, and its blocks are bad from the first on.
    for (number, _) in points.iter().enumerate() {
        let seed = u32::try_from(number).unwrap() + 1;
        flip(&pack_of(&bench, &noise(seed)), STORED);
    }
    let reads = AtomicU32::new(0);
    let dies = VerifyOptions {
        threads: 1,
        save_every: Some(Duration::ZERO),
        pace: Some(Arc::new(move |_| {
            assert!(reads.fetch_add(1, Ordering::Relaxed) < 3, "killed");
        })),
        ..VerifyOptions::default()
    };
    again(&bench).verify(&dies).unwrap_err();
    assert_eq!(checked(&bench).len(), 3);
    let lost = again(&bench).lost_blocks().unwrap();
    assert_eq!(lost.len(), 3, "what it found is known");
    let report = verify(&again(&bench), &share(50.0));
    assert_eq!(report.packs.unwrap().never, 0);
    assert_eq!(report.damage.len(), 6, "{report:?}");
    assert_eq!(again(&bench).lost_blocks().unwrap().len(), 6);
}

#[test]
fn an_interrupted_run_tells_what_it_found_and_writes_down_how_far_it_was() {
    let (bench, _) = rounds(6);
    for seed in 1..=6 {
        flip(&pack_of(&bench, &noise(seed)), STORED);
    }
    let flag = Arc::new(AtomicBool::new(false));
    let (reads, ends) = (AtomicU32::new(0), Arc::clone(&flag));
    let options = VerifyOptions {
        threads: 1,
        interrupted: Some(Arc::clone(&flag)),
        pace: Some(Arc::new(move |_| {
            if reads.fetch_add(1, Ordering::Relaxed) == 2 {
                ends.store(true, Ordering::Relaxed);
            }
        })),
        ..VerifyOptions::default()
    };
    let report = verify(&again(&bench), &options);
    assert!(report.interrupted && !report.complete);
    assert_eq!(report.damage.len(), 3, "{report:?}");
    assert_eq!(checked(&bench).len(), 3);
    assert_eq!(again(&bench).lost_blocks().unwrap().len(), 3);
    // The rest is the next run's.
    let report = verify(&again(&bench), &share(50.0));
    assert_eq!((report.packs.unwrap().never, report.damage.len()), (0, 6));
    // One that is interrupted at once has nothing to tell.
    let error = again(&bench).verify(&options).unwrap_err();
    assert!(matches!(error, Error::Interrupted), "{error}");
}

#[test]
fn what_is_done_adds_up_to_what_there_is_to_do() {
    let (bench, points) = rounds(5);
    for chosen in [None, Some(vec![points[3].0.id])] {
        let told: Arc<Mutex<BTreeMap<String, (u64, u64)>>> = Arc::default();
        let (phase, shared) = (Mutex::new(String::new()), Arc::clone(&told));
        let progress = move |name: &str, done: u64, total: u64| {
            let mut phase = phase.lock().unwrap();
            if !name.is_empty() {
                name.clone_into(&mut phase);
            }
            let mut shared = shared.lock().unwrap();
            let known = shared.entry(phase.clone()).or_default();
            known.0 += done;
            known.1 += total;
        };
        let options = VerifyOptions {
            points: chosen,
            progress: Some(Arc::new(progress)),
            ..VerifyOptions::default()
        };
        verify(&bench.repo, &options);
        let (done, total) = told.lock().unwrap()["verify"];
        assert!(total > 4 * BLOCK as u64);
        assert_eq!(done, total);
    }
}

#[test]
fn packs_that_are_gone_fall_out_of_what_is_known() {
    let (bench, _) = rounds(3);
    verify(&bench.repo, &VerifyOptions::default());
    let gone = pack_of(&bench, &noise(2));
    std::fs::remove_file(&gone).unwrap();
    let repo = again(&bench);
    assert!(!verify(&repo, &VerifyOptions::default()).damage.is_empty());
    let known = checked(&bench);
    assert_eq!(known.len(), 2);
    assert!(!known.contains_key(gone.file_name().unwrap().to_str().unwrap()));
}

#[test]
fn a_bad_block_is_named_is_not_referred_to_and_heals_every_point_when_it_is_stored_anew() {
    let (mut bench, points) = rounds(3);
    let block = noise(2);
    let id = id_of(&block);
    let pack = pack_of(&bench, &block);
    flip(&pack, STORED + 100);
    let repo = again(&bench);
    assert!(repo.lost_blocks().unwrap().is_empty());
    let report = verify(&repo, &VerifyOptions::default());
    assert_eq!(report.damage.len(), 1, "{report:?}");
    let damage = &report.damage[0];
    assert!(
        damage
            .object
            .contains(pack.file_name().unwrap().to_str().unwrap())
    );
    assert!(damage.what.contains(&id.to_string()), "{damage:?}");
    let hurt: Vec<_> = damage.hurts.iter().map(|(point, _)| *point).collect();
    let mut expected = vec![points[1].0.id, points[2].0.id];
    expected.sort_unstable();
    assert_eq!(hurt, expected, "the first point does not have it");
    assert_eq!(bench.objects("quarantine/").len(), 1);
    // Once more: the same, and no second record.
    assert_eq!(verify(&repo, &VerifyOptions::default()).damage.len(), 1);
    assert_eq!(verify(&repo, &share(1.0)).damage.len(), 1);
    let of_point = VerifyOptions {
        points: Some(vec![points[1].0.id]),
        ..VerifyOptions::default()
    };
    assert_eq!(verify(&repo, &of_point).damage.len(), 1);
    assert_eq!(repo.check(None, 1).unwrap().damage.len(), 1);
    assert_eq!(bench.objects("quarantine/").len(), 1);
    let of_point = VerifyOptions {
        points: Some(vec![points[0].0.id]),
        ..VerifyOptions::default()
    };
    assert_eq!(verify(&repo, &of_point).damage, []);

    // Nobody deduplicates against it, not even against the base.
    assert_eq!(repo.lost_blocks().unwrap(), [id].into());
    for expected in [None, Some(id)] {
        let encoded = repo.encode_expecting(&block, expected).unwrap();
        assert!(matches!(encoded, Encoded::New(_)), "{encoded:?}");
    }
    bench.repo = repo;
    bench.write(BLOCK, &block);
    let healing = bench.backup();
    let repo = again(&bench);
    assert!(repo.lost_blocks().unwrap().is_empty());
    for expected in [None, Some(id)] {
        let encoded = repo.encode_expecting(&block, expected).unwrap();
        assert!(matches!(encoded, Encoded::Known(_)), "{encoded:?}");
    }
    for (point, disk) in &points {
        assert!(&restore(&repo, &point.disks[0]).unwrap() == disk);
    }
    assert!(restore(&repo, &healing.disks[0]).unwrap() == bench.disk);
    let report = verify(&repo, &VerifyOptions::default());
    assert_eq!((&*report.damage, report.healed), (&[][..], 1));
    assert_eq!(repo.check(None, 1).unwrap().damage, []);

    // The new copy rots as well: hurt again. Then the first one is repaired: all is well.
    flip(&newest_pack_of(&bench, &block, &pack), STORED);
    let report = verify(&again(&bench), &VerifyOptions::default());
    assert!(
        report.damage.iter().any(|damage| damage.hurts.len() == 3),
        "{report:?}"
    );
    assert_eq!(again(&bench).lost_blocks().unwrap(), [id].into());
    flip(&pack, STORED + 100);
    let report = verify(&again(&bench), &VerifyOptions::default());
    assert_eq!(
        (&*report.damage, report.sound_again, report.healed),
        (&[][..], 1, 1)
    );
}

fn newest_pack_of(bench: &Bench, block: &[u8], not: &Path) -> PathBuf {
    let id = *id_of(block).as_bytes();
    let packs = bench.objects("packs/").into_iter();
    let mut paths = packs.map(|object| bench.path().join(object));
    paths
        .find(|path| path != not && std::fs::read(path).unwrap()[24..56] == id)
        .unwrap()
}

#[test]
fn what_can_be_read_again_leaves_the_quarantine() {
    let (bench, _) = rounds(2);
    let pack = pack_of(&bench, &noise(1));
    flip(&pack, STORED);
    assert_eq!(
        verify(&again(&bench), &VerifyOptions::default())
            .damage
            .len(),
        1
    );
    flip(&pack, STORED);
    let report = verify(&again(&bench), &VerifyOptions::default());
    assert_eq!((&*report.damage, report.sound_again), (&[][..], 1));
    assert_eq!(bench.objects("quarantine/"), Vec::<String>::new());
}

#[test]
fn a_restore_puts_what_it_finds_into_quarantine() {
    let (bench, points) = rounds(2);
    flip(&pack_of(&bench, &noise(1)), STORED);
    restore(&again(&bench), &points[1].0.disks[0]).unwrap_err();
    let lost = again(&bench).lost_blocks().unwrap();
    assert_eq!(lost, [id_of(&noise(1))].into());
    restore(&again(&bench), &points[1].0.disks[0]).unwrap_err();
    assert_eq!(bench.objects("quarantine/").len(), 1);
}

#[test]
fn a_missing_pack_heals_when_its_blocks_are_stored_anew() {
    for check in [true, false] {
        let (mut bench, points) = rounds(3);
        std::fs::remove_file(pack_of(&bench, &noise(2))).unwrap();
        let repo = again(&bench);
        let damage = if check {
            repo.check(None, 2).unwrap().damage
        } else {
            verify(&repo, &share(1.0)).damage
        };
        assert_eq!(damage.len(), 1, "{damage:?}");
        assert_eq!(damage[0].hurts.len(), 2);
        assert_eq!(repo.lost_blocks().unwrap(), [id_of(&noise(2))].into());
        bench.repo = repo;
        bench.write(BLOCK, &noise(2));
        bench.backup();
        let repo = again(&bench);
        assert_eq!(verify(&repo, &VerifyOptions::default()).damage, []);
        assert_eq!(repo.check(None, 2).unwrap().damage, []);
        for (point, disk) in &points {
            assert!(&restore(&repo, &point.disks[0]).unwrap() == disk);
        }
    }
}

#[test]
fn a_check_finds_every_missing_or_cut_object_and_no_damage_where_there_is_none() {
    let (bench, points) = rounds(3);
    let session = Session::create(&bench.repo, "other", &json!({})).unwrap();
    session.append(&json!({ "a": 1 })).unwrap();
    session.append(&json!({ "b": 2 })).unwrap();
    let report = bench.repo.check(None, 2).unwrap();
    assert_eq!(report.damage, []);
    assert_eq!((report.points, report.packs, report.sessions), (3, 3, 1));
    assert_eq!((report.blocks, report.entries, report.layers), (3, 3, 3));
    for kind in ["points/", "maps/", "packs/", "index/", "sessions/"] {
        for object in bench.objects(kind) {
            let path = bench.path().join(&object);
            let sound = std::fs::read(&path).unwrap();
            let last = kind == "sessions/" && object.ends_with("2-record");
            for length in [None, Some(sound.len() / 2), Some(sound.len() - 1)] {
                std::fs::remove_file(&path).unwrap();
                if let Some(length) = length {
                    std::fs::write(&path, &sound[..length]).unwrap();
                }
                let report = again(&bench).check(None, 2).unwrap();
                // A point or the end of a log that is not there is not missed.
                let unseen =
                    length.is_none() && (kind == "points/" || last || object.ends_with("0-header"));
                assert_eq!(report.damage.is_empty(), unseen, "{object} {length:?}");
                if length.is_some() {
                    std::fs::remove_file(&path).unwrap();
                }
                std::fs::write(&path, &sound).unwrap();
            }
        }
    }
    // What was put into quarantine meanwhile can be read again.
    assert_eq!(again(&bench).check(None, 2).unwrap().damage, []);
    let chosen = [points[0].0.id];
    let report = again(&bench).check(Some(&chosen), 2).unwrap();
    assert_eq!((report.points, report.blocks), (1, 1));
}

#[test]
fn damage_to_what_verify_writes_is_told_and_hides_no_other() {
    let (bench, _) = rounds(2);
    flip(&pack_of(&bench, &noise(1)), STORED);
    assert_eq!(
        verify(&again(&bench), &VerifyOptions::default())
            .damage
            .len(),
        1
    );
    for kind in ["checks/", "quarantine/"] {
        let object = bench.objects(kind).remove(0);
        let path = bench.path().join(&object);
        let size = std::fs::metadata(&path).unwrap().len();
        flip(&path, usize::try_from(size).unwrap() / 2);
        let report = verify(&again(&bench), &VerifyOptions::default());
        let objects: Vec<&str> = report.damage.iter().map(|it| &*it.object).collect();
        assert_eq!(objects.len(), 2, "{objects:?}");
        assert!(objects.contains(&&*object), "{objects:?}");
        assert_eq!(again(&bench).lost_blocks().unwrap().len(), 1);
        // It has no value any more.
        let report = verify(&again(&bench), &VerifyOptions::default());
        assert_eq!(report.damage.len(), 1, "{report:?}");
    }
}
