//! The copier: pieces of disks come in, their blocks are hashed, compared with the base, compressed and stored, and what
//! each block was proved to hold comes out.
//!
//! ```text
//! source (NBD reads, a spool) --pieces--> workers: hash, compare, compress --blocks--> one writer: packs
//! ```
//!
//! Every queue is bounded, so memory is; a slow repository stops the reads by itself.

use std::ops::{ControlFlow, Deref};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use crossbeam_channel::{Receiver, Sender, bounded};
use thread_priority::{
    NormalThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy,
    set_thread_priority_and_policy, thread_native_id,
};

use crate::image::{Content, Encoded, Entry, MapReader, PackWriter, Repository, SessionId};
use crate::units::{BlockRun, BlockSize, Extent};

/// Pieces that wait for a worker, and pieces' results that wait for the writer.
const QUEUE: usize = 32;
/// The nice value of who hashes, compresses and stores.
const NICE: i32 = 10;

/// A piece of a disk that was read.
pub struct Piece {
    /// The disk's number in this run.
    pub disk: usize,
    /// Where: whole blocks, but for the disk's end.
    pub extent: Extent,
    /// Its bytes; none when all of them are zeros.
    pub data: Option<Box<dyn Deref<Target = [u8]> + Send>>,
}

/// A disk that is copied.
pub struct CopyDisk {
    /// Its key.
    pub key: String,
    /// Its size, bytes.
    pub size: u64,
    /// The base's map, for disks that have one.
    pub base: Option<MapReader>,
    /// The disk's size in the base, bytes; 0 without.
    pub base_size: u64,
}

/// What blocks were proved to hold; a run of more than one block is zero or the same as the base.
pub type Proof = (BlockRun, Content);

/// What a copy came to.
#[derive(Debug, Default)]
pub struct Copied {
    /// By disk: what was proved, in no order.
    pub proofs: Vec<Vec<Proof>>,
    /// Bytes read.
    pub bytes: u64,
    /// Bytes newly stored, compressed.
    pub stored: u64,
    /// The generation of the repository before the first block was looked up.
    pub generation: u64,
}

/// How a copy is made.
#[derive(Debug, Clone, Copy, Default)]
pub struct Manner {
    /// So long the repository may take nothing before `source` is told to stop: whoever waits holds a VM.
    pub patience: Option<Duration>,
    /// There is time: only what processors nobody else wants is used.
    pub quiet: bool,
}

enum Done {
    Block(usize, u64, Encoded),
    Run(usize, BlockRun, Content),
}

/// Copies what `source` hands out and makes it durable, in packs of this session. `source` runs on this thread; it gets a function that takes a
/// piece, and must stop when that says so.
pub fn copy<T>(
    repo: &Repository,
    disks: &[CopyDisk],
    (session, pass): (SessionId, &str),
    progress: &AtomicU64,
    manner: Manner,
    source: impl FnOnce(&mut dyn FnMut(Piece) -> ControlFlow<()>) -> Result<T>,
) -> Result<(T, Copied)> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let (work, pieces) = bounded::<Piece>(QUEUE);
    let (out, results) = bounded::<Result<Vec<Done>>>(QUEUE);
    let read = AtomicU64::new(0);
    let generation = repo.generation()?;
    std::thread::scope(|scope| {
        for _ in 0..workers {
            let (pieces, out) = (pieces.clone(), out.clone());
            scope.spawn(move || {
                give_way(manner.quiet);
                work_on(repo, disks, &pieces, &out);
            });
        }
        drop(pieces);
        drop(out);
        let label = |disk: &str| format!("{session} {disk} {pass}");
        let writer = scope.spawn(move || {
            give_way(manner.quiet);
            write(repo, disks, &label, results)
        });
        let mut give = |piece: Piece| {
            let bytes = piece.extent.length;
            let taken = match manner.patience {
                Some(patience) => work.send_timeout(piece, patience).is_ok(),
                None => work.send(piece).is_ok(),
            };
            // Nobody takes pieces any more: the writer failed, and says why below, or the repository stalls.
            if !taken {
                return ControlFlow::Break(());
            }
            read.fetch_add(bytes, Ordering::Relaxed);
            progress.fetch_add(bytes, Ordering::Relaxed);
            ControlFlow::Continue(())
        };
        let result = source(&mut give);
        drop(work);
        let copied = match writer.join() {
            Ok(copied) => copied,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        // What was stored before the source failed is worth keeping only as data, not as proofs.
        let mut copied = copied?;
        copied.bytes = read.load(Ordering::Relaxed);
        copied.generation = generation;
        Ok((result?, copied))
    })
}

/// Others who want the processor or the disk come first: on Linux a nice value is a thread's own, and its I/O priority follows
/// from it. A quiet one gets what nobody else wants: whoever wakes up takes its processor at once (`sched(7)`, `SCHED_IDLE`), and
/// its I/O is of the idle class (`ioprio_set(2)`). Who talks to a VM is never such a thread.
fn give_way(quiet: bool) {
    let idle = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
    let is_idle =
        || set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, idle).is_ok();
    if !(quiet && is_idle()) {
        rustix::process::nice(NICE).ok();
    }
}

fn work_on(
    repo: &Repository,
    disks: &[CopyDisk],
    pieces: &Receiver<Piece>,
    out: &Sender<Result<Vec<Done>>>,
) {
    for piece in pieces {
        let done = match &piece.data {
            Some(data) => encode(repo, disks, &piece, data),
            None => zeros(repo, disks, &piece),
        };
        // Its buffer is read into again while the results wait.
        drop(piece);
        let failed = done.is_err();
        if out.send(done).is_err() || failed {
            return;
        }
    }
}

fn encode(repo: &Repository, disks: &[CopyDisk], piece: &Piece, data: &[u8]) -> Result<Vec<Done>> {
    let block_size = repo.block_size();
    let disk = &disks[piece.disk];
    let first = piece.extent.offset / block_size.bytes();
    let blocks = (first..).zip(data.chunks(block_size.as_usize()));
    blocks
        .map(|(block, plain)| {
            encode_block(repo, disk, piece.disk, block, plain)
                .with_context(|| format!("block {block} of disk {}", disk.key))
        })
        .collect()
}

fn encode_block(
    repo: &Repository,
    disk: &CopyDisk,
    number: usize,
    block: u64,
    plain: &[u8],
) -> Result<Done> {
    let base = base_entry(disk, block, repo.block_size())?;
    let expected = if let Entry::Data(id) = base {
        Some(id)
    } else {
        None
    };
    let encoded = repo.encode_expecting(plain, expected)?;
    Ok(match (&encoded, base) {
        (Encoded::Zero, Entry::Zero) => same(number, block),
        (Encoded::Known(id), Entry::Data(base)) if *id == base => same(number, block),
        _ => Done::Block(number, block, encoded),
    })
}

fn same(disk: usize, block: u64) -> Done {
    Done::Run(
        disk,
        BlockRun {
            first: block,
            count: 1,
        },
        Content::Same,
    )
}

/// What the base holds at a block. Where the sizes differ, a block that is not whole in both has nothing to be the same
/// as.
pub fn base_entry(disk: &CopyDisk, block: u64, block_size: BlockSize) -> Result<Entry> {
    let common = disk.base_size.min(disk.size);
    if disk.base_size != disk.size && block >= common / block_size.bytes() {
        return Ok(Entry::Unset);
    }
    match &disk.base {
        Some(base) => Ok(base.get(block)?),
        None => Ok(Entry::Unset),
    }
}

/// A run of zeros is one proof, whatever its length, where there is no base to compare with.
fn zeros(repo: &Repository, disks: &[CopyDisk], piece: &Piece) -> Result<Vec<Done>> {
    let run = repo.block_size().cover(piece.extent);
    let disk = &disks[piece.disk];
    let mut proofs = Vec::new();
    if disk.base.is_none() {
        proofs.push((run, Content::Zero));
    } else {
        for block in run.first..run.end() {
            let content = match base_entry(disk, block, repo.block_size())? {
                Entry::Zero => Content::Same,
                _ => Content::Zero,
            };
            let one = BlockRun {
                first: block,
                count: 1,
            };
            push(&mut proofs, one, content);
        }
    }
    let done = proofs
        .into_iter()
        .map(|(run, content)| Done::Run(piece.disk, run, content));
    Ok(done.collect())
}

fn write(
    repo: &Repository,
    disks: &[CopyDisk],
    label: &dyn Fn(&str) -> String,
    results: Receiver<Result<Vec<Done>>>,
) -> Result<Copied> {
    let mut packs: Vec<PackWriter> = disks
        .iter()
        .map(|disk| repo.pack_writer(&label(&disk.key)))
        .collect();
    let mut copied = Copied {
        proofs: disks.iter().map(|_| Vec::new()).collect(),
        ..Copied::default()
    };
    for piece in results {
        for done in piece? {
            match done {
                Done::Run(disk, run, content) => push(&mut copied.proofs[disk], run, content),
                Done::Block(disk, block, encoded) => {
                    let content = packs[disk].put(encoded)?;
                    let one = BlockRun {
                        first: block,
                        count: 1,
                    };
                    push(&mut copied.proofs[disk], one, content);
                }
            }
        }
    }
    for pack in packs.drain(..) {
        copied.stored += pack.seal()?.stored_bytes;
    }
    Ok(copied)
}

/// Joins a run to the one before it where both say the same of neighbours.
fn push(proofs: &mut Vec<Proof>, run: BlockRun, content: Content) {
    if let Some((last, before)) = proofs.last_mut()
        && *before == content
        && !matches!(content, Content::Data(_))
        && last.end() == run.first
    {
        last.count += run.count;
        return;
    }
    proofs.push((run, content));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quiet_thread_is_idle_and_others_are_nice() {
        let seen = |quiet| {
            let thread = std::thread::spawn(move || {
                give_way(quiet);
                let nice = rustix::process::getpriority_process(None).unwrap();
                (thread_priority::thread_schedule_policy().unwrap(), nice)
            });
            thread.join().unwrap()
        };
        let normal = |policy| ThreadSchedulePolicy::Normal(policy);
        assert_eq!(seen(true).0, normal(NormalThreadSchedulePolicy::Idle));
        let (policy, nice) = seen(false);
        assert_eq!(policy, normal(NormalThreadSchedulePolicy::Other));
        assert!(nice >= NICE, "{nice}");
    }
}
