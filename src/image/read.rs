//! Reading: single blocks, and whole disks with parallel fetching, decompression and re-hashing. Nothing is handed out that
//! does not hash to the id that the map names.
//!
//! ```text
//! map runs -> batches of neighbouring blocks -> workers: locate, read packs, decode, hash -> the caller's sink
//! ```
//!
//! A few batches are on their way at a time; that bounds the memory and by how much the order is disturbed.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::block::{Location, decode_entry};
use super::bytes::{narrow, wide};
use super::error::{Error, Result};
use super::ids::BlockId;
use super::locate::Locator;
use super::manifest::DiskPoint;
use super::map::{MapReader, MapRuns, Run, RunContent};
use super::pack::{self, entry_length};
use super::quarantine::Bad;
use super::repo::Repository;
use crate::units::BlockSize;

/// Plain bytes of a batch at most.
const BATCH: u64 = 2 << 20;
/// Batches on their way for each worker.
const IN_FLIGHT: usize = 3;
/// Entries that lie so near each other in a pack are read at once.
const GAP: u64 = 64 << 10;
/// Bytes of one read of a pack at most.
const READ: u64 = 4 << 20;

/// How often a block is looked for again when its pack is gone.
const READ_TRIES: usize = 3;

/// Where the content of a disk goes. Every byte of the disk comes exactly once, not strictly in order.
pub trait BlockSink {
    /// Data.
    fn data(&mut self, offset: u64, data: &[u8]) -> std::io::Result<()>;
    /// Zeros, which must replace whatever is there.
    fn zero(&mut self, offset: u64, length: u64) -> std::io::Result<()>;
}

impl Repository {
    /// A stored block, proved by its id, from whichever of its copies is sound.
    pub fn read_block(&self, id: BlockId) -> Result<Vec<u8>> {
        let mut tries = 1;
        loop {
            match self.read_any(id) {
                // Its pack was repacked meanwhile.
                Err(error) if error.is_not_found() && tries < READ_TRIES => tries += 1,
                other => return other.map_err(Error::missing_is_corrupt),
            }
        }
    }

    /// A block from the first of its locations that has it. [`Error::NotFound`] when a pack of them is gone.
    fn read_any(&self, id: BlockId) -> Result<Vec<u8>> {
        let first = self.index().locate_stored(id)?;
        let mut failure = match self.read_at(id, &first) {
            Ok(plain) => return Ok(plain),
            Err(error) => error,
        };
        for (location, _) in self.index().locate_all(id)? {
            match self.read_at(id, &location) {
                Ok(plain) => return Ok(plain),
                Err(error) if error.is_not_found() => {
                    self.index().refresh_as_gone(location.pack)?;
                    failure = error;
                }
                Err(_) => {}
            }
        }
        Err(failure)
    }

    /// A block from one of its locations.
    fn read_at(&self, id: BlockId, location: &Location) -> Result<Vec<u8>> {
        let object = pack::name(location.pack);
        let mut entry = vec![0; entry_length(location)];
        self.store()
            .get_range(&object, u64::from(location.offset), &mut entry)?;
        let mut plain = vec![0; narrow(u64::from(location.plain))];
        decode_entry(self.hasher(), &entry, id, &mut plain)
            .map_err(|damage| Error::corrupt(object, format!("block {id}: {}", damage.0)))?;
        Ok(plain)
    }

    /// Stored blocks that lie next to each other on a disk, `length` bytes together, each proved by its id. All but the last
    /// are whole blocks.
    pub fn read_blocks(&self, ids: Vec<BlockId>, length: usize) -> Result<Vec<u8>> {
        let mut batch = Batch {
            offset: 0,
            plain: vec![0; length],
            ids,
            block_size: self.block_size(),
        };
        let found = Mutex::new(Vec::new());
        let fetched = Fetcher::new(self, &found).fetch(&mut batch);
        self.note_bad(found);
        fetched?;
        Ok(batch.plain)
    }

    /// Puts what a reader found bad into quarantine, where that can be written.
    fn note_bad(&self, found: Mutex<Vec<Bad>>) {
        let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = self.quarantine(&found) {
            tracing::warn!(%error, "{} bad blocks are not in quarantine", found.len());
        }
    }

    /// Reads a whole disk of a point with `threads` workers.
    pub fn read_disk(
        &self,
        disk: &DiskPoint,
        threads: usize,
        sink: &mut dyn BlockSink,
    ) -> Result<()> {
        if disk.size != disk.map.size {
            return Err(Error::corrupt(
                format!("the map of {}", disk.key),
                format!(
                    "it is of {} bytes, the disk has {}",
                    disk.map.size, disk.size
                ),
            ));
        }
        let map = MapReader::open(self, &disk.map)?;
        let plan = Plan {
            runs: map.runs(),
            rest: None,
            size: disk.map.size,
            block_size: self.block_size(),
        };
        let threads = threads.max(1);
        let (jobs, work) = bounded::<Batch>(threads * IN_FLIGHT);
        let (done, results) = bounded::<Result<Batch>>(threads * IN_FLIGHT);
        let found = Mutex::new(Vec::new());
        let read = std::thread::scope(|scope| {
            for _ in 0..threads {
                let (work, done, found) = (work.clone(), done.clone(), &found);
                scope.spawn(move || Fetcher::new(self, found).fetch_all(&work, &done));
            }
            drop((work, done));
            let disk = &*disk.key;
            let limit = threads * IN_FLIGHT;
            let pumped = pump(plan, &jobs, &results, limit, &mut Output { sink, disk });
            // This is what ends the workers.
            drop((jobs, results));
            pumped
        });
        self.note_bad(found);
        read
    }
}

/// The caller's sink, with the disk's name for errors.
struct Output<'a> {
    sink: &'a mut dyn BlockSink,
    disk: &'a str,
}

impl Output<'_> {
    fn failed(&self, offset: u64, length: u64, source: std::io::Error) -> Error {
        let object = format!("{length} bytes at offset {offset:#x} of {}", self.disk);
        match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Error::TargetFull { object, source }
            }
            _ => Error::Io {
                action: "write",
                object,
                source,
            },
        }
    }
}

/// Feeds the workers and hands on what they did, on the caller's thread.
fn pump(
    mut plan: Plan,
    jobs: &Sender<Batch>,
    results: &Receiver<Result<Batch>>,
    limit: usize,
    output: &mut Output<'_>,
) -> Result<()> {
    let mut in_flight = 0;
    let mut spare = Vec::new();
    let gone = || Error::Invalid("a restore worker ended early".into());
    loop {
        while in_flight < limit {
            match plan.next_step(&mut spare)? {
                Some(Step::Zero { offset, length }) => output
                    .sink
                    .zero(offset, length)
                    .map_err(|error| output.failed(offset, length, error))?,
                Some(Step::Fetch(batch)) => {
                    jobs.send(batch).map_err(|_| gone())?;
                    in_flight += 1;
                }
                None if in_flight == 0 => return Ok(()),
                None => break,
            }
        }
        let batch = results.recv().map_err(|_| gone())??;
        in_flight -= 1;
        output
            .sink
            .data(batch.offset, &batch.plain)
            .map_err(|error| output.failed(batch.offset, wide(batch.plain.len()), error))?;
        spare.push(batch.plain);
    }
}

/// What comes next of a disk.
enum Step {
    Zero { offset: u64, length: u64 },
    Fetch(Batch),
}

/// Neighbouring blocks of data.
struct Batch {
    offset: u64,
    /// Their content, once it is fetched; from the beginning of this length.
    plain: Vec<u8>,
    ids: Vec<BlockId>,
    block_size: BlockSize,
}

/// The disk cut into steps.
struct Plan {
    runs: MapRuns,
    rest: Option<Run>,
    size: u64,
    block_size: BlockSize,
}

impl Plan {
    fn next_run(&mut self) -> Result<Option<Run>> {
        match self.rest.take() {
            Some(run) => Ok(Some(run)),
            None => self.runs.next().transpose(),
        }
    }

    fn next_step(&mut self, spare: &mut Vec<Vec<u8>>) -> Result<Option<Step>> {
        let Some(run) = self.next_run()? else {
            return Ok(None);
        };
        let extent = self.block_size.run_extent(run.blocks(), self.size);
        if !matches!(run.content, RunContent::Data(_)) {
            return Ok(Some(Step::Zero {
                offset: extent.offset,
                length: extent.length,
            }));
        }
        let limit = BATCH / self.block_size.bytes();
        let mut ids = Vec::with_capacity(narrow(limit));
        let mut next = Some(run);
        let mut end = extent.offset;
        while let Some(mut run) = next.take() {
            let room = limit.saturating_sub(wide(ids.len()));
            if room == 0 || !matches!(run.content, RunContent::Data(_)) {
                self.rest = Some(run);
                break;
            }
            let taken = if run.count() > room {
                let taken = run.split_before(run.first.saturating_add(room));
                self.rest = Some(run);
                taken
            } else {
                run
            };
            let extent = self.block_size.run_extent(taken.blocks(), self.size);
            end = extent.end();
            if let RunContent::Data(more) = &taken.content {
                ids.extend_from_slice(more.as_slice());
            }
            if self.rest.is_some() {
                break;
            }
            next = self.runs.next().transpose()?;
        }
        let mut plain = spare.pop().unwrap_or_default();
        plain.resize(narrow(end.saturating_sub(extent.offset)), 0);
        Ok(Some(Step::Fetch(Batch {
            offset: extent.offset,
            plain,
            ids,
            block_size: self.block_size,
        })))
    }
}

/// A worker.
struct Fetcher<'a> {
    repo: &'a Repository,
    locator: Locator<'a>,
    buffer: Vec<u8>,
    /// Blocks that are bad where they are stored.
    found: &'a Mutex<Vec<Bad>>,
}

/// A block to be read and where its plain bytes go.
struct Wanted<'a> {
    id: BlockId,
    location: Location,
    plain: &'a mut [u8],
}

impl Wanted<'_> {
    fn wrong_length(&self, length: usize) -> Error {
        Error::corrupt(
            format!("block {}", self.id),
            format!("it has {length} bytes, the disk {}", self.plain.len()),
        )
    }
}

impl<'a> Fetcher<'a> {
    fn new(repo: &'a Repository, found: &'a Mutex<Vec<Bad>>) -> Self {
        Self {
            repo,
            locator: Locator::new(repo),
            buffer: Vec::new(),
            found,
        }
    }

    fn fetch_all(mut self, work: &Receiver<Batch>, done: &Sender<Result<Batch>>) {
        for mut batch in work {
            // A panic must come to the caller as an error: it would wait for this batch for ever.
            let fetch = AssertUnwindSafe(|| self.fetch(&mut batch));
            let fetched = catch_unwind(fetch)
                .unwrap_or_else(|_| Err(Error::Invalid("a restore worker panicked".into())));
            if done.send(fetched.map(|()| batch)).is_err() {
                return;
            }
        }
    }

    fn fetch(&mut self, batch: &mut Batch) -> Result<()> {
        let mut wanted = Vec::with_capacity(batch.ids.len());
        let places = batch.plain.chunks_mut(batch.block_size.as_usize());
        for (id, plain) in batch.ids.iter().zip(places) {
            let location = self.locator.locate(*id)?;
            let block = Wanted {
                id: *id,
                location,
                plain,
            };
            let length = narrow(u64::from(location.plain));
            if block.plain.len() != length {
                return Err(block.wrong_length(length));
            }
            wanted.push(block);
        }
        wanted.sort_unstable_by_key(|block| (block.location.pack, block.location.offset));
        let mut rest: VecDeque<Wanted<'_>> = wanted.into();
        while let Some(first) = rest.pop_front() {
            let mut group = vec![first];
            while let Some(next) = rest.pop_front() {
                if goes_with(&group, &next) {
                    group.push(next);
                } else {
                    rest.push_front(next);
                    break;
                }
            }
            self.read_group(group)?;
        }
        Ok(())
    }

    fn read_group(&mut self, group: Vec<Wanted<'_>>) -> Result<()> {
        let Some(first) = group.first() else {
            return Ok(());
        };
        let object = pack::name(first.location.pack);
        let start = u64::from(first.location.offset);
        let end = group
            .iter()
            .map(|block| block.location.end())
            .max()
            .unwrap_or(start);
        let length = narrow(end.saturating_sub(start));
        if self.buffer.len() < length {
            self.buffer.resize(length, 0);
        }
        let bytes = &mut self.buffer[..length];
        // Each block may be somewhere else, too. Who finds a pack gone cannot tell whether it is lost.
        let (bytes, is_there): (&[u8], _) = match self.repo.store().get_range(&object, start, bytes)
        {
            Ok(()) => (bytes, true),
            Err(Error::NotFound { .. }) => (&[], false),
            Err(Error::Corrupt { .. }) => (&[], true),
            Err(error) => return Err(error),
        };
        for block in group {
            let skip = narrow(u64::from(block.location.offset).saturating_sub(start));
            let entry = bytes.get(skip..).unwrap_or_default();
            if let Err(damage) = decode_entry(self.repo.hasher(), entry, block.id, block.plain) {
                if is_there {
                    let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
                    found.push(Bad {
                        id: block.id,
                        pack: block.location.pack,
                        what: damage.0.to_owned(),
                    });
                }
                let sound = self.repo.read_block(block.id)?;
                if sound.len() != block.plain.len() {
                    return Err(block.wrong_length(sound.len()));
                }
                block.plain.copy_from_slice(&sound);
            }
        }
        Ok(())
    }
}

/// Whether a block is read at once with a group that lies before it in its pack.
fn goes_with(group: &[Wanted<'_>], next: &Wanted<'_>) -> bool {
    let (Some(first), Some(last)) = (group.first(), group.last()) else {
        return false;
    };
    let start = u64::from(first.location.offset);
    let at = u64::from(next.location.offset);
    next.location.pack == first.location.pack
        && at <= last.location.end().saturating_add(GAP)
        && next.location.end().saturating_sub(start) <= READ
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::block::NewBlock;
    use super::super::codec::Compression;
    use super::super::ids::ObjectId;
    use super::super::memory::{Fate, Memory, Objects};
    use super::super::quarantine::{Bad, Quarantine};
    use super::super::repo::{Encoded, InitOptions};
    use super::super::store::Store;
    use super::*;

    fn repository() -> (Memory, Repository) {
        let store = Memory::new(Objects::new(), None, Fate::Lost);
        let options = InitOptions::default();
        let repo = Repository::init_store(Arc::new(store.clone()), options).unwrap();
        (store, repo)
    }

    /// Stores a block whatever the index says; gives where.
    fn store_again(repo: &Repository, plain: &[u8]) -> Location {
        let id = BlockId::of(plain);
        let before = repo.index().locate_all(id).unwrap();
        let block = NewBlock::encode(id, plain, Compression::default()).unwrap();
        let mut writer = repo.pack_writer("a test");
        writer.put(Encoded::New(block)).unwrap();
        writer.seal().unwrap();
        let after = repo.index().locate_all(id).unwrap();
        assert_eq!(after.len(), before.len() + 1);
        let new = after.into_iter().find(|found| !before.contains(found));
        new.unwrap().0
    }

    fn damage(store: &Memory, pack: ObjectId) {
        let name = pack::name(pack);
        let mut bytes = store.get(&name).unwrap();
        bytes[70] ^= 1;
        store.delete(std::slice::from_ref(&name)).unwrap();
        store.put(&name, &bytes).unwrap();
    }

    #[test]
    fn a_block_is_read_from_whichever_copy_is_sound() {
        let (store, repo) = repository();
        let plain = vec![5; 1000];
        let id = BlockId::of(&plain);
        let copies = [store_again(&repo, &plain), store_again(&repo, &plain)];
        for (bad, other) in [(0, 1), (1, 0)] {
            damage(&store, copies[bad].pack);
            assert_eq!(repo.read_block(id).unwrap(), plain);
            damage(&store, copies[other].pack);
            let error = repo.read_block(id).unwrap_err();
            assert!(error.is_corrupt(), "{error}");
            // The second flip of the same bit heals.
            for copy in &copies {
                damage(&store, copy.pack);
            }
            assert_eq!(repo.read_block(id).unwrap(), plain);
        }
    }

    #[test]
    fn a_block_is_found_where_its_pack_was_repacked_to() {
        let (store, repo) = repository();
        let plain = vec![5; 1000];
        let id = BlockId::of(&plain);
        let old = store_again(&repo, &plain);
        let reader = Repository::open_store(Arc::new(store.clone())).unwrap();
        assert_eq!(reader.index().locate_stored(id).unwrap(), old);
        let new = store_again(&repo, &plain);
        store.delete(&[pack::name(old.pack)]).unwrap();
        // Before and after the index was rewritten.
        assert_eq!(reader.read_block(id).unwrap(), plain);
        repo.index().rewrite_without(&[old.pack].into()).unwrap();
        assert_eq!(reader.read_block(id).unwrap(), plain);
        assert_eq!(repo.index().locate_all(id).unwrap(), [(new, false)]);
        store.delete(&[pack::name(new.pack)]).unwrap();
        let error = reader.read_block(id).unwrap_err();
        assert!(error.to_string().ends_with("it is missing"), "{error}");
    }

    #[test]
    fn a_block_that_was_found_bad_is_stored_anew_although_it_is_expected() {
        let (store, repo) = repository();
        let plain = vec![5; 1000];
        let id = BlockId::of(&plain);
        let bad = store_again(&repo, &plain);
        let known = |repo: &Repository| {
            let encoded = repo.encode_expecting(&plain, Some(id)).unwrap();
            matches!(encoded, Encoded::Known(_))
        };
        assert!(known(&repo));
        let found = Bad {
            id,
            pack: bad.pack,
            what: "a test".into(),
        };
        Quarantine::add(&store, &[found]).unwrap();
        repo.index().refresh().unwrap();
        assert!(!known(&repo));
        let sound = store_again(&repo, &plain);
        assert!(known(&repo));
        assert_eq!(repo.index().locate_stored(id).unwrap(), sound);
    }
}
