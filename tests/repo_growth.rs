//! What a repository grows by: the metadata of increments, opening a point after a thousand of them, and a second VM of the same
//! system. A measurement and no test of a rule, so it runs when it is asked for:
//! `cargo test --release --test repo_growth -- --ignored --nocapture`.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "a measurement prints what it measured"
)]

mod image_common;

use std::collections::BTreeSet;

use forerun::clock;
use forerun::image::{Content, DiskPoint, Manifest, MapReader, Repository, Session, build_map};
use image_common::{BLOCK, Bench, backup_of, made_up_id, mixed, segment_header, segments};

/// Blocks of the disk whose increments are made: 256 GiB of 64 KiB.
const BLOCKS: u64 = 4 << 20;
/// Increments.
const INCREMENTS: u64 = 1000;
/// Changed blocks of each.
const CHANGED: u64 = 2000;

fn bytes(repo: &Repository, prefix: &str) -> u64 {
    let names = repo.store().list(prefix).unwrap();
    names
        .iter()
        .map(|name| repo.store().size(name).unwrap())
        .sum()
}

/// A point like another of blocks that nobody has: what maps cost does not depend on data.
fn increment(repo: &Repository, last: &Manifest, blocks: &[(u64, Content)]) -> Manifest {
    let session = Session::create(repo, "growth", &serde_json::Value::Null).unwrap();
    session.append_segment(&segment_header(), blocks).unwrap();
    let base = last.disks.first().map(|disk| &disk.map);
    let size = BLOCKS * BLOCK as u64;
    let made = segments(&session).unwrap();
    let (map, _) = build_map(repo, base, &session, &made, size).unwrap();
    let point = Manifest {
        id: forerun::image::PointId::random().unwrap(),
        session: session.id(),
        disks: vec![DiskPoint {
            size,
            map,
            ..last.disks.first().unwrap().clone()
        }],
        ..last.clone()
    };
    repo.publish(&point).unwrap();
    session.remove().unwrap();
    point
}

/// A manifest to begin from.
fn template() -> (Bench, Manifest) {
    let mut bench = Bench::new(BLOCK);
    bench.write(0, b"x");
    let mut point = bench.backup();
    "growth".clone_into(&mut point.target.key);
    (bench, point)
}

#[test]
#[ignore = "a measurement"]
fn increments() {
    let (bench, template) = template();
    let repo = &bench.repo;
    let full: Vec<(u64, Content)> = (0..BLOCKS)
        .map(|block| (block, Content::Data(made_up_id(block))))
        .collect();
    let mut first = template.clone();
    first.disks[0].map.layers.clear();
    first.disks[0].map.size = 0;
    let mut last = increment(repo, &first, &full);
    let before = bytes(repo, "maps/");
    let layers = repo.store().list("maps/").unwrap().len();
    let mut own = 0;
    for round in 0..INCREMENTS {
        let changed: BTreeSet<u64> = (0..CHANGED)
            .map(|number| mixed(round * CHANGED + number) % BLOCKS)
            .collect();
        let changed: Vec<(u64, Content)> = changed
            .into_iter()
            .map(|block| {
                (
                    block,
                    Content::Data(made_up_id(BLOCKS + round * BLOCKS + block)),
                )
            })
            .collect();
        let made = increment(repo, &last, &changed);
        if round == 0 {
            own = bytes(repo, "maps/") - before;
        }
        last = made;
    }
    let maps = bytes(repo, "maps/") - before;
    let all = (INCREMENTS * CHANGED) as f64;
    println!(
        "map bytes a changed block, before compaction\t{:.1}",
        own as f64 / CHANGED as f64
    );
    println!(
        "map bytes a changed block, {INCREMENTS} increments kept, compacted\t{:.1}",
        maps as f64 / all
    );
    println!(
        "layers of the newest map, and objects\t{} and {}",
        last.disks[0].map.layers.len(),
        repo.store().list("maps/").unwrap().len() - layers
    );
    let start = clock::now();
    let point = repo.point(last.id).unwrap();
    let map = MapReader::open(repo, &point.disks[0].map).unwrap();
    for block in 0..100 {
        map.get(mixed(block) % BLOCKS).unwrap();
    }
    println!(
        "open a point after {INCREMENTS} increments and look up 100 blocks, ms\t{:.1}",
        start.elapsed().as_secs_f64() * 1000.0
    );
    let start = clock::now();
    let runs = map.runs().map(|run| run.unwrap().count()).sum::<u64>();
    assert_eq!(runs, BLOCKS);
    println!(
        "read its whole map of {BLOCKS} blocks, ms\t{:.0}",
        start.elapsed().as_secs_f64() * 1000.0
    );
}

/// A block of noise.
fn noise(number: u64) -> Vec<u8> {
    (0..BLOCK as u64 / 8)
        .flat_map(|word| mixed(number << 20 | word).to_le_bytes())
        .collect()
}

#[test]
#[ignore = "a measurement"]
fn metadata_of_data() {
    let mut bench = Bench::new(4000 * BLOCK);
    for block in 0..4000 {
        bench.write(block as usize * BLOCK, &noise(block));
    }
    bench.backup();
    let kinds = ["maps/", "index/", "points/"];
    let before: u64 = kinds.map(|kind| bytes(&bench.repo, kind)).iter().sum();
    let packs = bytes(&bench.repo, "packs/");
    let changed: BTreeSet<u64> = (0..2000).map(|number| mixed(number) % 4000).collect();
    for block in &changed {
        bench.write(*block as usize * BLOCK, &noise(1 << 30 | block));
    }
    bench.backup();
    let packs = bytes(&bench.repo, "packs/") - packs - changed.len() as u64 * BLOCK as u64;
    let after: u64 = kinds.map(|kind| bytes(&bench.repo, kind)).iter().sum();
    println!(
        "metadata bytes a scattered changed block (maps, index, packs' own, manifest)\t{:.1}",
        (after - before + packs) as f64 / changed.len() as f64
    );
}

#[test]
#[ignore = "a measurement"]
fn a_second_vm() {
    // The same system, and 1 % of its own: a host's name, keys, logs.
    let bench = Bench::new(BLOCK);
    let mut disk: Vec<u8> = (0..8000).flat_map(noise).collect();
    let all: BTreeSet<u64> = (0..8000).collect();
    let kinds = ["packs/", "maps/", "index/", "points/"];
    let stored = |bench: &Bench| {
        kinds
            .map(|kind| bytes(&bench.repo, kind))
            .iter()
            .sum::<u64>()
    };
    let before = stored(&bench);
    backup_of(&bench.repo, "one", &disk, &all, None).unwrap();
    let one = stored(&bench) - before;
    backup_of(&bench.repo, "two", &disk, &all, None).unwrap();
    let two = stored(&bench) - before - one;
    println!(
        "a second VM with the same image, % of the first\t{:.2}",
        two as f64 * 100.0 / one as f64
    );
    for own in 0..80 {
        let at = (mixed(own) % 8000) as usize * BLOCK;
        disk[at..at + BLOCK].copy_from_slice(&noise(1 << 31 | own));
    }
    backup_of(&bench.repo, "three", &disk, &all, None).unwrap();
    let three = stored(&bench) - before - one - two;
    println!(
        "a third with 1 % of its own, % of the first\t{:.2}",
        three as f64 * 100.0 / one as f64
    );
}
