//! What newer layers hide in all points that are left is not kept: space comes back although layers are shared. Nobody reads what is gone,
//! and nobody misses it.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by it, and the disks here are small"
)]

mod image_common;

use std::sync::Arc;

use forerun::image::{
    Encoded, Error, Manifest, MapReader, Need, PruneOptions, PruneReport, RunContent, Session,
    VerifyOptions, build_map,
};
use forerun::progress::Progress;
use forerun::replicate::{Copied, Options, Replication};
use image_common::memory::{Fate, Memory, Objects};
use image_common::{
    BLOCK, Bench, copy, id_of, init_store, manifest, mixed, open_store, restore, segments,
};
use serde_json::json;

/// Blocks of the disk.
const BLOCKS: usize = 32;
/// Of these, the ones that are written again for every point.
const HOT: usize = 26;

/// A block that does not compress.
fn noise(seed: u64) -> Vec<u8> {
    let words = (0..BLOCK as u64 / 8).map(|word| mixed(seed << 32 | word));
    words.flat_map(u64::to_le_bytes).collect()
}

fn prune(bench: &Bench) -> PruneReport {
    bench
        .repo
        .prune(&PruneOptions::default(), &|_, _, _| ())
        .unwrap()
}

fn stored(bench: &Bench) -> u64 {
    let packs = bench.objects("packs/").into_iter();
    packs
        .map(|pack| bench.repo.store().size(&pack).unwrap())
        .sum()
}

/// Writes the hot blocks anew and makes a point.
fn next(bench: &mut Bench, seed: u64) -> (Manifest, Vec<u8>) {
    for block in 0..HOT {
        bench.write(block * BLOCK, &noise(seed * 1000 + block as u64));
    }
    (bench.backup(), bench.disk.clone())
}

/// A disk of noise and some points of it; forgotten are all but the last `kept`.
fn history(bench: &mut Bench, count: u64, kept: usize) -> Vec<(Manifest, Vec<u8>)> {
    for block in HOT..BLOCKS {
        bench.write(block * BLOCK, &noise(block as u64));
    }
    let mut points: Vec<_> = (1..=count).map(|seed| next(bench, seed)).collect();
    while points.len() > kept {
        bench.repo.withdraw(points.remove(0).0.id).unwrap();
    }
    points
}

/// Every point is exact, and nothing is damaged or missing.
fn check(bench: &Bench, points: &[(Manifest, Vec<u8>)]) {
    for (point, disk) in points {
        assert!(&restore(&bench.repo, &point.disks[0]).unwrap() == disk);
        let one = VerifyOptions {
            points: Some(vec![point.id]),
            ..VerifyOptions::default()
        };
        let report = bench.repo.verify(&one).unwrap();
        assert_eq!((report.damage, report.complete), (vec![], true));
        assert_eq!(bench.repo.check(Some(&[point.id]), 1).unwrap().damage, []);
    }
    assert_eq!(bench.repo.check(None, 2).unwrap().damage, []);
    let report = bench.repo.verify(&VerifyOptions::default()).unwrap();
    assert_eq!((report.damage, report.complete), (vec![], true));
    let stats = bench.repo.stats().unwrap();
    assert_eq!((stats.missing, stats.damaged.len()), (0, 0));
    let open = bench.repo.rebuild_index().unwrap();
    assert_eq!(open.damaged.len(), 0);
    assert_eq!(bench.repo.lost_blocks().unwrap(), [].into());
}

#[test]
fn what_comes_back_is_all_but_what_is_seen() {
    for kept in [1, 3] {
        let mut bench = Bench::in_memory(BLOCKS * BLOCK);
        let mut points = history(&mut bench, 8, kept);
        assert!(points[0].0.disks[0].map.layers.len() > 5, "they are shared");
        let seen = (BLOCKS - HOT + kept * HOT) as u64;
        let before = stored(&bench);
        let report = prune(&bench);
        assert_eq!(report.references, seen);
        let visible = seen * (BLOCK as u64 + 52 + 44);
        let after = stored(&bench);
        assert!(
            after < visible + visible / 20,
            "{before}, {after} of {visible}"
        );
        assert!(before > 2 * visible || kept > 1);
        check(&bench, &points);
        // On top, and through a merge of the layers, pruned each time.
        for seed in 9..28 {
            points.push(next(&mut bench, seed));
            if seed % 4 > 0 {
                bench.repo.withdraw(points.remove(0).0.id).unwrap();
                prune(&bench);
            }
            if seed % 9 == 0 {
                check(&bench, &points);
            }
        }
        while points.len() > 1 {
            bench.repo.withdraw(points.remove(0).0.id).unwrap();
        }
        prune(&bench);
        check(&bench, &points);
        assert!(stored(&bench) < (BLOCKS * (BLOCK + 200)) as u64);
    }
}

/// Points that share layers of which none is the newest of any point: all of these hide it, or not.
#[test]
fn what_one_of_several_points_sees_stays() {
    let mut bench = Bench::in_memory(4 * BLOCK);
    for block in 0..4 {
        bench.write(block * BLOCK, &noise(block as u64));
    }
    let oldest = bench.backup();
    let mut points = Vec::new();
    // Both hide block 0, each one of 1 and 2, none 3.
    for seed in [1, 2] {
        bench.last = Some(oldest.clone());
        bench.disk[..].copy_from_slice(&restore(&bench.repo, &oldest.disks[0]).unwrap());
        bench.write(0, &noise(10 + seed));
        bench.write(seed as usize * BLOCK, &noise(20 + seed));
        points.push((bench.backup(), bench.disk.clone()));
    }
    bench.repo.withdraw(oldest.id).unwrap();
    assert_eq!(prune(&bench).references, 3 + 2 + 2);
    for _ in 0..2 {
        check(&bench, &points);
        let gone = bench.repo.read_block(id_of(&noise(0)));
        let stays = bench.repo.read_block(id_of(&noise(1)));
        assert_eq!(gone.is_err(), bench.objects("packs/").len() == 1);
        assert!(stays.is_ok());
        // Small packs are merged when there are four.
        for seed in 90..93 {
            let mut other = Bench::in_memory(BLOCK);
            other.repo = bench.repo.clone();
            other.write(0, &noise(seed));
            points.push((other.backup(), other.disk.clone()));
        }
        prune(&bench);
    }
}

#[test]
fn a_disk_that_is_cut_and_grown_shows_what_it_did() {
    let mut bench = Bench::in_memory(8 * BLOCK);
    let mut points = Vec::new();
    let sizes = [8, 5, 5, 9, 6, 6, 12, 3, 12];
    for (seed, size) in (1_u64..).zip(sizes) {
        bench.resize(size * BLOCK - if seed % 3 == 0 { 700 } else { 0 });
        for block in [0, 2, size - 1] {
            let length = BLOCK.min(bench.disk.len() - block * BLOCK);
            let content = noise(seed * 100 + block as u64);
            bench.write(block * BLOCK, &content[..length]);
        }
        points.push((bench.backup(), bench.disk.clone()));
    }
    // All ways to keep some.
    let objects: Vec<(String, Vec<u8>)> = bench
        .repo
        .store()
        .list("")
        .unwrap()
        .into_iter()
        .map(|name| (name.clone(), bench.repo.store().get(&name).unwrap()))
        .collect();
    for kept in (1_u32..1 << points.len()).step_by(37) {
        let store = Memory::new(Objects::from_iter(objects.clone()), None, Fate::Lost);
        let mut bench = Bench::in_memory(0);
        bench.repo = open_store(Arc::new(store)).unwrap();
        let mut left = Vec::new();
        for (number, point) in points.iter().enumerate() {
            if kept >> number & 1 == 1 {
                left.push(point.clone());
            } else {
                bench.repo.withdraw(point.0.id).unwrap();
            }
        }
        prune(&bench);
        check(&bench, &left);
        // Onto the newest that is left, longer than all of them.
        bench.disk.clone_from(&left[left.len() - 1].1);
        bench.dirty.clear();
        bench.last = Some(left[left.len() - 1].0.clone());
        bench.resize(13 * BLOCK);
        left.push((bench.backup(), bench.disk.clone()));
        prune(&bench);
        check(&bench, &left);
    }
}

#[test]
fn who_deduplicates_against_what_is_hidden_stores_it_anew_when_it_goes() {
    let mut bench = Bench::in_memory(BLOCKS * BLOCK);
    let points = history(&mut bench, 3, 1);
    let hidden = noise(1000);
    let session = Session::create(&bench.repo, "another host", &json!({})).unwrap();
    let since = bench.repo.generation().unwrap();
    let mut writer = bench.repo.pack_writer(&format!("{} vda 1", session.id()));
    let encoded = bench.repo.encode(&hidden).unwrap();
    assert!(matches!(encoded, Encoded::Known(_)), "it is there as yet");
    let content = writer.put(encoded).unwrap();
    writer.seal().unwrap();
    prune(&bench);
    let header = image_common::segment_header();
    let one = forerun::units::BlockRun { first: 0, count: 1 };
    let error = session.prove(&header, &[(one, content)], since);
    assert!(matches!(error, Err(Error::Condemned { .. })), "{error:?}");
    copy(&bench.repo, &session, &hidden, &[0]).unwrap();
    prune(&bench);
    let segments = segments(&session).unwrap();
    let (map, _) = build_map(&bench.repo, None, &session, &segments, BLOCK as u64).unwrap();
    let point = manifest(map, &session, None).unwrap();
    session.publish(&point).unwrap();
    session.remove().unwrap();
    let points = [points, vec![(point, hidden)]].concat();
    prune(&bench);
    check(&bench, &points);
}

/// A session that builds on a point keeps what that shows, though the point is forgotten, and not what it hides.
#[test]
fn what_a_session_or_a_reader_builds_on_is_seen() {
    let mut bench = Bench::in_memory(BLOCKS * BLOCK);
    let mut points = history(&mut bench, 6, 3);
    let read = points.remove(0);
    let lease = bench.repo.lease(&[&read.0], "a test").unwrap();
    let base = points.remove(0);
    let map = base.0.disks[0].map.clone();
    let session = Session::create(&bench.repo, "vm", &json!({})).unwrap();
    let roots = [map.clone()];
    session.append_with_roots(&json!({}), &roots).unwrap();
    for gone in [&read, &base] {
        bench.repo.withdraw(gone.0.id).unwrap();
    }
    let report = prune(&bench);
    assert_eq!(report.references, (BLOCKS - HOT + 3 * HOT) as u64);
    check(&bench, &points);
    assert!(restore(&bench.repo, &read.0.disks[0]).unwrap() == read.1);
    drop(lease);
    let report = prune(&bench);
    assert_eq!(report.references, (BLOCKS - HOT + 2 * HOT) as u64);
    let mut disk = base.1;
    disk[..BLOCK].copy_from_slice(&noise(77));
    copy(&bench.repo, &session, &disk, &[0]).unwrap();
    let segments = segments(&session).unwrap();
    let size = disk.len() as u64;
    let (map, _) = build_map(&bench.repo, Some(&map), &session, &segments, size).unwrap();
    let point = manifest(map, &session, None).unwrap();
    session.publish(&point).unwrap();
    session.remove().unwrap();
    points.push((point, disk));
    prune(&bench);
    check(&bench, &points);
}

#[test]
fn a_copy_of_what_is_left_is_whole() {
    let mut bench = Bench::in_memory(BLOCKS * BLOCK);
    let points = history(&mut bench, 6, 3);
    prune(&bench);
    let store = Memory::new(Objects::new(), None, Fate::Lost);
    let mut second = Bench::in_memory(0);
    second.repo = init_store(Arc::new(store), false);
    let progress = Progress::default();
    for (point, _) in &points {
        let options = Options::default();
        let copy = Replication::new(&bench.repo, &second.repo, options, &progress).unwrap();
        let copied = copy.copy(point.id).unwrap();
        assert!(matches!(copied, Copied::Done { .. }));
    }
    let there =
        |(point, disk): &(Manifest, Vec<u8>)| (second.repo.point(point.id).unwrap(), disk.clone());
    check(&second, &points.iter().map(there).collect::<Vec<_>>());
}

/// A layer that is damaged takes the points with it that have it, and none of the others; what it hid is told of nobody.
#[test]
fn a_damaged_layer_makes_nothing_of_what_was_hidden() {
    let mut bench = Bench::in_memory(BLOCKS * BLOCK);
    let points = history(&mut bench, 6, 2);
    prune(&bench);
    let newest = &points[1].0;
    let object = format!("maps/{}", newest.disks[0].map.layers[0].id);
    let store = bench.repo.store();
    let mut bytes = store.get(&object).unwrap();
    bytes[40] ^= 1;
    store.delete(std::slice::from_ref(&object)).unwrap();
    store.put(&object, &bytes).unwrap();
    for damage in [
        bench.repo.check(None, 1).unwrap().damage,
        bench.repo.verify(&VerifyOptions::default()).unwrap().damage,
    ] {
        assert_eq!(damage.len(), 1, "{damage:?}");
        assert_eq!(damage[0].object, object);
        assert_eq!(damage[0].need, Need::Somebody);
        assert_eq!(damage[0].hurts, [(newest.id, Some("vda".into()))].into());
    }
    // Nothing goes while it cannot be told what is needed.
    let pruned = bench.repo.prune(&PruneOptions::default(), &|_, _, _| ());
    assert!(pruned.unwrap_err().is_corrupt());
    assert_eq!(bench.repo.stats().unwrap().missing, 0);
    bench.repo.withdraw(newest.id).unwrap();
    prune(&bench);
    check(&bench, &points[..1]);
    // Every block of what is left was looked at.
    let map = MapReader::open(&bench.repo, &points[0].0.disks[0].map).unwrap();
    let data = map.runs().map(|run| match run.unwrap().content {
        RunContent::Data(ids) => ids.as_slice().len() as u64,
        _ => 0,
    });
    assert_eq!(bench.repo.check(None, 1).unwrap().blocks, data.sum::<u64>());
}
