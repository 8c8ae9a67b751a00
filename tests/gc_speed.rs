//! How fast a prune marks: a session with 30 million references (`FORERUN_REFERENCES`) in a directory, or many points of one disk
//! (`FORERUN_POINTS`, each kept from the 20th on, so that none of the layers that they share is the newest of any), and a dry run over it.
//! A measurement and no test of a rule, so it runs when it is asked for:
//! `cargo test --release --test gc_speed -- --ignored --nocapture`.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    reason = "a measurement prints what it measured"
)]

mod image_common;

use forerun::image::{Content, PruneOptions, Session};
use image_common::{BLOCK, Bench, made_up_id, manifest, mixed, segment_header};

/// References in one segment.
const SEGMENT: u64 = 1 << 20;

/// The most memory that this process has had, KiB.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let digits = line.unwrap().chars().filter(char::is_ascii_digit);
    digits.collect::<String>().parse().unwrap()
}

#[test]
#[ignore = "a measurement"]
fn marking() {
    let asked = std::env::var("FORERUN_REFERENCES").ok();
    let references: u64 = asked.map_or(30_000_000, |text| text.parse().unwrap());
    let bench = Bench::new(65536);
    let session = Session::create(&bench.repo, "speed", &serde_json::Value::Null).unwrap();
    let mut made = 0;
    while made < references {
        let end = references.min(made + SEGMENT);
        let blocks: Vec<(u64, Content)> = (made..end)
            .map(|block| (block, Content::Data(made_up_id(block))))
            .collect();
        session.append_segment(&segment_header(), &blocks).unwrap();
        made = end;
    }
    assert_eq!(mark(&bench), references);
}

/// Marks, and says how long it took.
fn mark(bench: &Bench) -> u64 {
    let before = peak();
    let start = forerun::clock::now();
    let options = PruneOptions {
        dry_run: true,
        ..PruneOptions::default()
    };
    let report = bench.repo.prune(&options, &|_, _, _| ()).unwrap();
    println!(
        "{} references marked in {:.1?}; peak memory {} MiB, before {} MiB",
        report.references,
        start.elapsed(),
        peak() >> 10,
        before >> 10
    );
    report.references
}

#[test]
#[ignore = "a measurement"]
fn marking_many_points() {
    const CHANGED: u64 = 500;
    let asked = |name, default| {
        let asked = std::env::var(name).ok();
        asked.map_or(default, |text: String| text.parse().unwrap())
    };
    let blocks: u64 = asked("FORERUN_BLOCKS", 1_000_000);
    let points: u64 = asked("FORERUN_POINTS", 200);
    let bench = Bench::new(BLOCK);
    let size = blocks as usize * BLOCK;
    let all: Vec<(u64, Content)> = (0..blocks)
        .map(|block| (block, Content::Data(made_up_id(block))))
        .collect();
    let mut map = bench.commit_blocks(None, &all, size).unwrap();
    for point in 1..points {
        let changed: Vec<(u64, Content)> = (0..CHANGED)
            .map(|number| {
                let made = point << 32 | number;
                (mixed(made) % blocks, Content::Data(made_up_id(made)))
            })
            .collect();
        map = bench.commit_blocks(Some(&map), &changed, size).unwrap();
        if point >= 20 {
            let key = format!("point {point}");
            let session = Session::create(&bench.repo, &key, &serde_json::Value::Null).unwrap();
            let manifest = manifest(map.clone(), &session, None).unwrap();
            session.publish(&manifest).unwrap();
            session.remove().unwrap();
        }
    }
    println!("{} layers", bench.objects("maps/").len());
    mark(&bench);
}
