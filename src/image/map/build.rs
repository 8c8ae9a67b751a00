//! Building the map of a new point: the segments of a session, the later over the earlier, as one new layer over the layers
//! of the base.
//!
//! ```text
//! segments  |  D   S  Z D      |   merged; S: proved to be what the base holds, not stored again
//! base      |DDDDDDDDDDDD|         smaller than the disk here
//! new layer |  D      Z D|DDDDD|   beyond the base every block must be set
//! ```

use super::super::error::{Error, Result};
use super::super::ids::{ObjectId, SessionId, hex, random};
use super::super::repo::Repository;
use super::super::session::{SegmentRef, Session};
use super::layer::{Layer, LayerWriter, MAP, SEGMENT, Totals};
use super::run::{Clip, Run, RunContent, RunSource, overlay};
use super::{LAYERS, LayerRef, MapRef};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// So many segments are merged at a time; each holds a chunk in memory.
const FAN_IN: usize = 128;
/// Layers of fewer blocks count as equally small.
const SMALL_LAYER: u64 = 1024;

/// The meta of a map layer: whose it is until a point has it.
#[derive(Serialize, Deserialize)]
pub(in crate::image) struct LayerMeta {
    pub(in crate::image) session: SessionId,
}

/// What a new map has beyond its base.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MapStats {
    /// Blocks of the new layer.
    pub changed_blocks: u64,
    /// Those of them that are zero.
    pub zero_blocks: u64,
    /// Those of them that have data.
    pub data_blocks: u64,
}

/// Builds the map of a disk of `size` bytes from a base and the segments of a session, in the order of its log: later ones win.
/// Without a base every block must be set; with one of another size, every block that the base does not have in full. When
/// nothing changed the base's layers are used and nothing is written.
pub fn build_map(
    repo: &Repository,
    base: Option<&MapRef>,
    session: &Session,
    segments: &[SegmentRef],
    size: u64,
) -> Result<(MapRef, MapStats)> {
    let mut merged = Merged::new(repo, session, segments)?;
    let meta = LayerMeta {
        session: session.id(),
    };
    let meta = serde_json::to_vec(&meta)
        .map_err(|error| Error::Invalid(format!("cannot write a layer's meta: {error}")))?;
    let mut build = Build::new(repo, base, size);
    while let Some(run) = merged.source.next_run()? {
        build.add(run)?;
    }
    let layer = build.finish(&meta)?;
    merged.remove(repo)?;
    let mut layers = base.map(|base| base.layers.clone()).unwrap_or_default();
    let mut stats = MapStats::default();
    let newest_is_new = layer.is_some();
    if let Some((layer, totals)) = layer {
        stats = MapStats {
            changed_blocks: totals.blocks(),
            zero_blocks: totals.zero,
            data_blocks: totals.data,
        };
        layers.insert(0, layer);
    }
    let map = MapRef { size, layers };
    Ok((compact(repo, map, newest_is_new, &meta)?, stats))
}

/// The segments as one stream. When there are too many, earlier merges are kept as objects of the session meanwhile.
struct Merged {
    source: Box<dyn RunSource>,
    temporary: Vec<String>,
}

impl Merged {
    fn new(repo: &Repository, session: &Session, segments: &[SegmentRef]) -> Result<Self> {
        let mut objects: Vec<String> = segments
            .iter()
            .map(|segment| segment.object().to_owned())
            .collect();
        let mut temporary = Vec::new();
        while objects.len() > FAN_IN {
            let mut next = Vec::new();
            for group in objects.chunks(FAN_IN) {
                let object = format!("{}merge-{}", session.prefix(), hex(&random::<8>()?));
                let mut writer = LayerWriter::create(repo.store(), &object, SEGMENT)?;
                let mut source = later_over_earlier(repo, group)?;
                while let Some(run) = source.next_run()? {
                    writer.push(run)?;
                }
                writer.finish(b"")?;
                temporary.push(object.clone());
                next.push(object);
            }
            objects = next;
        }
        Ok(Self {
            source: later_over_earlier(repo, &objects)?,
            temporary,
        })
    }

    fn remove(self, repo: &Repository) -> Result<()> {
        if self.temporary.is_empty() {
            return Ok(());
        }
        repo.store().delete(&self.temporary)
    }
}

fn later_over_earlier(repo: &Repository, objects: &[String]) -> Result<Box<dyn RunSource>> {
    let layers = objects.iter().rev().map(|object| {
        let layer = Layer::open(repo.store_arc(), object, SEGMENT, None)
            .map_err(Error::missing_is_corrupt)?;
        Ok(Arc::new(layer).stream())
    });
    Ok(overlay(layers.collect::<Result<_>>()?))
}

/// The new layer in the making, and how much of what must be set is.
struct Build<'a> {
    repo: &'a Repository,
    blocks: u64,
    /// Below this block the base has what is not set; from here to `blocks` every block must be set, and up to `at` is.
    at: u64,
    /// Where the base ends.
    base_end: u64,
    writer: Option<(ObjectId, LayerWriter)>,
}

impl<'a> Build<'a> {
    fn new(repo: &'a Repository, base: Option<&MapRef>, size: u64) -> Self {
        let blocks = repo.block_size().blocks(size);
        let base_end = match base {
            None => 0,
            Some(base) if base.size == size => blocks,
            // The last block of the shorter one is another block in the longer one.
            Some(base) => base.size.min(size) / repo.block_size().bytes(),
        };
        Self {
            repo,
            blocks,
            at: base_end,
            base_end,
            writer: None,
        }
    }

    fn missing(&self) -> Error {
        Error::Invalid(format!(
            "block {} of {} is neither set nor in the base",
            self.at, self.blocks
        ))
    }

    fn add(&mut self, mut run: Run) -> Result<()> {
        if run.first >= self.blocks {
            return Ok(());
        }
        if run.end() > self.blocks {
            run = run.split_before(self.blocks);
        }
        let is_same = matches!(run.content, RunContent::Same(_));
        if run.end() > self.base_end {
            let goes_on = run.first <= self.at && !is_same;
            if !goes_on {
                return Err(self.missing());
            }
            self.at = run.end();
        }
        if is_same {
            return Ok(());
        }
        let (_, writer) = match &mut self.writer {
            Some(writer) => writer,
            none => {
                let id = ObjectId::random()?;
                let object = format!("maps/{id}");
                none.insert((id, LayerWriter::create(self.repo.store(), &object, MAP)?))
            }
        };
        writer.push(run)
    }

    fn finish(self, meta: &[u8]) -> Result<Option<(LayerRef, Totals)>> {
        if self.at < self.blocks {
            return Err(self.missing());
        }
        let Some((id, writer)) = self.writer else {
            return Ok(None);
        };
        let (digest, totals, _) = writer.finish(meta)?;
        let layer = LayerRef {
            id,
            blocks: totals.blocks(),
            digest,
        };
        Ok(Some((layer, totals)))
    }
}

/// Merges the newest layers when there are too many. The inputs stay, other points have them; the layer that was only just
/// written goes when it became part of another.
fn compact(repo: &Repository, map: MapRef, newest_is_new: bool, meta: &[u8]) -> Result<MapRef> {
    let sizes: Vec<u64> = map.layers.iter().map(|layer| layer.blocks).collect();
    let count = choose_count(&sizes);
    let Some((inputs, kept)) = map.layers.split_at_checked(count).filter(|_| count > 0) else {
        return Ok(map);
    };
    let sources = inputs.iter().map(|layer| {
        Layer::open(repo.store_arc(), &layer.object(), MAP, Some(layer.digest))
            .map(|layer| Arc::new(layer).stream())
            .map_err(Error::missing_is_corrupt)
    });
    let mut source = Clip {
        source: overlay(sources.collect::<Result<_>>()?),
        end: repo.block_size().blocks(map.size),
    };
    let id = ObjectId::random()?;
    let mut writer = LayerWriter::create(repo.store(), &format!("maps/{id}"), MAP)?;
    while let Some(run) = source.next_run()? {
        writer.push(run)?;
    }
    let (digest, totals, _) = writer.finish(meta)?;
    if let Some(newest) = inputs.first().filter(|_| newest_is_new) {
        repo.store().delete(&[newest.object()])?;
    }
    let mut layers = vec![LayerRef {
        id,
        blocks: totals.blocks(),
        digest,
    }];
    layers.extend_from_slice(kept);
    Ok(MapRef {
        size: map.size,
        layers,
    })
}

/// How many of the newest layers to merge, given their sizes, the newest first: enough to keep the limit, and on as long as
/// the next one is not of a higher tier than what they make together.
fn choose_count(sizes: &[u64]) -> usize {
    if sizes.len() <= LAYERS {
        return 0;
    }
    let needed = sizes.len() - LAYERS + 1;
    let mut count = 0;
    let mut sum = 0_u64;
    for size in sizes {
        if count >= needed && tier(*size) > tier(sum) {
            break;
        }
        sum = sum.saturating_add(*size);
        count += 1;
    }
    count
}

/// Tiers are powers of four.
fn tier(blocks: u64) -> u32 {
    (blocks / SMALL_LAYER)
        .checked_ilog2()
        .map_or(0, |log| log / 2 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compaction_bounds_the_layers_at_a_bounded_price() {
        let mut sizes: Vec<u64> = vec![10_000_000];
        let (mut written, mut total) = (0_u64, 0_u64);
        for round in 0..5000_u64 {
            let new = 500 + round % 3000;
            total += new;
            sizes.insert(0, new);
            let count = choose_count(&sizes);
            if count > 0 {
                let merged: u64 = sizes.drain(..count).sum();
                written += merged;
                sizes.insert(0, merged);
            }
            assert!(sizes.len() <= LAYERS, "{sizes:?}");
        }
        assert!(written < total * 12, "{written} of {total}");
    }
}
