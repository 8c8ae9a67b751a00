//! Several hosts on one repository, each with its own view of it: what one drops, pins or loses, the others must not miss.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by it, and the disks here are small"
)]

mod image_common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use forerun::image::store::{ObjectWriter, Store, StoreLock};
use forerun::image::{
    Encoded, Error, InitOptions, Item, Manifest, Policy, PruneOptions, Repository, Selection,
    Session, VerifyOptions, build_map,
};
use image_common::memory::{Fate, Memory, Objects};
use image_common::{BLOCK, backup_of, copy, manifest_of, segments};
use serde_json::json;

/// What one host does to the store that all share.
#[derive(Default)]
struct Trouble {
    /// Writes and deletions that still work, when they are counted.
    left: Option<u64>,
    /// What can neither be listed nor deleted,
    deaf_to: &'static [&'static str],
    /// and from the next segment on.
    deaf_behind_segment: &'static [&'static str],
    /// What it remembers of listings, as a client of a network file system does.
    remembered: Option<BTreeMap<String, Vec<String>>>,
}

/// One host's client.
#[derive(Clone)]
struct Host {
    shared: Memory,
    trouble: Arc<Mutex<Trouble>>,
}

fn broken(object: &str) -> Error {
    Error::Io {
        action: "reach",
        object: object.into(),
        source: std::io::Error::other("crashed"),
    }
}

impl Host {
    fn new(shared: &Memory) -> Self {
        Self {
            shared: shared.clone(),
            trouble: Arc::default(),
        }
    }

    fn change(&self, name: &str) -> Result<(), Error> {
        let mut trouble = self.trouble.lock().unwrap();
        match &mut trouble.left {
            Some(0) => Err(broken(name)),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn hears(&self, name: &str) -> Result<(), Error> {
        let deaf_to = self.trouble.lock().unwrap().deaf_to;
        if deaf_to.iter().any(|part| name.contains(part)) {
            return Err(broken(name));
        }
        Ok(())
    }

    fn open(&self) -> Repository {
        Repository::open_store(Arc::new(self.clone())).unwrap()
    }
}

impl Store for Host {
    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        self.change(name)?;
        self.shared.put(name, bytes)
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>, Error> {
        self.change(name)?;
        if name.ends_with("-segment") {
            let mut trouble = self.trouble.lock().unwrap();
            trouble.deaf_to = std::mem::take(&mut trouble.deaf_behind_segment);
        }
        self.shared.create(name)
    }

    fn get(&self, name: &str) -> Result<Vec<u8>, Error> {
        self.shared.get(name)
    }

    fn get_range(&self, name: &str, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        self.shared.get_range(name, offset, buffer)
    }

    fn size(&self, name: &str) -> Result<u64, Error> {
        self.shared.size(name)
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>, Error> {
        let names = self.shared.list(prefix)?;
        let mut trouble = self.trouble.lock().unwrap();
        Ok(match &mut trouble.remembered {
            Some(known) => known.entry(prefix.into()).or_insert(names).clone(),
            None => names,
        })
    }

    fn list_fresh(&self, prefix: &str) -> Result<Vec<String>, Error> {
        self.hears(prefix)?;
        self.shared.list_fresh(prefix)
    }

    fn delete(&self, names: &[String]) -> Result<(), Error> {
        for name in names {
            self.hears(name)?;
            self.change(name)?;
        }
        self.shared.delete(names)
    }

    fn lock(&self, name: &str, who: &str) -> Result<StoreLock, Error> {
        self.shared.lock(name, who)
    }

    fn held(&self, prefix: &str) -> Result<Vec<(String, String)>, Error> {
        self.shared.held(prefix)
    }
}

fn prune(repo: &Repository) {
    repo.prune(&PruneOptions::default(), &|_, _, _| ()).unwrap();
}

/// A disk of blocks of these values.
fn disk(values: &[u8]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| vec![*value; BLOCK])
        .collect()
}

fn all(disk: &[u8]) -> BTreeSet<u64> {
    (0..(disk.len() / BLOCK) as u64).collect()
}

fn shared() -> Memory {
    let store = Memory::new(Objects::new(), None, Fate::Lost);
    Repository::init_store(Arc::new(store.clone()), InitOptions::default()).unwrap();
    store
}

fn whole_backup(repo: &Repository, key: &str, disk: &[u8]) -> Manifest {
    backup_of(repo, key, disk, &all(disk), None).unwrap()
}

/// Another host drops the session and prunes its blocks; the writer, who does not know, dies at any moment of its publication.
#[test]
fn a_dropped_session_never_becomes_a_point() {
    for left in [None, Some(0), Some(1), Some(2), Some(3)] {
        let shared = shared();
        let writer = Host::new(&shared);
        let repo = writer.open();
        let content = disk(&[1, 2, 3]);
        let session = Session::create(&repo, "vm", &json!({})).unwrap();
        copy(&repo, &session, &content, &[0, 1, 2]).unwrap();
        let mine = segments(&session).unwrap();
        let (map, _) = build_map(&repo, None, &session, &mine, content.len() as u64).unwrap();
        let manifest = manifest_of("vm", map, &session, None).unwrap();
        // A client keeps open what it had open, so a layer seems to be there.
        let layers: Objects = shared
            .objects()
            .into_iter()
            .filter(|(name, _)| name.starts_with("maps/"))
            .collect();

        let other = Host::new(&shared).open();
        Session::remove_damaged(&other, session.id()).unwrap();
        prune(&other);
        for (name, bytes) in layers {
            shared.put(&name, &bytes).unwrap();
        }

        writer.trouble.lock().unwrap().left = left;
        session.publish(&manifest).unwrap_err();
        let points = other.points().unwrap();
        assert!(points.points.is_empty(), "{left:?}: {points:?}");
    }
}

#[test]
fn a_session_cannot_be_dropped_while_its_point_is_published() {
    let shared = shared();
    let repo = Host::new(&shared).open();
    let session = Session::create(&repo, "vm", &json!({})).unwrap();
    // Who begins or publishes holds this lock, which is named by the hash that the id begins with.
    let hash = session.id().to_string();
    let lock = shared.lock(&format!("session-{}", &hash[..16]), "publishing");
    let dropping = std::thread::spawn({
        let (repo, id) = (Host::new(&shared).open(), session.id());
        move || Session::remove_damaged(&repo, id).unwrap()
    });
    forerun::clock::sleep(std::time::Duration::from_millis(50));
    assert!(!dropping.is_finished());
    assert!(Session::find(&repo, "vm").unwrap().is_some());
    drop(lock.unwrap());
    dropping.join().unwrap();
    assert!(Session::find(&repo, "vm").unwrap().is_none());
}

#[test]
fn a_pin_and_a_point_of_another_host_are_seen_at_once() {
    let shared = shared();
    let here = Host::new(&shared);
    here.trouble.lock().unwrap().remembered = Some(BTreeMap::new());
    let repo = here.open();
    let content = disk(&[1]);
    let first = whole_backup(&repo, "vm", &content);
    let second = backup_of(&repo, "vm", &content, &all(&content), Some(&first)).unwrap();
    assert_eq!(repo.points().unwrap().points.len(), 2);
    assert!(repo.pins().unwrap().pins.is_empty());

    let other = Host::new(&shared).open();
    other.pin(first.id, Some("evidence".into())).unwrap();
    let third = backup_of(&other, "vm", &content, &all(&content), Some(&second)).unwrap();

    assert_eq!(repo.resolve("web@latest").unwrap().id, third.id);
    assert_eq!(repo.resolve(&third.id.to_string()).unwrap().id, third.id);
    let selection = Selection::Policy {
        policy: Policy {
            last: 1,
            ..Policy::default()
        },
        zone: jiff::tz::TimeZone::UTC,
        targets: None,
    };
    repo.forget(&selection).unwrap();
    let kept: BTreeSet<_> = other
        .points()
        .unwrap()
        .points
        .iter()
        .map(|p| p.id)
        .collect();
    assert_eq!(kept, [first.id, third.id].into());
}

/// Each pack of a repository of two points that share nothing goes missing in turn.
fn each_lost_pack(find_out: &dyn Fn(&Repository)) {
    let store = shared();
    let repo = Host::new(&store).open();
    let disks = [disk(&[1, 2, 3, 4]), disk(&[5, 6, 7, 8])];
    whole_backup(&repo, "a", &disks[0]);
    whole_backup(&repo, "b", &disks[1]);
    let objects = store.objects();
    let packs: Vec<&String> = objects
        .keys()
        .filter(|name| name.starts_with("packs/"))
        .collect();
    assert!(packs.len() >= 2);
    for pack in packs {
        let mut objects = objects.clone();
        objects.remove(pack);
        let store = Memory::new(objects, None, Fate::Lost);
        find_out(&Host::new(&store).open());

        let repo = Host::new(&store).open();
        let lost = repo.lost_blocks().unwrap();
        assert!(
            !lost.is_empty(),
            "{pack}: nobody would read its blocks again"
        );
        // Who has them stores them, also where a base says that it has them.
        let mut healed = 0;
        for plain in disks.iter().flat_map(|disk| disk.chunks(BLOCK)) {
            let id = image_common::id_of(plain);
            if lost.contains(&id) {
                let encoded = repo.encode_expecting(plain, Some(id)).unwrap();
                assert!(matches!(encoded, Encoded::New(_)), "{pack}: {encoded:?}");
                healed += 1;
            }
        }
        assert_eq!(healed, lost.len());
        for (key, disk) in ["c", "d"].iter().zip(&disks) {
            whole_backup(&repo, key, disk);
        }
        prune(&Host::new(&store).open());
        let repo = Host::new(&store).open();
        let report = repo.verify(&VerifyOptions::default()).unwrap();
        assert!(report.damage.is_empty(), "{pack}: {report:?}");
        assert!(repo.lost_blocks().unwrap().is_empty());
    }
}

#[test]
fn a_prune_that_misses_a_needed_pack_lets_nobody_rely_on_it() {
    each_lost_pack(&prune);
}

#[test]
fn an_index_that_is_made_anew_does_not_hide_that_a_pack_is_lost() {
    each_lost_pack(&|repo| {
        repo.rebuild_index().unwrap();
        let report = repo.verify(&VerifyOptions::default()).unwrap();
        assert!(!report.damage.is_empty());
    });
}

/// The look fails by the storage: nothing may be appended behind a segment that nobody has looked at.
#[test]
fn a_segment_that_was_not_looked_at_stays_at_the_end_of_the_log() {
    let shared = shared();
    let host = Host::new(&shared);
    let repo = host.open();
    let session = Session::create(&repo, "vm", &json!({})).unwrap();
    session.append(&json!("a record")).unwrap();
    let has_segment = || {
        let session = Session::find(&repo, "vm").unwrap().unwrap();
        let last = session.items().unwrap().pop();
        matches!(last, Some(Item::Segment(_)))
    };
    let fails = |value: u8, deaf_to| {
        host.trouble.lock().unwrap().deaf_behind_segment = deaf_to;
        copy(&repo, &session, &disk(&[value]), &[0]).unwrap_err();
        host.trouble.lock().unwrap().deaf_to = &[];
    };

    fails(1, &["condemned/"]);
    assert!(!has_segment(), "it can be taken back");
    session.append(&json!("another record")).unwrap();

    fails(2, &["condemned/", "-segment"]);
    assert!(has_segment());
    session.append(&json!("hides it")).unwrap_err();
    copy(&repo, &session, &disk(&[3]), &[0]).unwrap_err();
    assert!(has_segment());
    assert_eq!(session.settle().unwrap(), None, "its blocks are there");
    session.append(&json!("goes on")).unwrap();
    copy(&repo, &session, &disk(&[3]), &[0]).unwrap();
    session.items().unwrap();
}
