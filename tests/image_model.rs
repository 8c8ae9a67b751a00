//! Random writes and backups against a model: every point restores exactly, through as many layers and runs as there come, whatever
//! is forgotten and pruned between them, and what is left is what the points show.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by it, and the disks here are small"
)]

mod image_common;

use std::collections::BTreeSet;

use forerun::image::{LAYERS, Manifest, PruneOptions, VerifyOptions, diff};
use image_common::{BLOCK, Bench, restore};
use proptest::prelude::*;

/// Blocks of the disk, the last one short.
const BLOCKS: usize = 12;
const SIZE: usize = (BLOCKS - 1) * BLOCK + 300;

/// The distinct blocks of a disk that are not zero.
fn blocks(disk: &[u8]) -> BTreeSet<&[u8]> {
    let data = disk.chunks(BLOCK);
    data.filter(|block| block.iter().any(|byte| *byte != 0))
        .collect()
}

/// What is stored, checked and counted is what the points show.
fn check(bench: &Bench, points: &[(Manifest, Vec<u8>)]) {
    for (point, disk) in points {
        assert!(&restore(&bench.repo, &point.disks[0]).unwrap() == disk);
    }
    let all: BTreeSet<&[u8]> = points.iter().flat_map(|(_, disk)| blocks(disk)).collect();
    let report = bench.repo.check(None, 1).unwrap();
    assert_eq!(report.damage, []);
    assert_eq!(report.blocks, all.len() as u64);
    let report = bench.repo.verify(&VerifyOptions::default()).unwrap();
    assert!(report.damage.is_empty() && report.complete);
    let stats = bench.repo.stats_in_parts(5).unwrap();
    assert_eq!((stats.missing, stats.damaged.len()), (0, 0));
    assert_eq!(stats.referred.blocks, all.len() as u64);
    for (point, disk) in points {
        let found = stats.points.iter().find(|found| found.id == point.id);
        let amount = found.unwrap().amount;
        let mut only = blocks(disk);
        assert_eq!(amount.refers.blocks, only.len() as u64);
        for (_, other) in points.iter().filter(|(other, _)| other.id != point.id) {
            let others = blocks(other);
            only.retain(|block| !others.contains(block));
        }
        assert_eq!(amount.only.blocks, only.len() as u64);
        let one = VerifyOptions {
            points: Some(vec![point.id]),
            ..VerifyOptions::default()
        };
        let report = bench.repo.verify(&one).unwrap();
        assert_eq!(report.damage, []);
        assert_eq!(report.checked_blocks, amount.refers.blocks);
    }
}

fn prune(bench: &Bench) {
    let options = PruneOptions::default();
    bench.repo.prune(&options, &|_, _, _| ()).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn every_point_restores_exactly(
        rounds in proptest::collection::vec(proptest::collection::vec((0..BLOCKS, 0_u8..4), 0..4), 20..45)
    ) {
        let mut bench = Bench::in_memory(SIZE);
        let mut points = Vec::new();
        for (number, round) in (3_u8..).zip(&rounds) {
            for (block, value) in round {
                let length = if block + 1 == BLOCKS { 300 } else { BLOCK };
                // Zero, a value that comes again and again, or one of this round only.
                let value = if *value < 3 { vec![*value; length] } else { vec![number; length] };
                bench.write(block * BLOCK, &value);
            }
            points.push((bench.backup(), bench.disk.clone()));
        }
        for (point, disk) in &points {
            prop_assert!(point.disks[0].map.layers.len() <= LAYERS);
            prop_assert!(&restore(&bench.repo, &point.disks[0]).unwrap() == disk);
        }
        prop_assert!(bench.objects("index/").len() <= 8);
        let (first, last) = (&points[0], &points[points.len() - 1]);
        let changed: Vec<u64> = diff(&bench.repo, &first.0.disks[0].map, &last.0.disks[0].map)
            .unwrap()
            .flat_map(|run| { let run = run.unwrap(); run.first..run.end() })
            .collect();
        let expected: Vec<u64> = first.1.chunks(BLOCK).zip(last.1.chunks(BLOCK)).zip(0..)
            .filter(|((a, b), _)| a != b).map(|(_, block)| block).collect();
        prop_assert_eq!(changed, expected);
        let report = bench.repo.verify(&VerifyOptions::default()).unwrap();
        prop_assert!(report.damage.is_empty() && report.complete);
    }

    #[test]
    fn what_points_show_outlives_every_prune_and_what_they_hide_does_not(
        rounds in proptest::collection::vec((
            proptest::collection::vec((0..BLOCKS, 0_u8..6), 0..5),
            // A size, points that go, and whether it is pruned then.
            proptest::option::weighted(0.2, 5 * BLOCK..SIZE + 3 * BLOCK),
            proptest::collection::vec(any::<prop::sample::Index>(), 0..3),
            0..4,
        ), 20..45)
    ) {
        let mut bench = Bench::in_memory(SIZE);
        let mut points: Vec<(Manifest, Vec<u8>)> = Vec::new();
        for (number, (writes, size, gone, pruned)) in (9_u8..).zip(&rounds) {
            if let Some(size) = size {
                // Often to the block.
                bench.resize(if size % 2 == 0 { size / BLOCK * BLOCK } else { *size });
            }
            for (block, value) in writes {
                let length = BLOCK.min(bench.disk.len().saturating_sub(block * BLOCK));
                // Contents that come back, also when they have been pruned, and new ones.
                let value = if *value < 4 { *value } else { number };
                if length > 0 {
                    bench.write(block * BLOCK, &vec![value; length]);
                }
            }
            points.push((bench.backup(), bench.disk.clone()));
            for gone in gone {
                // The newest stays: the next one builds on it.
                if points.len() > 1 {
                    let (gone, _) = points.remove(gone.index(points.len() - 1));
                    bench.repo.withdraw(gone.id).unwrap();
                }
            }
            if *pruned == 0 {
                prune(&bench);
                check(&bench, &points);
            }
        }
        prune(&bench);
        check(&bench, &points);
        // Only the newest is left, in a single pack: without anything that is hidden.
        while points.len() > 1 {
            bench.repo.withdraw(points.remove(0).0.id).unwrap();
        }
        for _ in 0..3 {
            prune(&bench);
        }
        check(&bench, &points);
        prop_assert!(bench.objects("maps/").len() <= LAYERS);
    }
}
