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
#[allow(dead_code, reason = "prune and verify use it")]
mod condemned;
mod envelope;
mod error;
mod forget;
mod heal;
mod ids;
#[allow(dead_code, reason = "prune and verify use it")]
mod index;
mod locate;
mod manifest;
mod map;
mod pack;
mod pins;
mod points;
#[allow(dead_code, reason = "prune and verify use it")]
mod quarantine;
mod read;
mod repo;
mod retention;
mod sealed;
mod session;
pub mod store;
mod verify;

pub use block::NewBlock;
pub use error::{Error, Result};
pub use forget::{ForgetPlan, Selection, TargetPlan};
pub use ids::{BlockId, Digest, ObjectId, PointId, RepoId, SessionId};
pub use index::Rebuilt;
pub use manifest::{DiskPoint, Manifest, Quiesce, RetiredBitmap, Target, Tracking};
pub use map::{
    BlockIds, Diff, Entry, LAYERS, LayerRef, MapReader, MapRef, MapRuns, MapStats, Run, RunContent,
    build_map, diff,
};
pub use pack::{PackStats, PackWriter};
pub use pins::{Pin, Pins};
pub use points::Points;
pub use read::BlockSink;
pub use repo::{Encoded, InitOptions, Repository};
pub use retention::{Policy, Reason};
pub use session::{
    Content, Item, SegmentContent, SegmentHeader, SegmentRef, SegmentRuns, Session, Sessions,
};
pub use verify::{CheckReport, Damage, Pace, PackReport, VerifyOptions, VerifyReport};
