//! The contract of a store, for the directory and for the one in memory that the crash tests use, and what only the directory
//! has: modes, temporary files, who holds a lock.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by it, and the disks here are small"
)]

mod image_common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use forerun::image::store::{DirStore, Store};
use forerun::image::{Error, InitOptions, Repository};
use forerun::units::BlockSize;
use image_common::memory::{Fate, Memory, Objects};
use image_common::{init_store, sha256};
use rustix::process::{PidfdFlags, PidfdGetfdFlags};

/// What every store does.
fn contract(store: &dyn Store) {
    store.put("points/aa", b"hello").unwrap();
    assert_eq!(store.get("points/aa").unwrap(), b"hello");
    assert_eq!(store.size("points/aa").unwrap(), 5);
    // Nothing is ever replaced.
    let error = store.put("points/aa", b"other").unwrap_err();
    assert!(matches!(error, Error::Exists { .. }), "{error}");
    assert_eq!(store.get("points/aa").unwrap(), b"hello");

    let mut middle = [0; 3];
    store.get_range("points/aa", 1, &mut middle).unwrap();
    assert_eq!(&middle, b"ell");
    let error = store.get_range("points/aa", 3, &mut middle).unwrap_err();
    assert!(error.is_corrupt(), "{error}");

    for error in [
        store.get("points/bb").unwrap_err(),
        store.size("points/bb").unwrap_err(),
        store.get_range("points/bb", 0, &mut middle).unwrap_err(),
    ] {
        assert!(error.is_not_found(), "{error}");
    }

    // An object is there when it is finished, not before, and never when it is dropped.
    let mut writer = store.create("packs/ab/cd").unwrap();
    writer.write(b"one ").unwrap();
    assert!(store.list("packs/").unwrap().is_empty());
    writer.write(b"two").unwrap();
    writer.finish().unwrap();
    assert_eq!(store.get("packs/ab/cd").unwrap(), b"one two");
    let mut dropped = store.create("packs/ab/ef").unwrap();
    dropped.write(b"x").unwrap();
    drop(dropped);
    store.put("packs/00/11", b"").unwrap();
    assert_eq!(
        store.list("packs/").unwrap(),
        ["packs/00/11", "packs/ab/cd"]
    );
    assert!(store.list("maps/").unwrap().is_empty());
    for prefix in ["packs/", "maps/", "sessions/none/"] {
        let listed = store.list(prefix).unwrap();
        assert_eq!(store.list_fresh(prefix).unwrap(), listed);
    }
    let mut late = store.create("points/aa").unwrap();
    late.write(b"y").unwrap();
    assert!(matches!(late.finish(), Err(Error::Exists { .. })));

    let gone = ["packs/ab/cd".to_owned(), "packs/00/11".to_owned()];
    store.delete(&gone).unwrap();
    store.delete(&gone).unwrap();
    assert!(store.list("packs/").unwrap().is_empty());
    assert!(store.get("packs/ab/cd").unwrap_err().is_not_found());
    store.put("packs/ab/cd", b"again").unwrap();
    assert_eq!(store.size("packs/ab/cd").unwrap(), 5);

    let held = store.lock("index", "the first").unwrap();
    let error = store.lock("index", "the second").unwrap_err();
    assert!(matches!(error, Error::Busy { .. }), "{error}");
    store.lock("other", "the second").unwrap();
    drop(held);
    store.lock("index", "the second").unwrap();
}

fn directory() -> (tempfile::TempDir, DirStore) {
    let directory = tempfile::tempdir().unwrap();
    let store = DirStore::init(&directory.path().join("repo")).unwrap();
    (directory, store)
}

#[test]
fn a_directory_keeps_the_contract() {
    let (_directory, store) = directory();
    contract(&store);
}

#[test]
fn the_store_of_the_crash_tests_keeps_the_contract() {
    contract(&Memory::new(Objects::new(), None, Fate::Lost));
}

#[test]
fn an_encrypted_store_keeps_the_contract() {
    let beneath = Memory::new(Objects::new(), None, Fate::Lost);
    contract(init_store(Arc::new(beneath), true).store());
}

/// Another descriptor of the open file, as a child has it from its fork until it is another program.
fn inherited(path: &Path) -> rustix::fd::OwnedFd {
    let is = |fd: &std::fs::DirEntry| std::fs::read_link(fd.path()).is_ok_and(|to| to == path);
    let mut open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let fd: i32 = open
        .find(is)
        .unwrap()
        .file_name()
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    let own = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).unwrap();
    rustix::process::pidfd_getfd(own, fd, PidfdGetfdFlags::empty()).unwrap()
}

#[test]
fn a_lock_is_let_go_though_a_child_has_its_file_open() {
    let (directory, store) = directory();
    let held = store.lock("index", "the first").unwrap();
    let path = directory
        .path()
        .canonicalize()
        .unwrap()
        .join("repo/locks/index");
    let _child = inherited(&path);
    drop(held);
    store.lock("index", "the second").unwrap();
}

#[test]
fn the_loser_of_a_lock_reads_who_holds_it() {
    let (directory, store) = directory();
    let _held = store.lock("index", "merging index runs").unwrap();
    let other = DirStore::open(&directory.path().join("repo")).unwrap();
    let message = other.lock("index", "me").unwrap_err().to_string();
    let pid = format!("pid {}", std::process::id());
    for part in ["locks/index", "merging index runs", &pid, " on ", " since "] {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn names_that_leave_the_store_are_refused() {
    let (_directory, store) = directory();
    for name in ["../x", "/etc/passwd", "points/../../x", "points/", ""] {
        assert!(
            matches!(store.put(name, b""), Err(Error::Invalid(_))),
            "{name}"
        );
        assert!(matches!(store.get(name), Err(Error::Invalid(_))), "{name}");
        assert!(store.delete(&[name.to_owned()]).is_err(), "{name}");
        assert!(store.lock(name, "").is_err(), "{name}");
    }
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn nobody_else_can_read_a_repository() {
    let (directory, store) = directory();
    store.put("packs/ab/cd", b"x").unwrap();
    let root = directory.path().join("repo");
    for path in ["", "packs", "packs/ab", "points", "tmp"] {
        assert_eq!(mode(&root.join(path)), 0o700, "{path}");
    }
    assert_eq!(mode(&root.join("packs/ab/cd")), 0o600);
}

#[test]
fn only_temporary_files_of_dead_writers_are_removed() {
    let (directory, store) = directory();
    let root = directory.path().join("repo");
    let mut alive = store.create("packs/ab/cd").unwrap();
    alive.write(b"x").unwrap();
    std::fs::File::create_new(root.join("tmp/00")).unwrap();
    assert_eq!(std::fs::read_dir(root.join("tmp")).unwrap().count(), 2);
    DirStore::open(&root).unwrap();
    assert_eq!(std::fs::read_dir(root.join("tmp")).unwrap().count(), 1);
    alive.finish().unwrap();
    assert_eq!(std::fs::read_dir(root.join("tmp")).unwrap().count(), 0);
    assert_eq!(store.get("packs/ab/cd").unwrap(), b"x");
}

#[test]
fn init_refuses_what_is_not_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let options = InitOptions::default();
    let root = directory.path().join("repo");
    let repo = Repository::init(&root, options).unwrap();
    let error = Repository::init(&root, options).unwrap_err();
    assert!(matches!(error, Error::Exists { .. }), "{error}");
    let opened = Repository::open(&root).unwrap();
    assert_eq!(opened.id(), repo.id());
    assert_eq!(opened.block_size(), BlockSize::DEFAULT);

    let error = Repository::init(directory.path(), options).unwrap_err();
    assert!(matches!(error, Error::Invalid(_)), "{error}");
    assert!(
        error.to_string().ends_with("is not empty: it holds repo"),
        "{error}"
    );
    let error = Repository::open(directory.path()).unwrap_err();
    assert!(error.is_not_found(), "{error}");

    // Cut short before its config was written, it is begun again.
    std::fs::remove_file(root.join("config")).unwrap();
    Repository::init(&root, options).unwrap();
}

#[test]
fn a_later_format_or_an_unknown_feature_is_refused_in_clear_words() {
    for (config, words) in [
        (
            r#"{"version":2,"#,
            "the repository has format version 2, this build reads 1",
        ),
        (
            r#"{"version":1,"features":["encrypt"],"#,
            "the repository has the feature `encrypt`",
        ),
    ] {
        let features = if config.contains("features") {
            ""
        } else {
            r#""features":[],"#
        };
        let id = "ab".repeat(16);
        let body = format!(r#"{config}{features}"id":"{id}","block_size":65536}}"#);
        let digest = sha256(&body);
        let object = format!("forerun config 1 {} {digest}\n{body}", body.len());
        let objects = [("config".to_owned(), object.into_bytes())].into();
        let store = Memory::new(objects, None, Fate::Lost);
        let error = Repository::open_store(Arc::new(store)).unwrap_err();
        assert!(matches!(error, Error::Unsupported(_)), "{error}");
        assert!(error.to_string().starts_with(words), "{error}");
    }
}

/// A large object is written out in parts before it is finished; nothing of it may be lost or come twice.
#[test]
fn a_large_object_is_whole() {
    let directory = tempfile::tempdir().unwrap();
    let store = DirStore::init(&directory.path().join("store")).unwrap();
    let bytes: Vec<u8> = (0..40_u32 << 18).flat_map(u32::to_le_bytes).collect();
    let mut writer = store.create("packs/ab/large").unwrap();
    let mut rest = &bytes[..];
    for length in [1, 300 << 10, 65_588, 17 << 20].into_iter().cycle() {
        let (part, after) = rest.split_at(length.min(rest.len()));
        writer.write(part).unwrap();
        rest = after;
        if rest.is_empty() {
            break;
        }
    }
    writer.finish().unwrap();
    assert!(store.get("packs/ab/large").unwrap() == bytes);
}

#[test]
fn a_fresh_listing_leaves_nothing_and_takes_away_what_a_dead_one_left() {
    let (directory, store) = directory();
    store.put("packs/ab/cd", b"x").unwrap();
    let packs = directory.path().join("repo/packs/ab");
    for name in [".probe-new", ".probe-old"] {
        std::fs::File::create_new(packs.join(name)).unwrap();
    }
    let old = std::fs::File::options()
        .write(true)
        .open(packs.join(".probe-old"));
    let long_ago = std::time::SystemTime::UNIX_EPOCH;
    old.unwrap().set_modified(long_ago).unwrap();
    assert_eq!(store.list_fresh("packs/").unwrap(), ["packs/ab/cd"]);
    let mut left: Vec<_> = std::fs::read_dir(&packs)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, [".probe-new", "cd"]);
}

#[test]
fn a_directory_that_an_older_store_lacks_is_made() {
    let (directory, store) = directory();
    let condemned = directory.path().join("repo/condemned");
    std::fs::remove_dir(&condemned).unwrap();
    assert!(store.list_fresh("condemned/").unwrap().is_empty());
    store.put("condemned/0000000000000001", b"x").unwrap();
    assert_eq!(mode(&condemned), 0o700);
}
