//! Copies in a second repository: the same content under the same names, from as few bytes as the second lacks, whatever is
//! damaged in the first and wherever a copy is cut off.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::cast_possible_truncation,
    reason = "a test fails by it, and the disks here are small"
)]

mod image_common;

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use forerun::image::{
    Compression, InitOptions, Manifest, PointId, Repository, Session, Tracking, VerifyOptions,
};
use forerun::progress::Progress;
use forerun::replicate::{Copied, Options, Replication};
use forerun::units::BlockSize;
use image_common::memory::{Fate, Memory, Objects};
use image_common::{BLOCK, Bench, backup, init_store, open_store, restore};
use serde_json::Value;

const OPTIONS: InitOptions = InitOptions {
    block_size: BlockSize::DEFAULT,
    compression: Compression::Lz4,
};

/// So small that nearly every block is a batch of its own.
const SMALL: Options = Options {
    rate: None,
    batch: BLOCK as u64,
};

fn copy(from: &Repository, to: &Repository, point: PointId) -> anyhow::Result<Copied> {
    copy_with(from, to, point, Options::default())
}

fn copy_with(
    from: &Repository,
    to: &Repository,
    point: PointId,
    options: Options,
) -> anyhow::Result<Copied> {
    let progress = Progress::default();
    Replication::new(from, to, options, &progress)?.copy(point)
}

/// The bytes that a copy read, and what it builds on.
fn read(copied: Copied) -> (usize, Option<PointId>) {
    match copied {
        Copied::Done { read, base, .. } => (read as usize, base),
        Copied::Skipped => panic!("it was skipped"),
    }
}

fn second() -> Repository {
    let store = Memory::new(Objects::new(), None, Fate::Lost);
    Repository::init_store(Arc::new(store), OPTIONS).unwrap()
}

fn check(repo: &Repository, points: &[(Manifest, Vec<u8>)], case: &str) {
    for (point, disk) in points {
        let there = repo.point(point.id).unwrap();
        assert!(&restore(repo, &there.disks[0]).unwrap() == disk, "{case}");
        assert_eq!(there.instant, point.instant, "{case}");
        assert_eq!(there.target, point.target, "{case}");
        assert_eq!(there.machine, point.machine, "{case}");
    }
    let report = repo.verify(&VerifyOptions::default()).unwrap();
    assert!(report.damage.is_empty(), "{case}: {report:?}");
    assert!(repo.store().list("sessions/").unwrap().is_empty(), "{case}");
}

/// Points of a disk that is written, zeroed, grown and shrunk.
fn history(bench: &mut Bench) -> Vec<(Manifest, Vec<u8>)> {
    let mut points = Vec::new();
    for block in [0, 2, 3] {
        bench.write(block * BLOCK, &vec![block as u8 + 1; BLOCK]);
    }
    points.push((bench.backup(), bench.disk.clone()));
    bench.write(2 * BLOCK, &vec![0; BLOCK]);
    bench.write(3 * BLOCK + 9, b"changed");
    points.push((bench.backup(), bench.disk.clone()));
    points.push((bench.backup(), bench.disk.clone()));
    let size = bench.disk.len();
    bench.disk.resize(size + 2 * BLOCK + 100, 0);
    let end = bench.disk.len();
    bench.write(size - 10, &[7; 20]);
    bench
        .dirty
        .extend((size / BLOCK) as u64..end.div_ceil(BLOCK) as u64);
    points.push((bench.backup(), bench.disk.clone()));
    bench.disk.truncate(BLOCK + 5);
    bench.dirty.insert(1);
    points.push((bench.backup(), bench.disk.clone()));
    points
}

#[test]
fn points_come_out_as_they_went_in_and_increments_stay_increments() {
    let mut bench = Bench::in_memory(4 * BLOCK + 500);
    let points = history(&mut bench);
    let to = second();
    let mut before = None;
    for (number, (point, _)) in points.iter().enumerate() {
        let (bytes, base) = read(copy(&bench.repo, &to, point.id).unwrap());
        assert_eq!(base, before);
        before = Some(point.id);
        let expected = match number {
            0 => 3 * BLOCK,
            // At 3: the block that was short at the end, and the one after it is zero but for 10 bytes.
            1 | 3 => BLOCK,
            _ => 0,
        };
        assert_eq!(bytes, expected, "point {number}");
        // A layer has what changed, as in the source.
        let layers = |repo: &Repository| -> Vec<u64> {
            let map = repo.point(point.id).unwrap().disks[0].map.clone();
            map.layers.iter().map(|layer| layer.blocks).collect()
        };
        if number < 3 {
            assert_eq!(layers(&to), layers(&bench.repo), "point {number}");
        }
    }
    check(&to, &points, "copied");
    let packs = to.store().list("packs/").unwrap();
    for (point, _) in &points {
        assert_eq!(copy(&bench.repo, &to, point.id).unwrap(), Copied::Skipped);
    }
    assert_eq!(to.store().list("packs/").unwrap(), packs);
}

#[test]
fn what_did_not_change_is_not_read_either_where_ids_are_keyed() {
    for (from, to) in [(false, true), (true, false), (true, true)] {
        let case = format!("encrypted {from}, to encrypted {to}");
        let size = 4 * BLOCK + 500;
        let mut bench = if from {
            Bench::encrypted(size)
        } else {
            Bench::in_memory(size)
        };
        let points = history(&mut bench);
        let store = Memory::new(Objects::new(), None, Fate::Lost);
        let second = init_store(Arc::new(store), to);
        let mut before = None;
        for ((point, _), expected) in points.iter().zip([3, 1, 0, 1, 0]) {
            let (bytes, base) = read(copy(&bench.repo, &second, point.id).unwrap());
            assert_eq!(base, before, "{case}");
            // What is left of the last one is zero at its end.
            let blocks = bytes.div_ceil(BLOCK);
            assert_eq!(blocks, expected, "{case}, {}: {bytes}", point.instant);
            before = Some(point.id);
        }
        check(&second, &points, &case);
        for (point, _) in &points {
            let again = copy(&bench.repo, &second, point.id).unwrap();
            assert_eq!(again, Copied::Skipped, "{case}");
        }
        // Without the source's own earlier point there is nothing to tell by what changed.
        bench
            .repo
            .store()
            .delete(&[format!("points/{}", points[0].0.id)])
            .unwrap();
        let store = Memory::new(Objects::new(), None, Fate::Lost);
        let third = init_store(Arc::new(store), to);
        copy(&second, &third, points[0].0.id).unwrap();
        let (_, base) = read(copy(&bench.repo, &third, points[1].0.id).unwrap());
        assert_eq!(base, None, "{case}");
        check(&third, &points[..2], &case);
    }
}

#[test]
fn the_order_of_copies_does_not_matter() {
    let mut bench = Bench::in_memory(4 * BLOCK + 500);
    let points = history(&mut bench);
    let to = second();
    for at in [4, 1, 3, 0, 2] {
        copy_with(&bench.repo, &to, points[at].0.id, SMALL).unwrap();
    }
    check(&to, &points, "in any order");
}

#[test]
fn what_the_second_has_is_not_read() {
    let mut bench = Bench::in_memory(4 * BLOCK);
    for block in 0..4 {
        bench.write(block * BLOCK, &[block as u8 + 1; 100]);
    }
    let point = bench.backup();
    let mut second = Bench::in_memory(3 * BLOCK);
    second.write(0, &[3; 100]);
    second.write(BLOCK, &[1; 100]);
    let own = second.backup();
    // Of another target: no base, but the blocks are known.
    let mut other = own.clone();
    other.id = PointId::random().unwrap();
    other.target.key = "another".into();
    second.repo.publish(&other).unwrap();
    second
        .repo
        .store()
        .delete(&[format!("points/{}", own.id)])
        .unwrap();
    let (bytes, base) = read(copy(&bench.repo, &second.repo, point.id).unwrap());
    assert_eq!((bytes, base), (2 * BLOCK, None));
    check(&second.repo, &[(point, bench.disk)], "known blocks");
}

#[test]
fn a_copy_says_where_it_is_from_and_follows_no_bitmap() {
    let mut bench = Bench::in_memory(BLOCK);
    bench.write(0, b"x");
    let mut point = bench.backup();
    point.id = PointId::random().unwrap();
    point.disks[0].tracking = Some(Tracking {
        epoch: 1,
        bitmap: "forerun-00000000-1-0123456789abcdef".into(),
        persistent: true,
        granularity: 65536,
        identity: Value::Null,
    });
    bench.repo.publish(&point).unwrap();
    let (b, c) = (second(), second());
    copy(&bench.repo, &b, point.id).unwrap();
    copy(&b, &c, point.id).unwrap();
    for repo in [&b, &c] {
        let there = repo.point(point.id).unwrap();
        assert_eq!(there.disks[0].tracking, None);
        assert_eq!(there.origin.unwrap().repository, bench.repo.id());
        assert_ne!(there.session, point.session);
    }
    // A copy of a copy is the same point, wherever it comes from and goes to.
    assert_eq!(copy(&bench.repo, &c, point.id).unwrap(), Copied::Skipped);
    assert_eq!(copy(&c, &bench.repo, point.id).unwrap(), Copied::Skipped);
}

#[test]
fn what_cannot_be_copied_is_refused() {
    let mut bench = Bench::in_memory(BLOCK);
    let point = bench.backup();
    let refused = |from: &Repository, to: &Repository| {
        let error = copy(from, to, point.id).unwrap_err();
        let (kind, hint) = forerun::exit::classify(&error);
        (format!("{error:#}"), kind.code(), hint.unwrap())
    };
    let (words, code, hint) = refused(&bench.repo, &bench.repo);
    assert!(words.contains("both are the repository"), "{words}");
    assert!(hint.contains("repair new-id"), "{hint}");
    assert_eq!(code, 2);
    let store = Memory::new(Objects::new(), None, Fate::Lost);
    let block_size = BlockSize::try_from(128 << 10).unwrap();
    let options = InitOptions {
        block_size,
        ..OPTIONS
    };
    let coarse = Repository::init_store(Arc::new(store), options).unwrap();
    let (words, _, hint) = refused(&bench.repo, &coarse);
    assert!(
        words.contains("64 KiB") && words.contains("128 KiB"),
        "{words}"
    );
    assert!(hint.contains("--block-size 65536"), "{hint}");
    let mut other = Bench::in_memory(BLOCK);
    let mut same_name = other.backup();
    same_name.id = point.id;
    other.repo.publish(&same_name).unwrap();
    let (words, ..) = refused(&bench.repo, &other.repo);
    assert!(words.contains("another point"), "{words}");
}

/// Crashes the second repository at every operation of a copy, and goes on.
fn crash_everywhere(fate: Fate, encrypted: bool) {
    let mut bench = Bench::in_memory(6 * BLOCK + 1);
    let mut points = Vec::new();
    for round in 1..=2_u8 {
        for block in 0..6 {
            bench.write(block * BLOCK, &[round, block as u8]);
        }
        bench.write(6 * BLOCK, &[round - 1]);
        points.push((bench.backup(), bench.disk.clone()));
    }
    let (first, last) = (points[0].0.id, points[1].0.id);
    let store = Memory::new(Objects::new(), None, fate);
    let to = init_store(Arc::new(store.clone()), encrypted);
    copy(&bench.repo, &to, first).unwrap();
    let before = store.objects();
    let whole = Memory::new(before.clone(), None, fate);
    let to = open_store(Arc::new(whole.clone())).unwrap();
    let (bytes, _) = read(copy_with(&bench.repo, &to, last, SMALL).unwrap());
    assert_eq!(bytes, 6 * BLOCK + 1);
    let operations = whole.operations();
    assert!(operations > 20, "{operations}");
    let mut gone_on = 0;
    for at in 1..=operations {
        let case = format!("{fate:?} at {at} of {operations}");
        let store = Memory::new(before.clone(), Some(at), fate);
        let to = open_store(Arc::new(store.clone())).unwrap();
        let error = copy_with(&bench.repo, &to, last, SMALL).unwrap_err();
        let kind = forerun::exit::classify(&error).0.code();
        assert_eq!(
            kind,
            if fate == Fate::Full { 8 } else { 1 },
            "{case}: {error:#}"
        );

        let to = open_store(Arc::new(Memory::new(store.objects(), None, fate))).unwrap();
        assert!(to.points().unwrap().damaged.is_empty(), "{case}");
        let done = to.point(last).is_ok();
        let segments = to.store().list("sessions/").unwrap();
        let segments = segments
            .iter()
            .filter(|name| name.ends_with("-segment"))
            .count();
        match copy_with(&bench.repo, &to, last, SMALL).unwrap() {
            Copied::Skipped => assert!(done, "{case}"),
            Copied::Done { read, .. } => {
                assert!(!done, "{case}");
                // Nothing that is in the session is read again.
                assert!(
                    read as usize <= bytes - segments.min(6) * BLOCK,
                    "{case}: {read}"
                );
                gone_on += segments;
            }
        }
        check(&to, &points, &case);
    }
    assert!(gone_on > 20, "{gone_on}");
}

#[test]
fn a_crash_before_any_operation_of_a_copy_loses_nothing_and_it_goes_on() {
    crash_everywhere(Fate::Lost, false);
}

#[test]
fn a_crash_after_any_operation_of_a_copy_loses_nothing_and_it_goes_on() {
    crash_everywhere(Fate::Done, false);
    crash_everywhere(Fate::Done, true);
}

#[test]
fn a_full_second_repository_is_told_and_the_copy_goes_on() {
    crash_everywhere(Fate::Full, false);
}

#[test]
fn a_copy_that_is_interrupted_goes_on_where_it_ended() {
    const BLOCKS: usize = 192;
    let mut bench = Bench::in_memory(BLOCKS * BLOCK);
    for block in 0..BLOCKS {
        // Some need no reading.
        if block % 64 != 40 {
            bench.write(
                block * BLOCK,
                &(block as u32 + 1).to_le_bytes().repeat(BLOCK / 4),
            );
        }
    }
    let points = [(bench.backup(), bench.disk.clone())];
    let to = second();
    let id = points[0].0.id;
    let slow = Options {
        rate: Some(8 << 20),
        ..Options::default()
    };
    let progress = Progress::default();
    let flag = Arc::new(AtomicBool::new(false));
    let failed = std::thread::scope(|scope| {
        scope.spawn(|| {
            // The third read has begun.
            while progress.done.load(Ordering::Relaxed) < 4 << 20 {
                std::thread::sleep(Duration::from_millis(1));
            }
            flag.store(true, Ordering::Relaxed);
        });
        Replication::new(&bench.repo, &to, slow, &progress)
            .unwrap()
            .ended_by(Arc::clone(&flag))
            .copy(id)
            .unwrap_err()
    });
    let ended = failed.downcast_ref::<forerun::image::Error>();
    assert!(
        matches!(ended, Some(forerun::image::Error::Interrupted)),
        "{failed:#}"
    );
    assert!(to.points().unwrap().points.is_empty());
    // Nothing is held.
    assert!(to.store().held("").unwrap().is_empty());
    assert_eq!(bench.objects("leases/"), Vec::<String>::new());
    let all = (BLOCKS - 3) * BLOCK;
    let (bytes, _) = read(copy(&bench.repo, &to, id).unwrap());
    assert!((1..=all - (6 << 20)).contains(&bytes), "{bytes} of {all}");
    check(&to, &points, "after an interruption");
}

#[test]
fn a_base_that_is_forgotten_meanwhile_begins_the_copy_anew() {
    let mut bench = Bench::in_memory(4 * BLOCK);
    bench.write(0, &vec![1; 4 * BLOCK]);
    let first = bench.backup();
    bench.write(0, &vec![2; 2 * BLOCK]);
    bench.write(BLOCK, b"unlike the one before");
    let point = (bench.backup(), bench.disk.clone());
    let store = Memory::new(Objects::new(), None, Fate::Lost);
    let to = Repository::init_store(Arc::new(store.clone()), OPTIONS).unwrap();
    copy(&bench.repo, &to, first.id).unwrap();
    // The sixth operation is after the first segment.
    let dying = Memory::new(store.objects(), Some(6), Fate::Done);
    let to = Repository::open_store(Arc::new(dying.clone())).unwrap();
    copy_with(&bench.repo, &to, point.0.id, SMALL).unwrap_err();
    let mut objects = dying.objects();
    assert!(
        objects.keys().any(|name| name.ends_with("-segment")),
        "{:?}",
        objects.keys()
    );
    objects.retain(|name, _| !name.starts_with("points/"));
    let to = Repository::open_store(Arc::new(Memory::new(objects, None, Fate::Lost))).unwrap();
    let (_, base) = read(copy(&bench.repo, &to, point.0.id).unwrap());
    assert_eq!(base, None);
    check(&to, &[point], "without its base");
}

fn run(repo: &Path, args: &[&str]) -> (i32, Value, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = Command::new(env!("CARGO_BIN_EXE_forerun"))
        .args(args)
        .arg("--json")
        .env("FORERUN_REPO", repo)
        .output()
        .unwrap();
    let said = serde_json::from_slice(&stdout).unwrap_or(Value::Null);
    (
        status.code().unwrap(),
        said,
        String::from_utf8(stderr).unwrap(),
    )
}

#[test]
fn a_damaged_point_is_not_copied_and_hinders_no_other() {
    let mut bench = Bench::new(2 * BLOCK);
    bench.write(0, &[1; 300]);
    let first = bench.backup();
    let packs = bench.objects("packs/");
    bench.write(0, &[2; 300]);
    let damaged = bench.backup();
    let pack = bench
        .objects("packs/")
        .into_iter()
        .find(|pack| !packs.contains(pack))
        .unwrap();
    let pack = bench.path().join(pack);
    let mut bytes = std::fs::read(&pack).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&pack, bytes).unwrap();
    bench.write(0, &[3; 300]);
    let last = bench.backup();
    let to = bench.path().with_file_name("second");
    assert_eq!(run(&to, &["init", to.to_str().unwrap()]).0, 0);

    let copy = ["copy", "--all", "--to", to.to_str().unwrap()];
    for round in 0..2 {
        let (code, said, words) = run(&bench.path(), &copy);
        assert_eq!(code, 5, "{said} {words}");
        let failed = &said["copy"]["failed"];
        assert_eq!(failed[0]["point"], damaged.id.to_string(), "{said}");
        assert!(
            failed[0]["what"].as_str().unwrap().contains("packs/"),
            "{said}"
        );
        let listed = if round == 0 { "copied" } else { "skipped" };
        assert_eq!(said["copy"][listed].as_array().unwrap().len(), 2, "{said}");
    }
    let second = Repository::open(&to).unwrap();
    let there: Vec<_> = second
        .points()
        .unwrap()
        .points
        .iter()
        .map(|point| point.id)
        .collect();
    assert_eq!(there, [first.id, last.id]);
    check(
        &second,
        &[(last, bench.disk.clone())],
        "beside a damaged one",
    );
}

#[test]
fn the_program_copies_what_is_named() {
    let mut bench = Bench::new(2 * BLOCK);
    bench.write(0, &[1; 300]);
    let first = bench.backup();
    bench.write(0, &[2; 300]);
    let last = (bench.backup(), bench.disk.clone());
    let to = bench.path().with_file_name("second");
    assert_eq!(run(&to, &["init", to.to_str().unwrap()]).0, 0);
    let second = to.to_str().unwrap();
    assert_eq!(run(&bench.path(), &["copy", "--to", second]).0, 2);
    assert_eq!(
        run(
            &bench.path(),
            &["copy", "web@latest", "--all", "--to", second]
        )
        .0,
        2
    );
    assert_eq!(
        run(
            &bench.path(),
            &["copy", "--all", "--target", "nobody", "--to", second]
        )
        .0,
        1
    );
    let (code, said, words) = run(&bench.path(), &["copy", "web@latest", "--to", second]);
    assert_eq!(code, 0, "{words}");
    assert_eq!(said["copy"]["copied"][0]["point"], last.0.id.to_string());
    let repo = Repository::open(&to).unwrap();
    check(&repo, &[last], "named");
    let all = [
        "copy", "--all", "--target", "web", "--to", second, "--rate", "100MiB/s",
    ];
    let (code, said, words) = run(&bench.path(), &all);
    assert_eq!(code, 0, "{words}");
    assert_eq!(said["copy"]["copied"][0]["point"], first.id.to_string());

    // A session that somebody gives up.
    let key = format!("copy:{}:{}", bench.repo.id(), first.id);
    Session::create(&repo, &key, &Value::Null).unwrap();
    let (code, said, words) = run(&to, &["drop-session", &key]);
    assert_eq!(code, 0, "{words}");
    assert_eq!(said["targets"][0]["key"], key);
}

#[test]
fn a_backup_goes_on_in_the_second_repository() {
    let mut bench = Bench::in_memory(2 * BLOCK);
    bench.write(0, &[1; 300]);
    let point = bench.backup();
    let to = second();
    copy(&bench.repo, &to, point.id).unwrap();
    let there = to.point(point.id).unwrap();
    bench.write(BLOCK, b"more");
    let next = backup(&to, &bench.disk, &bench.dirty, Some(&there)).unwrap();
    check(&to, &[(next, bench.disk.clone())], "on a copy");
}
