//! Random writes and backups against a model: every point restores exactly, through as many layers and runs as there come.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by it, and the disks here are small"
)]

mod image_common;

use forerun::image::{LAYERS, VerifyOptions, diff};
use image_common::{BLOCK, Bench, restore};
use proptest::prelude::*;

/// Blocks of the disk, the last one short.
const BLOCKS: usize = 12;
const SIZE: usize = (BLOCKS - 1) * BLOCK + 300;

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
}
