//! The files of a VM in a point beside its disks: whatever keeps, checks, counts and copies disks does so with them.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by it"
)]

mod image_common;

use forerun::image::{
    Content, DiskPoint, HostFile, Manifest, NVRAM, PointId, Policy, PruneOptions, Repository,
    Selection, VerifyOptions,
};
use forerun::progress::Progress;
use forerun::replicate::{Options, Replication};
use image_common::{BLOCK, Bench, id_of, restore};
use serde_json::{Value, json};

/// A file that is no multiple of a block.
fn content() -> Vec<u8> {
    let bytes = (0..BLOCK + 1000).map(|at| (at * 7 % 251).to_le_bytes()[0]);
    bytes.collect()
}

/// A point of a disk, and one with a file beside it.
fn bench() -> (Bench, Manifest, Manifest) {
    let mut bench = Bench::new(2 * BLOCK);
    bench.write(0, b"a disk");
    let bare = bench.backup();
    let content = content();
    let mut writer = bench.repo.pack_writer("a file");
    let blocks: Vec<(u64, Content)> = (0..)
        .zip(content.chunks(BLOCK))
        .map(|(block, plain)| {
            (
                block,
                writer.put(bench.repo.encode(plain).unwrap()).unwrap(),
            )
        })
        .collect();
    writer.seal().unwrap();
    let map = bench.commit_blocks(None, &blocks, content.len()).unwrap();
    let held = DiskPoint {
        key: "file:nvram".into(),
        size: map.size,
        map,
        file: Some(HostFile {
            role: NVRAM.into(),
            name: "nvram".into(),
            path: Some("/var/lib/libvirt/qemu/nvram/web_VARS.fd".into()),
            owner: None,
        }),
        ..bare.disks[0].clone()
    };
    let mut whole = bare.clone();
    whole.id = PointId::random().unwrap();
    whole.disks.push(held);
    bench.repo.publish(&whole).unwrap();
    (bench, bare, whole)
}

fn read(repo: &Repository, point: PointId) -> Vec<u8> {
    let point = repo.point(point).unwrap();
    let (stored, file) = point.files().next().unwrap();
    assert_eq!(
        (file.role.as_str(), stored.size),
        (NVRAM, content().len() as u64)
    );
    restore(repo, stored).unwrap()
}

#[test]
fn a_prune_keeps_the_files_of_points_and_takes_them_with_the_last() {
    let (bench, bare, whole) = bench();
    let repo = &bench.repo;
    let before = bench.objects("packs/").len();
    let prune = || repo.prune(&PruneOptions::default(), &|_, _, _| ()).unwrap();
    let forget = |id| {
        let points = [id].into();
        let selection = Selection::Points {
            points,
            allow_last: true,
        };
        repo.forget(&selection).unwrap()
    };
    // It is no disk that a policy could lose.
    assert!(
        forget(bare.id)
            .targets
            .iter()
            .all(|target| target.kept.len() == 1)
    );
    prune();
    assert_eq!(read(repo, whole.id), content());
    assert!(!bench.objects("packs/").is_empty());
    // A reader's claim is one on its files, too.
    let lease = repo.lease(&[&whole], "a test").unwrap();
    forget(whole.id);
    prune();
    let (stored, _) = whole.files().next().unwrap();
    assert_eq!(restore(repo, stored).unwrap(), content());
    drop(lease);
    prune();
    assert!(bench.objects("packs/").is_empty(), "there were {before}");
}

#[test]
fn no_policy_keeps_a_point_for_a_file_that_newer_ones_do_not_have() {
    let (bench, _, whole) = bench();
    let mut newer = whole.clone();
    newer.id = PointId::random().unwrap();
    newer.instant = "2030-01-01T00:00Z".parse().unwrap();
    newer.disks.pop();
    bench.repo.publish(&newer).unwrap();
    let policy = Selection::Policy {
        policy: Policy {
            last: 1,
            ..Policy::default()
        },
        zone: jiff::tz::TimeZone::UTC,
        targets: None,
    };
    bench.repo.forget(&policy).unwrap();
    let left: Vec<PointId> = bench
        .repo
        .points()
        .unwrap()
        .points
        .iter()
        .map(|point| point.id)
        .collect();
    assert_eq!(left, [newer.id]);
}

#[test]
fn a_damaged_file_is_found_and_named() {
    let (bench, _, whole) = bench();
    assert_eq!(
        bench.repo.verify(&VerifyOptions::default()).unwrap().damage,
        []
    );
    let text = content();
    // The pack that has its first block as the first; where that is stored is known from the format.
    let id = *id_of(&text[..BLOCK]).as_bytes();
    let packs = bench.objects("packs/").into_iter();
    let mut packs = packs.map(|object| bench.path().join(object));
    let path = packs
        .find(|path| std::fs::read(path).unwrap()[24..56] == id)
        .unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[16 + 52] ^= 0x10;
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, bytes).unwrap();
    let repo = Repository::open(&bench.path()).unwrap();
    let report = repo.verify(&VerifyOptions::default()).unwrap();
    let hurts: Vec<_> = report
        .damage
        .iter()
        .flat_map(|damage| &damage.hurts)
        .collect();
    assert_eq!(hurts, [&(whole.id, Some("file:nvram".to_owned()))]);
    let (stored, _) = whole.files().next().unwrap();
    assert!(restore(&repo, stored).unwrap_err().is_corrupt());
    // Its disk is as good as ever.
    assert_eq!(restore(&repo, &whole.disks[0]).unwrap(), bench.disk);
}

#[test]
fn a_copy_has_the_files_and_the_sizes_count_them() {
    let (bench, _, whole) = bench();
    let second = Bench::in_memory(BLOCK);
    let progress = Progress::default();
    let copier = Replication::new(&bench.repo, &second.repo, Options::default(), &progress);
    copier.unwrap().copy(whole.id).unwrap();
    assert_eq!(read(&second.repo, whole.id), content());
    let stats = bench.repo.stats().unwrap();
    let logical: Vec<u64> = stats
        .points
        .iter()
        .map(|point| point.amount.logical)
        .collect();
    let (disk, file) = (2 * BLOCK as u64, content().len() as u64);
    assert_eq!(logical.iter().min(), Some(&disk));
    assert_eq!(logical.iter().max(), Some(&(disk + file)));
}

#[test]
fn a_role_of_a_later_version_outlives_this_one() {
    let (_, bare, whole) = bench();
    let text = serde_json::to_value(&bare).unwrap();
    assert_eq!(text["disks"][0].get("file"), None);
    let mut text = serde_json::to_value(&whole).unwrap();
    text["disks"][1]["file"]["role"] = json!("hologram");
    let read: Manifest = serde_json::from_value(text.clone()).unwrap();
    assert_eq!(read.files().count(), 1);
    assert_eq!(read.guest_disks().count(), 1);
    let again: Value = serde_json::to_value(&read).unwrap();
    assert_eq!(again, text);
}
