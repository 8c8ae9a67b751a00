//! A crash at any operation of the store: published points restore exactly, the repository opens, and the next run goes on with
//! the session. The store here forgets what was not durable and, at the chosen operation, either does it or not and then fails
//! everything that follows.

mod image_common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use forerun::image::store::{ObjectWriter, Store, StoreLock};
use forerun::image::{Error, InitOptions, Manifest, Repository, Session, VerifyOptions};
use forerun::units::BlockSize;
use image_common::{BLOCK, KEY, backup, restore};

type Objects = BTreeMap<String, Vec<u8>>;

/// What happens at the fatal operation.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fate {
    /// Nothing of it is durable.
    Lost,
    /// It is durable, but nobody was told.
    Done,
    /// The disk is full: this and all later writes fail, the process goes on.
    Full,
}

struct State {
    objects: Objects,
    /// Operations until the fatal one.
    left: Option<u64>,
    operations: u64,
    fate: Fate,
    locked: BTreeSet<String>,
}

#[derive(Clone)]
struct Memory(Arc<Mutex<State>>);

impl Memory {
    fn new(objects: Objects, left: Option<u64>, fate: Fate) -> Self {
        Self(Arc::new(Mutex::new(State {
            objects,
            left,
            operations: 0,
            fate,
            locked: BTreeSet::new(),
        })))
    }

    fn objects(&self) -> Objects {
        self.0.lock().unwrap().objects.clone()
    }

    /// Runs a durable operation unless the crash was before.
    fn durable(
        &self,
        name: &str,
        operation: impl FnOnce(&mut Objects) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut state = self.0.lock().unwrap();
        state.operations += 1;
        let left = state.left;
        state.left = left.map(|left| left.saturating_sub(1));
        match left {
            None | Some(2..) => return operation(&mut state.objects),
            // The fatal one.
            Some(1) if state.fate == Fate::Done => operation(&mut state.objects)?,
            Some(_) => {}
        }
        let source = match state.fate {
            Fate::Full => std::io::ErrorKind::StorageFull.into(),
            _ => std::io::Error::other("crashed"),
        };
        Err(match state.fate {
            Fate::Full => Error::NoSpace {
                object: name.into(),
                source,
            },
            _ => Error::Io {
                action: "write",
                object: name.into(),
                source,
            },
        })
    }
}

fn put(objects: &mut Objects, name: &str, bytes: &[u8]) -> Result<(), Error> {
    if objects.contains_key(name) {
        return Err(Error::Exists {
            object: name.into(),
        });
    }
    objects.insert(name.into(), bytes.to_vec());
    Ok(())
}

struct Writer {
    store: Memory,
    name: String,
    bytes: Vec<u8>,
}

impl ObjectWriter for Writer {
    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<(), Error> {
        let store = self.store.clone();
        store.durable(&self.name, |objects| put(objects, &self.name, &self.bytes))
    }
}

struct Unlock(Memory, String);

impl Drop for Unlock {
    fn drop(&mut self) {
        self.0.0.lock().unwrap().locked.remove(&self.1);
    }
}

impl Store for Memory {
    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        self.durable(name, |objects| put(objects, name, bytes))
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>, Error> {
        Ok(Box::new(Writer {
            store: self.clone(),
            name: name.into(),
            bytes: Vec::new(),
        }))
    }

    fn get(&self, name: &str) -> Result<Vec<u8>, Error> {
        let state = self.0.lock().unwrap();
        state.objects.get(name).cloned().ok_or(Error::NotFound {
            object: name.into(),
        })
    }

    fn get_range(&self, name: &str, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        let bytes = self.get(name)?;
        let start = offset as usize;
        let range = bytes.get(start..start + buffer.len());
        buffer.copy_from_slice(range.ok_or(Error::Corrupt {
            object: name.into(),
            what: "short".into(),
        })?);
        Ok(())
    }

    fn size(&self, name: &str) -> Result<u64, Error> {
        Ok(self.get(name)?.len() as u64)
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>, Error> {
        let names = self.objects().into_keys();
        Ok(names.filter(|name| name.starts_with(prefix)).collect())
    }

    fn delete(&self, names: &[String]) -> Result<(), Error> {
        // One at a time: a crash may come between any two.
        names.iter().try_for_each(|name| {
            self.durable(name, |objects| {
                objects.remove(name);
                Ok(())
            })
        })
    }

    fn lock(&self, name: &str, who: &str) -> Result<StoreLock, Error> {
        if !self.0.lock().unwrap().locked.insert(name.into()) {
            return Err(Error::Busy {
                object: name.into(),
                holder: who.into(),
            });
        }
        Ok(StoreLock::new(Unlock(self.clone(), name.into())))
    }
}

/// A repository with two points, and a disk with changes since.
struct Before {
    objects: Objects,
    points: Vec<(Manifest, Vec<u8>)>,
    disk: Vec<u8>,
    dirty: BTreeSet<u64>,
}

fn before(increments: u8) -> Before {
    let store = Memory::new(Objects::new(), None, Fate::Lost);
    let block_size = BlockSize::DEFAULT;
    let repo = Repository::init_store(Arc::new(store.clone()), InitOptions { block_size }).unwrap();
    let mut disk = vec![0; 4 * BLOCK];
    let mut points: Vec<(Manifest, Vec<u8>)> = Vec::new();
    for round in 0..=increments {
        let block = usize::from(round % 4);
        disk[block * BLOCK] = round + 1;
        let dirty = match round {
            0 => (0..4).collect(),
            _ => [block as u64].into(),
        };
        let last = points.last().map(|(point, _)| point.clone());
        let point = backup(&repo, &disk, &dirty, last.as_ref()).unwrap();
        points.push((point, disk.clone()));
    }
    disk[3 * BLOCK + 5] = 200;
    disk[0] = 201;
    Before {
        objects: store.objects(),
        points,
        disk,
        dirty: [0, 3].into(),
    }
}

fn check_points(repo: &Repository, points: &[(Manifest, Vec<u8>)], case: &str) {
    for (point, disk) in points {
        let manifest = repo.point(point.id).unwrap();
        let restored = restore(repo, &manifest.disks[0]).unwrap();
        assert!(&restored == disk, "{case}: point {}", point.id);
    }
    let report = repo.verify(&VerifyOptions::default()).unwrap();
    assert!(report.damage.is_empty(), "{case}: {report:?}");
}

/// Crashes at every operation of a backup, and goes on after it.
fn crash_everywhere(before: &Before, fate: Fate) {
    let last = before.points.last().map(|(point, _)| point);
    let whole = Memory::new(before.objects.clone(), None, fate);
    let repo = Repository::open_store(Arc::new(whole.clone())).unwrap();
    backup(&repo, &before.disk, &before.dirty, last).unwrap();
    let operations = whole.0.lock().unwrap().operations;
    assert!(operations >= 8, "{operations}");
    for at in 1..=operations {
        let case = format!("{fate:?} at operation {at} of {operations}");
        let store = Memory::new(before.objects.clone(), Some(at), fate);
        let repo = Repository::open_store(Arc::new(store.clone())).unwrap();
        let error = backup(&repo, &before.disk, &before.dirty, last).unwrap_err();
        let is_full = matches!(error, Error::NoSpace { .. });
        assert_eq!(is_full, fate == Fate::Full, "{case}: {error}");

        let after = Memory::new(store.objects(), None, fate);
        let repo = Repository::open_store(Arc::new(after.clone())).unwrap();
        check_points(&repo, &before.points, &case);
        let known: BTreeSet<_> = before.points.iter().map(|(point, _)| point.id).collect();
        let found = repo.points().unwrap();
        assert!(found.damaged.is_empty(), "{case}");
        let new = found
            .points
            .into_iter()
            .find(|point| !known.contains(&point.id));
        let session = Session::find(&repo, KEY).unwrap();
        let point = match new {
            // The commit was done; what is left of its session is recognised by the point.
            Some(point) => {
                if let Some(session) = session {
                    assert_eq!(session.id(), point.session, "{case}");
                    session.remove().unwrap();
                }
                point
            }
            None => backup(&repo, &before.disk, &before.dirty, last).unwrap(),
        };
        let mut points = before.points.clone();
        points.push((point, before.disk.clone()));
        check_points(&repo, &points, &case);
        assert!(repo.store().list("sessions/").unwrap().is_empty(), "{case}");
    }
}

#[test]
fn a_crash_before_any_operation_loses_no_point_and_no_session() {
    crash_everywhere(&before(1), Fate::Lost);
}

#[test]
fn a_crash_after_any_operation_loses_no_point_and_no_session() {
    crash_everywhere(&before(1), Fate::Done);
}

#[test]
fn a_full_disk_is_its_own_error_and_the_session_goes_on_when_there_is_room() {
    crash_everywhere(&before(1), Fate::Full);
}

#[test]
fn a_crash_while_runs_and_layers_are_merged_loses_nothing() {
    // Sixteen layers and eight runs: the next backup merges both.
    for fate in [Fate::Lost, Fate::Done] {
        crash_everywhere(&before(15), fate);
    }
}

#[test]
fn a_crash_in_the_first_backup_leaves_a_repository_to_begin_again_with() {
    for fate in [Fate::Lost, Fate::Done] {
        let mut before = before(0);
        before.objects.retain(|name, _| name == "config");
        before.points.clear();
        before.dirty = (0..4).collect();
        crash_everywhere(&before, fate);
    }
}
