//! A crash at any operation of the store: published points restore exactly, the repository opens, and the next run goes on with
//! the session. `image_kill.rs` does the same to real processes.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by it, and the disks here are small"
)]

mod image_common;

use std::collections::BTreeSet;
use std::sync::Arc;

use forerun::image::{Error, Manifest, Repository, Session, VerifyOptions};
use image_common::memory::{Fate, Memory, Objects};
use image_common::{BLOCK, KEY, backup, init_store, open_store, restore};

/// A repository with two points, and a disk with changes since.
struct Before {
    objects: Objects,
    points: Vec<(Manifest, Vec<u8>)>,
    disk: Vec<u8>,
    dirty: BTreeSet<u64>,
}

fn before(increments: u8, encrypted: bool) -> Before {
    let store = Memory::new(Objects::new(), None, Fate::Lost);
    let repo = init_store(Arc::new(store.clone()), encrypted);
    let mut disk = vec![0; 4 * BLOCK];
    let mut points: Vec<(Manifest, Vec<u8>)> = Vec::new();
    for round in 0..=increments {
        let block = usize::from(round % 4);
        disk[block * BLOCK] = round + 1;
        let dirty = match round {
            0 => (0..4).collect(),
            _ => [block as u64].into(),
        };
        let last = points.last().map(|(point, _)| point.clone());
        let point = backup(&repo, &disk, &dirty, last.as_ref()).unwrap();
        points.push((point, disk.clone()));
    }
    disk[3 * BLOCK + 5] = 200;
    disk[0] = 201;
    Before {
        objects: store.objects(),
        points,
        disk,
        dirty: [0, 3].into(),
    }
}

fn check_points(repo: &Repository, points: &[(Manifest, Vec<u8>)], case: &str) {
    for (point, disk) in points {
        let manifest = repo.point(point.id).unwrap();
        let restored = restore(repo, &manifest.disks[0]).unwrap();
        assert!(&restored == disk, "{case}: point {}", point.id);
    }
    let report = repo.verify(&VerifyOptions::default()).unwrap();
    assert!(report.damage.is_empty(), "{case}: {report:?}");
}

/// Crashes at every operation of a backup, and goes on after it.
fn crash_everywhere(before: &Before, fate: Fate) {
    let last = before.points.last().map(|(point, _)| point);
    let whole = Memory::new(before.objects.clone(), None, fate);
    let repo = open_store(Arc::new(whole.clone())).unwrap();
    backup(&repo, &before.disk, &before.dirty, last).unwrap();
    let operations = whole.operations();
    assert!(operations >= 8, "{operations}");
    for at in 1..=operations {
        let case = format!("{fate:?} at operation {at} of {operations}");
        let store = Memory::new(before.objects.clone(), Some(at), fate);
        let repo = open_store(Arc::new(store.clone())).unwrap();
        let error = backup(&repo, &before.disk, &before.dirty, last).unwrap_err();
        let is_full = matches!(error, Error::NoSpace { .. });
        assert_eq!(is_full, fate == Fate::Full, "{case}: {error}");

        let after = Memory::new(store.objects(), None, fate);
        let repo = open_store(Arc::new(after.clone())).unwrap();
        check_points(&repo, &before.points, &case);
        let known: BTreeSet<_> = before.points.iter().map(|(point, _)| point.id).collect();
        let found = repo.points().unwrap();
        assert!(found.damaged.is_empty(), "{case}");
        let new = found
            .points
            .into_iter()
            .find(|point| !known.contains(&point.id));
        let session = Session::find(&repo, KEY).unwrap();
        let point = match new {
            // The commit was done; what is left of its session is recognised by the point.
            Some(point) => {
                if let Some(session) = session {
                    assert_eq!(session.id(), point.session, "{case}");
                    session.remove().unwrap();
                }
                point
            }
            None => backup(&repo, &before.disk, &before.dirty, last).unwrap(),
        };
        let mut points = before.points.clone();
        points.push((point, before.disk.clone()));
        check_points(&repo, &points, &case);
        assert!(repo.store().list("sessions/").unwrap().is_empty(), "{case}");
    }
}

#[test]
fn a_crash_before_any_operation_loses_no_point_and_no_session() {
    crash_everywhere(&before(1, false), Fate::Lost);
}

#[test]
fn a_crash_after_any_operation_loses_no_point_and_no_session() {
    crash_everywhere(&before(1, false), Fate::Done);
}

#[test]
fn a_full_disk_is_its_own_error_and_the_session_goes_on_when_there_is_room() {
    crash_everywhere(&before(1, false), Fate::Full);
}

#[test]
fn a_crash_while_runs_and_layers_are_merged_loses_nothing() {
    // Sixteen layers and eight runs: the next backup merges both.
    for fate in [Fate::Lost, Fate::Done] {
        crash_everywhere(&before(15, false), fate);
    }
}

#[test]
fn a_crash_in_the_first_backup_leaves_a_repository_to_begin_again_with() {
    for fate in [Fate::Lost, Fate::Done] {
        let mut before = before(0, false);
        before.objects.retain(|name, _| name == "config");
        before.points.clear();
        before.dirty = (0..4).collect();
        crash_everywhere(&before, fate);
    }
}

#[test]
fn an_encrypted_repository_survives_the_same_crashes() {
    for fate in [Fate::Lost, Fate::Done, Fate::Full] {
        crash_everywhere(&before(1, true), fate);
    }
}
