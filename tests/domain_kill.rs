//! The program dies while it holds a libvirt domain, with its guard or without: the guest runs on, thawed, what was put
//! into the VM comes out, and the next run goes on from there.
#![cfg(all(feature = "libvirt", feature = "fault-injection"))]
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by it, and needs no durable writes"
)]
#![expect(clippy::print_stdout, reason = "numbers for who reads the log")]

mod domain_common;
mod kill_common;
mod vm_common;

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::Duration;

use domain_common::{ALONE, Lab};
use forerun::clock;
use forerun_rig::guest::{Bus, Disk, Program};
use kill_common::{Step, named, states};
use rustix::process::{Pid, Signal, kill_process};
use vm_common::{MIB, WAIT, wait_for};

/// How a run dies.
#[derive(Debug, Clone, Copy)]
enum Death {
    /// Alone; libvirt's daemon lives.
    Alone,
    /// With its guard.
    WithGuard,
    /// Alone, while the daemon is away: the guard has to wait for it.
    WithoutDaemon,
}

/// A domain that stamps its disks and has a mounted file system to freeze.
fn stamping(name: &str) -> Lab {
    let mut lab = Lab::boot_with(name, |builder| {
        builder
            .disk(Disk::qcow2("vda", 16 * MIB).iothread(true))
            .disk(Disk::raw("vdb", 16 * MIB))
            .disk(Disk::qcow2("sda", 16 * MIB).bus(Bus::Scsi))
            .disk(Disk::qcow2("vdc", 8 * MIB).ext4())
            .mount("/dev/vdc", "/data")
            .agent(true)
            .program(Program::Stamp(
                "--trim --span 4 --rate 300 /dev/vda /dev/vdb /dev/sda".to_owned(),
            ))
    });
    connects(&lab);
    lab.backup(&[]).done();
    lab
}

fn connects(lab: &Lab) {
    wait_for("the agent never connects", || {
        let ping = r#"{"execute":"guest-ping"}"#;
        lab.domain
            .virsh(&["qemu-agent-command", lab.domain.name(), ping])
            .is_ok()
    });
}

/// One death, and everything that must hold after it. Says whether the step was reached.
fn die_at(lab: &mut Lab, words: &[&str], step: &Step, death: Death, last: &mut u64) -> bool {
    let action = match death {
        Death::Alone => "kill",
        Death::WithGuard => "kill-with-guard",
        Death::WithoutDaemon => "stop",
    };
    let fault = format!("{action}@{}", step.name);
    let run = lab.start(words, &fault);
    let ended = if let Death::WithoutDaemon = death {
        let pid = Pid::from_child(&run.child);
        let mut run = run;
        wait_for("the run neither hangs nor ends", || {
            !lab.steps().is_empty() || run.child.try_wait().unwrap().is_some()
        });
        lab.domain.lock().stop_daemon().unwrap();
        if !lab.steps().is_empty() {
            kill_process(pid, Signal::KILL).unwrap();
        }
        let ended = run.end();
        lab.domain.lock().start_daemon().unwrap();
        ended
    } else {
        run.end()
    };
    let log = lab.steps();
    let reached = !log.is_empty();
    if reached {
        assert_eq!(ended.status.signal(), Some(9), "{fault}: {ended:#?}");
        if log[0].ends_with(" guarded") && !matches!(death, Death::WithGuard) {
            let died = clock::now();
            wait_for("the guard does not release", || {
                lab.leftovers().is_empty() && lab.host_state().is_empty()
            });
            println!(
                "{fault}, {death:?}: released after {:?}",
                clock::now() - died
            );
            assert!(!frozen(lab), "{fault}, {death:?}");
        }
    } else {
        // Polls: this time it took fewer looks.
        ended.done();
    }
    if matches!(death, Death::WithGuard) {
        let name = lab.name();
        lab.run(&["recover", &name]).code(0);
        lab.is_clean();
    }
    lab.progresses();
    let next = lab.backup(&[]).done();
    assert!(next.rescanned().is_empty(), "{fault}, {death:?}: {next:#?}");
    assert_eq!(
        next.json["targets"][0]["point"]["quiesce"], "quiesced",
        "{fault}, {death:?}: {next:#?}"
    );
    lab.is_clean();
    assert!(!frozen(lab), "{fault}, {death:?}");
    let write = lab.step_of(&next.point());
    assert!(write > *last, "{fault}: {write} after {last}");
    *last = write;
    reached
}

fn dies(name: &str, words: &[&str]) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut lab = stamping(name);
    let words = [&[words[0], name], &words[1..]].concat();
    lab.start(&words, "count").end().done();
    let steps = named(&lab.steps());
    let guarded = steps.iter().filter(|step| step.guarded).count();
    let all = std::env::var_os("FORERUN_KILL_ALL").is_some_and(|all| all == "1");
    let deaths = if all { states(&steps) } else { few(&steps) };
    println!(
        "{words:?}: {} steps, {guarded} guarded, {} deaths",
        steps.len(),
        deaths.len()
    );
    let (mut last, mut killed) = (0, 0);
    let mut by_death = [0; 3];
    for (number, step) in deaths.iter().enumerate() {
        let death = match (step.guarded, number % 3) {
            (true, 1) => Death::WithGuard,
            (_, 2) => Death::WithoutDaemon,
            _ => Death::Alone,
        };
        println!("{}, {death:?}", step.name);
        if die_at(&mut lab, &words, step, death, &mut last) {
            killed += 1;
            by_death[death as usize] += 1;
        }
    }
    lab.run(&["verify"]).code(0);
    println!(
        "{words:?}: {} steps, {guarded} guarded; {killed} deaths (alone, with the guard, while the daemon was away: {by_death:?}), a point exact after each",
        steps.len(),
    );
}

/// The steps at which something is new in the VM.
fn few(steps: &[Step]) -> Vec<Step> {
    let after = [
        "journal:write:after#1",
        "qmp:block-dirty-bitmap-disable:answered#1",
        "qga:guest-fsfreeze-freeze:answered#1",
        "snapshot:before#1",
        "snapshot:answered#1",
        "qmp:transaction:answered#1",
        "qmp:block-export-add:answered#1",
        "qmp:block-job-cancel:answered#1",
    ];
    let chosen = steps
        .iter()
        .filter(|step| after.contains(&step.name.as_str()));
    chosen.cloned().collect()
}

#[test]
fn killed_at_any_step_of_a_domain_s_precopy() {
    dies("killpre", &["precopy", "--once"]);
}

#[test]
fn killed_at_any_step_of_a_domain_s_backup() {
    dies("killback", &["backup", "--freeze", "fleece"]);
}

#[test]
fn killed_at_any_step_of_a_domain_s_snapshot() {
    dies("killsnap", &["backup", "--freeze", "snapshot"]);
}

/// Dies with its guard right after the transaction: everything of a freeze is in the VM. Returns the journal.
fn dies_whole(lab: &mut Lab) -> (PathBuf, Vec<u8>) {
    let name = lab.name();
    let fault = "kill-with-guard@qmp:block-export-add:answered#1";
    lab.start(&["backup", &name], fault).end();
    let state = lab.path("state").join(lab.uuid());
    let journal = lab.host_state().into_iter().find(|file| {
        Path::new(file)
            .extension()
            .is_some_and(|ext| ext == "journal")
    });
    let path = state.join(journal.unwrap());
    let bytes = std::fs::read(&path).unwrap();
    assert!(lab.leftovers().len() > 4, "{:?}", lab.leftovers());
    (path, bytes)
}

#[test]
fn what_dead_runs_left_is_found_again() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut lab = Lab::boot("recover", 16 * MIB, "--trim --span 8 --rate 300");
    let name = lab.name();
    lab.backup(&[]).done();

    // With its journal lost: by the names, for its own repository only, and a live run has nothing to fear.
    let (journal, _) = dies_whole(&mut lab);
    std::fs::remove_file(&journal).unwrap();
    let other = lab.path("other").display().to_string();
    lab.run(&["init", &other]).done();
    let left = lab.leftovers();
    let ended = lab.run(&["recover", &name, "--repo", &other]).code(3);
    assert!(
        ended.json.to_string().contains("name their repository"),
        "{ended:#?}"
    );
    assert_eq!(lab.leftovers().len(), left.len());
    let ended = lab.run(&["recover", &name]).code(0);
    let said = ended.json.to_string();
    for what in ["job ", "export ", "node ", "NBD server"] {
        assert!(said.contains(what), "{what}: {ended:#?}");
    }
    lab.is_clean();
    clock::sleep(Duration::from_secs(1));
    let run = lab.start(&["precopy", &name, "--once", "--rate", "3MiB/s"], "");
    wait_for("no batch began", || {
        clock::sleep(Duration::from_millis(30));
        !lab.ask("query-block-exports").is_empty()
    });
    lab.run(&["recover", &name]).code(0);
    run.end().done();

    // Without a target: whatever the journals of this host are about.
    dies_whole(&mut lab);
    let ended = lab.run(&["recover"]).code(0);
    assert!(ended.json.to_string().contains("NBD server"), "{ended:#?}");
    lab.is_clean();
    let ended = lab.run(&["recover"]).code(0);
    assert_eq!(
        ended.json["targets"].as_array().unwrap().len(),
        0,
        "{ended:#?}"
    );
    let next = lab.backup(&[]).done();
    assert!(next.rescanned().is_empty(), "{next:#?}");
    lab.step_of(&next.point());

    // Off, by another name, and not there at all.
    let (path, journal) = dies_whole(&mut lab);
    lab.domain.destroy().unwrap();
    lab.domain.virsh(&["domrename", &name, "renamed"]).unwrap();
    for spelled in [name.as_str(), "renamed"] {
        std::fs::write(&path, &journal).unwrap();
        lab.run(&["recover", spelled]).code(0);
        assert_eq!(lab.host_state(), Vec::<String>::new(), "{spelled}");
    }
    lab.domain.virsh(&["undefine", "renamed"]).unwrap();
    let uuid = lab.uuid().to_owned();
    for words in [&["recover", &name][..], &["recover", &uuid], &["recover"]] {
        std::fs::write(&path, &journal).unwrap();
        lab.run(words).code(0);
        assert_eq!(lab.host_state(), Vec::<String>::new(), "{words:?}");
    }
    lab.run(&["recover", &name]).code(2);

    // Started anew: the journal is of a QEMU that is gone.
    let xml = lab.path(&format!("{name}.xml")).display().to_string();
    lab.domain.virsh(&["define", &xml]).unwrap();
    lab.start_again();
    std::fs::write(&path, &journal).unwrap();
    lab.run(&["status", &name]).done();
    lab.is_clean();
    let next = lab.backup(&[]).done();
    lab.step_of(&next.point());
    lab.is_clean();
}

/// What the guest's agent says of its file systems.
fn frozen(lab: &Lab) -> bool {
    let ask = r#"{"execute":"guest-fsfreeze-status"}"#;
    let said = lab
        .domain
        .virsh(&["qemu-agent-command", lab.domain.name(), ask]);
    said.is_ok_and(|said| said.contains("frozen"))
}

#[test]
fn a_guest_is_quiesced_by_its_domain_s_agent_and_never_stays_frozen() {
    let mut lab = Lab::boot_with("agent", |builder| {
        let script = "echo stamp: running; while true; do echo $RANDOM >/data/file; sync; usleep 20000; done";
        builder
            .disk(Disk::qcow2("vda", 64 * MIB).ext4())
            .mount("/dev/vda", "/data")
            .agent(true)
            .program(Program::Script(script.to_owned()))
    });
    let name = lab.name();
    connects(&lab);
    for quiesce in ["always", "auto"] {
        let backup = lab.backup(&["--quiesce", quiesce]).done();
        let point = &backup.json["targets"][0]["point"];
        assert_eq!(point["quiesce"], "quiesced", "{point}");
        assert!(!frozen(&lab));
        // No journal to replay: the file system was frozen at the instant.
        let output = lab.path("restored");
        std::fs::remove_dir_all(&output).ok();
        let words = [
            "restore",
            &backup.point(),
            "--output",
            &output.display().to_string(),
        ];
        lab.run(&words).done();
        let features = std::process::Command::new("dumpe2fs")
            .arg("-h")
            .arg(output.join("vda.raw"))
            .output()
            .unwrap();
        let features = String::from_utf8_lossy(&features.stdout).into_owned();
        assert!(features.contains("has_journal"), "{features}");
        assert!(!features.contains("needs_recovery"), "{features}");
    }
    for action in ["kill", "kill-with-guard"] {
        let fault = format!("{action}@qga:guest-fsfreeze-freeze:answered#1");
        let ended = lab
            .start(&["backup", &name, "--quiesce", "always"], &fault)
            .end();
        assert_eq!(ended.status.signal(), Some(9), "{ended:#?}");
        if action == "kill" {
            wait_for("the guard does not thaw", || !frozen(&lab));
        } else {
            assert!(frozen(&lab));
            lab.run(&["recover", &name]).code(0);
            assert!(!frozen(&lab));
        }
    }
    wait_for("the host state is not settled", || {
        lab.host_state().is_empty()
    });
    lab.is_clean();
    lab.domain.wait_for("GUEST-UP", WAIT).unwrap();
}
