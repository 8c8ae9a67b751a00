//! Garbage collection against a model: writers that deduplicate against each other and against what is dying, forgets, prunes and
//! readers run the real code on a store that lets one of them do one operation at a time, in random order, and are killed now and then.
//!
//! What holds, whenever something was deleted and at the end: every published point can be read, so can every proved block of a
//! living session and what a reader has a lease of; and in the end nothing is left that no root needs. Every read re-hashes, so what
//! can be read is what was written.
//!
//! `FORERUN_MODEL_CASES` asks for more cases than the default. The model must notice when the protocol is broken: that is tested, too.
#![allow(
    clippy::single_match_else,
    clippy::unused_self,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by it, and the numbers here are small"
)]

#[path = "../image_common/mod.rs"]
mod image_common;

mod actors;
mod world;

use std::sync::Arc;

use forerun::image::{InitOptions, PruneOptions, Repository, Session};
use proptest::prelude::*;

use actors::{Player, blocks_of};
use world::{Broken, Dice, Role, View, World};

const ROLES: [(Role, u64); 6] = [
    (Role::Writer, 5),
    (Role::Writer, 5),
    (Role::Forget, 9),
    (Role::Prune, 3),
    (Role::Prune, 2),
    (Role::Reader, 3),
];

/// Everything that is promised can be read.
fn check(world: &Arc<World>) -> Result<(), String> {
    let repo = View::whole(world)
        .open()
        .map_err(|error| error.to_string())?;
    let points = repo.points().map_err(|error| error.to_string())?;
    if let Some(error) = points.damaged.first() {
        return Err(error.to_string());
    }
    let mut all = world.promised();
    for point in points.points {
        let ids = blocks_of(&repo, &point.disks[0].map);
        let ids = ids.map_err(|error| format!("point {}: {error}", point.id))?;
        all.push((format!("point {}", point.id), ids));
    }
    for (whose, ids) in all {
        for id in ids {
            repo.read_block(id)
                .map_err(|error| format!("{whose}: {error}"))?;
        }
    }
    // What is hidden may be gone, and nobody misses it. That takes longest, so not each time.
    if !world.is_tenth() {
        return Ok(());
    }
    let report = repo.check(None, 1).map_err(|error| error.to_string())?;
    match report.damage.first() {
        Some(damage) => Err(format!("{damage:?}")),
        None => Ok(()),
    }
}

/// Nothing is left that no root needs. A dead block may seem alive by chance, but not again and again.
fn check_clean(repo: &Repository) -> Result<(), String> {
    let dry = PruneOptions {
        dry_run: true,
        ..PruneOptions::default()
    };
    let words = |error: forerun::image::Error| error.to_string();
    let mut left = String::new();
    for _ in 0..5 {
        repo.prune(&PruneOptions::default(), &|_, _, _| ())
            .map_err(words)?;
        let report = repo.prune(&dry, &|_, _, _| ()).map_err(words)?;
        let count = |prefix: &str| repo.store().list(prefix).map_or(0, |names| names.len());
        let nothing = report.deleted == report.repacked
            && report.kept_for_sessions.packs == 0
            && (report.layers, report.sessions, report.leases) == (0, 0, 0)
            && count("leases/") == 0
            && count("sessions/") == 0
            && count("condemned/") <= 1;
        if nothing {
            return Ok(());
        }
        left = format!("left for ever: {report:?}");
    }
    Err(left)
}

/// One history.
fn run(seed: u64, broken: Broken) -> Result<(), String> {
    let world = World::new(ROLES.len(), broken);
    let whole = View::whole(&world);
    Repository::init_store(Arc::new(whole.clone()), InitOptions::default()).unwrap();
    let mut dice = Dice(seed | 1);
    std::thread::scope(|scope| {
        for (number, (role, rounds)) in ROLES.into_iter().enumerate() {
            let player = Player {
                world: Arc::clone(&world),
                number,
                role,
                dice: Dice(dice.below(u64::MAX >> 33) << 20 | 1),
            };
            scope.spawn(move || player.play(rounds));
        }
        world.schedule(dice, &|| {
            if let Err(what) = check(&world) {
                world.fail(what);
            }
        });
    });
    if let Some(what) = world.failure() {
        return Err(world.told(what));
    }
    check(&world)?;
    let repo = whole.open().map_err(|error| error.to_string())?;
    for session in Session::list(&repo)
        .map_err(|error| error.to_string())?
        .sessions
    {
        world.release(&session.id().to_string());
        session.remove().map_err(|error| error.to_string())?;
    }
    check_clean(&repo)?;
    check(&world)
}

fn cases(default: u32) -> u32 {
    let asked = std::env::var("FORERUN_MODEL_CASES").ok();
    asked
        .and_then(|asked| asked.parse().ok())
        .unwrap_or(default)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(1000),
        max_shrink_iters: 0,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn nothing_that_is_needed_goes_and_nothing_else_stays(seed in any::<u64>()) {
        let done = run(seed, Broken::Not);
        prop_assert!(done.is_ok(), "{}", done.unwrap_err());
    }
}

/// How many histories it takes until the model notices.
fn noticed(broken: Broken) -> u64 {
    for seed in 1..20_000_u64 {
        if run(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15), broken).is_err() {
            return seed;
        }
    }
    panic!("{broken:?} goes unnoticed");
}

#[test]
fn a_writer_that_does_not_look_is_noticed() {
    noticed(Broken::NoLook);
}

#[test]
fn a_prune_that_does_not_mark_again_is_noticed() {
    noticed(Broken::NoSecondMark);
}

#[test]
fn a_prune_that_condemns_after_it_deleted_is_noticed() {
    noticed(Broken::CondemnedLate);
}

#[test]
fn a_prune_that_lists_points_before_sessions_is_noticed() {
    noticed(Broken::PointsFirst);
}

#[test]
fn a_writer_that_does_not_look_for_its_base_is_noticed() {
    noticed(Broken::NoBaseCheck);
}

#[test]
#[ignore = "replays a history: FORERUN_MODEL_SEED, with FORERUN_MODEL_TRACE what happened in it"]
fn replay() {
    let seed = std::env::var("FORERUN_MODEL_SEED").unwrap();
    let seed = seed.parse().unwrap();
    for _ in 0..cases(200) {
        if let Err(what) = run(seed, Broken::Not) {
            panic!("{what}");
        }
    }
}
