//! Measurements of the repository at sizes that no test has: ids are generated and there are no blocks behind them.
//! `scripts/bench-repo.sh` runs them, each in a process of its own, since the memory of a process is one of the figures.
//!
//! ```text
//! FORERUN_BENCH_DIR       where the store is; `build` makes it, the others find it
//! FORERUN_BENCH_ENTRIES   entries of the index
//! FORERUN_BENCH_OUT       lines of `figure <tab> value` are appended to this file
//! ```
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "a measurement fails by it, and figures are rounded"
)]

use std::collections::HashSet;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::block::Location;
use super::codec::Codec;
use super::ids::{BlockId, ObjectId};
use super::index::Index;
use super::store::{DirStore, Store};
use crate::clock;

/// Blocks of a pack: 256 MiB of blocks of 64 KiB that halve.
const PACK: u64 = 4000;
/// Numbers from here on are in no index.
const NOWHERE: u64 = 1 << 60;

/// A number spread over all bits.
fn spread(number: u64) -> u64 {
    let mut mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

fn bytes<const N: usize>(number: u64) -> [u8; N] {
    let mut bytes = [0; N];
    for (part, place) in (1..).zip(bytes.chunks_mut(8)) {
        place.copy_from_slice(&spread(number.wrapping_mul(8).wrapping_add(part)).to_be_bytes());
    }
    bytes
}

fn block(number: u64) -> BlockId {
    BlockId::from_bytes(bytes(number))
}

fn pack(number: u64) -> ObjectId {
    ObjectId::from_bytes(bytes(number ^ (1 << 59)))
}

/// The entries of a pack.
fn entries(number: u64) -> Vec<(BlockId, Location)> {
    let entry = |place: u64| {
        let location = Location {
            pack: pack(number),
            offset: 16 + place as u32 * 30_052,
            stored: 30_000,
            plain: 65_536,
            codec: Codec::Lz4,
        };
        (block(number * PACK + place), location)
    };
    (0..PACK).map(entry).collect()
}

/// One measurement.
struct Bench {
    directory: PathBuf,
    packs: u64,
    out: std::fs::File,
}

impl Bench {
    fn new() -> Self {
        let variable = |name: &str| {
            std::env::var(name).unwrap_or_else(|_| panic!("{name}: use scripts/bench-repo.sh"))
        };
        let entries: u64 = variable("FORERUN_BENCH_ENTRIES").parse().unwrap();
        let out = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(variable("FORERUN_BENCH_OUT"))
            .unwrap();
        Self {
            directory: PathBuf::from(variable("FORERUN_BENCH_DIR")).join("store"),
            packs: entries.div_ceil(PACK),
            out,
        }
    }

    fn entries(&self) -> u64 {
        self.packs * PACK
    }

    fn store(&self) -> Arc<dyn Store> {
        Arc::new(DirStore::open(&self.directory).unwrap())
    }

    fn tell(&mut self, figure: &str, value: f64) {
        writeln!(self.out, "{figure}\t{value:.6}").unwrap();
    }

    /// The most memory that this process had, beside what it had at first.
    fn tell_memory(&mut self, figure: &str) {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:"));
        let kib: f64 = line
            .and_then(|line| line.split_whitespace().nth(1))
            .unwrap()
            .parse()
            .unwrap();
        self.tell(figure, kib / 1024.0);
    }
}

fn seconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64()
}

#[test]
#[ignore = "a measurement"]
fn build() {
    let mut bench = Bench::new();
    let store: Arc<dyn Store> = Arc::new(DirStore::init(&bench.directory).unwrap());
    let index = Index::new(Arc::clone(&store));
    let start = clock::now();
    let count = index.fill((0..bench.packs).map(entries)).unwrap();
    assert_eq!(count, bench.entries());
    bench.tell("build, s", seconds(start));
    bench.tell_memory("build, memory, MiB");
    let names = store.list("index/").unwrap();
    let sizes = names.iter().map(|name| store.size(name).unwrap());
    let size = sizes.sum::<u64>() as f64;
    bench.tell("parts", names.len() as f64);
    bench.tell("size, GiB", size / f64::from(1 << 30));
    bench.tell("bytes an entry", size / bench.entries() as f64);
}

/// Look-ups a second of random blocks, found or not.
fn rate(bench: &Bench, index: &Index, threads: u64, hit: bool) -> f64 {
    const EACH: u64 = 100_000;
    let all = bench.entries();
    let start = clock::now();
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                for step in 0..EACH {
                    let number = spread((thread << 40) + step + all);
                    let number = if hit {
                        number % all
                    } else {
                        NOWHERE + number / 16
                    };
                    let found = index.locate(block(number)).unwrap();
                    assert_eq!(found.is_some(), hit);
                }
            });
        }
    });
    (threads * EACH) as f64 / seconds(start)
}

#[test]
#[ignore = "a measurement"]
fn lookups() {
    let mut bench = Bench::new();
    let index = Index::new(bench.store());
    let start = clock::now();
    index.generation().unwrap();
    bench.tell("open, ms", seconds(start) * 1000.0);
    for threads in [1, 2] {
        for hit in [true, false] {
            let words = if hit { "hits" } else { "misses" };
            let found = rate(&bench, &index, threads, hit);
            bench.tell(&format!("{words}/s, {threads} thread(s)"), found);
        }
    }
    bench.tell_memory("look-ups, memory, MiB");
}

/// What batches of a live copy cost: many tiny runs, merged on the way.
#[test]
#[ignore = "a measurement"]
fn publish() {
    const RUNS: u64 = 200;
    let mut bench = Bench::new();
    let index = Index::new(bench.store());
    index.generation().unwrap();
    let first = bench.packs + (1 << 40);
    let mut most = 0.0_f64;
    let start = clock::now();
    for number in 0..RUNS {
        let one = clock::now();
        let mut entries = entries(first + number);
        entries.truncate(500);
        index.publish(entries).unwrap();
        most = most.max(seconds(one));
    }
    bench.tell(
        "publish 500 entries, ms",
        seconds(start) * 1000.0 / RUNS as f64,
    );
    bench.tell("publish 500 entries, most, ms", most * 1000.0);
    bench.tell_memory("publish, memory, MiB");
}

/// Reads all entries in order, as prune does.
#[test]
#[ignore = "a measurement"]
fn sweep() {
    let mut bench = Bench::new();
    let index = Index::new(bench.store());
    let start = clock::now();
    let mut blocks = 0;
    let mut count = |_, _: &[Location]| {
        blocks += 1;
        Ok(())
    };
    index.sweep(&mut count).unwrap();
    assert!(blocks >= bench.entries());
    bench.tell("sweep, s", seconds(start));
    bench.tell_memory("sweep, memory, MiB");
}

/// Takes one pack in a hundred out of the index, as prune does.
#[test]
#[ignore = "a measurement"]
fn rewrite() {
    let mut bench = Bench::new();
    let index = Index::new(bench.store());
    let gone: HashSet<ObjectId> = (0..bench.packs).step_by(100).map(pack).collect();
    let start = clock::now();
    index.rewrite_without(&gone).unwrap();
    bench.tell("rewrite, s", seconds(start));
    bench.tell_memory("rewrite, memory, MiB");
    assert_eq!(index.locate(block(0)).unwrap(), None);
    assert!(index.locate(block(PACK)).unwrap().is_some());
}
