//! The repository: its configuration, and what every other part of it reaches the store through.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::block::NewBlock;
use super::bytes::all_zero;
use super::closed::{self, Closed};
use super::codec::Compression;
use super::envelope;
use super::error::{Error, Result};
use super::hasher::Hasher;
use super::ids::{BlockId, ObjectId, RepoId};
use super::index::{Index, Rebuilt};
use super::keys::KeyRing;
use super::look::beside;
use super::pack::PackWriter;
use super::secret::Secret;
use super::store::{DirStore, Store};
use crate::units::BlockSize;

pub(super) const CONFIG: &str = "config";
/// The feature of a repository that takes a key.
pub(super) const ENCRYPTED: &str = "encrypted";

/// How a new repository is made.
#[derive(Debug, Clone, Copy)]
pub struct InitOptions {
    /// The unit of storage, for ever.
    pub block_size: BlockSize,
    /// What new blocks are compressed with when nothing else is said.
    pub compression: Compression,
}

impl Default for InitOptions {
    fn default() -> Self {
        Self {
            block_size: BlockSize::DEFAULT,
            compression: Compression::default(),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Config {
    /// The version of the whole repository.
    pub(super) version: u32,
    pub(super) id: RepoId,
    block_size: BlockSize,
    pub(super) features: Vec<String>,
    #[serde(default)]
    compression: Compression,
}

impl Config {
    fn new(options: InitOptions, features: &[&str]) -> Result<Self> {
        Ok(Self {
            version: 1,
            id: RepoId::random()?,
            block_size: options.block_size,
            features: features
                .iter()
                .map(|feature| (*feature).to_owned())
                .collect(),
            compression: options.compression,
        })
    }

    pub(super) fn is_encrypted(&self) -> bool {
        self.features.iter().any(|feature| feature == ENCRYPTED)
    }
}

/// An opened repository; clones are the same one.
#[derive(Clone)]
pub struct Repository {
    inner: Arc<Inner>,
    compression: Compression,
}

struct Inner {
    store: Arc<dyn Store>,
    config: Config,
    index: Index,
    hasher: Hasher,
    /// Packs that were there, at one generation.
    there: Mutex<(u64, HashSet<ObjectId>)>,
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
        let config = Config::new(options, &[])?;
        let sealed = envelope::seal("config", &config)?;
        let repo = Self::with(store, config, Hasher::plain());
        repo.keep_reserve()?;
        repo.store().put(CONFIG, &sealed)?;
        Ok(repo)
    }

    /// Makes an encrypted repository in a directory that is missing or empty; the secret opens it, its key has the label.
    pub fn init_encrypted(
        path: &Path,
        options: InitOptions,
        secret: &Secret,
        label: &str,
    ) -> Result<Self> {
        let store = DirStore::init(path)?;
        Self::init_encrypted_store(Arc::new(store), options, secret, label)
    }

    /// Makes an encrypted repository in an empty store.
    pub fn init_encrypted_store(
        store: Arc<dyn Store>,
        options: InitOptions,
        secret: &Secret,
        label: &str,
    ) -> Result<Self> {
        let config = Config::new(options, &[ENCRYPTED])?;
        let ring = KeyRing::create(&store, config.id, secret, label)?;
        let sealed = envelope::seal("config", &config)?;
        let repo = closed::encrypted(store, config, &ring)?;
        repo.keep_reserve()?;
        repo.store().put(CONFIG, &sealed)?;
        Ok(repo)
    }

    /// Opens a repository in a directory that needs no key; [`Closed`] opens the others.
    pub fn open(path: &Path) -> Result<Self> {
        Closed::at(path)?.open(None)
    }

    /// Opens the repository in a store, which needs no key.
    pub fn open_store(store: Arc<dyn Store>) -> Result<Self> {
        Closed::in_store(store)?.open(None)
    }

    pub(super) fn with(store: Arc<dyn Store>, config: Config, hasher: Hasher) -> Self {
        let index = Index::new(Arc::clone(&store));
        Self {
            compression: config.compression,
            inner: Arc::new(Inner {
                store,
                config,
                index,
                hasher,
                there: Mutex::default(),
            }),
        }
    }

    /// The same repository; what it stores from now on is compressed so.
    #[must_use]
    pub fn with_compression(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }

    /// What new blocks are compressed with.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// Whether all that it holds is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.inner.config.is_encrypted()
    }

    /// Gives the repository in the store another name, whose short form is another, too. What is opened keeps the old name until
    /// it is opened again. Everything else of the configuration stays, also what this build does not know.
    pub fn renew_id(&self) -> Result<RepoId> {
        let _lock = self.store().lock("new-id", "giving the repository an id")?;
        self.expect_renewable()?;
        let mut config: serde_json::Value =
            envelope::open("config", CONFIG, &self.store().get(CONFIG)?)?;
        let mut id = RepoId::random()?;
        while id.short() == self.id().short() {
            id = RepoId::random()?;
        }
        config["id"] = id.to_string().into();
        self.store()
            .replace(CONFIG, &envelope::seal("config", &config)?)?;
        Ok(id)
    }

    /// Refuses a repository that cannot have another id, before anything is done for one.
    pub fn expect_renewable(&self) -> Result<()> {
        if let Some(feature) = self.inner.config.features.first() {
            return Err(Error::Unsupported(format!(
                "a repository with the feature `{feature}` keeps its id: make another one and copy the points to it"
            )));
        }
        Ok(())
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

    pub(super) fn hasher(&self) -> &Hasher {
        &self.inner.hasher
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
        let id = self.hasher().block(plain);
        // One that was found bad is worth storing anew, and this is the moment when its bytes are at hand.
        if expected == Some(id) && !self.index().is_quarantined(id)? {
            return Ok(Encoded::Known(id));
        }
        if self.has_block(id)? {
            return Ok(Encoded::Known(id));
        }
        NewBlock::encode(id, plain, self.compression).map(Encoded::New)
    }

    /// Whether a block of this id need not be stored: it is here, as far as [`Repository::encode`] would say.
    pub fn has_block(&self, id: BlockId) -> Result<bool> {
        match self.index().locate(id) {
            Ok(Some(location)) => self.is_there(location.pack),
            Ok(None) => Ok(false),
            // Stored twice is safe; a backup that cannot go on is not.
            Err(error @ Error::Corrupt { .. }) => {
                tracing::debug!(%error, "a block is stored without looking for it");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether a pack that the index names is there. A writer who was held up for long may publish entries of a pack that a prune
    /// has deleted meanwhile; one that is there is deleted only in a later generation.
    fn is_there(&self, pack: ObjectId) -> Result<bool> {
        let generation = self.index().generation()?;
        let mut there = self
            .inner
            .there
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if there.0 != generation {
            *there = (generation, HashSet::new());
        }
        if there.1.contains(&pack) {
            return Ok(true);
        }
        let beside = beside(self, pack)?;
        there.1.extend(beside);
        Ok(there.1.contains(&pack))
    }

    /// Refuses a repository whose index is gone: nothing in it can be restored before it is made anew.
    pub fn expect_index(&self) -> Result<()> {
        if !self.index().is_empty()? || self.store().list("packs/")?.is_empty() {
            return Ok(());
        }
        let what = "all of it is missing; `forerun repair index` makes it anew from the packs";
        Err(Error::corrupt("the index", what))
    }

    /// Whether equal blocks have equal ids here and there.
    #[must_use]
    pub fn shares_ids_with(&self, other: &Repository) -> bool {
        self.block_size() == other.block_size() && self.hasher().agrees_with(other.hasher())
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
