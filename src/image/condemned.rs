//! The packs that are about to be deleted: nobody may refer to them any more. The list with the highest number counts; its
//! number is the *generation* by which a writer sees that packs were condemned since it looked.
//!
//! ```text
//! condemned/<16 hex digits, the generation>    JSON, kind condemned: {"packs": [...], "by": "..."}
//! ```

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::envelope;
use super::error::{Error, Result};
use super::ids::{ObjectId, hex, unhex};
use super::store::Store;

const PREFIX: &str = "condemned/";
const KIND: &str = "condemned";
/// How often the head is looked for again when it is replaced while it is read.
const TRIES: usize = 10;

#[derive(Serialize, Deserialize)]
struct Record {
    packs: Vec<ObjectId>,
    /// Who condemned them, for people.
    by: String,
}

/// The head of the condemned lists.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Condemned {
    /// Its number; 0 when packs were never condemned.
    pub(super) generation: u64,
    /// Packs that count as gone for everybody who deduplicates.
    pub(super) packs: HashSet<ObjectId>,
}

fn name(generation: u64) -> String {
    format!("{PREFIX}{}", hex(&generation.to_be_bytes()))
}

/// The generations that there are, past any cache, ascending.
fn generations(store: &dyn Store) -> Result<Vec<u64>> {
    let names = store.list_fresh(PREFIX)?;
    let number = |name: &String| Some(u64::from_be_bytes(unhex(name.strip_prefix(PREFIX)?)?));
    Ok(names.iter().filter_map(number).collect())
}

impl Condemned {
    /// The head, past any cache.
    pub(super) fn read(store: &dyn Store) -> Result<Self> {
        Self::read_head(store)?.1
    }

    /// The number of the head and the head itself, which may be damaged, past any cache.
    pub(super) fn read_head(store: &dyn Store) -> Result<(u64, Result<Self>)> {
        let mut tries = 0;
        loop {
            let generation = Self::generation(store)?;
            if generation == 0 {
                return Ok((0, Ok(Self::default())));
            }
            match Self::read_at(store, generation) {
                // A new head is put before the old one goes.
                Err(error) if error.is_not_found() && tries < TRIES => tries += 1,
                Err(error @ (Error::Corrupt { .. } | Error::Unsupported(_))) => {
                    return Ok((generation, Err(error)));
                }
                other => return Ok((generation, Ok(other?))),
            }
        }
    }

    /// The list of one generation.
    fn read_at(store: &dyn Store, generation: u64) -> Result<Self> {
        let object = name(generation);
        let record: Record = envelope::open(KIND, &object, &store.get(&object)?)?;
        Ok(Self {
            generation,
            packs: record.packs.into_iter().collect(),
        })
    }

    /// The number of the head, past any cache; 0 when there is none.
    pub(super) fn generation(store: &dyn Store) -> Result<u64> {
        Ok(generations(store)?.last().copied().unwrap_or(0))
    }

    /// Publishes a list; [`Error::Exists`] when another one has taken the number.
    pub(super) fn put(
        store: &dyn Store,
        generation: u64,
        packs: &HashSet<ObjectId>,
        by: &str,
    ) -> Result<()> {
        if generation == 0 {
            return Err(Error::Invalid("a condemned list of number 0".into()));
        }
        let mut packs: Vec<ObjectId> = packs.iter().copied().collect();
        packs.sort_unstable();
        let record = Record {
            packs,
            by: by.to_owned(),
        };
        store.put(&name(generation), &envelope::seal(KIND, &record)?)
    }

    /// Deletes the lists below a generation. The newest must stay: its number is what writers compare.
    pub(super) fn drop_older(store: &dyn Store, generation: u64) -> Result<()> {
        let mut older = generations(store)?;
        older.pop();
        older.retain(|number| *number < generation);
        let older: Vec<String> = older.into_iter().map(name).collect();
        store.delete(&older)
    }
}
