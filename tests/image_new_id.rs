//! A repository that was copied as files gets an identity of its own: its points stay, no bitmap of the original is taken for its
//! own, and the sessions that came along go only by decision.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by it"
)]

mod image_common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use forerun::bitmap::name;
use forerun::image::{self, Manifest, PointId, Repository, RetiredBitmap, Tracking, VerifyOptions};
use forerun::progress::Progress;
use forerun::replicate::{Copied, Options, Replication};
use forerun::session::Session;
use image_common::{BLOCK, Bench, KEY, restore};
use serde_json::{Value, json};

/// A repository with a point whose disk is followed, and a copy of its files.
fn copied() -> (Bench, Manifest, PathBuf) {
    let mut bench = Bench::new(2 * BLOCK);
    bench.write(0, b"content");
    let mut point = bench.backup();
    bench
        .repo
        .store()
        .delete(&[format!("points/{}", point.id)])
        .unwrap();
    point.id = PointId::random().unwrap();
    let short = bench.repo.id().short();
    point.disks[0].tracking = Some(Tracking {
        epoch: 4,
        bitmap: name::new(&short, 4),
        persistent: true,
        granularity: 65536,
        identity: json!(["the chain"]),
    });
    point.retired_bitmaps = vec![RetiredBitmap {
        disk: "vda".into(),
        name: name::new(&short, 3),
    }];
    bench.repo.publish(&point).unwrap();
    let copy = bench.path().with_file_name("copy");
    copy_files(&bench.path(), &copy);
    (bench, point, copy)
}

fn copy_files(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let place = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_files(&entry.path(), &place);
        } else {
            std::fs::copy(entry.path(), place).unwrap();
        }
    }
}

fn run(repo: &Path, args: &[&str]) -> (i32, Value, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = Command::new(env!("CARGO_BIN_EXE_forerun"))
        .args(args)
        .arg("--json")
        .env("FORERUN_REPO", repo)
        .env("FORERUN_STATE_DIR", repo.with_file_name("state"))
        .output()
        .unwrap();
    let said = serde_json::from_slice(&stdout).unwrap_or(Value::Null);
    let words = String::from_utf8(stderr).unwrap();
    (status.code().unwrap(), said, words)
}

/// Whether the point's bitmap is believed, and what would be removed from the VM.
fn believed(repo: &Repository) -> (bool, usize) {
    let session = Session::open(repo, KEY).unwrap();
    let base = &session.bases["vda"];
    assert!(base.base.is_some(), "it is still compared with");
    (base.new.is_some(), session.state.retired.len())
}

#[test]
fn the_points_stay_and_the_originals_bitmaps_are_not_taken_for_ours() {
    let (bench, point, copy) = copied();
    let (code, said, words) = run(&copy, &["repair", "new-id"]);
    assert_eq!(code, 0, "{words}");
    let repo = Repository::open(&copy).unwrap();
    assert_eq!(said["repair"]["old"], bench.repo.id().to_string());
    assert_eq!(said["repair"]["new"], repo.id().to_string());
    assert_ne!(repo.id().short(), bench.repo.id().short());
    assert_eq!(repo.block_size(), bench.repo.block_size());
    assert!(restore(&repo, &repo.point(point.id).unwrap().disks[0]).unwrap() == bench.disk);
    let report = repo.verify(&VerifyOptions::default()).unwrap();
    assert!(report.damage.is_empty(), "{report:?}");
    assert_eq!(believed(&bench.repo), (true, 1));
    assert_eq!(believed(&repo), (false, 0));
    assert_eq!(std::fs::read_dir(copy.join("tmp")).unwrap().count(), 0);
}

#[test]
fn what_the_configuration_has_besides_stays() {
    let (_bench, _, copy) = copied();
    let config = copy.join("config");
    let bytes = std::fs::read(&config).unwrap();
    let body = bytes.splitn(2, |byte| *byte == b'\n').nth(1).unwrap();
    let mut value: Value = serde_json::from_slice(body).unwrap();
    value["later"] = json!("kept");
    let body = serde_json::to_vec(&value).unwrap();
    let digest = image_common::sha256(&body);
    let mut bytes = format!("forerun config 1 {} {digest}\n", body.len()).into_bytes();
    bytes.extend(body);
    std::fs::write(&config, bytes).unwrap();
    Repository::open(&copy).unwrap().renew_id().unwrap();
    let text = std::fs::read_to_string(&config).unwrap();
    assert!(text.contains(r#""later":"kept""#), "{text}");
}

#[test]
fn a_key_that_is_bound_to_the_id_keeps_it() {
    let bench = Bench::encrypted(BLOCK);
    let error = bench.repo.renew_id().unwrap_err();
    assert!(error.to_string().contains("copy the points"), "{error}");
}

#[test]
fn sessions_go_only_by_decision() {
    let (bench, point, copy) = copied();
    let repo = Repository::open(&copy).unwrap();
    let session = image::Session::create(&repo, KEY, &json!({})).unwrap();
    let key = format!("copy:{}:{}", bench.repo.id(), PointId::random().unwrap());
    let on_its_way = image::Session::create(&repo, &key, &json!({})).unwrap();
    image::Session::create(&repo, &format!("{KEY}/withdrawn"), &json!({})).unwrap();
    let (code, said, words) = run(&copy, &["repair", "new-id"]);
    assert_eq!(code, 1, "{words}");
    assert!(
        said["errors"][0]["message"].as_str().unwrap().contains(KEY),
        "{said}"
    );
    assert!(
        said["errors"][0]["hint"]
            .as_str()
            .unwrap()
            .contains("--drop-sessions"),
        "{said}"
    );
    assert_eq!(Repository::open(&copy).unwrap().id(), bench.repo.id());
    assert_eq!(
        image::Session::find(&repo, KEY).unwrap().unwrap().id(),
        session.id()
    );

    let (code, said, words) = run(&copy, &["repair", "new-id", "--drop-sessions"]);
    assert_eq!(code, 0, "{words}");
    assert_eq!(said["repair"]["dropped"], json!([KEY]));
    let repo = Repository::open(&copy).unwrap();
    assert_ne!(repo.id(), bench.repo.id());
    let left = image::Session::list(&repo).unwrap().sessions;
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].id(), on_its_way.id());
    assert!(repo.point(point.id).is_ok());
}

#[test]
fn afterwards_points_can_be_copied_between_the_two() {
    let (mut bench, point, copy) = copied();
    let repo = Repository::open(&copy).unwrap();
    repo.renew_id().unwrap();
    let repo = Repository::open(&copy).unwrap();
    bench.last = Some(point.clone());
    bench.write(BLOCK, b"later");
    let next = bench.backup();
    let progress = Progress::default();
    let to_copy = Replication::new(&bench.repo, &repo, Options::default(), &progress).unwrap();
    // It came with the files: the same point.
    assert_eq!(to_copy.copy(point.id).unwrap(), Copied::Skipped);
    let copied = to_copy.copy(next.id).unwrap();
    assert!(matches!(copied, Copied::Done { base, .. } if base == Some(point.id)));
    let back = Replication::new(&repo, &bench.repo, Options::default(), &progress).unwrap();
    assert_eq!(back.copy(next.id).unwrap(), Copied::Skipped);
}
