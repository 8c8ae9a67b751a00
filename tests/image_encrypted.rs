//! Encrypted repositories: what is stored tells nothing of what it is, nothing that was changed is opened, and keys come and
//! go without the data being touched.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by it, and the disks here are small"
)]

mod image_common;

use std::sync::Arc;

use forerun::image::store::Store;
use forerun::image::{Closed, Error, InitOptions, Repository, Secret, VerifyOptions};
use image_common::memory::{Fate, Memory, Objects};
use image_common::{BLOCK, Bench, KEY, backup, init_store, open_store, restore, secret, sha256};

const HEADER: usize = 48;
const CHUNK: usize = 16 << 10;
const TAG: usize = 16;

fn memory(objects: Objects) -> Memory {
    Memory::new(objects, None, Fate::Lost)
}

/// An empty encrypted repository and the store beneath.
fn empty() -> (Memory, Repository) {
    let store = memory(Objects::new());
    let repo = init_store(Arc::new(store.clone()), true);
    (store, repo)
}

fn content(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at / 7 + at % 251) as u8).collect()
}

fn passphrase(words: &str) -> Secret {
    Secret::passphrase(words.as_bytes().to_vec().into()).unwrap()
}

/// The same repository with one object changed, opened anew.
fn with(objects: &Objects, name: &str, bytes: Vec<u8>) -> Repository {
    let mut objects = objects.clone();
    objects.insert(name.into(), bytes);
    open_store(Arc::new(memory(objects))).unwrap()
}

/// Reads an object in every way; gives its content or the error that all of them agree on.
fn read(store: &dyn Store, name: &str) -> Result<Vec<u8>, Error> {
    let whole = store.get(name);
    let ranged = store.size(name).and_then(|size| {
        let mut bytes = vec![0; size as usize];
        // An empty read proves nothing, as it does of a plain object.
        store.get_range(name, 0, &mut bytes).map(|()| bytes)
    });
    match (&whole, ranged) {
        (Ok(whole), Ok(ranged)) => assert_eq!(*whole, ranged),
        (Err(_), Ok(ranged)) => assert!(ranged.is_empty(), "{name} is read in ranges only"),
        (Ok(_), Err(error)) => panic!("{name} is not read in ranges: {error}"),
        (Err(_), Err(_)) => {}
    }
    whole
}

#[test]
fn every_length_around_the_chunks_comes_back_however_it_was_written() {
    let (beneath, repo) = empty();
    let store = repo.store();
    for length in [
        0,
        1,
        CHUNK - 1,
        CHUNK,
        CHUNK + 1,
        2 * CHUNK,
        2 * CHUNK + 5,
        66 * CHUNK,
    ] {
        let plain = content(length);
        let name = format!("maps/{length}");
        store.put(&name, &plain).unwrap();
        assert_eq!(read(store, &name).unwrap(), plain);
        let chunks = length.div_ceil(CHUNK).max(1);
        let stored = beneath.size(&name).unwrap() as usize;
        assert_eq!(stored, HEADER + length + chunks * TAG);
        for piece in [1_000, CHUNK, 3 * CHUNK + 1] {
            let name = format!("packs/{length}-{piece}");
            let mut writer = store.create(&name).unwrap();
            for piece in plain.chunks(piece) {
                writer.write(piece).unwrap();
            }
            writer.finish().unwrap();
            assert_eq!(read(store, &name).unwrap(), plain, "{name}");
        }
    }
}

#[test]
fn a_range_across_any_border_is_exact_and_none_reaches_beyond_the_end() {
    let (_, repo) = empty();
    let store = repo.store();
    let plain = content(3 * CHUNK + 100);
    store.put("maps/a", &plain).unwrap();
    let size = plain.len();
    let borders = [
        0,
        1,
        CHUNK - 1,
        CHUNK,
        CHUNK + 1,
        2 * CHUNK - 1,
        2 * CHUNK,
        2 * CHUNK + 1,
    ];
    let borders = [
        &borders[..],
        &[3 * CHUNK - 1, 3 * CHUNK, 3 * CHUNK + 1, size - 1, size],
    ]
    .concat();
    for start in &borders {
        for end in borders.iter().filter(|end| *end >= start) {
            let mut bytes = vec![0; end - start];
            store
                .get_range("maps/a", *start as u64, &mut bytes)
                .unwrap();
            assert!(bytes == plain[*start..*end], "{start}..{end}");
        }
        let mut beyond = vec![0; plain.len() - start + 1];
        let error = store
            .get_range("maps/a", *start as u64, &mut beyond)
            .unwrap_err();
        assert!(error.is_corrupt(), "{error}");
    }
}

#[test]
fn no_flipped_byte_no_missing_one_and_no_added_one_is_opened() {
    let (beneath, repo) = empty();
    for length in [0, 1, 100, CHUNK + 5] {
        let name = format!("points/{length}");
        repo.store().put(&name, &content(length)).unwrap();
        let objects = beneath.objects();
        let sound = &objects[&name];
        // One store, so that what it remembers of the sound object is in the way.
        let changed = memory(objects.clone());
        let repo = open_store(Arc::new(changed.clone())).unwrap();
        read(repo.store(), &name).unwrap();
        let refused = |bytes: Vec<u8>, case: &str| {
            changed.delete(std::slice::from_ref(&name)).unwrap();
            changed.put(&name, &bytes).unwrap();
            let error = read(repo.store(), &name).unwrap_err();
            assert!(error.is_corrupt(), "{name} {case}: {error}");
            assert!(error.to_string().contains(&name), "{error}");
        };
        // Of a long object every byte around the chunks' borders.
        let near = |at: &usize| {
            let bytes = sound.len();
            length <= CHUNK
                || *at < HEADER + 20
                || bytes - at < 2 * TAG + 20
                || at.is_multiple_of(97)
        };
        for position in (0..sound.len()).filter(near) {
            let mut bad = sound.clone();
            bad[position] ^= 1 << (position % 8);
            if position < HEADER {
                // Who remembers the header reads right on.
                let anew = with(&objects, &name, bad);
                assert!(read(anew.store(), &name).unwrap_err().is_corrupt());
            } else {
                refused(bad, &format!("byte {position}"));
            }
        }
        for short in (0..sound.len()).filter(near) {
            refused(sound[..short].to_vec(), &format!("{short} bytes"));
        }
        for added in [1, TAG, TAG + 1, CHUNK + TAG] {
            let longer = [&sound[..], &vec![0; added]].concat();
            refused(longer, &format!("{added} bytes more"));
        }
        // Sound again, it is read again.
        changed.delete(std::slice::from_ref(&name)).unwrap();
        changed.put(&name, sound).unwrap();
        read(repo.store(), &name).unwrap();
    }
}

#[test]
fn chunks_that_are_moved_cut_off_or_taken_from_elsewhere_are_not_opened() {
    let (beneath, repo) = empty();
    let store = repo.store();
    store.put("maps/a", &content(3 * CHUNK)).unwrap();
    store.put("maps/b", &content(3 * CHUNK)).unwrap();
    let objects = beneath.objects();
    let cut = |name: &str| -> Vec<Vec<u8>> {
        let bytes = &objects[name];
        let chunks = bytes[HEADER..].chunks(CHUNK + TAG).map(<[u8]>::to_vec);
        [bytes[..HEADER].to_vec()]
            .into_iter()
            .chain(chunks)
            .collect()
    };
    let (a, b) = (cut("maps/a"), cut("maps/b"));
    let part = |from: &[Vec<u8>], which: &[usize]| {
        let parts: Vec<&[u8]> = which.iter().map(|at| &from[*at][..]).collect();
        parts.concat()
    };
    let mut foreign = a.clone();
    foreign[2].clone_from(&b[2]);
    let mut header = a.clone();
    header[0].clone_from(&b[0]);
    let all = [0, 1, 2, 3];
    for (case, bytes) in [
        ("swapped", part(&a, &[0, 2, 1, 3])),
        ("cut off at a chunk", part(&a, &[0, 1, 2])),
        ("cut off to nothing", part(&a, &[0])),
        ("one twice", part(&a, &[0, 1, 1, 2, 3])),
        ("the last twice", part(&a, &[0, 1, 2, 3, 3])),
        ("one missing", part(&a, &[0, 1, 3])),
        ("one of another object", part(&foreign, &all)),
        ("another object's header", part(&header, &all)),
        ("another object", part(&b, &all)),
    ] {
        let repo = with(&objects, "maps/a", bytes);
        let error = read(repo.store(), "maps/a").unwrap_err();
        assert!(error.is_corrupt(), "{case}: {error}");
    }
    // Cut at a chunk's border, the chunks before the cut are what they were: reading them alone is right.
    let repo = with(&objects, "maps/a", part(&a, &[0, 1, 2]));
    let mut first = vec![0; CHUNK];
    repo.store().get_range("maps/a", 0, &mut first).unwrap();
    assert!(first == content(3 * CHUNK)[..CHUNK]);
    let error = repo.store().get_range("maps/a", 0, &mut vec![0; CHUNK + 1]);
    assert!(error.unwrap_err().is_corrupt());
}

#[test]
fn an_object_of_another_repository_with_the_same_secret_is_not_opened() {
    let ((_, repo), (other, second)) = (empty(), empty());
    repo.store().put("points/a", b"one").unwrap();
    second.store().put("points/a", b"two").unwrap();
    let foreign = other.objects()["points/a"].clone();
    let (mine, _) = empty();
    let repo = with(&mine.objects(), "points/a", foreign);
    assert!(read(repo.store(), "points/a").unwrap_err().is_corrupt());
}

#[test]
fn another_object_under_a_name_that_was_read_before_is_read_anew() {
    let (beneath, repo) = empty();
    let other = open_store(Arc::new(beneath.clone())).unwrap();
    for round in 0..3_u8 {
        repo.store().put("sessions/a/1", &[round; 40]).unwrap();
        let mut bytes = [0; 40];
        other
            .store()
            .get_range("sessions/a/1", 0, &mut bytes)
            .unwrap();
        assert_eq!(bytes, [round; 40]);
        repo.store().delete(&["sessions/a/1".into()]).unwrap();
    }
}

/// All bytes of all objects, with their names.
fn everything(objects: &Objects) -> Vec<u8> {
    objects
        .iter()
        .flat_map(|(name, bytes)| [name.as_bytes(), bytes].concat())
        .collect()
}

fn holds(all: &[u8], what: &[u8]) -> bool {
    all.windows(what.len()).any(|window| window == what)
}

#[test]
fn nothing_that_is_stored_tells_what_it_is() {
    let block = content(BLOCK);
    let noise = b"a text that no codec makes any shorter: 0123456789";
    let disk = [&block[..], &noise[..]].concat();
    let words = "correct horse battery staple";
    let run = |encrypted: bool| {
        let store = memory(Objects::new());
        let options = InitOptions {
            compression: "none".parse().unwrap(),
            ..InitOptions::default()
        };
        let beneath = Arc::new(store.clone());
        let repo = if encrypted {
            Repository::init_encrypted_store(beneath, options, &passphrase(words), "me").unwrap()
        } else {
            Repository::init_store(beneath, options).unwrap()
        };
        // One point with its session gone, and a session that goes on.
        let point = backup(&repo, &disk, &(0..2).collect(), None).unwrap();
        assert!(restore(&repo, &point.disks[0]).unwrap() == disk);
        let session = forerun::image::Session::create(&repo, KEY, &"header-word".into()).unwrap();
        session.append(&"record-word".into()).unwrap();
        assert!(
            repo.verify(&VerifyOptions::default())
                .unwrap()
                .damage
                .is_empty()
        );
        everything(&store.objects())
    };
    let (plain, encrypted) = (run(false), run(true));
    let id = <sha2::Sha256 as sha2::Digest>::digest(&block);
    let shown = sha256(KEY);
    for known in [
        &block[100..164],
        &noise[..24],
        &id[..],
        &shown.as_bytes()[..16],
        KEY.as_bytes(),
        b" vda ",
        b"\"vda\"",
        b"virtio0",
        b"<domain/>",
        b"header-word",
        b"record-word",
        b"fBlk",
        b"fr-pack",
    ] {
        let text = String::from_utf8_lossy(known);
        assert!(holds(&plain, known), "the test looks for nothing: {text}");
        assert!(!holds(&encrypted, known), "{text} is in the clear");
    }
    assert!(!holds(&encrypted, words.as_bytes()));
    assert!(!holds(&encrypted, b"horse"));
}

#[test]
fn the_same_block_has_another_id_in_every_encrypted_repository_and_is_stored_once_in_each() {
    let ids: Vec<_> = (0..2)
        .map(|_| {
            let mut bench = Bench::encrypted(2 * BLOCK);
            let block = content(BLOCK);
            bench.write(0, &block);
            bench.write(BLOCK, &block);
            let point = bench.backup();
            let report = bench.repo.verify(&VerifyOptions::default()).unwrap();
            assert_eq!(report.checked_blocks, 1);
            let map = forerun::image::MapReader::open(&bench.repo, &point.disks[0].map).unwrap();
            format!("{:?}", map.get(0).unwrap())
        })
        .collect();
    assert_ne!(ids[0], ids[1]);
}

#[test]
fn no_key_a_wrong_one_and_a_needless_one_are_told_apart() {
    let (store, _) = empty();
    let closed = || Closed::in_store(Arc::new(store.clone())).unwrap();
    assert!(closed().is_encrypted());
    assert!(matches!(closed().open(None), Err(Error::NoKey)));
    let other = Secret::key_file(
        vec![1; 31]
            .into_iter()
            .chain([2])
            .collect::<Vec<u8>>()
            .into(),
    );
    for (wrong, words) in [
        (
            passphrase("open"),
            "no key of the repository opens with this passphrase",
        ),
        (
            other.unwrap(),
            "no key of the repository opens with this key file",
        ),
    ] {
        let error = closed().open(Some(&wrong)).unwrap_err();
        assert_eq!(error.to_string(), words);
        let Error::WrongKey { keys, .. } = error else {
            panic!("{error:?}");
        };
        assert!(keys[0].ends_with("(key file `test`)"), "{keys:?}");
    }
    // A configuration that was made to say that all is plain: no plain text is sent there.
    let plain = memory(Objects::new());
    init_store(Arc::new(plain.clone()), false);
    let mut tampered = store.objects();
    tampered.insert("config".into(), plain.objects()["config"].clone());
    let closed = Closed::in_store(Arc::new(memory(tampered))).unwrap();
    let error = closed.open(Some(&secret())).unwrap_err();
    assert!(error.to_string().contains("is not encrypted"), "{error}");
}

#[test]
fn keys_come_and_go_and_the_last_one_stays() {
    let (store, repo) = empty();
    repo.store().put("points/a", b"one").unwrap();
    let closed = || Closed::in_store(Arc::new(store.clone())).unwrap();
    let opens = |secret: &Secret| {
        let repo = closed().open(Some(secret));
        repo.is_ok_and(|repo| repo.store().get("points/a").unwrap() == b"one")
    };
    let ring = closed().key_ring(&secret()).unwrap();
    let first = ring.opened();
    let error = ring.remove(first).unwrap_err();
    assert!(error.to_string().contains("is the last one"), "{error}");

    let words = passphrase("two words");
    let second = ring.add(&words, "the safe").unwrap();
    assert_eq!((second.kind, &*second.label), ("passphrase", "the safe"));
    assert!(opens(&secret()) && opens(&words));
    assert!(!opens(&passphrase("two  words")));
    assert_eq!(closed().keys().unwrap().keys.len(), 2);

    let ring = closed().key_ring(&words).unwrap();
    assert_eq!(ring.opened(), second.id);
    ring.remove(first).unwrap();
    assert!(!opens(&secret()) && opens(&words));
    assert!(ring.remove(first).unwrap_err().is_not_found());
    let error = ring.remove(second.id).unwrap_err();
    assert!(error.to_string().contains("is the last one"), "{error}");
    assert!(ring.add(&words, "two\nlines").is_err());

    // A key that cannot be read may be the one that would have opened; it does not stop the others.
    let mut objects = store.objects();
    objects.insert("keys/0011223344556677".into(), b"forerun key 1".to_vec());
    let hurt = Closed::in_store(Arc::new(memory(objects.clone()))).unwrap();
    assert_eq!(hurt.keys().unwrap().damaged.len(), 1);
    hurt.key_ring(&words).unwrap();
    assert!(hurt.key_ring(&secret()).unwrap_err().is_corrupt());
    // Without any key it is over.
    objects.retain(|name, _| !name.starts_with("keys/"));
    let lost = Closed::in_store(Arc::new(memory(objects))).unwrap();
    let error = lost.open(Some(&words)).unwrap_err();
    assert!(
        error.is_corrupt() && error.to_string().contains("keys/"),
        "{error}"
    );
}

#[test]
fn a_beginning_that_was_cut_short_is_begun_again_and_a_repository_never_is() {
    let options = InitOptions::default();
    for at in 1..=2 {
        let store = Memory::new(Objects::new(), Some(at), Fate::Lost);
        let begun =
            Repository::init_encrypted_store(Arc::new(store.clone()), options, &secret(), "");
        assert!(begun.is_err(), "{at}");
        let again = memory(store.objects());
        init_store(Arc::new(again.clone()), true);
        let closed = Closed::in_store(Arc::new(again.clone())).unwrap();
        assert_eq!(closed.keys().unwrap().keys.len(), 1, "{at}");
        closed.open(Some(&secret())).unwrap();
        // Its key is not taken away by another try.
        let error =
            Repository::init_encrypted_store(Arc::new(again.clone()), options, &secret(), "");
        assert!(matches!(error, Err(Error::Exists { .. })));
        assert!(open_store(Arc::new(again)).is_ok());
    }
}
