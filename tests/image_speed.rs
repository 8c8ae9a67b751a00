//! How fast blocks are stored and read back, and how small they get, for each compression, plain and encrypted. Run it with
//! `cargo test --release --test image_speed -- --ignored --nocapture`.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::cast_lossless,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::print_stdout,
    reason = "it prints figures"
)]

mod image_common;

use std::sync::Arc;
use std::time::Instant;

use forerun::image::store::DirStore;
use forerun::image::{Content, InitOptions, Repository};
use image_common::{BLOCK, secret};

/// Blocks of this program and of its sources in turn: half machine code, half text.
fn mix() -> Vec<Vec<u8>> {
    let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    let mut text = Vec::new();
    let mut folders = vec![std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                text.extend(std::fs::read(path).unwrap());
            }
        }
    }
    let count = 512;
    let part = |bytes: &[u8], number: usize, step: usize| {
        let start = number * step % (bytes.len() - BLOCK);
        bytes[start..start + BLOCK].to_vec()
    };
    (0..count)
        .map(|number| match number % 2 {
            // Odd steps, so that no block comes twice.
            0 => part(&program, number, 50_021),
            _ => part(&text, number, 7_919),
        })
        .collect()
}

#[test]
#[ignore = "it measures"]
fn figures() {
    let blocks = mix();
    let plain: usize = blocks.iter().map(Vec::len).sum();
    let speed = |from: Instant| plain as f64 / (1 << 20) as f64 / from.elapsed().as_secs_f64();
    println!("one thread, MiB/s of plain data; best of 3");
    println!("compression  encrypted  encode   put  read  ratio");
    for compression in ["none", "lz4", "zstd:-7", "zstd:1", "zstd:3", "zstd:9"] {
        for encrypted in [false, true] {
            let mut best = [0_f64; 3];
            let mut stored = 0;
            for _ in 0..3 {
                let directory = tempfile::tempdir().unwrap();
                let options = InitOptions {
                    compression: compression.parse().unwrap(),
                    ..InitOptions::default()
                };
                let store = Arc::new(DirStore::init(&directory.path().join("repo")).unwrap());
                let repo = if encrypted {
                    Repository::init_encrypted_store(store, options, &secret(), "").unwrap()
                } else {
                    Repository::init_store(store, options).unwrap()
                };
                let start = Instant::now();
                let encoded: Vec<_> = blocks.iter().map(|b| repo.encode(b).unwrap()).collect();
                best[0] = best[0].max(speed(start));
                let start = Instant::now();
                let mut writer = repo.pack_writer("figures");
                let ids: Vec<_> = encoded
                    .into_iter()
                    .map(|block| writer.put(block).unwrap())
                    .collect();
                stored = writer.seal().unwrap().stored_bytes;
                best[1] = best[1].max(speed(start));
                let start = Instant::now();
                for id in &ids {
                    let Content::Data(id) = id else { continue };
                    repo.read_block(*id).unwrap();
                }
                best[2] = best[2].max(speed(start));
            }
            println!(
                "{compression:11}  {encrypted:9}  {:6.0} {:5.0} {:5.0}  {:5.2}",
                best[0],
                best[1],
                best[2],
                plain as f64 / stored as f64
            );
        }
    }
}
