//! The program dies, hangs or is asked to end at every named step, with its guard or without: the guest runs on, what was
//! put into the VM comes out, no point is lost, and the next run goes on from there.
#![cfg(feature = "fault-injection")]
#![allow(clippy::unwrap_used, reason = "a test fails by it")]
#![expect(clippy::print_stdout, reason = "numbers for who reads the log")]

mod kill_common;
mod vm_common;

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use forerun::clock;
use kill_common::{Step, chosen, named, spread_of};
use rustix::process::{Pid, Signal, kill_process};
use vm_common::{Lab, MIB, wait_for};

/// Steps outside the freeze that are died at, unless `FORERUN_KILL_ALL=1` asks for all.
const SPREAD: usize = 10;
/// How long a guard may take on a machine that is shared with everything else; what it did take is printed.
const GUARD: Duration = Duration::from_secs(20);

/// What a file of kills came to.
#[derive(Default)]
struct Counts {
    killed: usize,
    not_reached: usize,
    published: usize,
    released: Vec<Duration>,
    points: BTreeMap<String, u64>,
}

/// A run that writes its steps down.
fn steps(lab: &mut Lab, words: &[&str]) -> Vec<Step> {
    lab.start(words, "count").end().done();
    named(&lab.steps())
}

/// One death and everything that must hold after it.
fn die_at(lab: &mut Lab, words: &[&str], step: &Step, with_guard: bool, counts: &mut Counts) {
    let action = if with_guard {
        "kill-with-guard"
    } else {
        "kill"
    };
    let fault = format!("{action}@{}", step.name);
    println!("{} {fault}", words[0]);
    let points = lab.published();
    let ended = lab.start(words, &fault).end();
    let died = clock::now();
    let log = lab.steps();
    if log.is_empty() {
        // Jobs and exports are polled; this time it took fewer looks.
        counts.not_reached += 1;
        let ended = ended.done();
        if words[0] == "backup" {
            counts.points.insert(ended.point(), 0);
        }
    } else {
        assert_eq!(ended.status.signal(), Some(9), "{fault}: {ended:#?}");
        counts.killed += 1;
        // Steps that are polled may be others than in the run that was counted.
        if log[0].ends_with(" guarded") && !with_guard {
            wait_for("the guard does not release", || lab.leftovers().is_empty());
            let took = clock::now() - died;
            assert!(took < GUARD, "{fault}: released after {took:?}");
            counts.released.push(took);
        }
    }
    lab.progresses();
    if with_guard {
        lab.recover().code(0);
        lab.is_clean();
    }
    let published = lab.published() - points;
    assert!(published <= 1, "{fault}");
    counts.published += published;
    let method = if counts.killed.is_multiple_of(2) {
        "fleece"
    } else {
        "snapshot"
    };
    let next = lab.backup(&["--freeze", method]).done();
    assert!(next.rescanned().is_empty(), "{fault}: {next:#?}");
    lab.is_clean();
    let point = next.point();
    let step = lab.step_of(&point);
    let last = counts.points.values().max().copied().unwrap_or(0);
    assert!(step > last, "{fault}: {step} after {last}");
    counts.points.insert(point, step);
}

/// Dies at the steps of a command.
fn dies(words: &[&str]) {
    let mut lab = Lab::boot_in_memory(16 * MIB, "--trim --span 8 --rate 500");
    lab.backup(&[]).done();
    let target = lab.target.clone();
    let words = [&[words[0], target.as_str()], &words[1..]].concat();
    let steps = steps(&mut lab, &words);
    let guarded = steps.iter().filter(|step| step.guarded).count();
    let mut counts = Counts::default();
    let deaths = chosen(&steps, SPREAD);
    println!(
        "{} steps, {guarded} guarded, {} deaths",
        steps.len(),
        deaths.len()
    );
    for (step, with_guard) in &deaths {
        die_at(&mut lab, &words, step, *with_guard, &mut counts);
    }
    let points = lab.points();
    for point in points
        .iter()
        .filter(|id| counts.points.get(*id).is_none_or(|step| *step == 0))
    {
        lab.step_of(point);
    }
    lab.run(&["verify"]).code(0);
    counts.released.sort_unstable();
    println!(
        "{words:?}: {} steps, {guarded} guarded; killed {} times, {} steps not reached, {} points published by runs \
         that died or were not reached, {} points exact; released by the guard: {:?}",
        steps.len(),
        counts.killed,
        counts.not_reached,
        counts.published,
        points.len(),
        spread_of(&counts.released),
    );
    assert_eq!(guarded > 0, words[0] == "backup");
}

#[test]
fn killed_at_any_step_of_a_precopy() {
    dies(&["precopy", "--once"]);
}

#[test]
fn killed_at_any_step_of_a_fleecing_backup() {
    dies(&["backup", "--quiesce", "never", "--freeze", "fleece"]);
}

#[test]
fn killed_at_any_step_of_a_snapshot_backup() {
    dies(&["backup", "--quiesce", "never", "--freeze", "snapshot"]);
}

/// The step right after the freeze's transaction: it is the first one of a backup with little to copy.
const FROZEN: &str = "qmp:transaction:answered#1";

#[test]
fn a_run_that_hangs_is_ended_by_its_guard() {
    let mut lab = Lab::boot_in_memory(16 * MIB, "--trim --span 8 --rate 500");
    lab.backup(&[]).done();
    let target = lab.target.clone();
    for method in ["fleece", "snapshot"] {
        let words = [
            "backup",
            &target,
            "--quiesce",
            "never",
            "--freeze",
            method,
            "--deadline",
            "1s",
        ];
        let run = lab.start(&words, &format!("stop@{FROZEN}"));
        wait_for("the run never came to its freeze", || {
            !lab.steps().is_empty()
        });
        assert!(!lab.leftovers().is_empty());
        lab.progresses();
        let held = wait_for("the guard does not release", || lab.leftovers().is_empty());
        println!("{method}: released {held:?} after the run began to hang");
        wait_for("the guard keeps its journal", || {
            lab.host_state().is_empty()
        });
        let ended = run.end();
        assert_eq!(ended.status.signal(), Some(9), "{ended:#?}");
        lab.is_clean();
        lab.progresses();
        let point = lab.backup(&[]).done().point();
        lab.step_of(&point);
    }
    lab.run(&["verify"]).code(0);
}

#[test]
fn asked_to_end_it_lets_go_and_the_next_run_goes_on() {
    let mut lab = Lab::boot_in_memory(24 * MIB, "--trim --span 16 --rate 500");
    lab.backup(&[]).done();
    let target = lab.target.clone();
    for signal in [Signal::TERM, Signal::INT] {
        // In the middle of a batch: its rate makes it last for minutes.
        let run = lab.start(
            &[
                "precopy",
                &target,
                "--rate",
                "64KiB/s",
                "--converge",
                "1KiB",
            ],
            "",
        );
        wait_for("no batch began", || {
            !lab.ask("query-block-exports").is_empty()
        });
        let pid = Pid::from_child(&run.child);
        kill_process(pid, signal).unwrap();
        run.end().code(130);
        lab.is_clean();
    }
    for method in ["fleece", "snapshot"] {
        let words = ["backup", &target, "--quiesce", "never", "--freeze", method];
        let points = lab.points().len();
        lab.start(&words, &format!("term@{FROZEN}")).end().code(130);
        assert_eq!(lab.steps().len(), 1);
        lab.is_clean();
        lab.progresses();
        assert_eq!(lab.points().len(), points);
        let next = lab.backup(&["--freeze", method]).done();
        assert!(next.rescanned().is_empty(), "{next:#?}");
        lab.step_of(&next.point());
    }
    lab.run(&["verify"]).code(0);
}
