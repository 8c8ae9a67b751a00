//! The repository: its configuration, and what every other part of it reaches the store through.

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::block::NewBlock;
use super::bytes::all_zero;
use super::envelope;
use super::error::{Error, Result};
use super::ids::{BlockId, RepoId};
use super::index::{Index, Rebuilt};
use super::pack::PackWriter;
use super::store::{DirStore, Store};
use crate::units::BlockSize;

const CONFIG: &str = "config";
/// Features that this build can work with; a repository that has others is refused.
const FEATURES: [&str; 0] = [];

/// How a new repository is made.
#[derive(Debug, Clone, Copy)]
pub struct InitOptions {
    /// The unit of storage, for ever.
    pub block_size: BlockSize,
}

#[derive(Debug, Serialize, Deserialize)]
struct Config {
    /// The version of the whole repository.
    version: u32,
    id: RepoId,
    block_size: BlockSize,
    features: Vec<String>,
}

/// An opened repository; clones are the same one.
#[derive(Clone)]
pub struct Repository {
    inner: Arc<Inner>,
}

struct Inner {
    store: Arc<dyn Store>,
    config: Config,
    index: Index,
}

/// A block on its way into the repository.
#[derive(Debug)]
pub enum Encoded {
    /// It is zero.
    Zero,
    /// The repository has it, durably.
    Known(BlockId),
    /// It is to be stored.
    New(NewBlock),
}

impl Repository {
    /// Makes a repository in a directory that is missing or empty.
    pub fn init(path: &Path, options: InitOptions) -> Result<Self> {
        let store = DirStore::init(path)?;
        Self::init_store(Arc::new(store), options)
    }

    /// Makes a repository in an empty store.
    pub fn init_store(store: Arc<dyn Store>, options: InitOptions) -> Result<Self> {
        let config = Config {
            version: 1,
            id: RepoId::random()?,
            block_size: options.block_size,
            features: Vec::new(),
        };
        store.put(CONFIG, &envelope::seal("config", &config)?)?;
        Ok(Self::with(store, config))
    }

    /// Opens a repository in a directory.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.join(CONFIG).exists() {
            return Err(Error::NotFound {
                object: format!("a repository at {}", path.display()),
            });
        }
        Self::open_store(Arc::new(DirStore::open(path)?))
    }

    /// Opens the repository in a store.
    pub fn open_store(store: Arc<dyn Store>) -> Result<Self> {
        let config: Config = envelope::open("config", CONFIG, &store.get(CONFIG)?)?;
        if config.version != 1 {
            return Err(Error::Unsupported(format!(
                "the repository has format version {}, this build reads 1",
                config.version
            )));
        }
        let unknown = config
            .features
            .iter()
            .find(|feature| !FEATURES.contains(&feature.as_str()));
        if let Some(feature) = unknown {
            return Err(Error::Unsupported(format!(
                "the repository has the feature `{feature}`, which this build does not know"
            )));
        }
        Ok(Self::with(store, config))
    }

    fn with(store: Arc<dyn Store>, config: Config) -> Self {
        let index = Index::new(Arc::clone(&store));
        Self {
            inner: Arc::new(Inner {
                store,
                config,
                index,
            }),
        }
    }

    /// Its name.
    pub fn id(&self) -> RepoId {
        self.inner.config.id
    }

    /// The unit of storage.
    pub fn block_size(&self) -> BlockSize {
        self.inner.config.block_size
    }

    /// The store beneath.
    pub fn store(&self) -> &dyn Store {
        &*self.inner.store
    }

    pub(super) fn store_arc(&self) -> &Arc<dyn Store> {
        &self.inner.store
    }

    pub(super) fn index(&self) -> &Index {
        &self.inner.index
    }

    /// Looks at a block, hashes it, looks it up and compresses it; called from many threads at once. The last block of a disk
    /// may be short and is taken as it is.
    pub fn encode(&self, plain: &[u8]) -> Result<Encoded> {
        self.encode_expecting(plain, None)
    }

    /// As [`Repository::encode`] for a block that probably is the stored block `expected`, which saves the look-up.
    pub fn encode_expecting(&self, plain: &[u8], expected: Option<BlockId>) -> Result<Encoded> {
        let limit = self.block_size().as_usize();
        if plain.is_empty() || plain.len() > limit {
            return Err(Error::Invalid(format!(
                "a block of {} bytes in a repository of {limit}",
                plain.len()
            )));
        }
        if all_zero(plain) {
            return Ok(Encoded::Zero);
        }
        let id = BlockId::of(plain);
        // One that was found bad is worth storing anew, and this is the moment when its bytes are at hand.
        if expected == Some(id) && !self.index().is_quarantined(id)? {
            return Ok(Encoded::Known(id));
        }
        match self.index().locate(id) {
            Ok(Some(_)) => return Ok(Encoded::Known(id)),
            Ok(None) => {}
            // Stored twice is safe; a backup that cannot go on is not.
            Err(error @ Error::Corrupt { .. }) => {
                tracing::debug!(%error, "a block is stored without looking for it");
            }
            Err(error) => return Err(error),
        }
        NewBlock::encode(id, plain).map(Encoded::New)
    }

    /// A writer for the new blocks of one disk and one pass, which the label names.
    pub fn pack_writer(&self, label: &str) -> PackWriter {
        PackWriter::new(self, label)
    }

    /// Makes the index anew from the packs.
    pub fn rebuild_index(&self) -> Result<Rebuilt> {
        self.index().rebuild()
    }
}

impl std::fmt::Debug for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Repository({})", self.id())
    }
}
