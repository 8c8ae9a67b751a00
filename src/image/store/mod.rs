//! The shape of storage: named immutable objects, put if absent, read in ranges, listed, deleted, and an exclusive named lock.
//!
//! A directory implements it ([`DirStore`]); an object store can, so nothing here appends to a published object or maps it, and
//! nothing is replaced but, by repair, the configuration. What `put` and `finish` return from with success survives a power loss; an object is there whole or not at all.
//! Names are `/`-separated paths of `[0-9a-z.-]` whose first part is the kind of the object.

mod dir;
mod encrypted;
mod holder;
mod recent;

pub use dir::DirStore;
pub(super) use encrypted::EncryptedStore;
pub use holder::Holder;

use super::error::{Error, Result};

/// An object of [`RESERVE_BYTES`] without meaning: deleted, it makes the room that freeing space takes.
pub(super) const RESERVE: &str = "reserve";
/// How long it is: enough to condemn 30,000 packs.
pub(super) const RESERVE_BYTES: usize = 1 << 20;

/// The longest object that is read whole.
pub const WHOLE_LIMIT: u64 = 64 << 20;

/// Named immutable objects.
pub trait Store: Send + Sync {
    /// Publishes a small object; [`Error::Exists`] when the name is taken.
    fn put(&self, name: &str, bytes: &[u8]) -> Result<()>;
    /// Begins an object that is written piece by piece; it exists only once it is finished.
    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>>;
    /// A whole object of at most [`WHOLE_LIMIT`] bytes.
    fn get(&self, name: &str) -> Result<Vec<u8>>;
    /// Fills `buffer` from `offset`; [`Error::Corrupt`] when the object is too short.
    fn get_range(&self, name: &str, offset: u64, buffer: &mut [u8]) -> Result<()>;
    /// The length of an object in bytes.
    fn size(&self, name: &str) -> Result<u64>;
    /// The names of all objects under a prefix that ends with `/`, sorted.
    fn list(&self, prefix: &str) -> Result<Vec<String>>;
    /// As [`Store::list`], but never from what a client of a network file system remembers: what another host published
    /// before the call is in the answer.
    fn list_fresh(&self, prefix: &str) -> Result<Vec<String>>;
    /// Deletes objects, durably when it returns; one that is not there is no error.
    fn delete(&self, names: &[String]) -> Result<()>;
    /// Puts another object in the place of one, in one step: whoever reads finds the old or the new. Only `repair new-id` does
    /// so, to `config`; a store that cannot says so.
    fn replace(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let _ = bytes;
        Err(Error::Unsupported(format!(
            "this store cannot replace {name}"
        )))
    }
    /// Takes the named lock until the guard is dropped or the process dies; [`Error::Busy`] says who holds it.
    fn lock(&self, name: &str, who: &str) -> Result<StoreLock>;
    /// The names of the held locks that begin with `prefix`, with the texts of their holders, past any cache. What dead holders
    /// left is removed; so such locks must have names that nobody takes twice.
    fn held(&self, prefix: &str) -> Result<Vec<(String, String)>>;
}

/// An object in the making; dropped before [`ObjectWriter::finish`] it leaves nothing.
pub trait ObjectWriter: Send {
    /// Adds bytes.
    fn write(&mut self, bytes: &[u8]) -> Result<()>;
    /// Makes it durable and visible; [`Error::Exists`] when the name is taken. After an error nothing is left and the
    /// object must be written anew.
    fn finish(self: Box<Self>) -> Result<()>;
}

/// A held lock; dropping it lets go.
pub struct StoreLock {
    _held: Box<dyn Send + Sync>,
}

impl StoreLock {
    /// A lock that is held as long as `guard` lives.
    pub fn new(guard: impl Send + Sync + 'static) -> Self {
        Self {
            _held: Box::new(guard),
        }
    }
}

impl std::fmt::Debug for StoreLock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StoreLock")
    }
}

/// Refuses names that could leave the store or that an object store would spell differently.
fn check_name(name: &str) -> Result<()> {
    let part_is_good = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.len() <= 128
            && part
                .bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'z' | b'.' | b'-'))
    };
    if name.len() <= 512 && name.split('/').all(part_is_good) {
        Ok(())
    } else {
        Err(Error::Invalid(format!("`{name}` is not an object name")))
    }
}

/// The kind of an object: the first part of its name.
fn kind(name: &str) -> &str {
    name.split('/').next().unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_leave_the_store() {
        for good in ["config", "packs/ab/cd01", "sessions/00/00000000-header"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in [
            "", "/", "a/", "/a", "a//b", "..", "a/../b", ".x", "A", "a b", "a\0",
        ] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }
}
