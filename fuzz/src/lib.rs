//! What the fuzz targets share: a store in memory, the golden repositories, and the seals of objects, written anew from
//! `docs/format.md` so that hostile content gets past the checksums.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use forerun::image::Error;
use forerun::image::store::{ObjectWriter, Store, StoreLock};
use sha2::{Digest, Sha256};

/// Objects by name.
pub type Objects = BTreeMap<String, Vec<u8>>;

/// A store in memory.
#[derive(Clone)]
pub struct Memory(std::sync::Arc<Mutex<Objects>>);

impl Memory {
    pub fn new(objects: Objects) -> Self {
        Self(std::sync::Arc::new(Mutex::new(objects)))
    }

    fn with<T>(&self, look: impl FnOnce(&mut Objects) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn missing(name: &str) -> Error {
    Error::NotFound {
        object: name.to_owned(),
    }
}

struct Writer(Memory, String, Vec<u8>);

impl ObjectWriter for Writer {
    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.2.extend_from_slice(bytes);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<(), Error> {
        self.0.put(&self.1, &self.2)
    }
}

impl Store for Memory {
    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        self.with(|objects| match objects.get(name) {
            Some(_) => Err(Error::Exists {
                object: name.to_owned(),
            }),
            None => {
                objects.insert(name.to_owned(), bytes.to_vec());
                Ok(())
            }
        })
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>, Error> {
        Ok(Box::new(Writer(self.clone(), name.to_owned(), Vec::new())))
    }

    fn get(&self, name: &str) -> Result<Vec<u8>, Error> {
        self.with(|objects| objects.get(name).cloned().ok_or_else(|| missing(name)))
    }

    fn get_range(&self, name: &str, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        self.with(|objects| {
            let bytes = objects.get(name).ok_or_else(|| missing(name))?;
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            let end = start.saturating_add(buffer.len());
            let range = bytes.get(start..end).ok_or_else(|| Error::Corrupt {
                object: name.to_owned(),
                what: "it is too short".to_owned(),
            })?;
            buffer.copy_from_slice(range);
            Ok(())
        })
    }

    fn size(&self, name: &str) -> Result<u64, Error> {
        self.with(|objects| {
            objects
                .get(name)
                .map(|bytes| bytes.len() as u64)
                .ok_or_else(|| missing(name))
        })
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>, Error> {
        self.with(|objects| {
            Ok(objects
                .keys()
                .filter(|name| name.starts_with(prefix))
                .cloned()
                .collect())
        })
    }

    fn list_fresh(&self, prefix: &str) -> Result<Vec<String>, Error> {
        self.list(prefix)
    }

    fn delete(&self, names: &[String]) -> Result<(), Error> {
        self.with(|objects| names.iter().for_each(|name| drop(objects.remove(name))));
        Ok(())
    }

    fn held(&self, _: &str) -> Result<Vec<(String, String)>, Error> {
        Ok(Vec::new())
    }

    fn lock(&self, _: &str, _: &str) -> Result<StoreLock, Error> {
        Ok(StoreLock::new(()))
    }
}

fn read_into(directory: &Path, prefix: &str, objects: &mut Objects) {
    for entry in std::fs::read_dir(directory)
        .expect("the golden repository")
        .flatten()
    {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.path().is_dir() {
            read_into(&entry.path(), &format!("{name}/"), objects);
        } else {
            objects.insert(name, std::fs::read(entry.path()).expect("an object"));
        }
    }
}

/// A repository as it was written by the first build of its format.
pub fn golden() -> &'static Objects {
    static GOLDEN: OnceLock<Objects> = OnceLock::new();
    GOLDEN.get_or_init(|| {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/repository-v1");
        let mut objects = Objects::new();
        read_into(&root, "", &mut objects);
        objects
    })
}

/// A JSON object with the first line that belongs to it.
pub fn seal_json(kind: &str, body: &[u8]) -> Vec<u8> {
    let digest: String = Sha256::digest(body)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let mut bytes = format!("forerun {kind} 1 {} {digest}\n", body.len()).into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

/// A binary object with the frame that belongs to it.
pub fn seal_binary(magic: [u8; 8], body: &[u8], footer: &[u8]) -> Vec<u8> {
    let mut bytes = magic.to_vec();
    bytes.extend_from_slice(&1_u32.to_le_bytes());
    bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
    bytes.extend_from_slice(body);
    bytes.extend_from_slice(footer);
    bytes.extend_from_slice(
        &u32::try_from(footer.len())
            .expect("a short footer")
            .to_le_bytes(),
    );
    bytes.extend_from_slice(&1_u32.to_le_bytes());
    bytes.extend_from_slice(&Sha256::digest(footer));
    bytes.extend_from_slice(&magic);
    bytes
}

/// The golden repository without its own points, blocks and index: a place for hostile ones.
pub fn empty() -> Objects {
    let kept = |name: &str| name == "config";
    golden()
        .iter()
        .filter(|(name, _)| kept(name))
        .map(|(name, bytes)| (name.clone(), bytes.clone()))
        .collect()
}

/// Bytes that are taken from the input one after the other.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    pub fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// A number that is often one that means something.
    pub fn number(&mut self, known: &[u32]) -> Option<u32> {
        let byte = self.byte()?;
        match known.get(usize::from(byte)) {
            Some(known) => Some(*known),
            None => Some(u32::from_be_bytes(self.take(4).try_into().ok()?)),
        }
    }

    pub fn data(&mut self) -> Option<&'a [u8]> {
        let length = usize::from(self.byte()?) * 17;
        Some(self.take(length))
    }
}
