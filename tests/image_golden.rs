//! A repository of format version 1, as it was written when that version was made, is read for ever. A later version adds its
//! own directory beside it.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::cast_possible_truncation,
    reason = "a test fails by it, and the disks here are small"
)]

mod image_common;

use std::path::PathBuf;

use forerun::image::{Closed, InitOptions, Repository, Secret, Session, VerifyOptions};
use forerun::units::BlockSize;
use image_common::{BLOCK, backup, restore};

fn golden(name: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.join("tests/golden").join(name)
}

const PLAIN: &str = "repository-v1";
const ENCRYPTED: &str = "encrypted-v1";

/// The key file of the encrypted one.
fn key_file() -> Secret {
    let bytes = std::fs::read(golden("encrypted-v1.key")).unwrap();
    Secret::key_file(bytes.into()).unwrap()
}

/// Its other key.
fn passphrase() -> Secret {
    Secret::passphrase(b"a golden passphrase".to_vec().into()).unwrap()
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

/// What every golden repository holds.
fn check(repo: &Repository) {
    assert_eq!(repo.block_size(), BlockSize::DEFAULT);
    let points = repo.points().unwrap();
    assert!(points.damaged.is_empty(), "{points:?}");
    assert_eq!(points.points.len(), 2);
    for (point, disk) in points.points.iter().zip(disks()) {
        assert!(restore(repo, &point.disks[0]).unwrap() == disk);
    }
    let report = repo.verify(&VerifyOptions::default()).unwrap();
    assert!(report.damage.is_empty(), "{report:?}");
    let session = Session::find(repo, "golden").unwrap().unwrap();
    assert_eq!(session.items().unwrap().len(), 2);
}

#[test]
fn version_1_is_read() {
    check(&Repository::open(&golden(PLAIN)).unwrap());
}

#[test]
fn version_1_encrypted_is_read_with_each_of_its_keys() {
    for secret in [key_file(), passphrase()] {
        let closed = Closed::at(&golden(ENCRYPTED)).unwrap();
        let repo = closed.open(Some(&secret)).unwrap();
        assert_eq!(repo.compression().to_string(), "zstd:3");
        check(&repo);
    }
}

fn fill(repo: &Repository) {
    let [first, second] = disks();
    let point = backup(repo, &first, &(0..4).collect(), None).unwrap();
    backup(repo, &second, &[0, 1].into(), Some(&point)).unwrap();
    let session = Session::create(repo, "golden", &serde_json::json!({"kept": true})).unwrap();
    session.append(&serde_json::json!({"record": 1})).unwrap();
    let blocks = [
        (7, forerun::image::Content::Zero),
        (2, forerun::image::Content::Same),
    ];
    session
        .append_segment(&image_common::segment_header(), &blocks)
        .unwrap();
}

#[test]
#[ignore = "makes the golden repository, once for each version of the format"]
fn make() {
    fill(&Repository::init(&golden(PLAIN), InitOptions::default()).unwrap());
}

#[test]
#[ignore = "makes the encrypted golden repository, once for each version of the format"]
fn make_encrypted() {
    let key = Secret::new_key_file().unwrap();
    std::fs::write(golden("encrypted-v1.key"), &key).unwrap();
    let options = InitOptions {
        compression: "zstd".parse().unwrap(),
        ..InitOptions::default()
    };
    let path = golden(ENCRYPTED);
    fill(&Repository::init_encrypted(&path, options, &key_file(), "a file").unwrap());
    let ring = Closed::at(&path).unwrap().key_ring(&key_file()).unwrap();
    ring.add(&passphrase(), "words").unwrap();
}
