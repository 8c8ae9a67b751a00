//! A repository that was found and is not opened yet: what can be told of it without a key.

use std::path::Path;
use std::sync::Arc;

use super::envelope;
use super::error::{Error, Result};
use super::hasher::Hasher;
use super::ids::RepoId;
use super::keys::{self, KeyRing, Keys};
use super::repo::{CONFIG, Config, ENCRYPTED, Repository};
use super::secret::Secret;
use super::store::{DirStore, EncryptedStore, Store};

/// Features that this build can work with; a repository that has others is refused.
const FEATURES: [&str; 1] = [ENCRYPTED];

/// A repository before it is opened.
pub struct Closed {
    store: Arc<dyn Store>,
    config: Config,
}

impl Closed {
    /// Finds the repository in a directory.
    pub fn at(path: &Path) -> Result<Self> {
        let shown = || path.display().to_string();
        match path.join(CONFIG).try_exists() {
            Ok(true) => {}
            Ok(false) => return Err(Error::NoRepository { path: shown() }),
            // Nobody knows whether it is there.
            Err(error) => return Err(Error::io("look into", shown(), error)),
        }
        Self::in_store(Arc::new(DirStore::open(path)?))
    }

    /// Finds the repository in a store.
    pub fn in_store(store: Arc<dyn Store>) -> Result<Self> {
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
        Ok(Self { store, config })
    }

    /// Its name.
    pub fn id(&self) -> RepoId {
        self.config.id
    }

    /// Whether it takes a key to open it.
    pub fn is_encrypted(&self) -> bool {
        self.config.is_encrypted()
    }

    /// Its keys, as anybody sees them.
    pub fn keys(&self) -> Result<Keys> {
        keys::list(&*self.store)
    }

    /// Opens its keys, to change them.
    pub fn key_ring(&self, secret: &Secret) -> Result<KeyRing> {
        self.expect_encrypted()?;
        KeyRing::open(&self.store, self.id(), secret)
    }

    /// A key for a repository that is not encrypted is no slip to pass over: who can write the configuration could have made
    /// it so, and would be sent plain text from now on.
    fn expect_encrypted(&self) -> Result<()> {
        if self.is_encrypted() {
            return Ok(());
        }
        Err(Error::Invalid(
            "the repository is not encrypted, but a key was given: leave it away, unless the repository should be encrypted and its `config` was tampered with".into(),
        ))
    }

    /// Opens it, with a secret if it is encrypted.
    pub fn open(self, secret: Option<&Secret>) -> Result<Repository> {
        match secret {
            Some(secret) => {
                let ring = self.key_ring(secret)?;
                encrypted(self.store, self.config, &ring)
            }
            None if self.is_encrypted() => Err(Error::NoKey),
            None => Ok(Repository::with(self.store, self.config, Hasher::plain())),
        }
    }
}

/// An encrypted repository over its store.
pub(super) fn encrypted(
    store: Arc<dyn Store>,
    config: Config,
    ring: &KeyRing,
) -> Result<Repository> {
    let hasher = Hasher::keyed(ring.master())?;
    let store = EncryptedStore::new(store, Arc::clone(ring.master()));
    Ok(Repository::with(Arc::new(store), config, hasher))
}

impl std::fmt::Debug for Closed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Closed({})", self.id())
    }
}
