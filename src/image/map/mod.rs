//! Maps: which block of a disk holds what. A map is a list of layers, the newest first; a block is what the first layer says
//! that has it. Layers are immutable and shared between points, so a point costs what changed, and points go in any order.
//!
//! ```text
//! layer 0   |   D     Z      D |   the last increment
//! layer 1   | D D              |
//! layer 2   |DDDDZZZZDDDDDDDDDD|   the first copy: every block of the disk
//! map       |DDDDZZZZZDDDDDDDDD|
//! ```
//!
//! A map has every block of its disk: what says otherwise is damaged. A block of a layer that newer layers hide in every map is nobody's:
//! it may be gone from the repository while the layer still names it. Who wants to know what is needed asks `shown.rs`, never a layer
//! alone.

mod build;
mod chunk;
mod diff;
mod layer;
mod run;
mod shown;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub(super) use build::LayerMeta;
pub use build::{MapStats, build_map};
pub use diff::{Changes, Diff, changes, diff};
pub(super) use layer::{Layer, LayerWriter, MAP, SEGMENT};
pub(super) use run::RunSource;
pub use run::{BlockIds, Run, RunContent};
pub(super) use shown::Shown;

use super::error::{Error, Result};
use super::ids::{BlockId, Digest, ObjectId};
use super::repo::Repository;
use run::{Clip, overlay};

/// The most layers of a map.
pub const LAYERS: usize = 16;

/// A layer, as a map refers to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRef {
    /// Its name.
    pub id: ObjectId,
    /// How many blocks it has.
    pub blocks: u64,
    /// The digest of its footer, from which all its content is proved.
    pub digest: Digest,
}

impl LayerRef {
    /// The name of the object.
    pub(super) fn object(&self) -> String {
        format!("maps/{}", self.id)
    }
}

/// The map of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapRef {
    /// The size of the disk in bytes; its last block may be short.
    pub size: u64,
    /// The layers, newest first.
    pub layers: Vec<LayerRef>,
}

/// What a block of a map holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// The block is beyond the disk, or the map is damaged.
    Unset,
    /// Zeros.
    Zero,
    /// The block of this id.
    Data(BlockId),
}

/// An opened map.
pub struct MapReader {
    layers: Vec<Arc<Layer>>,
    blocks: u64,
}

impl MapReader {
    /// Opens all layers.
    pub fn open(repo: &Repository, map: &MapRef) -> Result<Self> {
        let open = |layer: &LayerRef| {
            Layer::open(repo.store_arc(), &layer.object(), MAP, Some(layer.digest))
                .map(Arc::new)
                .map_err(Error::missing_is_corrupt)
        };
        Ok(Self {
            layers: map.layers.iter().map(open).collect::<Result<_>>()?,
            blocks: repo.block_size().blocks(map.size),
        })
    }

    /// A map of opened layers, newest first.
    pub(super) fn of(layers: Vec<Arc<Layer>>, blocks: u64) -> Self {
        Self { layers, blocks }
    }

    /// How many blocks the disk has.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// What a block holds.
    pub fn get(&self, block: u64) -> Result<Entry> {
        if block >= self.blocks {
            return Ok(Entry::Unset);
        }
        for layer in &self.layers {
            if let Some(run) = layer.get(block)? {
                return Ok(match &run.content {
                    RunContent::Data(ids) => ids
                        .as_slice()
                        .first()
                        .map_or(Entry::Unset, |id| Entry::Data(*id)),
                    RunContent::Zero(_) | RunContent::Same(_) => Entry::Zero,
                });
            }
        }
        Ok(Entry::Unset)
    }

    /// All runs in order. A block that no layer has is an error: every block of a published map is set.
    pub fn runs(&self) -> MapRuns {
        let layers = self.layers.iter().map(Layer::stream).collect();
        MapRuns {
            source: Clip {
                source: overlay(layers),
                end: self.blocks,
            },
            at: 0,
            blocks: self.blocks,
            failed: false,
        }
    }
}

/// The runs of a map, from the first block to the last without a gap.
pub struct MapRuns {
    source: Clip,
    at: u64,
    blocks: u64,
    failed: bool,
}

impl MapRuns {
    fn step(&mut self) -> Result<Option<Run>> {
        let run = self.source.next_run()?;
        let first = run.as_ref().map_or(self.blocks, |run| run.first);
        if first != self.at {
            let what = format!("no layer has block {}", self.at);
            return Err(Error::corrupt("a disk's map", what));
        }
        if let Some(run) = &run {
            self.at = run.end();
        }
        Ok(run)
    }
}

impl Iterator for MapRuns {
    type Item = Result<Run>;

    fn next(&mut self) -> Option<Result<Run>> {
        if self.failed {
            return None;
        }
        let step = self.step().transpose();
        self.failed = matches!(step, Some(Err(_)));
        step
    }
}
