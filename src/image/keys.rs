//! The keys of an encrypted repository: objects that each hold the master key, wrapped by what one passphrase or one key file
//! gives. They can be added and removed without touching anything else; who has lost all of them has lost the repository.

use std::sync::Arc;

use aes_gcm_siv::aead::AeadInOut;
use aes_gcm_siv::aead::inout::InOutBuf;
use aes_gcm_siv::{Aes256GcmSiv, KeyInit, Nonce, Tag};
use argon2::{Algorithm, Argon2, Params, Version};
use serde::{Deserialize, Serialize};

use super::envelope;
use super::error::{Error, Result};
use super::ids::{Digest, KeyId, RepoId, hex, random, unhex};
use super::secret::{KEY_BYTES, Key, MasterKey, Secret, derive};
use super::store::{Store, StoreLock};
use crate::clock;

const PREFIX: &str = "keys/";
const TAG: usize = 16;
/// So many keys a repository has at most: each may cost a try.
const KEYS_LIMIT: usize = 64;
/// The longest label.
const LABEL_LIMIT: usize = 100;
/// What new passphrases cost: 64 MiB and three passes, the second choice of RFC 9106.
const MEMORY_KIB: u32 = 64 << 10;
const PASSES: u32 = 3;
const LANES: u32 = 1;
/// What a key may ask for; it is read before it is proved.
const MEMORY_KIB_LIMIT: u32 = 256 << 10;
const PASSES_LIMIT: u32 = 16;
const LANES_LIMIT: u32 = 4;

/// How a secret becomes the key that wraps the master key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
enum Kdf {
    /// Of a passphrase.
    Argon2id {
        memory_kib: u32,
        passes: u32,
        lanes: u32,
        salt: Digest,
    },
    /// HKDF-SHA256 of a file of random bytes.
    KeyFile { salt: Digest },
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    id: KeyId,
    label: String,
    created: String,
    kdf: Kdf,
    /// The master key, encrypted, and the tag: hex.
    wrapped: String,
}

/// A key of a repository, as anybody sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KeyInfo {
    /// Its name.
    pub id: KeyId,
    /// What opens it: `passphrase` or `key file`.
    pub kind: &'static str,
    /// The operator's word for it.
    pub label: String,
    /// When it was added, RFC 3339.
    pub created: String,
}

/// The keys of a repository.
#[derive(Debug, Default)]
pub struct Keys {
    /// The ones that can be read.
    pub keys: Vec<KeyInfo>,
    /// What is wrong with the others.
    pub damaged: Vec<Error>,
}

fn object(id: KeyId) -> String {
    format!("{PREFIX}{id}")
}

impl Kdf {
    fn new(secret: &Secret) -> Result<Self> {
        let salt = Digest::from_bytes(random()?);
        Ok(match secret {
            Secret::Passphrase(_) => Self::Argon2id {
                memory_kib: MEMORY_KIB,
                passes: PASSES,
                lanes: LANES,
                salt,
            },
            Secret::KeyFile(_) => Self::KeyFile { salt },
        })
    }

    fn opened_by(&self) -> &'static str {
        match self {
            Self::Argon2id { .. } => "passphrase",
            Self::KeyFile { .. } => "key file",
        }
    }

    /// Whether what it asks for is within the bounds.
    fn is_possible(&self) -> bool {
        match *self {
            Self::Argon2id {
                memory_kib,
                passes,
                lanes,
                ..
            } => {
                (1..=LANES_LIMIT).contains(&lanes)
                    && (1..=PASSES_LIMIT).contains(&passes)
                    && (8 * LANES_LIMIT..=MEMORY_KIB_LIMIT).contains(&memory_kib)
            }
            Self::KeyFile { .. } => true,
        }
    }

    /// The wrapping key; `None` when another kind of secret opens it.
    fn key(&self, secret: &Secret) -> Result<Option<Key>> {
        match (self, secret) {
            (
                Self::Argon2id {
                    memory_kib,
                    passes,
                    lanes,
                    salt,
                },
                Secret::Passphrase(passphrase),
            ) => {
                let mut key = Key::default();
                Params::new(*memory_kib, *passes, *lanes, Some(KEY_BYTES))
                    .and_then(|params| {
                        Argon2::new(Algorithm::Argon2id, Version::V0x13, params).hash_password_into(
                            passphrase,
                            salt.as_bytes(),
                            &mut *key,
                        )
                    })
                    .map_err(|error| Error::Invalid(format!("cannot run argon2id: {error}")))?;
                Ok(Some(key))
            }
            (Self::KeyFile { salt }, Secret::KeyFile(file)) => {
                derive(file, salt.as_bytes(), "forerun key file 1", &[]).map(Some)
            }
            _ => Ok(None),
        }
    }
}

/// The wrapping key is used for this one text only, since its salt is random: the nonce is fixed.
fn cipher(key: &Key) -> (Aes256GcmSiv, Nonce) {
    (Aes256GcmSiv::new((&**key).into()), Nonce::default())
}

/// A wrapped key opens only as this key of this repository.
fn binding(repo: RepoId, id: KeyId) -> Vec<u8> {
    [b"forerun key 1\0", &repo.as_bytes()[..], id.as_bytes()].concat()
}

impl Record {
    fn wrap(repo: RepoId, master: &MasterKey, secret: &Secret, label: &str) -> Result<Self> {
        if label.chars().count() > LABEL_LIMIT || label.chars().any(char::is_control) {
            return Err(Error::Invalid(format!(
                "a key's label is one line of at most {LABEL_LIMIT} characters"
            )));
        }
        let failed = || Error::Invalid("cannot wrap the master key".into());
        let id = KeyId::random()?;
        let kdf = Kdf::new(secret)?;
        let key = kdf.key(secret)?.ok_or_else(failed)?;
        let (cipher, nonce) = cipher(&key);
        let mut sealed = Key::new(*master.bytes());
        let tag = cipher
            .encrypt_inout_detached(&nonce, &binding(repo, id), InOutBuf::from(&mut sealed[..]))
            .map_err(|_| failed())?;
        Ok(Self {
            id,
            label: label.to_owned(),
            created: clock::utc_now().to_string(),
            kdf,
            wrapped: hex(&[&sealed[..], &tag[..]].concat()),
        })
    }

    /// The master key; `None` when the secret is not this key's.
    fn unwrap(&self, repo: RepoId, secret: &Secret) -> Result<Option<MasterKey>> {
        let Some(key) = self.kdf.key(secret)? else {
            return Ok(None);
        };
        let wrapped: [u8; KEY_BYTES + TAG] =
            unhex(&self.wrapped).ok_or_else(|| self.damaged("its wrapped key"))?;
        let mut master = Key::default();
        let Some((body, tag)) = wrapped.split_last_chunk::<TAG>() else {
            return Ok(None);
        };
        master.copy_from_slice(body);
        let (cipher, nonce) = cipher(&key);
        let opened = cipher.decrypt_inout_detached(
            &nonce,
            &binding(repo, self.id),
            InOutBuf::from(&mut master[..]),
            &Tag::from(*tag),
        );
        Ok(opened.is_ok().then(|| MasterKey::from_key(master)))
    }

    fn damaged(&self, what: &str) -> Error {
        Error::corrupt(object(self.id), format!("{what} is impossible"))
    }

    /// Reads a key object. Its numbers are bounded here, before anything is allocated by them.
    fn parse(name: &str, bytes: &[u8]) -> Result<Self> {
        let record: Self = envelope::open("key", name, bytes)?;
        if object(record.id) != name {
            return Err(Error::corrupt(name, "it is another key's"));
        }
        if !record.kdf.is_possible() {
            return Err(record.damaged("what it asks of argon2id"));
        }
        if unhex::<{ KEY_BYTES + TAG }>(&record.wrapped).is_none() {
            return Err(record.damaged("its wrapped key"));
        }
        Ok(record)
    }

    fn info(&self) -> KeyInfo {
        KeyInfo {
            id: self.id,
            kind: self.kdf.opened_by(),
            label: self.label.clone(),
            created: self.created.clone(),
        }
    }
}

/// All key objects.
fn records(store: &dyn Store) -> Result<(Vec<Record>, Vec<Error>)> {
    let (mut records, mut damaged) = (Vec::new(), Vec::new());
    for name in store.list(PREFIX)?.into_iter().take(KEYS_LIMIT) {
        match store
            .get(&name)
            .and_then(|bytes| Record::parse(&name, &bytes))
        {
            Ok(record) => records.push(record),
            // Removed meanwhile.
            Err(Error::NotFound { .. }) => {}
            Err(error @ (Error::Corrupt { .. } | Error::Unsupported(_))) => damaged.push(error),
            Err(error) => return Err(error),
        }
    }
    Ok((records, damaged))
}

/// The keys in a store.
pub(super) fn list(store: &dyn Store) -> Result<Keys> {
    let (records, damaged) = records(store)?;
    Ok(Keys {
        keys: records.iter().map(Record::info).collect(),
        damaged,
    })
}

fn lock(store: &dyn Store) -> Result<StoreLock> {
    store.lock("keys", "changing the keys")
}

/// An opened set of keys, which can be changed.
pub struct KeyRing {
    store: Arc<dyn Store>,
    repo: RepoId,
    master: Arc<MasterKey>,
    opened: KeyId,
}

impl KeyRing {
    /// A new master key with its first key; whatever an interrupted beginning left goes.
    pub(super) fn create(
        store: &Arc<dyn Store>,
        repo: RepoId,
        secret: &Secret,
        label: &str,
    ) -> Result<Self> {
        let _lock = lock(&**store)?;
        if store.get(super::repo::CONFIG).is_ok() {
            return Err(Error::Exists {
                object: "the repository".into(),
            });
        }
        store.delete(&store.list(PREFIX)?)?;
        let master = MasterKey::random()?;
        let record = Record::wrap(repo, &master, secret, label)?;
        store.put(&object(record.id), &envelope::seal("key", &record)?)?;
        Ok(Self {
            store: Arc::clone(store),
            repo,
            master: Arc::new(master),
            opened: record.id,
        })
    }

    /// Tries all keys of the secret's kind.
    pub(super) fn open(store: &Arc<dyn Store>, repo: RepoId, secret: &Secret) -> Result<Self> {
        let (records, damaged) = records(&**store)?;
        for record in &records {
            if let Some(master) = record.unwrap(repo, secret)? {
                return Ok(Self {
                    store: Arc::clone(store),
                    repo,
                    master: Arc::new(master),
                    opened: record.id,
                });
            }
        }
        // The one that would have opened may be the one that is hurt.
        if let Some(error) = damaged.into_iter().next() {
            return Err(error);
        }
        if records.is_empty() {
            return Err(Error::corrupt(
                "keys/",
                "it holds no key, and without one nothing of the repository can be read: put it back from a copy",
            ));
        }
        Err(Error::WrongKey {
            with: secret.kind(),
            keys: records
                .iter()
                .map(|record| record.info().to_string())
                .collect(),
        })
    }

    pub(super) fn master(&self) -> &Arc<MasterKey> {
        &self.master
    }

    /// The key that the secret opened.
    pub fn opened(&self) -> KeyId {
        self.opened
    }

    /// Adds a key for another secret: one that no key opens with yet.
    pub fn add(&self, secret: &Secret, label: &str) -> Result<KeyInfo> {
        let _lock = lock(&*self.store)?;
        for record in records(&*self.store)?.0 {
            if record.unwrap(self.repo, secret)?.is_some() {
                return Err(Error::Invalid(format!(
                    "key {} opens with this {} already: there is nothing to add",
                    record.info(),
                    secret.kind()
                )));
            }
        }
        if self.store.list(PREFIX)?.len() >= KEYS_LIMIT {
            return Err(Error::Invalid(format!(
                "the repository has {KEYS_LIMIT} keys, which is as many as it may have"
            )));
        }
        let record = Record::wrap(self.repo, &self.master, secret, label)?;
        self.store
            .put(&object(record.id), &envelope::seal("key", &record)?)?;
        Ok(record.info())
    }

    /// Removes a key; never the last one that can be read.
    pub fn remove(&self, id: KeyId) -> Result<()> {
        let _lock = lock(&*self.store)?;
        let (records, _) = records(&*self.store)?;
        if !records.iter().any(|record| record.id != id) {
            return Err(Error::Invalid(format!(
                "key {id} is the last one: without it nothing of the repository could be read; add another one first"
            )));
        }
        let name = object(id);
        self.store.size(&name)?;
        self.store.delete(&[name])
    }
}

impl std::fmt::Display for KeyInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({}", self.id, self.kind)?;
        if !self.label.is_empty() {
            write!(f, " `{}`", self.label)?;
        }
        f.write_str(")")
    }
}

impl std::fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeyRing({})", self.opened)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use zeroize::Zeroizing;

    fn secret() -> Secret {
        Secret::key_file(Zeroizing::new((0..32).collect())).unwrap()
    }

    const REPO: [u8; 16] = [3; 16];

    fn record() -> (MasterKey, Record) {
        let master = MasterKey::random().unwrap();
        let record = Record::wrap(RepoId::from_bytes(REPO), &master, &secret(), "one").unwrap();
        (master, record)
    }

    #[test]
    fn a_key_opens_only_with_its_secret_in_its_repository_and_under_its_name() {
        let (master, mut record) = record();
        let repo = RepoId::from_bytes(REPO);
        let opened = record.unwrap(repo, &secret()).unwrap().unwrap();
        assert_eq!(opened.bytes(), master.bytes());
        let other = Secret::key_file(Zeroizing::new((1..33).collect())).unwrap();
        assert!(record.unwrap(repo, &other).unwrap().is_none());
        let passphrase = Secret::passphrase(Zeroizing::new((0..32).collect())).unwrap();
        assert!(record.unwrap(repo, &passphrase).unwrap().is_none());
        let other = RepoId::from_bytes([4; 16]);
        assert!(record.unwrap(other, &secret()).unwrap().is_none());
        record.id = KeyId::from_bytes([9; 8]);
        assert!(record.unwrap(repo, &secret()).unwrap().is_none());
    }

    #[test]
    fn every_changed_digit_of_a_wrapped_key_is_noticed() {
        let (_, mut record) = record();
        let sound = record.wrapped.clone();
        for at in 0..sound.len() {
            let mut digits = sound.clone().into_bytes();
            digits[at] = if digits[at] == b'0' { b'1' } else { b'0' };
            record.wrapped = String::from_utf8(digits).unwrap();
            let opened = record.unwrap(RepoId::from_bytes(REPO), &secret());
            assert!(opened.unwrap().is_none(), "{at}");
        }
    }

    fn with(change: impl FnOnce(&mut Value)) -> Result<Record> {
        let salt = "ab".repeat(32);
        let mut value = json!({
            "id": "0011223344556677", "label": "", "created": "",
            "kdf": { "kind": "argon2id", "memory_kib": 65536, "passes": 3, "lanes": 1, "salt": salt },
            "wrapped": "00".repeat(48),
        });
        change(&mut value);
        let bytes = envelope::seal("key", &value).unwrap();
        Record::parse("keys/0011223344556677", &bytes)
    }

    #[test]
    fn a_hostile_key_object_cannot_ask_for_much() {
        assert!(with(|_| {}).is_ok());
        for (field, bad) in [
            ("memory_kib", json!(u32::MAX)),
            ("memory_kib", json!(MEMORY_KIB_LIMIT + 1)),
            ("memory_kib", json!(0)),
            ("passes", json!(0)),
            ("passes", json!(1_000_000)),
            ("lanes", json!(0)),
            ("lanes", json!(1 << 20)),
            ("salt", json!("ab")),
            ("kind", json!("scrypt")),
        ] {
            let refused = with(|value| value["kdf"][field] = bad.clone());
            assert!(refused.unwrap_err().is_corrupt(), "{field} {bad}");
        }
        for (field, bad) in [
            ("wrapped", "00".repeat(47)),
            ("wrapped", "zz".repeat(48)),
            ("id", "1111223344556677".to_owned()),
        ] {
            assert!(with(|value| value[field] = json!(bad)).is_err(), "{field}");
        }
    }

    proptest! {
        #[test]
        fn hostile_key_objects_never_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            memory in any::<u32>(), passes in any::<u32>(), lanes in any::<u32>(),
        ) {
            prop_assert!(Record::parse("keys/0011223344556677", &bytes).is_err());
            let hostile = with(|value| {
                value["kdf"]["memory_kib"] = json!(memory);
                value["kdf"]["passes"] = json!(passes);
                value["kdf"]["lanes"] = json!(lanes);
            });
            let within = memory <= MEMORY_KIB_LIMIT && passes <= PASSES_LIMIT && lanes <= LANES_LIMIT;
            prop_assert!(hostile.is_err() || within);
        }
    }
}
