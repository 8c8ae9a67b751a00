//! Whatever single fault a repository has, a point is restored exactly or not at all: never a wrong image with success. Every
//! byte of every object is flipped, every object truncated and removed, in turn.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by it, and the disks here are small"
)]

mod image_common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use forerun::image::store::DirStore;
use forerun::image::{Error, Manifest, Repository, VerifyOptions};
use image_common::{BLOCK, Bench, KEY, open_store, restore};

/// What the damaged repository must still be right about.
struct Truth {
    points: Vec<(Manifest, Vec<u8>)>,
}

/// A small repository in which every kind of object has a part in a point: two index runs, two layers, a raw and an LZ4 block.
fn small(encrypted: bool) -> (Bench, Truth) {
    let size = 3 * BLOCK + 40;
    let mut bench = if encrypted {
        Bench::encrypted(size)
    } else {
        Bench::new(size)
    };
    let noise: Vec<u8> = (0_u32..200)
        .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    bench.write(0, &noise);
    bench.write(3 * BLOCK, b"raw: too short to compress 0123456789abc");
    let first = bench.backup();
    let mut points = vec![(first, bench.disk.clone())];
    bench.write(BLOCK, b"later");
    bench.write(0, &vec![0; BLOCK]);
    points.push((bench.backup(), bench.disk.clone()));
    (bench, Truth { points })
}

fn files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else {
            found.push(path);
        }
    }
}

/// Restores and verifies everything; gives how many points were restored and whether verify found nothing.
fn check(path: &Path, truth: &Truth, case: &str) -> (usize, bool) {
    let repo = match DirStore::open(path).and_then(|store| open_store(Arc::new(store))) {
        Ok(repo) => repo,
        Err(Error::Corrupt { .. } | Error::NotFound { .. } | Error::Unsupported(_)) => {
            return (0, false);
        }
        Err(error) => panic!("{case}: {error}"),
    };
    let mut exact = 0;
    for (expected, disk) in &truth.points {
        let Ok(point) = repo.point(expected.id) else {
            continue;
        };
        assert_eq!(&point, expected, "{case}: another manifest");
        if let Ok(restored) = restore(&repo, &point.disks[0]) {
            assert!(&restored == disk, "{case}: a wrong image");
            exact += 1;
        }
    }
    // A name that a person gives never leads to another point than without the fault.
    let latest = &truth.points.last().unwrap().0;
    if let Ok(resolved) = repo.resolve(&format!("{KEY}@latest"))
        && repo.point(latest.id).is_ok()
    {
        assert_eq!(resolved.id, latest.id, "{case}: not the latest");
    }
    let report = repo
        .verify(&VerifyOptions::default())
        .unwrap_or_else(|error| panic!("{case}: {error}"));
    let clean = report.damage.is_empty() && report.points == truth.points.len() as u64;
    assert!(
        !clean || exact == truth.points.len(),
        "{case}: verify saw nothing"
    );
    if exact < truth.points.len() && !report.damage.is_empty() {
        let hurts = report.damage.iter().any(|damage| !damage.hurts.is_empty());
        assert!(hurts, "{case}: no point is named: {report:?}");
    }
    (exact, clean)
}

fn shown(path: &Path, root: &Path) -> String {
    path.strip_prefix(root).unwrap().display().to_string()
}

/// Locks are no objects, the reserve means nothing, and what verify itself writes comes and goes with it (`image_verify.rs`
/// damages that).
fn is_judged(name: &str) -> bool {
    !["locks/", "checks/", "quarantine/", "reserve"]
        .iter()
        .any(|kind| name.starts_with(kind))
}

fn replace(path: &Path, bytes: &[u8]) {
    std::fs::remove_file(path).unwrap();
    let mut file = std::fs::File::create_new(path).unwrap();
    std::io::Write::write_all(&mut file, bytes).unwrap();
}

#[test]
fn a_flipped_byte_never_gives_a_wrong_image() {
    flipped(false);
}

#[test]
fn a_flipped_byte_never_gives_a_wrong_image_when_encrypted() {
    flipped(true);
}

fn flipped(encrypted: bool) {
    let (bench, truth) = small(encrypted);
    let root = bench.path();
    assert_eq!(check(&root, &truth, "sound"), (2, true));
    let mut objects = Vec::new();
    files(&root, &mut objects);
    for path in objects {
        let name = shown(&path, &root);
        if !is_judged(&name) {
            continue;
        }
        let sound = std::fs::read(&path).unwrap();
        // What is under an encryption is not seen at all; `image_encrypted.rs` flips every byte of it.
        let step = if encrypted { 23 } else { 1 };
        for position in (0..sound.len()).step_by(step) {
            let mut bad = sound.clone();
            bad[position] ^= 1 << (position % 8);
            replace(&path, &bad);
            let case = format!("{name}: byte {position} of {}", sound.len());
            let (_, clean) = check(&root, &truth, &case);
            assert!(!clean, "{case}: verify did not see it");
        }
        replace(&path, &sound);
    }
    assert_eq!(check(&root, &truth, "sound again"), (2, true));
}

#[test]
fn a_truncated_or_missing_object_never_gives_a_wrong_image() {
    truncated(false);
}

#[test]
fn a_truncated_or_missing_object_never_gives_a_wrong_image_when_encrypted() {
    truncated(true);
}

fn truncated(encrypted: bool) {
    let (bench, truth) = small(encrypted);
    let root = bench.path();
    let mut objects = Vec::new();
    files(&root, &mut objects);
    for path in objects {
        let name = shown(&path, &root);
        if !is_judged(&name) {
            continue;
        }
        let sound = std::fs::read(&path).unwrap();
        for length in [
            0,
            1,
            15,
            16,
            17,
            sound.len() / 2,
            sound.len() - 48,
            sound.len() - 1,
        ] {
            if length < sound.len() {
                replace(&path, &sound[..length]);
                let case = format!("{name}: {length} bytes of {}", sound.len());
                assert!(
                    !check(&root, &truth, &case).1,
                    "{case}: verify did not see it"
                );
            }
        }
        replace(&path, &[sound.clone(), vec![0]].concat());
        assert!(!check(&root, &truth, &format!("{name}: longer")).1);
        std::fs::remove_file(&path).unwrap();
        assert!(!check(&root, &truth, &format!("{name}: missing")).1);
        replace_missing(&path, &sound);
    }
    assert_eq!(check(&root, &truth, "sound again"), (2, true));
}

fn replace_missing(path: &Path, bytes: &[u8]) {
    let mut file = std::fs::File::create_new(path).unwrap();
    std::io::Write::write_all(&mut file, bytes).unwrap();
}

#[test]
fn objects_that_changed_places_are_noticed() {
    swapped(false);
}

#[test]
fn objects_that_changed_places_are_noticed_when_encrypted() {
    swapped(true);
}

fn swapped(encrypted: bool) {
    let (bench, truth) = small(encrypted);
    let root = bench.path();
    for kind in ["points", "maps", "packs"] {
        let mut objects = Vec::new();
        files(&root.join(kind), &mut objects);
        assert!(objects.len() >= 2, "{kind}");
        let contents: Vec<_> = objects
            .iter()
            .map(|path| std::fs::read(path).unwrap())
            .collect();
        replace(&objects[0], &contents[1]);
        replace(&objects[1], &contents[0]);
        let case = format!("{kind} swapped");
        assert!(!check(&root, &truth, &case).1, "{case}");
        replace(&objects[0], &contents[0]);
        replace(&objects[1], &contents[1]);
    }
}

#[test]
fn a_lost_index_is_made_anew_from_the_packs() {
    let (bench, truth) = small(false);
    let root = bench.path();
    let mut runs = Vec::new();
    files(&root.join("index"), &mut runs);
    for run in &runs {
        std::fs::remove_file(run).unwrap();
    }
    assert_eq!(check(&root, &truth, "no index").0, 0);
    let repo = Repository::open(&root).unwrap();
    // A backup would count what is the same as before for stored.
    let open = || forerun::session::Session::open(&repo, KEY);
    let refused = open().err().unwrap().to_string();
    assert!(refused.contains("repair index"), "{refused}");
    assert!(repo.rebuild_index().unwrap().blocks >= 3);
    open().unwrap();
    assert_eq!(check(&root, &truth, "rebuilt"), (2, true));
}

#[test]
fn a_pack_that_does_not_tell_itself_keeps_its_place_in_a_new_index() {
    let (bench, truth) = small(false);
    let root = bench.path();
    let mut packs = Vec::new();
    files(&root.join("packs"), &mut packs);
    let mut bytes = std::fs::read(&packs[0]).unwrap();
    let end = bytes.len() - 60;
    bytes[end] ^= 1;
    replace(&packs[0], &bytes);
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_forerun"))
        .args(["--json", "repair", "index", "--repo"])
        .arg(&root)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(5));
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let repair = &document["repair"];
    assert_eq!(repair["packs"], packs.len() - 1);
    assert_eq!(repair["left_out"].as_array().unwrap().len(), 1);
    assert!(repair["blocks"].as_u64().unwrap() >= 3, "{repair}");
    // Its blocks are sound, so all is restored, and verify names the footer.
    assert_eq!(check(&root, &truth, "a damaged footer"), (2, false));
}
