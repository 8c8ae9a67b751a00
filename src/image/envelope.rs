//! The form of the objects that hold JSON (`config`, points, session records): one line that checks the rest, then the JSON,
//! so that `tail -n +2` shows it.
//!
//! ```text
//! forerun point 1 1234 <sha256 of the JSON, 64 hex>\n
//! {...1234 bytes of JSON...}
//! ```
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::indexing_slicing
    )
)]

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::{Error, Result};
use super::ids::{hex, sha256};

/// The only version so far, of all three kinds.
const VERSION: u32 = 1;

fn head(kind: &str, body: &[u8]) -> String {
    let digest = hex(&sha256(body));
    format!("forerun {kind} {VERSION} {} {digest}", body.len())
}

/// The bytes of an object that holds `value`.
pub(super) fn seal<T: Serialize>(kind: &str, value: &T) -> Result<Vec<u8>> {
    let body = serde_json::to_vec(value)
        .map_err(|error| Error::Invalid(format!("cannot write a {kind} as JSON: {error}")))?;
    let mut bytes = head(kind, &body).into_bytes();
    bytes.push(b'\n');
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// The value in the bytes of an object. The first line is compared with the one that this body must have, so that no byte
/// of it can differ unseen.
pub(super) fn open<T: DeserializeOwned>(kind: &str, object: &str, bytes: &[u8]) -> Result<T> {
    let corrupt = |what: &str| Error::corrupt(object, what);
    let end = bytes
        .iter()
        .take(256)
        .position(|byte| *byte == b'\n')
        .ok_or_else(|| corrupt("its first line is missing"))?;
    let (first, body) = bytes
        .split_at_checked(end)
        .ok_or_else(|| corrupt("its first line is missing"))?;
    let body = body.get(1..).unwrap_or_default();
    if first != head(kind, body).as_bytes() {
        return Err(newer(kind, object, first)
            .unwrap_or_else(|| corrupt("its content does not match its checksum")));
    }
    serde_json::from_slice(body)
        .map_err(|error| corrupt(&format!("its JSON is no {kind}: {error}")))
}

/// The error for an object that is sound as far as can be told but of a version to come.
fn newer(kind: &str, object: &str, first: &[u8]) -> Option<Error> {
    let line = std::str::from_utf8(first).ok()?;
    let mut words = line.split(' ');
    let ours = words.next() == Some("forerun") && words.next() == Some(kind);
    let version: u32 = words.next()?.parse().ok()?;
    (ours && version > VERSION).then(|| {
        Error::Unsupported(format!(
            "{object} has format version {version}, this build reads {VERSION}: use a newer forerun"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    #[test]
    fn what_is_sealed_opens_and_no_flipped_bit_does() {
        let value = json!({"a": [1, 2, "x"]});
        let bytes = seal("record", &value).unwrap();
        assert_eq!(open::<Value>("record", "o", &bytes).unwrap(), value);
        assert!(open::<Value>("point", "o", &bytes).is_err());
        for position in 0..bytes.len() {
            for bit in 0..8 {
                let mut bad = bytes.clone();
                bad[position] ^= 1 << bit;
                assert!(open::<Value>("record", "o", &bad).is_err(), "{position}");
            }
            assert!(open::<Value>("record", "o", &bytes[..position]).is_err());
        }
    }

    #[test]
    fn a_later_version_is_unsupported_and_not_corrupt() {
        let bytes = b"forerun config 2 2 00\n{}";
        assert!(matches!(
            open::<Value>("config", "config", bytes),
            Err(Error::Unsupported(_))
        ));
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(open::<Value>("record", "o", &bytes).is_err());
        }
    }
}
