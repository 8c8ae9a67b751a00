//! The names of things: blocks by their content, everything else by random numbers. Shown as lower-case hex.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::Sha256;

use super::error::{Error, Result};

/// SHA-256 of some bytes.
pub(super) fn sha256(bytes: &[u8]) -> [u8; 32] {
    <Sha256 as sha2::Digest>::digest(bytes).into()
}

/// Random bytes from the kernel.
pub(super) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        let got =
            rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())
                .map_err(|error| Error::io("get random bytes from", "the kernel", error.into()))?;
        filled += got;
    }
    Ok(bytes)
}

/// Lower-case hex.
pub(super) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    text
}

/// Exactly `N` bytes from lower-case hex.
pub(super) fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    if text.len() != N * 2 {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $bytes:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name([u8; $bytes]);

        impl $name {
            /// The bytes themselves.
            #[must_use]
            pub fn as_bytes(&self) -> &[u8; $bytes] {
                &self.0
            }

            /// From the bytes themselves.
            #[must_use]
            pub fn from_bytes(bytes: [u8; $bytes]) -> Self {
                Self(bytes)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> std::result::Result<Self, String> {
                unhex(text).map(Self).ok_or_else(|| {
                    format!("`{text}` is not {} lower-case hex digits", $bytes * 2)
                })
            }
        }

        impl TryFrom<String> for $name {
            type Error = String;

            fn try_from(text: String) -> std::result::Result<Self, String> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.to_string()
            }
        }
    };
}

hex_id!(
    /// The name of a block by its content: the SHA-256 of the plain block, or in an encrypted repository a keyed one.
    BlockId,
    32
);
hex_id!(
    /// The random name of a repository; the bitmaps it owns carry the short form.
    RepoId,
    16
);
hex_id!(
    /// The random name of a recovery point.
    PointId,
    8
);
hex_id!(
    /// The random name of a key of an encrypted repository.
    KeyId,
    8
);
hex_id!(
    /// The random name of a session.
    SessionId,
    16
);
hex_id!(
    /// The random name of a pack, an index run or a map layer.
    ObjectId,
    16
);

hex_id!(
    /// SHA-256 of what an object refers to.
    Digest,
    32
);

impl BlockId {
    /// The name of a block in a repository that is not encrypted.
    #[cfg(test)]
    pub(super) fn of(plain: &[u8]) -> Self {
        Self(sha256(plain))
    }

    /// The leading bits as a number: ids are spread evenly, so it tells where in a sorted run to look.
    pub(super) fn leading(&self) -> u64 {
        self.0
            .first_chunk()
            .map_or(0, |leading| u64::from_be_bytes(*leading))
    }
}

impl RepoId {
    /// The first 8 hex digits.
    #[must_use]
    pub fn short(&self) -> String {
        hex(&self.0[..4])
    }

    pub(super) fn random() -> Result<Self> {
        random().map(Self)
    }
}

impl PointId {
    /// A new name; a caller may note it before it publishes the point.
    pub fn random() -> Result<Self> {
        random().map(Self)
    }
}

impl KeyId {
    pub(super) fn random() -> Result<Self> {
        random().map(Self)
    }
}

impl ObjectId {
    pub(super) fn random() -> Result<Self> {
        random().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_is_read_only_in_the_form_it_is_written() {
        let id = RepoId::from_bytes([0xab; 16]);
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(id.short(), "abababab");
        for bad in [
            "",
            "AB",
            &"AB".repeat(16),
            &"ab".repeat(15),
            &"zz".repeat(16),
        ] {
            assert!(bad.parse::<RepoId>().is_err(), "{bad}");
        }
    }
}
