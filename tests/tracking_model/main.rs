//! The tracking protocol against a model: the real rotation, trust and proofs run on a VM with QEMU's bitmap semantics and a
//! journal that may be cut off anywhere, while the guest writes and operators interfere between any two steps.
//!
//! ```text
//! tape   write  start(run)  3 steps  write begins  2 steps  it completes  die after  start(run)  kill QEMU ...
//! ```
//!
//! What holds: every published point is exact for all its disks at one instant; a disk that nothing happened to is not
//! rescanned; no repository touches another's bitmaps; and after any history a backup without faults succeeds.
//! `FORERUN_MODEL_CASES` asks for more cases than the default.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by it, and the disks here are small"
)]

mod freeze;
mod run;
mod vm;
mod world;

use std::cell::RefCell;
use std::collections::BTreeMap;

use forerun::bitmap::dirty::Proofs;
use forerun::bitmap::track::{State, plan};
use proptest::prelude::*;

use run::{Plan, run};
use vm::{Act, Range, Value, Vm};
use world::{Op, World, play};

fn range() -> impl Strategy<Value = Range> {
    (0u8..3, 0u8..48, 1u8..6).prop_map(|(disk, first, count)| Range { disk, first, count })
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        5 => Just(Value::New),
        2 => Just(Value::Zero),
        1 => Just(Value::Same),
        1 => (1u8..3).prop_map(Value::Old),
    ]
}

fn guest() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (range(), value()).prop_map(|(range, value)| Act::Write(range, value)),
        3 => (range(), value(), any::<bool>()).prop_map(|(range, value, there)| Act::Begin(range, value, there)),
        1 => any::<u8>().prop_map(Act::Land),
        3 => any::<u8>().prop_map(Act::Complete),
    ]
}

fn operator() -> impl Strategy<Value = Act> {
    let disk = 0u8..3;
    let two = (0u8..3, 0u8..3);
    let bitmap = (0u8..3, 0u8..8);
    prop_oneof![
        4 => Just(Act::Kill),
        6 => Just(Act::Restart),
        2 => (disk.clone(), any::<u8>()).prop_map(|(disk, blocks)| Act::Resize(disk, blocks)),
        2 => two.clone().prop_map(|(a, b)| Act::Swap(a, b)),
        5 => (disk.clone(), any::<bool>()).prop_map(|(disk, running)| Act::Copy(disk, running)),
        5 => disk.clone().prop_map(Act::Rollback),
        1 => two.prop_map(|(a, b)| Act::Clone(a, b)),
        4 => disk.clone().prop_map(Act::Plug),
        1 => bitmap.clone().prop_map(|(disk, bitmap)| Act::HandRemove(disk, bitmap)),
        1 => bitmap.clone().prop_map(|(disk, bitmap)| Act::HandDisable(disk, bitmap)),
        1 => bitmap.prop_map(|(disk, bitmap)| Act::HandEnable(disk, bitmap)),
        1 => disk.prop_map(Act::HandAdd),
        3 => Just(Act::EndSnapshot),
    ]
}

fn run_plan() -> impl Strategy<Value = Plan> {
    let repo = prop_oneof![3 => Just(0usize), 1 => Just(1)];
    let leave_out = prop_oneof![6 => Just(0u8), 1 => 0u8..8];
    (repo, leave_out, 0u8..3, 1u8..64, 0u8..5, any::<bool>()).prop_map(
        |(repo, leave_out, passes, batch, batches, backup)| Plan {
            repo,
            leave_out,
            passes,
            batch,
            batches,
            backup,
        },
    )
}

/// What happens next. Interference of an operator, and deaths, are so many of a thousand.
fn event(trouble: u32, deaths: u32) -> impl Strategy<Value = Vec<Op>> {
    let cut_off = |steps: std::ops::Range<u8>| {
        (run_plan(), steps, any::<bool>()).prop_map(|(plan, steps, after)| {
            vec![Op::Start(plan), Op::Steps(steps), Op::Die(after)]
        })
    };
    prop_oneof![
        300 => (0u8..50).prop_map(|steps| vec![Op::Steps(steps)]),
        350 => guest().prop_map(|act| vec![Op::Act(act)]),
        150 => run_plan().prop_map(|plan| vec![Op::Start(plan)]),
        deaths => any::<bool>().prop_map(|after| vec![Op::Die(after)]),
        deaths => cut_off(0..12),
        deaths => cut_off(0..100),
        trouble => operator().prop_map(|act| vec![Op::Act(act)]),
        trouble => disturbed_freeze(),
    ]
}

/// Something happens, and the guest writes, in the middle of a freeze.
fn disturbed_freeze() -> impl Strategy<Value = Vec<Op>> {
    let act = prop_oneof![3 => Just(Act::EndSnapshot), 2 => operator()];
    (0usize..2, 3u8..14, act, range(), 0u8..8).prop_map(|(repo, steps, act, range, more)| {
        let plan = Plan {
            passes: 0,
            ..backup(repo)
        };
        let write = Act::Write(range, Value::New);
        vec![
            Op::Start(plan),
            Op::Steps(steps),
            Op::Act(act),
            Op::Act(write),
            Op::Steps(more),
        ]
    })
}

fn tape(trouble: u32, deaths: u32) -> impl Strategy<Value = Vec<Op>> {
    prop::collection::vec(event(trouble, deaths), 5..70).prop_map(|parts| parts.concat())
}

/// A disk is copied, copied ahead for a while, perhaps left out, and put back to the copy: with other events in between.
fn tape_with_a_rollback() -> impl Strategy<Value = Vec<Op>> {
    let between = || prop::collection::vec(event(4, 20), 0..12).prop_map(|parts| parts.concat());
    let unfinished = (1u8..12, 0u8..60).prop_map(|(batch, steps)| {
        let plan = Plan {
            passes: 1,
            batch,
            batches: 0,
            backup: false,
            ..backup(0)
        };
        vec![Op::Start(plan), Op::Steps(60), Op::Steps(steps)]
    });
    let away = prop_oneof![
        2 => Just(Vec::new()),
        1 => (0u8..3, 0u8..60).prop_map(|(disk, steps)| vec![
            Op::Act(Act::Plug(disk)),
            Op::Start(Plan { passes: 0, backup: false, ..backup(0) }),
            Op::Steps(steps),
            Op::Act(Act::Plug(disk)),
        ]),
    ];
    let parts = (between(), between(), unfinished, between(), away, between());
    (0u8..3, parts).prop_map(
        |(disk, (before, after_copy, unfinished, later, away, end))| {
            let copy = vec![Op::Act(Act::Copy(disk, false))];
            let rollback = vec![Op::Act(Act::Rollback(disk))];
            [
                before, copy, after_copy, unfinished, later, away, rollback, end,
            ]
            .concat()
        },
    )
}

fn disks() -> impl Strategy<Value = Vec<(u8, bool)>> {
    prop::collection::vec(
        (6u8..40, prop_oneof![3 => Just(true), 1 => Just(false)]),
        1..4,
    )
}

fn backup(repo: usize) -> Plan {
    Plan {
        repo,
        leave_out: 0,
        passes: 1,
        batch: 200,
        batches: 9,
        backup: true,
    }
}

/// Plays a history, then backs up twice without faults.
fn follow(disks: &[(u8, bool)], blind: bool, tape: Vec<Op>) -> RefCell<World> {
    let world = World::new(Vm::new(disks, blind), tape);
    play(&world);
    {
        let mut world = world.borrow_mut();
        for slot in 0..world.vm.slots.len() {
            if !world.vm.slots[slot].plugged {
                world.vm.act(&Act::Plug(slot as u8), false);
            }
        }
    }
    for repo in 0..2 {
        if repo == 1 && world.borrow().repos[1].sessions == 0 {
            continue;
        }
        run(&world, &backup(repo)).unwrap();
        let doubts = world.borrow().repos[repo].doubts;
        run(&world, &backup(repo)).unwrap();
        let world = world.borrow();
        assert_eq!(world.repos[repo].doubts, doubts, "a rescan for nothing");
        if !world.vm.moved {
            let short = world.repos[repo].short;
            for image in &world.vm.images {
                let ours: Vec<&str> = image
                    .bitmaps
                    .iter()
                    .map(|bitmap| bitmap.name.as_str())
                    .filter(|name| forerun::bitmap::name::belongs_to(name, short))
                    .collect();
                assert_eq!(ours.len(), 1, "bitmaps stay behind: {ours:?}");
            }
        }
    }
    world
}

fn cases(default: u32) -> ProptestConfig {
    let asked = std::env::var("FORERUN_MODEL_CASES").or_else(|_| std::env::var("PROPTEST_CASES"));
    ProptestConfig {
        cases: asked
            .ok()
            .and_then(|cases| cases.parse().ok())
            .unwrap_or(default),
        failure_persistence: None,
        max_shrink_iters: 200_000,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases(500))]

    #[test]
    fn every_point_is_exact_whatever_happens(disks in disks(), blind in any::<bool>(), tape in tape(60, 60)) {
        follow(&disks, blind, tape);
    }

    #[test]
    fn every_point_is_exact_where_runs_die_anywhere(disks in disks(), tape in tape(2, 150)) {
        follow(&disks, true, tape);
    }

    #[test]
    fn every_point_is_exact_where_a_disk_is_rolled_back(disks in disks(), blind in any::<bool>(), tape in tape_with_a_rollback()) {
        follow(&disks, blind, tape);
    }

    #[test]
    fn without_faults_nothing_is_rescanned(disks in disks(), tape in tape(1, 1)) {
        let calm = tape.into_iter().filter(|op| match op {
            Op::Die(_) => false,
            Op::Act(act) => matches!(act, Act::Write(..) | Act::Begin(..) | Act::Land(_) | Act::Complete(_)),
            Op::Start(plan) => plan.leave_out == 0,
            Op::Steps(_) => true,
        });
        let world = follow(&disks, false, calm.collect());
        // The first copies, in each repository that was used.
        for repo in &world.borrow().repos {
            prop_assert!(repo.doubts <= disks.len() as u64);
        }
    }
}

/// Runs that are cut off after their rotation leave a bitmap each.
#[test]
fn more_pending_bitmaps_than_can_be_ranked_end_in_a_rescan() {
    let process = world::process(1);
    let mut state = State::default();
    let mut vm = Vm::new(&[(12, true)], true);
    let mut doubts = 0;
    for _ in 0..600 {
        let seen = [vm.seen(0)];
        let bases = BTreeMap::new();
        let rotation = plan(
            &state,
            &bases,
            &seen,
            vm::BLOCK,
            "0000aaaa",
            &process,
            false,
        );
        state.apply(&rotation.record);
        let disk = &state.disks["vda"];
        Proofs::new(12, disk.pending_epochs()).unwrap();
        doubts += usize::from(disk.whole == Some(state.epoch - 1));
        for bitmap in &mut vm.images[0].bitmaps {
            bitmap.recording = false;
        }
        vm.add(0, &rotation.add[0].1);
    }
    assert_eq!(doubts, 3);
}
