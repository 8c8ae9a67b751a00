//! A prune that is cut off at any operation of the store, or finds no room: the repository opens, every point restores, backups go on
//! in between, and in the end nothing is left that no root needs.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by it, and the disks here are small"
)]

mod image_common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use forerun::image::{
    Error, InitOptions, Manifest, PruneOptions, PruneReport, Repository, Session, VerifyOptions,
};
use image_common::memory::{Fate, Memory, Objects};
use image_common::{BLOCK, backup_of, copy, restore};
use serde_json::json;

/// Blocks of a disk.
const BLOCKS: usize = 12;

fn open(store: &Memory) -> Repository {
    Repository::open_store(Arc::new(store.clone())).unwrap()
}

fn prune(repo: &Repository) -> Result<PruneReport, Error> {
    repo.prune(&PruneOptions::default(), &|_, _, _| ())
}

/// A disk of blocks of these values.
fn disk(values: &[u8]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| vec![*value; BLOCK])
        .collect()
}

fn all() -> BTreeSet<u64> {
    (0..BLOCKS as u64).collect()
}

/// A repository with garbage of every kind and the points that must stay.
struct Before {
    objects: Objects,
    points: Vec<(Manifest, Vec<u8>)>,
}

fn before() -> Before {
    let store = Memory::new(Objects::new(), None, Fate::Lost);
    let repo = Repository::init_store(Arc::new(store.clone()), InitOptions::default()).unwrap();
    let mut points = Vec::new();
    // One pack that stays whole, one of which only two blocks are kept by a later point, one that dies.
    let whole = disk(&[40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51]);
    points.push((backup_of(&repo, "a", &whole, &all(), None).unwrap(), whole));
    let first = disk(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
    let old = backup_of(&repo, "b", &first, &all(), None).unwrap();
    let kept = disk(&[1, 2, 40, 40, 40, 40, 40, 40, 40, 40, 40, 40]);
    points.push((backup_of(&repo, "c", &kept, &all(), None).unwrap(), kept));
    let dead = disk(&[20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31]);
    let dying = backup_of(&repo, "d", &dead, &all(), None).unwrap();
    // A session that builds on a point which is forgotten, and has proved a block.
    let session = Session::create(&repo, "e", &json!({})).unwrap();
    let base = disk(&[60; BLOCKS]);
    let based = backup_of(&repo, "f", &base, &all(), None).unwrap();
    let roots = [based.disks[0].map.clone()];
    session.append_with_roots(&json!({}), &roots).unwrap();
    copy(&repo, &session, &disk(&[5, 70]), &[0, 1]).unwrap();
    for point in [old, dying, based] {
        repo.withdraw(point.id).unwrap();
    }
    // Points that hide most of what their shared layers name, one of them behind a point that is forgotten.
    let mut content = disk(&[100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111]);
    let mut newest = backup_of(&repo, "i", &content, &all(), None).unwrap();
    for round in 0..4_u8 {
        let hot = 0..8_u8;
        for block in hot.clone() {
            let value = 120 + round * 8 + block;
            let at = usize::from(block) * BLOCK;
            content[at..at + BLOCK].fill(value);
        }
        let dirty = hot.map(u64::from).collect();
        let point = backup_of(&repo, "i", &content, &dirty, Some(&newest)).unwrap();
        if round % 2 == 1 {
            points.push((point.clone(), content.clone()));
        }
        let gone = std::mem::replace(&mut newest, point);
        if points.iter().all(|(point, _)| point.id != gone.id) {
            repo.withdraw(gone.id).unwrap();
        }
    }
    // An unfinished removal, a dead reader, and what a crash before the index run leaves.
    let dropped = Session::create(&repo, "g", &json!({})).unwrap();
    copy(&repo, &dropped, &disk(&[80, 81]), &[0, 1]).unwrap();
    let removed = format!("sessions/{}/removed", dropped.id());
    store_put(&store, &removed, b"");
    let lost = Memory::new(store.objects(), Some(2), Fate::Lost);
    let crashed = Session::create(&repo, "h", &json!({})).unwrap();
    copy(&open(&lost), &crashed, &disk(&[90, 91]), &[0, 1]).unwrap_err();
    crashed.remove().unwrap();
    for (name, bytes) in lost.objects() {
        if !store.objects().contains_key(&name) && name.starts_with("packs/") {
            store_put(&store, &name, &bytes);
        }
    }
    let lease = format!("leases/{}", "ab".repeat(16));
    store_put(&store, &lease, b"of a reader who died");
    Before {
        objects: store.objects(),
        points,
    }
}

fn store_put(store: &Memory, name: &str, bytes: &[u8]) {
    forerun::image::store::Store::put(store, name, bytes).unwrap();
}

fn check(repo: &Repository, points: &[(Manifest, Vec<u8>)], case: &str) {
    for (point, disk) in points {
        let manifest = repo.point(point.id).unwrap();
        let restored = restore(repo, &manifest.disks[0]);
        let restored = restored.unwrap_or_else(|error| panic!("{case}: {error}"));
        assert!(&restored == disk, "{case}: point {}", point.id);
    }
    let report = repo.verify(&VerifyOptions::default()).unwrap();
    assert!(report.damage.is_empty(), "{case}: {report:?}");
}

/// Nothing is left that no root needs. A dead block may seem alive by chance, but not again and again.
fn check_clean(repo: &Repository, before: &Before, case: &str) {
    let count = |prefix: &str| repo.store().list(prefix).unwrap().len();
    for _ in 0..4 {
        prune(repo).unwrap_or_else(|error| panic!("{case}: {error}"));
    }
    let report = repo
        .prune(
            &PruneOptions {
                dry_run: true,
                ..PruneOptions::default()
            },
            &|_, _, _| (),
        )
        .unwrap();
    assert_eq!(report.deleted.packs, report.repacked.packs, "{case}");
    assert_eq!(report.layers, 0, "{case}");
    assert_eq!(count("leases/"), 0, "{case}");
    assert!(count("condemned/") <= 1, "{case}");
    assert_eq!(count("quarantine/"), 0, "{case}");
    let layers: BTreeSet<String> = repo
        .points()
        .unwrap()
        .points
        .iter()
        .flat_map(|point| &point.disks)
        .flat_map(|disk| &disk.map.layers)
        .map(|layer| format!("maps/{}", layer.id))
        .collect();
    // Those of the session's base come on top.
    let session = Session::find(repo, "e").unwrap();
    let based = usize::from(session.is_some());
    assert_eq!(count("maps/"), layers.len() + based, "{case}");
    let sessions = Session::list(repo).unwrap();
    assert!(sessions.damaged.is_empty(), "{case}");
    assert_eq!(sessions.sessions.len(), based, "{case}");
    check(repo, &before.points, case);
}

/// Cuts a prune off at every operation; then either prunes again, or makes a backup of blocks that are dying in between.
fn crash_everywhere(fate: Fate, backup_between: bool) {
    let before = before();
    let whole = Memory::new(before.objects.clone(), None, fate);
    let report = prune(&open(&whole)).unwrap();
    assert!(report.deleted.packs > report.repacked.packs, "{report:?}");
    assert!(report.repacked.packs > 0, "{report:?}");
    assert!(report.layers > 0 && report.sessions == 1 && report.leases == 1);
    check_clean(&open(&whole), &before, "uncut");
    let operations = whole.operations();
    for at in 1..=operations {
        let case = format!("{fate:?} at operation {at} of {operations}, {backup_between}");
        let store = Memory::new(before.objects.clone(), Some(at), fate);
        if prune(&open(&store)).is_ok() {
            break;
        }
        let after = Memory::new(store.objects(), None, fate);
        let repo = open(&after);
        check(&repo, &before.points, &case);
        let mut before = Before {
            objects: Objects::new(),
            points: before.points.clone(),
        };
        if backup_between {
            let revived = disk(&[20, 3, 80, 4, 22, 90, 1, 7, 60, 31, 12, 99]);
            let point = backup_of(&repo, "z", &revived, &all(), None).unwrap();
            before.points.push((point, revived));
        }
        prune(&repo).unwrap_or_else(|error| panic!("{case}: {error}"));
        check(&repo, &before.points, &case);
        let session = Session::find(&repo, "e").unwrap().unwrap();
        assert!(session.settle().unwrap().is_none(), "{case}");
        check_clean(&repo, &before, &case);
        session.remove().unwrap();
        check_clean(&repo, &before, &case);
    }
}

#[test]
fn a_prune_cut_off_before_any_operation_is_finished_by_the_next() {
    crash_everywhere(Fate::Lost, false);
}

#[test]
fn a_prune_cut_off_after_any_operation_is_finished_by_the_next() {
    crash_everywhere(Fate::Done, false);
}

#[test]
fn a_backup_in_the_middle_of_a_dead_prune_relies_on_nothing_that_goes() {
    crash_everywhere(Fate::Lost, true);
    crash_everywhere(Fate::Done, true);
}

#[test]
fn a_full_repository_is_pruned_all_the_same() {
    let before = before();
    for room in [0, 100, 2000] {
        let store = Memory::new(before.objects.clone(), None, Fate::Lost);
        let full = store.bytes() + room;
        store.limit(Some(full));
        let repo = open(&store);
        let report = prune(&repo).unwrap();
        assert!(report.deleted.packs > 0, "{report:?}");
        assert!(store.bytes() < full, "{room}");
        check(&repo, &before.points, "full");
        store.limit(None);
        check_clean(&repo, &before, "full");
        assert!(repo.store().size("reserve").is_ok());
    }
}

#[test]
fn a_damaged_root_is_named_and_nothing_goes() {
    let before = before();
    let victims: Vec<String> = before
        .objects
        .keys()
        .filter(|name| {
            let of_the_session = name.ends_with("-record") || name.ends_with("-segment");
            name.starts_with("points/") || (of_the_session && !dropped(&before.objects, name))
        })
        .cloned()
        .collect();
    assert!(victims.len() >= 4, "{victims:?}");
    for victim in victims {
        let mut objects = before.objects.clone();
        let bytes = objects.get_mut(&victim).unwrap();
        let middle = bytes.len() - 60;
        bytes[middle] ^= 1;
        let store = Memory::new(objects.clone(), None, Fate::Lost);
        let error = prune(&open(&store)).unwrap_err();
        assert!(error.is_corrupt(), "{victim}: {error}");
        assert!(error.to_string().contains(&victim), "{victim}: {error}");
        let kept = |name: &&String| name.starts_with("packs/") || name.starts_with("maps/");
        assert!(
            objects
                .keys()
                .filter(kept)
                .eq(store.objects().keys().filter(kept))
        );
    }
}

/// Whether an object is of a session whose removal was begun.
fn dropped(objects: &Objects, name: &str) -> bool {
    let session = name.rsplit_once('/').unwrap().0;
    objects.contains_key(&format!("{session}/removed"))
}

#[test]
fn a_lost_index_lets_nothing_go() {
    let before = before();
    let mut objects = before.objects.clone();
    objects.retain(|name, _| !name.starts_with("index/"));
    let store = Memory::new(objects, None, Fate::Lost);
    let repo = open(&store);
    let error = prune(&repo).unwrap_err();
    assert!(error.is_corrupt(), "{error}");
    assert!(error.to_string().contains("must be rebuilt"), "{error}");
    repo.rebuild_index().unwrap();
    check_clean(&repo, &before, "rebuilt");
}

#[test]
fn a_dry_run_changes_nothing_and_says_what_a_prune_does() {
    let before = before();
    let store = Memory::new(before.objects.clone(), None, Fate::Lost);
    let dry = PruneOptions {
        dry_run: true,
        ..PruneOptions::default()
    };
    let foreseen = open(&store).prune(&dry, &|_, _, _| ()).unwrap();
    assert_eq!(store.objects(), before.objects);
    let done = prune(&open(&store)).unwrap();
    // Which dead blocks seem alive is another chance each time.
    assert_eq!(foreseen.layers, done.layers);
    assert!(foreseen.deleted.packs >= 3 && done.deleted.packs >= 3);
    let small = PruneOptions {
        max_repack: 0,
        ..PruneOptions::default()
    };
    let store = Memory::new(before.objects.clone(), None, Fate::Lost);
    let report = open(&store).prune(&small, &|_, _, _| ()).unwrap();
    assert_eq!(report.repacked.packs, 0);
    assert!(report.kept_partly_dead.packs > 0, "{report:?}");
}

#[test]
fn an_interrupted_prune_is_finished_by_the_next() {
    let before = before();
    for phase in ["mark", "repack", "mark again", "delete packs"] {
        let store = Memory::new(before.objects.clone(), None, Fate::Lost);
        let repo = open(&store);
        let interrupted = AtomicBool::new(false);
        let options = PruneOptions {
            interrupted: Some(&interrupted),
            ..PruneOptions::default()
        };
        let watch = |name: &str, _, _| {
            if name == phase {
                interrupted.store(true, std::sync::atomic::Ordering::Relaxed);
            }
        };
        let error = repo.prune(&options, &watch).unwrap_err();
        assert!(matches!(error, Error::Interrupted), "{phase}: {error}");
        check(&repo, &before.points, phase);
        check_clean(&repo, &before, phase);
    }
}

#[test]
fn a_reader_keeps_a_point_that_is_forgotten() {
    let before = before();
    let store = Memory::new(before.objects.clone(), None, Fate::Lost);
    let repo = open(&store);
    let (point, content) = &before.points[0];
    let lease = repo.lease(&[point], "a test").unwrap();
    assert!(lease.is_some());
    repo.withdraw(point.id).unwrap();
    prune(&open(&store)).unwrap();
    assert!(&restore(&repo, &point.disks[0]).unwrap() == content);
    // Who begins now is told.
    let error = repo.lease(&[point], "another").map(drop).unwrap_err();
    assert!(error.to_string().contains("forgotten"), "{error}");
    drop(lease);
    assert!(repo.store().list("leases/").unwrap().is_empty());
    prune(&open(&store)).unwrap();
    assert!(restore(&repo, &point.disks[0]).unwrap_err().is_corrupt());
}

/// A pack that is lost and needed stays named, so that its blocks are known to be lost, and who has them still heals its points.
#[test]
fn a_prune_does_not_hide_that_a_needed_pack_is_lost() {
    let before = before();
    let packs = before.objects.keys();
    let mut needed = 0;
    for pack in packs.filter(|name| name.starts_with("packs/")) {
        let mut objects = before.objects.clone();
        objects.remove(pack);
        let store = Memory::new(objects, None, Fate::Lost);
        let repo = open(&store);
        let hurt = repo.verify(&VerifyOptions::default()).unwrap();
        let hurt = hurt.damage.iter().any(|damage| !damage.hurts.is_empty());
        let lost = repo.lost_blocks().unwrap();
        let report = prune(&repo).unwrap();
        if !hurt {
            continue;
        }
        needed += 1;
        let told = report
            .damaged
            .iter()
            .any(|what| what.contains(pack.as_str()));
        assert!(told, "{pack}: {report:?}");
        let still = open(&store).lost_blocks().unwrap();
        assert!(!still.is_empty() && still.is_subset(&lost), "{pack}");
        let repo = open(&store);
        for (number, (_, disk)) in before.points.iter().enumerate() {
            backup_of(&repo, &format!("healer {number}"), disk, &all(), None).unwrap();
        }
        // What the session alone has proved of the pack is its own to read again.
        Session::find(&repo, "e")
            .unwrap()
            .unwrap()
            .remove()
            .unwrap();
        for (point, disk) in &before.points {
            assert!(&restore(&repo, &point.disks[0]).unwrap() == disk, "{pack}");
        }
        // Now nothing of it is needed, and the index forgets it.
        let report = prune(&open(&store)).unwrap();
        assert!(report.damaged.is_empty(), "{pack}: {report:?}");
        check(&open(&store), &before.points, pack);
    }
    assert!(needed > 0, "no pack is needed");
}
