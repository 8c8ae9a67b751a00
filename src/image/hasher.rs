//! How a repository names blocks and sessions by their content: SHA-256, in an encrypted repository keyed, so that who reads
//! the repository cannot tell whether it holds a block or a target that he knows.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::error::{Error, Result};
use super::ids::{BlockId, sha256};
use super::secret::MasterKey;

/// Names things by their content; a clone is cheap.
#[derive(Clone)]
pub(super) struct Hasher(Option<Keyed>);

#[derive(Clone)]
struct Keyed {
    blocks: Hmac<Sha256>,
    sessions: Hmac<Sha256>,
}

impl Hasher {
    /// SHA-256.
    pub(super) fn plain() -> Self {
        Self(None)
    }

    /// HMAC-SHA256 under keys that are derived from the master key.
    pub(super) fn keyed(master: &MasterKey) -> Result<Self> {
        let mac = |purpose| {
            let key = master.derive(&[], purpose, &[])?;
            Hmac::new_from_slice(&*key)
                .map_err(|_| Error::Invalid("a key of impossible length".into()))
        };
        Ok(Self(Some(Keyed {
            blocks: mac("forerun block ids 1")?,
            sessions: mac("forerun session names 1")?,
        })))
    }

    /// The id of a block with this content.
    pub(super) fn block(&self, plain: &[u8]) -> BlockId {
        let keyed = self.0.as_ref().map(|keyed| &keyed.blocks);
        BlockId::from_bytes(digest(keyed, plain))
    }

    /// Whether both give equal blocks equal ids.
    pub(super) fn agrees_with(&self, other: &Self) -> bool {
        self.block(b"forerun") == other.block(b"forerun")
    }

    /// What the ids of all sessions of a target begin with.
    pub(super) fn session(&self, key: &str) -> [u8; 8] {
        let keyed = self.0.as_ref().map(|keyed| &keyed.sessions);
        let digest = digest(keyed, key.as_bytes());
        digest.first_chunk().copied().unwrap_or_default()
    }
}

fn digest(keyed: Option<&Hmac<Sha256>>, bytes: &[u8]) -> [u8; 32] {
    match keyed {
        None => sha256(bytes),
        Some(keyed) => keyed
            .clone()
            .chain_update(bytes)
            .finalize()
            .into_bytes()
            .into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zeroize::Zeroizing;

    #[test]
    fn plain_ids_are_sha_256_and_keyed_ones_depend_on_the_key() {
        let keyed = |byte| {
            let master = MasterKey::from_key(Zeroizing::new([byte; 32]));
            Hasher::keyed(&master).unwrap()
        };
        let (plain, one, other) = (Hasher::plain(), keyed(1), keyed(2));
        assert_eq!(
            plain.block(b"abc").to_string(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(one.block(b"abc"), keyed(1).block(b"abc"));
        assert!(one.agrees_with(&keyed(1)) && !one.agrees_with(&other) && !one.agrees_with(&plain));
        for id in [plain.block(b"abc"), other.block(b"abc"), one.block(b"abd")] {
            assert_ne!(one.block(b"abc"), id);
        }
        assert_ne!(one.session("abc")[..], one.block(b"abc").as_bytes()[..8]);
        assert_ne!(one.session("abc"), plain.session("abc"));
    }
}
