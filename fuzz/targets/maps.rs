//! Hostile maps under right digests: a point of up to three layers, whose chunks and footers are the input's. Reading,
//! verifying, comparing and looking up may fail but not panic, hang, or take memory by what is only claimed.
#![no_main]

use std::io;
use std::sync::Arc;

use forerun::image::{BlockSink, MapReader, Repository, VerifyOptions, diff};
use forerun_fuzz::{Input, Memory, empty, seal_binary, seal_json};
use libfuzzer_sys::fuzz_target;
use serde_json::json;
use sha2::{Digest, Sha256};

/// Takes everything and keeps nothing.
struct Nothing;

impl BlockSink for Nothing {
    fn data(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn zero(&mut self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A layer and the digest of its footer.
fn layer(input: &mut Input<'_>) -> Option<(Vec<u8>, String)> {
    let mut body = Vec::new();
    let mut chunks = Vec::new();
    let count = input.byte()? % 4;
    let mut at = 0;
    for _ in 0..count {
        let mut records = Vec::new();
        for _ in 0..input.byte()? % 8 {
            let kind = u32::from(input.byte()? % 4) << 30;
            let blocks = input.number(&[1, 2, 3, 0, 100, 0x3fff_ffff])?;
            records.extend(input.number(&[0, 1, 2, 3, 4, u32::MAX])?.to_le_bytes());
            records.extend((kind | (blocks & 0x3fff_ffff)).to_le_bytes());
            records.extend(input.data()?);
        }
        let first = u64::from(input.number(&[at, 0, 1])?);
        let end =
            u64::from(input.number(&[at.wrapping_add(1), at.wrapping_add(3), 4, u32::MAX])?);
        at = u32::try_from(end).unwrap_or(0);
        chunks.extend(first.to_le_bytes());
        chunks.extend(end.to_le_bytes());
        chunks.extend((16 + body.len() as u64).to_le_bytes());
        chunks.extend((records.len() as u32).to_le_bytes());
        chunks.extend(&Sha256::digest(&records)[..16]);
        body.extend(records);
    }
    let mut footer = 0_u32.to_le_bytes().to_vec();
    for _ in 0..3 {
        footer.extend(u64::from(input.number(&[0, 1, 3, 4])?).to_le_bytes());
    }
    footer.extend(input.number(&[u32::from(count), 0])?.to_le_bytes());
    footer.extend(chunks);
    let digest = hex(&Sha256::digest(&footer));
    Some((seal_binary(*b"fr-map\0\0", &body, &footer), digest))
}

fn run(data: &[u8]) -> Option<()> {
    let mut input = Input(data);
    let mut objects = empty();
    let size = u64::from(input.number(&[196_648, 65_536, 1, 0, u32::MAX])?);
    let mut layers = Vec::new();
    for number in 0..=input.byte()? % 3 {
        let id = format!("{number:032x}");
        let (bytes, digest) = layer(&mut input)?;
        objects.insert(format!("maps/{id}"), bytes);
        layers.push(json!({ "id": id, "blocks": input.number(&[0, 1, 4])?, "digest": digest }));
    }
    let disk = json!({
        "key": "vda", "device": "", "node": "", "format": "raw", "size": size, "tracking": null, "rescanned": null,
        "map": { "size": size, "layers": layers },
    });
    let point = json!({
        "id": "00000000000000aa", "target": { "key": "k", "spellings": [] }, "instant": "2026-01-01T00:00:00Z",
        "utc_offset": 0, "forerun": "", "parent": null, "session": "0".repeat(32), "freeze": "", "quiesce": "offline",
        "disks": [disk], "machine": null, "statistics": null, "retired_bitmaps": [],
    });
    let body = serde_json::to_vec(&point).ok()?;
    objects.insert(
        "points/00000000000000aa".to_owned(),
        seal_json("point", &body),
    );
    let repo = Repository::open_store(Arc::new(Memory::new(objects))).expect("the config is sound");
    let points = repo.points().expect("points are listed").points;
    let map = &points.first()?.disks.first()?.map;
    if let Ok(reader) = MapReader::open(&repo, map) {
        for block in [0, 1, 3, 4, u64::MAX] {
            reader.get(block).ok();
        }
        reader.runs().take(1000).for_each(drop);
    }
    if let Ok(diff) = diff(&repo, map, map) {
        diff.take(1000).for_each(drop);
    }
    repo.read_disk(&points[0].disks[0], 1, &mut Nothing).ok();
    repo.verify(&VerifyOptions::default()).ok();
    Some(())
}

fuzz_target!(|data: &[u8]| {
    run(data);
});
