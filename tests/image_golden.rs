//! A repository of format version 1, as it was written when that version was made, is read for ever. A later version adds its
//! own directory beside it.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by it, and the disks here are small"
)]

mod image_common;

use std::path::PathBuf;

use forerun::image::{InitOptions, Repository, Session, VerifyOptions};
use forerun::units::BlockSize;
use image_common::{BLOCK, backup, restore};

fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/repository-v1")
}

/// The disk at the first and at the second point: text, a short raw end, then a block zeroed and one written.
fn disks() -> [Vec<u8>; 2] {
    let mut first = vec![0; 3 * BLOCK + 40];
    first[..13].copy_from_slice(b"hello, future");
    first[3 * BLOCK..].copy_from_slice(b"raw: too short to compress 0123456789abc");
    let mut second = first.clone();
    second[..13].fill(0);
    second[BLOCK..BLOCK + 5].copy_from_slice(b"later");
    [first, second]
}

#[test]
fn version_1_is_read() {
    let repo = Repository::open(&golden()).unwrap();
    assert_eq!(repo.block_size(), BlockSize::DEFAULT);
    let points = repo.points().unwrap();
    assert!(points.damaged.is_empty(), "{points:?}");
    assert_eq!(points.points.len(), 2);
    for (point, disk) in points.points.iter().zip(disks()) {
        assert!(restore(&repo, &point.disks[0]).unwrap() == disk);
    }
    let report = repo.verify(&VerifyOptions::default()).unwrap();
    assert!(report.damage.is_empty(), "{report:?}");
    let session = Session::find(&repo, "golden").unwrap().unwrap();
    assert_eq!(session.items().unwrap().len(), 2);
}

#[test]
#[ignore = "makes the golden repository, once for each version of the format"]
fn make() {
    let repo = Repository::init(&golden(), InitOptions::default()).unwrap();
    let [first, second] = disks();
    let point = backup(&repo, &first, &(0..4).collect(), None).unwrap();
    backup(&repo, &second, &[0, 1].into(), Some(&point)).unwrap();
    let session = Session::create(&repo, "golden", &serde_json::json!({"kept": true})).unwrap();
    session.append(&serde_json::json!({"record": 1})).unwrap();
    let blocks = [
        (7, forerun::image::Content::Zero),
        (2, forerun::image::Content::Same),
    ];
    session
        .append_segment(&image_common::segment_header(), &blocks)
        .unwrap();
}
