//! A repository in a temporary directory, a disk in memory, and backups of it, for the tests of the repository.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]
#![allow(clippy::cast_possible_truncation, reason = "the disks here are small")]
#![allow(clippy::unwrap_used, reason = "tests fail by it")]

pub mod memory;

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use forerun::image::store::Store;
use forerun::image::{
    BlockId, BlockSink, Closed, Content, DiskPoint, Error, InitOptions, Item, Manifest, MapRef,
    PointId, Quiesce, Repository, Secret, SegmentHeader, Session, Target, build_map,
};
use forerun::units::BlockRun;
use serde_json::{Value, json};

/// Bytes of a block.
pub const BLOCK: usize = 64 << 10;

/// The key of the only target.
pub const KEY: &str = "uuid-of-the-vm";

/// A number that looks like chance (splitmix64).
pub fn mixed(number: u64) -> u64 {
    let mut mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// The id of a block that nobody has; they are spread evenly, as hashes are.
pub fn made_up_id(number: u64) -> BlockId {
    let mut bytes = [0; 32];
    for (place, part) in bytes.chunks_mut(8).zip(1_u64..) {
        place.copy_from_slice(&mixed(number.wrapping_mul(4).wrapping_add(part)).to_le_bytes());
    }
    BlockId::from_bytes(bytes)
}

/// The id of a block in a repository that is not encrypted.
pub fn id_of(plain: &[u8]) -> BlockId {
    BlockId::from_bytes(<sha2::Sha256 as sha2::Digest>::digest(plain).into())
}

/// A repository and a disk.
pub struct Bench {
    /// Where the repository is.
    pub directory: Option<tempfile::TempDir>,
    /// The repository.
    pub repo: Repository,
    /// The disk's content.
    pub disk: Vec<u8>,
    /// Blocks written since the last backup.
    pub dirty: BTreeSet<u64>,
    /// The last backup.
    pub last: Option<Manifest>,
}

impl Bench {
    /// A new repository and a disk of zeros, all of it dirty.
    pub fn new(size: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = InitOptions::default();
        let repo = Repository::init(&directory.path().join("repo"), options).unwrap();
        Self::with(Some(directory), repo, size)
    }

    /// The same, encrypted: [`secret`] opens it.
    pub fn encrypted(size: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("repo");
        let repo =
            Repository::init_encrypted(&path, InitOptions::default(), &secret(), "test").unwrap();
        Self::with(Some(directory), repo, size)
    }

    /// The same without a disk behind it, for tests of many backups.
    pub fn in_memory(size: usize) -> Self {
        let store = memory::Memory::new(memory::Objects::new(), None, memory::Fate::Lost);
        let options = InitOptions::default();
        let repo = Repository::init_store(Arc::new(store), options).unwrap();
        Self::with(None, repo, size)
    }

    fn with(directory: Option<tempfile::TempDir>, repo: Repository, size: usize) -> Self {
        Self {
            directory,
            repo,
            disk: vec![0; size],
            dirty: (0..size.div_ceil(BLOCK) as u64).collect(),
            last: None,
        }
    }

    /// Where the repository is.
    pub fn path(&self) -> PathBuf {
        self.directory.as_ref().unwrap().path().join("repo")
    }

    /// Writes to the disk.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let end = offset + data.len();
        self.disk[offset..end].copy_from_slice(data);
        self.dirty
            .extend((offset / BLOCK) as u64..end.div_ceil(BLOCK) as u64);
    }

    /// Grows the disk by zeros, or cuts it.
    pub fn resize(&mut self, size: usize) {
        let before = self.disk.len();
        self.disk.resize(size, 0);
        let (low, high) = (before.min(size) / BLOCK, before.max(size).div_ceil(BLOCK));
        self.dirty.extend(low as u64..high as u64);
        let end = size.div_ceil(BLOCK) as u64;
        self.dirty.retain(|block| *block < end);
    }

    /// Makes a point of the disk as it is.
    pub fn backup(&mut self) -> Manifest {
        let point = backup(&self.repo, &self.disk, &self.dirty, self.last.as_ref()).unwrap();
        self.dirty.clear();
        self.last = Some(point.clone());
        point
    }

    /// The names of objects.
    pub fn objects(&self, prefix: &str) -> Vec<String> {
        self.repo.store().list(prefix).unwrap()
    }

    /// Builds a map from blocks, in a session of its own.
    pub fn commit_blocks(
        &self,
        base: Option<&MapRef>,
        blocks: &[(u64, Content)],
        size: usize,
    ) -> Result<MapRef, Error> {
        let session = Session::create(&self.repo, "blocks", &Value::Null)?;
        session.append_segment(&segment_header(), blocks)?;
        let segments = segments(&session)?;
        let map = build_map(&self.repo, base, &session, &segments, size as u64);
        session.remove()?;
        map.map(|(map, _)| map)
    }
}

/// The header of all segments here.
pub fn segment_header() -> SegmentHeader {
    SegmentHeader {
        disk: "vda".into(),
        epoch: 1,
        pass: 1,
        read: 0,
        again: 0,
    }
}

/// The segments of a session.
pub fn segments(session: &Session) -> Result<Vec<forerun::image::SegmentRef>, Error> {
    let only_segments = |item| match item {
        Item::Segment(segment) => Some(segment),
        Item::Record(_) => None,
    };
    Ok(session
        .items()?
        .into_iter()
        .filter_map(only_segments)
        .collect())
}

/// Backs up the dirty blocks of a disk: goes on with a session that is there, publishes a point, removes the session.
pub fn backup(
    repo: &Repository,
    disk: &[u8],
    dirty: &BTreeSet<u64>,
    last: Option<&Manifest>,
) -> Result<Manifest, Error> {
    backup_of(repo, KEY, disk, dirty, last)
}

/// The same of a target.
pub fn backup_of(
    repo: &Repository,
    key: &str,
    disk: &[u8],
    dirty: &BTreeSet<u64>,
    last: Option<&Manifest>,
) -> Result<Manifest, Error> {
    let session = match Session::find(repo, key)? {
        Some(session) => session,
        None => Session::create(repo, key, &json!({"base": last.map(|last| last.id)}))?,
    };
    session.settle()?;
    let base = last.map(|last| &last.disks[0].map);
    let bases: Vec<MapRef> = base.into_iter().cloned().collect();
    session.append_with_roots(&json!({"intent": "copy"}), &bases)?;
    if let Some(last) = last
        && !repo.has_point(last.id)?
    {
        return Err(Error::NotFound {
            object: format!("the base {}", last.id),
        });
    }
    let middle = dirty.len() / 2;
    for half in [
        dirty.iter().skip(middle).copied().collect::<Vec<u64>>(),
        dirty.iter().take(middle).copied().collect(),
    ] {
        while !half.is_empty() {
            match copy(repo, &session, disk, &half) {
                Err(Error::Condemned { .. }) => {}
                done => {
                    done?;
                    break;
                }
            }
        }
    }
    let size = disk.len() as u64;
    let (map, _) = build_map(repo, base, &session, &segments(&session)?, size)?;
    let manifest = manifest_of(key, map, &session, last)?;
    session.publish(&manifest)?;
    session.remove()?;
    Ok(manifest)
}

/// Stores blocks of a disk and proves them.
pub fn copy(repo: &Repository, session: &Session, disk: &[u8], dirty: &[u64]) -> Result<(), Error> {
    let since = repo.generation()?;
    let mut writer = repo.pack_writer(&format!("{} vda 1", session.id()));
    let mut proofs = Vec::new();
    for block in dirty {
        let start = *block as usize * BLOCK;
        let plain = &disk[start..disk.len().min(start + BLOCK)];
        let one = BlockRun {
            first: *block,
            count: 1,
        };
        proofs.push((one, writer.put(repo.encode(plain)?)?));
    }
    writer.seal()?;
    session.prove(&segment_header(), &proofs, since).map(drop)
}

/// A manifest of one disk.
pub fn manifest(
    map: MapRef,
    session: &Session,
    last: Option<&Manifest>,
) -> Result<Manifest, Error> {
    manifest_of(KEY, map, session, last)
}

/// A manifest of one disk of a target.
pub fn manifest_of(
    key: &str,
    map: MapRef,
    session: &Session,
    last: Option<&Manifest>,
) -> Result<Manifest, Error> {
    let seconds = last.map_or(1_700_000_000, |last| last.instant.as_second() + 60);
    Ok(Manifest {
        id: PointId::random()?,
        target: Target {
            key: key.into(),
            spellings: vec!["web".into()],
        },
        instant: jiff::Timestamp::from_second(seconds).unwrap(),
        utc_offset: 3600,
        forerun: "0.1.0".into(),
        parent: last.map(|last| last.id),
        session: session.id(),
        freeze: "fleece".into(),
        quiesce: Quiesce::CrashConsistent,
        disks: vec![DiskPoint {
            key: "vda".into(),
            device: "virtio0".into(),
            node: "node0".into(),
            format: "raw".into(),
            size: map.size,
            map,
            tracking: None,
            rescanned: None,
            file: None,
        }],
        machine: json!({"xml": "<domain/>"}),
        statistics: json!({"residual": 0}),
        retired_bitmaps: vec![],
        origin: None,
    })
}

/// A disk in memory that notices bytes that come twice or never.
pub struct Memory {
    bytes: Vec<u8>,
    written: u64,
}

impl Memory {
    fn put(&mut self, offset: u64, length: u64, fill: impl FnOnce(&mut [u8])) -> io::Result<()> {
        let place = self
            .bytes
            .get_mut(offset as usize..(offset + length) as usize)
            .ok_or_else(|| io::Error::other("beyond the end"))?;
        fill(place);
        self.written += length;
        Ok(())
    }
}

impl BlockSink for Memory {
    fn data(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.put(offset, data.len() as u64, |place| {
            place.copy_from_slice(data);
        })
    }

    fn zero(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.put(offset, length, |place| place.fill(0))
    }
}

/// The content of a disk of a point.
pub fn restore(repo: &Repository, disk: &DiskPoint) -> Result<Vec<u8>, Error> {
    let mut memory = Memory {
        bytes: vec![0xee; disk.size as usize],
        written: 0,
    };
    repo.read_disk(disk, 2, &mut memory)?;
    assert_eq!(memory.written, disk.size);
    Ok(memory.bytes)
}

/// SHA-256 in hex.
pub fn sha256(bytes: impl AsRef<[u8]>) -> String {
    let digest = <sha2::Sha256 as sha2::Digest>::digest(bytes);
    forerun::image::Digest::from_bytes(digest.into()).to_string()
}

/// The key file that opens the encrypted repositories here.
pub fn key_file() -> Vec<u8> {
    (0..32).map(|byte: u8| byte.wrapping_mul(37)).collect()
}

/// What opens them.
pub fn secret() -> Secret {
    Secret::key_file(key_file().into()).unwrap()
}

/// A repository of no objects in a store.
pub fn init_store(store: Arc<dyn Store>, encrypted: bool) -> Repository {
    let options = InitOptions::default();
    if encrypted {
        Repository::init_encrypted_store(store, options, &secret(), "test").unwrap()
    } else {
        Repository::init_store(store, options).unwrap()
    }
}

/// Opens the repository in a store, encrypted or not.
pub fn open_store(store: Arc<dyn Store>) -> Result<Repository, Error> {
    let closed = Closed::in_store(store)?;
    let secret = closed.is_encrypted().then(secret);
    closed.open(secret.as_ref())
}
