//! What points cost, against what is known of small disks, and against the maps themselves.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by it, and the disks here are small"
)]

mod image_common;

use std::process::Command;

use forerun::image::{
    Amount, Content, Manifest, MapReader, PointId, RunContent, Session, Sizes, Stats,
};
use image_common::{BLOCK, Bench, segment_header};
use serde_json::Value;

fn of(stats: &Stats, point: &Manifest) -> Amount {
    stats
        .points
        .iter()
        .find(|found| found.id == point.id)
        .unwrap()
        .amount
}

fn blocks(sizes: Sizes) -> usize {
    assert_eq!(sizes.plain, sizes.blocks * BLOCK as u64);
    sizes.blocks as usize
}

/// A block that does not compress, and unlike any other of another seed.
fn noise(seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..BLOCK).map(|_| next()).collect()
}

#[test]
fn what_is_shared_and_what_is_not() {
    let mut bench = Bench::in_memory(8 * BLOCK);
    for block in 0..4 {
        bench.write(block * BLOCK, &noise(block as u32));
    }
    // Twice the same.
    bench.write(4 * BLOCK, &noise(0));
    let first = bench.backup();
    bench.write(0, &noise(10));
    bench.write(BLOCK, &vec![0; BLOCK]);
    let second = bench.backup();
    let mut other = second.clone();
    other.id = PointId::random().unwrap();
    other.target.key = "other".into();
    bench.repo.publish(&other).unwrap();

    let stats = bench.repo.stats().unwrap();
    assert!(stats.damaged.is_empty() && stats.missing == 0);
    assert_eq!(blocks(stats.referred), 5);
    let (a, b) = (of(&stats, &first), of(&stats, &second));
    assert_eq!((a.logical, a.data), (8 * BLOCK as u64, 5 * BLOCK as u64));
    assert_eq!((b.logical, b.data), (8 * BLOCK as u64, 4 * BLOCK as u64));
    // One block is zero since.
    assert_eq!((blocks(a.refers), blocks(a.only)), (4, 1));
    // The first layer is the second point's, too, but not what is hidden of it.
    assert_eq!((blocks(b.refers), blocks(b.only)), (4, 0));
    let web = stats.targets[&first.target.key];
    assert_eq!((blocks(web.refers), blocks(web.only)), (5, 1));
    assert_eq!(web.data, a.data + b.data);
    // Noise is stored as it is, each with its header.
    assert_eq!(stats.referred.stored, 5 * (BLOCK as u64 + 52));
    assert!(stats.objects["packs"].bytes > stats.referred.stored);
    assert_eq!(stats.objects["points"].count, 3);

    bench
        .repo
        .store()
        .delete(&[format!("points/{}", other.id)])
        .unwrap();
    let stats = bench.repo.stats().unwrap();
    assert_eq!(
        blocks(of(&stats, &second).only),
        1,
        "the block that it wrote"
    );
    assert_eq!(blocks(of(&stats, &first).only), 1);
    assert_eq!(
        blocks(stats.targets[&first.target.key].only),
        5,
        "all is the target's"
    );
}

#[test]
fn a_session_keeps_blocks() {
    let mut bench = Bench::in_memory(2 * BLOCK);
    bench.write(0, &noise(1));
    let point = bench.backup();
    let mut writer = bench.repo.pack_writer("vda pass 1");
    let known = bench.repo.encode(&noise(1)).unwrap();
    let new = bench.repo.encode(&noise(2)).unwrap();
    let contents: Vec<(u64, Content)> = vec![
        (0, writer.put(known).unwrap()),
        (1, writer.put(new).unwrap()),
    ];
    writer.seal().unwrap();
    let session = Session::create(&bench.repo, "a vm", &Value::Null).unwrap();
    session
        .append_segment(&segment_header(), &contents)
        .unwrap();
    let stats = bench.repo.stats().unwrap();
    assert_eq!(blocks(stats.referred), 2);
    assert_eq!(blocks(stats.sessions_only), 1);
    assert_eq!(blocks(of(&stats, &point).refers), 1);
    assert_eq!(
        blocks(of(&stats, &point).only),
        0,
        "the session has it, too"
    );
    session.remove().unwrap();
    assert_eq!(blocks(of(&bench.repo.stats().unwrap(), &point).only), 1);
}

#[test]
fn any_cut_into_parts_counts_the_same_and_data_is_what_the_maps_say() {
    let mut bench = Bench::in_memory(20 * BLOCK + 700);
    let mut points = Vec::new();
    let mut random = 1_u32;
    for round in 0..25 {
        for _ in 0..6 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let count = bench.disk.len().div_ceil(BLOCK);
            let block = (random >> 8) as usize % count * BLOCK;
            let length = BLOCK.min(bench.disk.len() - block);
            let content = match random >> 28 {
                0..6 => vec![0; length],
                // A few contents, so that many are shared.
                kind => noise(kind + 16 * (round % 3))[..length].to_vec(),
            };
            bench.write(block, &content);
        }
        if round == 10 || round == 15 {
            bench.resize(if round == 10 {
                12 * BLOCK + 50
            } else {
                24 * BLOCK
            });
        }
        points.push(bench.backup());
    }
    let stats = bench.repo.stats().unwrap();
    assert!(stats.referred.blocks > 20);
    for point in &points {
        let map = MapReader::open(&bench.repo, &point.disks[0].map).unwrap();
        let size = point.disks[0].size;
        let mut data = 0;
        for run in map.runs() {
            let run = run.unwrap();
            if let RunContent::Data(_) = run.content {
                data += bench
                    .repo
                    .block_size()
                    .run_extent(run.blocks(), size)
                    .length;
            }
        }
        assert_eq!(of(&stats, point).data, data, "{}", point.instant);
    }
    for part in [1, 3, 40] {
        let parted = bench.repo.stats_in_parts(part).unwrap();
        assert_eq!(parted.referred, stats.referred);
        assert_eq!(parted.targets, stats.targets);
        for point in &points {
            assert_eq!(of(&parted, point), of(&stats, point));
        }
    }
}

#[test]
fn what_is_damaged_is_told_and_not_counted() {
    let mut bench = Bench::new(2 * BLOCK);
    bench.write(0, &noise(1));
    bench.backup();
    bench.write(0, &noise(2));
    let last = bench.backup();
    let layer = format!("maps/{}", last.disks[0].map.layers[0].id);
    bench
        .repo
        .store()
        .delete(std::slice::from_ref(&layer))
        .unwrap();
    let stats = bench.repo.stats().unwrap();
    assert!(
        stats.damaged[0].to_string().contains(&layer),
        "{:?}",
        stats.damaged
    );
    assert_eq!(blocks(stats.referred), 1);
    for index in bench.objects("index/") {
        bench.repo.store().delete(&[index]).unwrap();
    }
    let repo = forerun::image::Repository::open(&bench.path()).unwrap();
    assert_eq!(repo.stats().unwrap().missing, 1);
}

#[test]
fn the_program_shows_all_or_a_part() {
    let mut bench = Bench::new(2 * BLOCK);
    bench.write(0, &noise(1));
    let point = bench.backup();
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_forerun"))
            .arg("stats")
            .args(args)
            .env("FORERUN_REPO", bench.path())
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        (output.status.code().unwrap(), text)
    };
    let (code, text) = run(&["--json"]);
    assert_eq!(code, 0, "{text}");
    let all: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(all["stats"]["referred"]["blocks"], 1);
    assert_eq!(all["stats"]["dedup"], 1.0);
    assert_eq!(
        all["targets"][0]["points"][0]["point"],
        point.id.to_string()
    );
    let (_, text) = run(&["web", "--json"]);
    let part: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(part["targets"], all["targets"]);
    let (_, text) = run(&["web@latest", "--json"]);
    let part: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(part["point"], all["targets"][0]["points"][0]);
    let (code, text) = run(&[]);
    assert!(
        code == 0 && text.contains("1 point of 1 target: 128 KiB on disks, 64 KiB"),
        "{text}"
    );
    assert_eq!(run(&["nobody"]).0, 1);
}
