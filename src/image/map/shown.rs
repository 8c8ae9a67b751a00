//! What some maps show: which blocks of their layers any of them has in sight. Layers are shared, so maps are laid out as trees, from
//! the oldest layer at the root to the newest, and each layer of a tree is read for itself, without what is hidden in all maps.
//!
//! ```text
//!   C*    D*     maps C B A and D B A: nobody sees A or B alone
//!    \   /
//!     B          hidden in B:  what both C and D have
//!     |
//!     A          hidden in A:  what B has, and what both C and D have
//! ```
//!
//! Nothing is hidden in the newest layer of a map (`*`). So a layer is read once for its ids, and once for which blocks it has for each layer
//! beneath it, down to the next that is the newest of a map; a map has few layers. Memory is a chunk of each layer that is read at a
//! time, and the number of those is bounded: beyond, less counts as hidden than is.

use std::collections::HashMap;
use std::sync::Arc;

use super::super::error::Result;
use super::super::ids::ObjectId;
use super::LayerRef;
use super::layer::Layer;
use super::run::{Clip, RunSource, Without, common, overlay};

/// So many layers are read at a time to find out what is hidden in one.
const LIMIT: usize = 512;

/// A layer over all that is beneath it in a map.
struct Node {
    layer: LayerRef,
    /// Blocks of the disk.
    blocks: u64,
    /// A map begins with this layer.
    is_newest: bool,
    /// What lies right beneath it.
    below: Option<usize>,
    /// The layers that lie right over this one.
    above: Vec<usize>,
}

/// Opens a layer.
type Open<'a> = &'a dyn Fn(&LayerRef) -> Result<Arc<Layer>>;

/// Some maps.
pub(in crate::image) struct Shown {
    nodes: Vec<Node>,
    /// By the node beneath, the size of the disk, and the layer.
    places: HashMap<(Option<usize>, u64, ObjectId), usize>,
    limit: usize,
}

impl Default for Shown {
    fn default() -> Self {
        Self {
            nodes: Vec::new(),
            places: HashMap::new(),
            limit: LIMIT,
        }
    }
}

impl Shown {
    /// Takes in a map of so many blocks; the layers newest first. Gives the place of the newest. Maps of different sizes have nothing in
    /// common: they see different parts of a layer.
    pub(in crate::image) fn add(&mut self, blocks: u64, layers: &[LayerRef]) -> Option<usize> {
        let mut below = None;
        for layer in layers.iter().rev() {
            let nodes = &mut self.nodes;
            let place = *self
                .places
                .entry((below, blocks, layer.id))
                .or_insert_with(|| {
                    let place = nodes.len();
                    if let Some(below) = below.and_then(|below: usize| nodes.get_mut(below)) {
                        below.above.push(place);
                    }
                    nodes.push(Node {
                        layer: layer.clone(),
                        blocks,
                        is_newest: false,
                        below,
                        above: Vec::new(),
                    });
                    place
                });
            below = Some(place);
        }
        if let Some(newest) = below.and_then(|newest| self.nodes.get_mut(newest)) {
            newest.is_newest = true;
        }
        below
    }

    /// The places of layers, each with its layer.
    pub(in crate::image) fn places(&self) -> impl Iterator<Item = (usize, &LayerRef)> {
        self.nodes.iter().map(|node| &node.layer).enumerate()
    }

    /// What is beneath a place, newest first, and how many blocks the disk has.
    pub(in crate::image) fn beneath(&self, place: usize) -> (u64, Vec<&LayerRef>) {
        let mut layers = Vec::new();
        let node = self.nodes.get(place);
        let mut next = node.and_then(|node| node.below);
        while let Some(below) = next.and_then(|below| self.nodes.get(below)) {
            layers.push(&below.layer);
            next = below.below;
        }
        (node.map_or(0, |node| node.blocks), layers)
    }

    /// Numbers for the places such that what lies over one has the numbers that follow its own: of each place its number, and the
    /// first that follows all of these.
    pub(in crate::image) fn spans(&self) -> Vec<(usize, usize)> {
        // A place is made after the one beneath it.
        let mut sizes = vec![1; self.nodes.len()];
        for (place, node) in self.nodes.iter().enumerate().rev() {
            if let Some(below) = node.below {
                sizes[below] += sizes[place];
            }
        }
        let mut spans: Vec<(usize, usize)> = Vec::with_capacity(sizes.len());
        // The next number that is free over each place, and at the root.
        let mut free = Vec::with_capacity(sizes.len());
        let mut root = 0;
        for (node, size) in self.nodes.iter().zip(sizes) {
            let next = node.below.map_or(&mut root, |below| &mut free[below]);
            let first = *next;
            *next += size;
            spans.push((first, first + size));
            free.push(first + 1);
        }
        spans
    }

    /// What is shown of the layer at a place; all of it where too much would have to be read to tell.
    pub(in crate::image) fn stream(
        &self,
        place: usize,
        open: Open<'_>,
    ) -> Result<Box<dyn RunSource>> {
        let Some(node) = self.nodes.get(place) else {
            return Ok(overlay(Vec::new()));
        };
        let source = Box::new(Clip {
            source: open(&node.layer)?.stream(),
            end: node.blocks,
        });
        let mut left = self.limit;
        Ok(match self.hidden(node, &mut left, open)? {
            Some(hidden) => Box::new(Without::new(source, hidden)),
            None => source,
        })
    }

    /// Which blocks are hidden from every map that has this layer; `None` for none. `left` layers may still be opened.
    fn hidden(
        &self,
        node: &Node,
        left: &mut usize,
        open: Open<'_>,
    ) -> Result<Option<Box<dyn RunSource>>> {
        if node.is_newest {
            return Ok(None);
        }
        let Some(rest) = left.checked_sub(node.above.len()) else {
            return Ok(None);
        };
        *left = rest;
        let mut sources = Vec::with_capacity(node.above.len());
        for above in node.above.iter().filter_map(|above| self.nodes.get(*above)) {
            let layer = open(&above.layer)?.stream();
            sources.push(match self.hidden(above, left, open)? {
                Some(hidden) => overlay(vec![layer, hidden]),
                None => layer,
            });
        }
        Ok(Some(common(sources)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::super::super::ids::{BlockId, Digest};
    use super::super::super::memory::{Fate, Memory, Objects};
    use super::super::super::store::Store;
    use super::super::layer::{LayerWriter, MAP};
    use super::super::run::{BlockIds, Run, RunContent};
    use super::super::{Entry, MapReader};
    use super::*;

    /// A layer of some blocks; zeros where `true`. Its ids are nobody else's.
    fn layer(store: &Memory, number: u8, blocks: &BTreeSet<(u8, bool)>) -> LayerRef {
        let object = format!("maps/{}", name(number));
        let mut writer = LayerWriter::create(store, &object, MAP).unwrap();
        let mut last = None;
        for (block, zero) in blocks {
            if last.replace(*block) == Some(*block) {
                continue;
            }
            let content = if *zero {
                RunContent::Zero(1)
            } else {
                RunContent::Data(BlockIds::new(vec![BlockId::of(&[number, *block])]))
            };
            let first = u64::from(*block);
            writer.push(Run { first, content }).unwrap();
        }
        let (digest, totals, _) = writer.finish(b"").unwrap();
        let blocks = totals.blocks();
        let id = name(number);
        LayerRef { id, blocks, digest }
    }

    fn name(number: u8) -> ObjectId {
        ObjectId::from_bytes([number; 16])
    }

    fn open(store: &Memory, layer: &LayerRef) -> Result<Arc<Layer>> {
        let store: Arc<dyn Store> = Arc::new(store.clone());
        Layer::open(&store, &layer.object(), MAP, Some(layer.digest)).map(Arc::new)
    }

    fn shown_by(store: &Memory, shown: &Shown) -> BTreeSet<BlockId> {
        let mut found = BTreeSet::new();
        for (place, _) in shown.places() {
            let mut runs = shown
                .stream(place, &|layer: &LayerRef| open(store, layer))
                .unwrap();
            while let Some(run) = runs.next_run().unwrap() {
                if let RunContent::Data(ids) = run.content {
                    found.extend(ids.as_slice());
                }
            }
        }
        found
    }

    proptest! {
        #[test]
        fn what_is_shown_is_what_the_maps_hold_and_nothing_else(
            contents in proptest::collection::vec(
                proptest::collection::btree_set((0_u8..12, any::<bool>()), 0..9), 1..14),
            beneath in proptest::collection::vec((any::<prop::sample::Index>(), 0_u8..4), 14),
            maps in proptest::collection::vec((any::<prop::sample::Index>(), 9_u64..13), 1..9),
        ) {
            let store = Memory::new(Objects::new(), None, Fate::Lost);
            let layers: Vec<LayerRef> = (0_u8..).zip(&contents)
                .map(|(number, blocks)| layer(&store, number, blocks)).collect();
            // Each layer lies over an earlier one, or is the oldest of its maps.
            let mut stacks: Vec<Vec<LayerRef>> = Vec::new();
            for (layer, (below, alone)) in layers.iter().zip(&beneath) {
                let mut stack = vec![layer.clone()];
                if *alone > 0 && !stacks.is_empty() {
                    stack.extend(below.get(&stacks).iter().cloned());
                }
                stacks.push(stack);
            }
            let (mut shown, mut few) = (Shown::default(), Shown { limit: 2, ..Shown::default() });
            let mut expected = BTreeSet::new();
            let mut places = Vec::new();
            for (stack, blocks) in &maps {
                let stack = stack.get(&stacks);
                places.push((shown.add(*blocks, stack).unwrap(), stack, *blocks));
                few.add(*blocks, stack);
                let opened = stack.iter().map(|layer| open(&store, layer).unwrap()).collect();
                let map = MapReader::of(opened, *blocks);
                for block in 0..*blocks {
                    if let Entry::Data(id) = map.get(block).unwrap() {
                        expected.insert(id);
                    }
                }
            }
            prop_assert_eq!(&shown_by(&store, &shown), &expected);
            // With less memory more counts as shown.
            prop_assert!(shown_by(&store, &few).is_superset(&expected));
            let spans = shown.spans();
            for (place, stack, blocks) in places {
                let (same, beneath) = shown.beneath(place);
                prop_assert_eq!(same, blocks);
                prop_assert!(beneath.into_iter().eq(&stack[1..]));
                for (other, above, of) in maps.iter().map(|(stack, of)| (stack.get(&stacks), of))
                    .map(|(stack, of)| (shown.place_of(*of, stack), stack, *of)) {
                    let (first, end) = spans[place];
                    let is_over = of == blocks && above.ends_with(stack);
                    prop_assert_eq!((first..end).contains(&spans[other].0), is_over);
                }
            }
        }
    }

    impl Shown {
        /// The place of a map that was added.
        fn place_of(&self, blocks: u64, layers: &[LayerRef]) -> usize {
            let mut below = None;
            for layer in layers.iter().rev() {
                below = self.places.get(&(below, blocks, layer.id)).copied();
            }
            below.unwrap()
        }
    }

    #[test]
    fn a_layer_that_is_missing_is_an_error() {
        let store = Memory::new(Objects::new(), None, Fate::Lost);
        let there = layer(&store, 1, &[(0, false)].into());
        let missing = LayerRef {
            id: name(2),
            blocks: 1,
            digest: Digest::from_bytes([0; 32]),
        };
        let mut shown = Shown::default();
        shown.add(1, &[missing, there]);
        let open = |layer: &LayerRef| open(&store, layer);
        assert!(shown.stream(0, &open).is_err(), "it may hide something");
        assert!(shown.stream(1, &open).is_err());
    }
}
