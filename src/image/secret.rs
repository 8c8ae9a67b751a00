//! The master key of an encrypted repository, what is derived from it, and what an operator opens it with. None of it is ever
//! shown, and the memory that held it is wiped.

use std::fmt;

use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::Zeroizing;

use super::error::{Error, Result};
use super::ids::random;

/// Bytes of every key.
pub(super) const KEY_BYTES: usize = 32;
/// A key file has at least as many bytes as the keys that depend on it.
const KEY_FILE_LEAST: usize = KEY_BYTES;

/// A key that was derived.
pub(super) type Key = Zeroizing<[u8; KEY_BYTES]>;

/// HKDF-SHA256. The purpose is a fixed text, the context what the key is for in particular.
pub(super) fn derive(input: &[u8], salt: &[u8], purpose: &str, context: &[u8]) -> Result<Key> {
    let mut key = Key::default();
    // A zero ends the purpose, so that no other purpose and context give the same bytes.
    let info = [purpose.as_bytes(), b"\0", context].concat();
    Hkdf::<Sha256>::new(Some(salt), input)
        .expand(&info, &mut *key)
        .map_err(|_| Error::Invalid("a key of impossible length".into()))?;
    Ok(key)
}

/// The random key that all other keys of a repository come from.
pub(super) struct MasterKey(Key);

impl MasterKey {
    pub(super) fn random() -> Result<Self> {
        random().map(|bytes| Self(Zeroizing::new(bytes)))
    }

    pub(super) fn from_key(key: Key) -> Self {
        Self(key)
    }

    pub(super) fn bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }

    /// A key for one purpose.
    pub(super) fn derive(&self, salt: &[u8], purpose: &str, context: &[u8]) -> Result<Key> {
        derive(self.bytes(), salt, purpose, context)
    }
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MasterKey")
    }
}

/// What opens an encrypted repository.
#[derive(Clone)]
pub enum Secret {
    /// What a person knows.
    Passphrase(Zeroizing<Vec<u8>>),
    /// The content of a file of random bytes.
    KeyFile(Zeroizing<Vec<u8>>),
}

impl Secret {
    /// A passphrase, which must not be empty.
    pub fn passphrase(bytes: Zeroizing<Vec<u8>>) -> Result<Self> {
        if bytes.is_empty() {
            return Err(Error::Invalid("the passphrase is empty".into()));
        }
        Ok(Self::Passphrase(bytes))
    }

    /// The content of a key file, which is too short when it could be guessed.
    pub fn key_file(bytes: Zeroizing<Vec<u8>>) -> Result<Self> {
        let repeats = bytes.iter().all(|byte| Some(byte) == bytes.first());
        if bytes.len() < KEY_FILE_LEAST || repeats {
            return Err(Error::Invalid(format!(
                "a key file has at least {KEY_FILE_LEAST} random bytes, this one has {}{}",
                bytes.len(),
                if repeats { ", all the same" } else { "" }
            )));
        }
        Ok(Self::KeyFile(bytes))
    }

    /// The content of a new key file, from the kernel.
    pub fn new_key_file() -> Result<Zeroizing<Vec<u8>>> {
        Ok(Zeroizing::new(MasterKey::random()?.bytes().to_vec()))
    }

    /// What to call it in a message.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Passphrase(_) => "passphrase",
            Self::KeyFile(_) => "key file",
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({})", self.kind())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn purpose_salt_and_context_each_make_another_key() {
        let key = |salt, purpose, context| *derive(&[7; 32], salt, purpose, context).unwrap();
        let keys = [
            key(&b"s"[..], "a", &b"bc"[..]),
            key(b"s", "ab", b"c"),
            key(b"s", "a", b"bd"),
            key(b"t", "a", b"bc"),
        ];
        for (number, one) in keys.iter().enumerate() {
            assert!(keys[..number].iter().all(|other| other != one));
        }
    }

    #[test]
    fn hkdf_is_that_of_rfc_5869() {
        // Test case 1, of which 42 bytes are asked for; ours are its first 32. Its info has no zero in front.
        let salt: Vec<u8> = (0..=12).collect();
        let info: Vec<u8> = (0xf0..=0xf9).collect();
        let mut key = [0; 32];
        Hkdf::<Sha256>::new(Some(&salt), &[0x0b; 22])
            .expand(&info, &mut key)
            .unwrap();
        assert_eq!(
            super::super::ids::hex(&key),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
        );
    }

    #[test]
    fn no_secret_is_shown_and_a_weak_one_is_refused() {
        let secret = Secret::passphrase(Zeroizing::new(b"open sesame".to_vec())).unwrap();
        assert_eq!(format!("{secret:?}"), "Secret(passphrase)");
        let master = MasterKey::from_key(Zeroizing::new([0x41; 32]));
        assert_eq!(format!("{master:?}"), "MasterKey");
        assert!(Secret::passphrase(Zeroizing::default()).is_err());
        assert!(Secret::key_file(Zeroizing::new(vec![1, 2, 3])).is_err());
        assert!(Secret::key_file(Zeroizing::new(vec![0; 64])).is_err());
        let random = random::<32>().unwrap().to_vec();
        assert!(Secret::key_file(Zeroizing::new(random)).is_ok());
    }
}
