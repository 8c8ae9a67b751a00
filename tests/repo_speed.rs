//! How fast a repository in the page cache is verified and restored, against what SHA-256 and LZ4 alone need for the same blocks in
//! memory. A measurement and no test of a rule, so it runs when it is asked for:
//! `cargo test --release --test repo_speed -- --ignored --nocapture`.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "a measurement prints what it measured"
)]

mod image_common;

use std::sync::atomic::{AtomicUsize, Ordering};

use forerun::clock;
use forerun::image::{BlockId, BlockSink, VerifyOptions};
use image_common::{BLOCK, Bench};

const SIZE: usize = 1 << 30;
const THREADS: usize = 2;
const ROUNDS: usize = 3;

/// The id of a block in a repository that is not encrypted.
fn id_of(plain: &[u8]) -> BlockId {
    BlockId::from_bytes(<sha2::Sha256 as sha2::Digest>::digest(plain).into())
}

struct Null;

impl BlockSink for Null {
    fn data(&mut self, _: u64, data: &[u8]) -> std::io::Result<()> {
        std::hint::black_box(data);
        Ok(())
    }

    fn zero(&mut self, _: u64, _: u64) -> std::io::Result<()> {
        Ok(())
    }
}

/// MiB of plain data a second, the best of some rounds.
fn best(mut work: impl FnMut()) -> f64 {
    let mut best = f64::MAX;
    for _ in 0..ROUNDS {
        let start = clock::now();
        work();
        best = best.min(start.elapsed().as_secs_f64());
    }
    (SIZE >> 20) as f64 / best
}

fn in_parallel(blocks: usize, work: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let block = next.fetch_add(1, Ordering::Relaxed);
                    if block >= blocks {
                        return;
                    }
                    work(block);
                }
            });
        }
    });
}

/// Half of each 256 bytes is noise, so that LZ4 halves it.
fn content() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = vec![0x5a; SIZE];
    for span in bytes.chunks_exact_mut(256) {
        for word in span[..128].chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
    }
    bytes
}

#[test]
#[ignore = "a measurement"]
fn against_hashing_alone() {
    let mut bench = Bench::new(SIZE);
    bench.write(0, &content());
    let point = bench.backup();
    let blocks: Vec<&[u8]> = bench.disk.chunks(BLOCK).collect();
    let packed: Vec<Vec<u8>> = blocks
        .iter()
        .map(|plain| lz4_flex::block::compress(plain))
        .collect();
    let hash = best(|| {
        in_parallel(blocks.len(), |block| {
            std::hint::black_box(id_of(blocks[block]));
        });
    });
    let unpack = best(|| {
        in_parallel(blocks.len(), |block| {
            let mut plain = vec![0; BLOCK];
            let length = lz4_flex::block::decompress_into(&packed[block], &mut plain);
            assert_eq!(length.unwrap(), BLOCK);
            std::hint::black_box(id_of(&plain));
        });
    });
    let options = VerifyOptions {
        threads: THREADS,
        ..VerifyOptions::default()
    };
    let verify = best(|| {
        let report = bench.repo.verify(&options).unwrap();
        assert_eq!(report.checked_bytes, SIZE as u64);
        assert!(report.damage.is_empty());
    });
    let of_points = VerifyOptions {
        points: Some(vec![point.id]),
        ..options
    };
    let verify_point = best(|| {
        let report = bench.repo.verify(&of_points).unwrap();
        assert_eq!(report.checked_bytes, SIZE as u64);
    });
    let restore = best(|| {
        bench
            .repo
            .read_disk(&point.disks[0], THREADS, &mut Null)
            .unwrap();
    });
    let check = clock::now();
    bench.repo.check(None, THREADS).unwrap();
    let check = check.elapsed();
    println!("MiB/s of plain data, {THREADS} threads, best of {ROUNDS}");
    println!("SHA-256 alone          {hash:7.0}");
    println!("LZ4 and SHA-256 alone  {unpack:7.0}");
    for (what, speed) in [
        ("verify", verify),
        ("verify POINT", verify_point),
        ("restore to nowhere", restore),
    ] {
        println!(
            "{what:22} {speed:7.0}   {:.2} of LZ4 and SHA-256",
            speed / unpack
        );
    }
    println!("check                  {:7.3} s", check.as_secs_f64());
}
