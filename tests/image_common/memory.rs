//! A store in memory that forgets what was not durable and, at a chosen operation, either does it or not and then fails
//! everything that follows.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use forerun::image::Error;
use forerun::image::store::{Holder, ObjectWriter, Store, StoreLock};

/// Objects by name.
pub type Objects = BTreeMap<String, Vec<u8>>;

/// What happens at the fatal operation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fate {
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
    locked: BTreeMap<String, String>,
    /// Bytes of objects that there is room for.
    capacity: Option<usize>,
}

/// A store in memory.
#[derive(Clone)]
pub struct Memory(Arc<Mutex<State>>);

impl Memory {
    /// A store with these objects that crashes at the `left`-th operation from now.
    pub fn new(objects: Objects, left: Option<u64>, fate: Fate) -> Self {
        Self(Arc::new(Mutex::new(State {
            objects,
            left,
            operations: 0,
            fate,
            locked: BTreeMap::new(),
            capacity: None,
        })))
    }

    /// From now on objects of so many bytes in all fit, and no more; what is there stays.
    pub fn limit(&self, capacity: Option<usize>) {
        self.0.lock().unwrap().capacity = capacity;
    }

    /// How many bytes the objects have.
    pub fn bytes(&self) -> usize {
        self.0.lock().unwrap().objects.values().map(Vec::len).sum()
    }

    /// What is durable.
    pub fn objects(&self) -> Objects {
        self.0.lock().unwrap().objects.clone()
    }

    /// How many durable operations there were.
    pub fn operations(&self) -> u64 {
        self.0.lock().unwrap().operations
    }

    fn fits(&self, name: &str, length: usize) -> Result<(), Error> {
        let used = self.bytes();
        let state = self.0.lock().unwrap();
        match state.capacity {
            Some(capacity) if used + length > capacity => Err(Error::NoSpace {
                object: name.into(),
                source: std::io::ErrorKind::StorageFull.into(),
            }),
            _ => Ok(()),
        }
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
        store.fits(&self.name, self.bytes.len())?;
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
        self.fits(name, bytes.len())?;
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

    fn list_fresh(&self, prefix: &str) -> Result<Vec<String>, Error> {
        self.list(prefix)
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
        let mut state = self.0.lock().unwrap();
        if let Some(holder) = state.locked.get(name) {
            return Err(Error::Busy {
                object: format!("locks/{name}"),
                holder: Holder::words(holder),
            });
        }
        let text = Holder::ourselves(who).to_text();
        state.locked.insert(name.into(), text);
        Ok(StoreLock::new(Unlock(self.clone(), name.into())))
    }

    fn held(&self, prefix: &str) -> Result<Vec<(String, String)>, Error> {
        let state = self.0.lock().unwrap();
        let held = state.locked.iter();
        Ok(held
            .filter(|(name, _)| name.starts_with(prefix))
            .map(|(name, text)| (name.clone(), text.clone()))
            .collect())
    }
}
