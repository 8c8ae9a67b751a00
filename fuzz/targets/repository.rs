//! One object of a repository is hostile: as it is, or under right seals. Everything that reads a repository runs over it;
//! nothing may panic, hang, or hand out a disk that is not the one of the point.
#![no_main]

use std::io;
use std::sync::{Arc, OnceLock};

use forerun::image::{BlockSink, Item, Repository, Session, VerifyOptions};
use forerun_fuzz::{Memory, Objects, golden, seal_binary, seal_json};
use libfuzzer_sys::fuzz_target;

struct Disk(Vec<u8>);

impl BlockSink for Disk {
    fn data(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let place = self.0.get_mut(start..start + data.len());
        place
            .ok_or(io::ErrorKind::InvalidInput)?
            .copy_from_slice(data);
        Ok(())
    }

    fn zero(&mut self, offset: u64, length: u64) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let end = start.saturating_add(usize::try_from(length).map_err(io::Error::other)?);
        self.0
            .get_mut(start..end)
            .ok_or(io::ErrorKind::InvalidInput)?
            .fill(0);
        Ok(())
    }
}

/// The points' disks as they are.
fn disks(repo: &Repository) -> Vec<(String, Vec<u8>)> {
    let points = repo
        .points()
        .map(|points| points.points)
        .unwrap_or_default();
    let mut read = Vec::new();
    for point in &points {
        for disk in &point.disks {
            let mut content = Disk(vec![0xee; 3 * (64 << 10) + 40]);
            if repo.read_disk(disk, 1, &mut content).is_ok() {
                read.push((point.id.to_string(), content.0));
            }
        }
    }
    read
}

fn sound() -> &'static [(String, Vec<u8>)] {
    static SOUND: OnceLock<Vec<(String, Vec<u8>)>> = OnceLock::new();
    SOUND.get_or_init(|| {
        let repo =
            Repository::open_store(Arc::new(Memory::new(golden().clone()))).expect("it opens");
        let disks = disks(&repo);
        assert_eq!(disks.len(), 2, "the golden repository has two points");
        disks
    })
}

fn kind_of(name: &str) -> &'static str {
    match name.split('/').next() {
        Some("config") => "config",
        Some("points") => "point",
        _ if name.ends_with("-header") => "session",
        _ => "record",
    }
}

/// The hostile object, and whether it says by itself what a point is.
fn hostile(name: &str, original: &[u8], how: u8, bytes: &[u8]) -> Option<Vec<u8>> {
    match how % 4 {
        0 => Some(bytes.to_vec()),
        1 => Some(seal_json(kind_of(name), bytes)),
        2 => {
            let (length, rest) = bytes.split_at_checked(2)?;
            let footer = usize::from(u16::from_le_bytes([length[0], length[1]])).min(rest.len());
            let (body, footer) = rest.split_at(rest.len() - footer);
            Some(seal_binary(
                original.get(..8)?.try_into().ok()?,
                body,
                footer,
            ))
        }
        // The original with some bytes changed, sealed again.
        _ => {
            let mut changed = original.to_vec();
            let json = original.starts_with(b"forerun ");
            let start = if json {
                original.iter().position(|byte| *byte == b'\n')? + 1
            } else {
                16
            };
            let end = if json {
                changed.len()
            } else {
                changed.len().checked_sub(48)?
            };
            let body = changed.get_mut(start..end)?;
            for change in bytes.chunks_exact(3) {
                let at =
                    usize::from(u16::from_le_bytes([change[0], change[1]])) % body.len().max(1);
                *body.get_mut(at)? ^= change[2];
            }
            let body = body.to_vec();
            if json {
                return Some(seal_json(kind_of(name), &body));
            }
            let length = original.get(original.len() - 48..original.len() - 44)?;
            let footer = u32::from_le_bytes(length.try_into().ok()?) as usize;
            let (body, footer) = body.split_at(body.len().checked_sub(footer)?);
            Some(seal_binary(
                original.get(..8)?.try_into().ok()?,
                body,
                footer,
            ))
        }
    }
}

fn run(data: &[u8]) -> Option<()> {
    let (head, bytes) = data.split_at_checked(2)?;
    let (name, original) = golden().iter().nth(usize::from(head[0]) % golden().len())?;
    let mut objects: Objects = golden().clone();
    objects.insert(name.clone(), hostile(name, original, head[1], bytes)?);
    let repo = Repository::open_store(Arc::new(Memory::new(objects))).ok()?;
    // A point under a right seal says what its disks are; every other object can only be refused.
    if !name.starts_with("points/") && name != "config" {
        for disk in disks(&repo) {
            assert!(
                sound().contains(&disk),
                "{name} changed what point {} restores to",
                disk.0
            );
        }
    } else {
        disks(&repo);
    }
    repo.verify(&VerifyOptions::default()).ok();
    if let Ok(sessions) = Session::list(&repo) {
        for session in &sessions.sessions {
            for item in session.items().unwrap_or_default() {
                if let Item::Segment(segment) = item
                    && let Ok(runs) = session.segment_runs(&segment)
                {
                    runs.take(1 << 16).for_each(drop);
                }
            }
        }
    }
    repo.rebuild_index().ok();
    if !name.starts_with("points/") && name != "config" {
        for disk in disks(&repo) {
            assert!(
                sound().contains(&disk),
                "{name}: an index made anew changed point {}",
                disk.0
            );
        }
    }
    Some(())
}

fuzz_target!(|data: &[u8]| {
    run(data);
});
