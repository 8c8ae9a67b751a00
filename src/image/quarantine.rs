//! Blocks that were found bad where they are stored: nobody deduplicates against them there, and a reader takes another copy when
//! there is one.
//!
//! ```text
//! quarantine/<32 hex>    JSON, kind quarantine: {"blocks": [{"id", "pack", "what"}, ...], "found": RFC 3339}
//! ```

use std::collections::HashMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::envelope;
use super::error::{Error, Result};
use super::ids::{BlockId, ObjectId};
use super::store::Store;
use crate::clock;

const PREFIX: &str = "quarantine/";
const KIND: &str = "quarantine";
/// Blocks of one record at most, so that it can be read whole.
const BLOCKS: usize = 1 << 16;

/// A block that is bad where it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Bad {
    pub(super) id: BlockId,
    pub(super) pack: ObjectId,
    /// How, for people.
    pub(super) what: String,
}

/// One object.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) blocks: Vec<Bad>,
    pub(super) found: Timestamp,
}

/// All that is known to be bad.
#[derive(Debug, Default)]
pub(super) struct Quarantine {
    locations: HashMap<BlockId, Vec<ObjectId>>,
    /// Records that cannot be read.
    pub(super) damaged: Vec<Error>,
}

impl Quarantine {
    /// Reads all records, past any cache.
    pub(super) fn read(store: &dyn Store) -> Result<Self> {
        let mut quarantine = Self::default();
        for (_, record) in Self::records(store, &mut quarantine.damaged)? {
            for bad in record.blocks {
                let packs = quarantine.locations.entry(bad.id).or_default();
                if !packs.contains(&bad.pack) {
                    packs.push(bad.pack);
                }
            }
        }
        Ok(quarantine)
    }

    /// The records with their names, past any cache; what cannot be read is put into `damaged`.
    pub(super) fn records(
        store: &dyn Store,
        damaged: &mut Vec<Error>,
    ) -> Result<Vec<(String, Record)>> {
        let mut records = Vec::new();
        for object in store.list_fresh(PREFIX)? {
            let read = store
                .get(&object)
                .and_then(|bytes| envelope::open(KIND, &object, &bytes));
            match read {
                Ok(record) => records.push((object, record)),
                // Healed meanwhile.
                Err(error) if error.is_not_found() => {}
                Err(error @ (Error::Corrupt { .. } | Error::Unsupported(_))) => {
                    tracing::warn!(%error, "a record of bad blocks is not used");
                    damaged.push(error);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(records)
    }

    /// Records blocks as bad.
    pub(super) fn add(store: &dyn Store, bad: &[Bad]) -> Result<()> {
        for blocks in bad.chunks(BLOCKS) {
            let record = Record {
                blocks: blocks.to_vec(),
                found: clock::utc_now(),
            };
            let name = format!("{PREFIX}{}", ObjectId::random()?);
            store.put(&name, &envelope::seal(KIND, &record)?)?;
        }
        Ok(())
    }

    /// Whether a block is bad in a pack.
    pub(super) fn has(&self, id: BlockId, pack: ObjectId) -> bool {
        self.locations
            .get(&id)
            .is_some_and(|packs| packs.contains(&pack))
    }

    /// Whether a block is bad anywhere.
    pub(super) fn has_block(&self, id: BlockId) -> bool {
        !self.locations.is_empty() && self.locations.contains_key(&id)
    }

    /// The blocks that are bad somewhere.
    pub(super) fn ids(&self) -> impl Iterator<Item = BlockId> {
        self.locations.keys().copied()
    }
}
