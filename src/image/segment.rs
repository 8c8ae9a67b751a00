//! The blocks of a session's segment as runs: in order, neighbours of one kind together.

use super::map::{BlockIds, Run, RunContent};
use super::session::Content;
use crate::units::BlockRun;

/// Sorts blocks and joins neighbours of one kind to runs.
pub(super) fn runs_of(blocks: &[(u64, Content)]) -> Vec<Run> {
    let mut sorted: Vec<(u64, Content)> = blocks.to_vec();
    sorted.sort_by_key(|(block, _)| *block);
    // The sort keeps the order of equal ones: of those the last stays.
    sorted.reverse();
    sorted.dedup_by_key(|(block, _)| *block);
    sorted.reverse();
    let mut runs = Vec::new();
    for group in sorted.chunk_by(|(a, left), (b, right)| {
        *b == *a + 1 && std::mem::discriminant(left) == std::mem::discriminant(right)
    }) {
        let Some((first, content)) = group.first() else {
            continue;
        };
        let count = group.len() as u64;
        let ids = group.iter().filter_map(|(_, content)| match content {
            Content::Data(id) => Some(*id),
            _ => None,
        });
        let content = match content {
            Content::Zero => RunContent::Zero(count),
            Content::Same => RunContent::Same(count),
            Content::Data(_) => RunContent::Data(BlockIds::new(ids.collect())),
        };
        runs.push(Run {
            first: *first,
            content,
        });
    }
    runs
}

/// Neighbouring data blocks as one run.
pub(super) fn joined(runs: &[(BlockRun, Content)]) -> impl Iterator<Item = Run> + '_ {
    let groups = runs.chunk_by(|(a, left), (b, right)| {
        let data = matches!((left, right), (Content::Data(_), Content::Data(_)));
        data && a.end() == b.first
    });
    groups.filter_map(|group| {
        let (first, content) = group.first()?;
        let ids = group.iter().filter_map(|(_, content)| match content {
            Content::Data(id) => Some(*id),
            _ => None,
        });
        let content = match content {
            Content::Zero => RunContent::Zero(first.count),
            Content::Same => RunContent::Same(first.count),
            Content::Data(_) => RunContent::Data(BlockIds::new(ids.collect())),
        };
        Some(Run {
            first: first.first,
            content,
        })
    })
}
