//! The repository: where the blocks of the disks go, and where points are restored from.
//!
//! ```text
//! plain block --encode--> Zero | Known | New --PackWriter--> packs/ --seal--> index/
//! blocks and what they hold --Session::append_segment--> sessions/   (durable before anything relies on it)
//! sessions/ --build_map--> maps/ --publish--> points/                (the only commit)
//! points/ --read_disk, verify--> maps/ --> index/ --> packs/         (every read re-hashes)
//! ```
//!
//! Objects are immutable and published in the order packs, index, maps, point: whatever refers to something is published after
//! it, so a crash leaves at most objects that nobody refers to. `docs/format.md` describes every byte. This part knows nothing
//! of VMs, bitmaps or NBD.

mod block;
mod bytes;
mod closed;
mod codec;
mod condemned;
mod envelope;
mod error;
mod forget;
mod gc;
mod hasher;
mod heal;
mod ids;
mod index;
mod keys;
mod lease;
mod locate;
mod look;
mod manifest;
mod map;
#[cfg(test)]
#[path = "../../tests/image_common/memory.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a store for tests, written for those outside"
)]
mod memory;
mod pack;
mod pins;
mod points;
mod quarantine;
mod read;
mod repo;
mod retention;
mod sealed;
mod secret;
mod segment;
mod session;
#[cfg(test)]
mod speed;
mod stats;
pub mod store;
mod verify;

pub use block::NewBlock;
pub use closed::Closed;
pub use codec::{Compression, ZstdLevel};
pub use error::{Error, Result};
pub use forget::{ForgetPlan, Selection, TargetPlan};
pub use gc::{Packs, PruneOptions, PruneReport};
pub use ids::{BlockId, Digest, KeyId, ObjectId, PointId, RepoId, SessionId};
pub use index::{NOT_INDEXED, Rebuilt};
pub use keys::{KeyInfo, KeyRing, Keys};
pub use lease::Lease;
pub use manifest::{
    DEFINITION, DiskPoint, HostFile, LIVE_DEFINITION, Manifest, NVRAM, Origin, Quiesce,
    RetiredBitmap, TPM, Target, Tracking,
};
pub use map::{
    BlockIds, Changes, Diff, Entry, LAYERS, LayerRef, MapReader, MapRef, MapRuns, MapStats, Run,
    RunContent, build_map, changes, diff,
};
pub use pack::{PackStats, PackWriter};
pub use pins::{Pin, Pins};
pub use points::Points;
pub use read::BlockSink;
pub use repo::{Encoded, InitOptions, Repository};
pub use retention::{Policy, Reason};
pub use secret::Secret;
pub use session::{
    Content, Item, SegmentContent, SegmentHeader, SegmentRef, SegmentRuns, Session, Sessions,
};
pub use stats::{Amount, Objects, PointStats, Sizes, Stats};
pub use verify::{
    CheckReport, Damage, Need, Pace, PackReport, Progress, VerifyOptions, VerifyReport,
};
