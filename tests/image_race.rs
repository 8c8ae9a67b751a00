//! Real processes on one directory: writers, forgets, prunes and readers at once, some killed at random. Every point that can be seen
//! restores exactly, during and at the end. A disk says itself what it must hold, so every restored one can be checked.
//!
//! `FORERUN_RACE_SECONDS` asks for more than the default.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by it, and the disks here are small"
)]

mod image_common;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use forerun::clock::{self, Deadline};
use forerun::image::{
    Error, InitOptions, Manifest, PruneOptions, Repository, Session, VerifyOptions,
};
use image_common::{BLOCK, backup_of, restore};

const ROLE: &str = "FORERUN_TEST_ROLE";
const REPOSITORY: &str = "FORERUN_TEST_REPOSITORY";
const ROLES: [&str; 7] = ["a", "b", "c", "forget", "prune", "prune", "read"];
const BLOCKS: usize = 6;

fn below(end: usize) -> usize {
    let id = forerun::image::PointId::random().unwrap();
    let bytes = id.as_bytes()[..4].try_into().unwrap();
    u32::from_le_bytes(bytes) as usize % end
}

/// Blocks of few values, and at the end a short one that names them.
fn disk(values: [u8; BLOCKS]) -> Vec<u8> {
    let blocks = values.iter().flat_map(|value| vec![*value; BLOCK]);
    blocks.chain(values).collect()
}

fn check(content: &[u8]) {
    let values: [u8; BLOCKS] = content[BLOCKS * BLOCK..].try_into().unwrap();
    assert!(
        content == disk(values),
        "a restored disk is not one that was"
    );
}

fn may_happen(error: &Error) -> bool {
    matches!(
        error,
        Error::Busy { .. } | Error::NotFound { .. } | Error::Exists { .. }
    )
}

fn write(repo: &Repository, key: &str) -> Result<(), Error> {
    let points = repo.points()?.points;
    if let Some(session) = Session::find(repo, key)?
        && points.iter().any(|point| point.session == session.id())
    {
        return session.remove();
    }
    let last: Option<Manifest> = points.into_iter().rfind(|point| point.target.key == key);
    let values = std::array::from_fn(|_| below(12) as u8 + 1);
    let all = (0..=BLOCKS as u64).collect();
    match backup_of(repo, key, &disk(values), &all, last.as_ref()) {
        // Its base was forgotten: the next run begins without.
        Err(Error::NotFound { .. }) => Session::find(repo, key)?.map_or(Ok(()), Session::remove),
        done => done.map(drop),
    }
}

fn forget(repo: &Repository) -> Result<(), Error> {
    let points = repo.points()?.points;
    if points.len() > 4 {
        let chosen = below(points.len());
        repo.withdraw(points[chosen].id)?;
    }
    clock::sleep(Duration::from_millis(10));
    Ok(())
}

fn read(repo: &Repository) -> Result<(), Error> {
    let points = repo.points()?.points;
    if points.is_empty() {
        return Ok(());
    }
    let point = &points[below(points.len())];
    let _lease = repo.lease(&[point], "a test that reads")?;
    check(&restore(repo, &point.disks[0])?);
    Ok(())
}

/// One of the processes; it is killed, or ends with its parent's deadline.
#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let path = std::env::var(REPOSITORY).unwrap();
    let ends = Deadline::after(Duration::from_secs(20));
    while !ends.passed() {
        let repo = Repository::open(Path::new(&path)).unwrap();
        let done = match &*role {
            "forget" => forget(&repo),
            "prune" => repo
                .prune(&PruneOptions::default(), &|_, _, _| ())
                .map(drop),
            "read" => read(&repo),
            key => write(&repo, key),
        };
        match done {
            Err(error) if !may_happen(&error) => panic!("{role}: {error}"),
            _ => {}
        }
    }
}

fn spawn(role: &str, path: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env(ROLE, role)
        .env(REPOSITORY, path)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn many_processes_on_one_repository_lose_nothing() {
    let seconds = std::env::var("FORERUN_RACE_SECONDS").ok();
    let seconds = seconds.and_then(|text| text.parse().ok()).unwrap_or(6);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("repo");
    Repository::init(&path, InitOptions::default()).unwrap();
    let mut children: Vec<Child> = ROLES.iter().map(|role| spawn(role, &path)).collect();
    let ends = Deadline::after(Duration::from_secs(seconds));
    let mut killed = 0;
    while !ends.passed() {
        clock::sleep(Duration::from_millis(below(100) as u64 + 20));
        let chosen = below(ROLES.len());
        children[chosen].kill().unwrap();
        let status = children[chosen].wait().unwrap();
        assert!(
            status.signal() == Some(9) || status.success(),
            "{}: {status}",
            ROLES[chosen]
        );
        children[chosen] = spawn(ROLES[chosen], &path);
        killed += 1;
    }
    for (child, role) in children.iter_mut().zip(ROLES) {
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert!(
            status.signal() == Some(9) || status.success(),
            "{role}: {status}"
        );
    }
    let repo = Repository::open(&path).unwrap();
    for _ in 0..2 {
        repo.prune(&PruneOptions::default(), &|_, _, _| ()).unwrap();
    }
    let points = repo.points().unwrap();
    assert!(points.damaged.is_empty() && !points.points.is_empty());
    for point in &points.points {
        check(&restore(&repo, &point.disks[0]).unwrap());
    }
    let report = repo.verify(&VerifyOptions::default()).unwrap();
    assert!(report.damage.is_empty(), "{report:?}");
    assert!(killed > 5, "{killed}");
    assert!(repo.store().list("leases/").unwrap().is_empty());
}
