//! Several domains at one instant: all exact, all frozen during all transactions; one whose agent hangs is quiesced no more,
//! or left out, and holds up the others for a bounded time.
#![cfg(all(feature = "libvirt", feature = "fault-injection"))]
#![allow(clippy::unwrap_used, reason = "a test fails by it")]
#![expect(clippy::print_stdout, reason = "numbers for who reads the log")]

mod domain_common;
mod vm_common;

use std::time::Duration;

use domain_common::Lab;
use forerun::clock;
use forerun_rig::guest::{Bus, Disk, Program};
use serde_json::{Value, json};
use vm_common::{Ended, MIB, wait_for};

/// Stamps three disks; a file system for the agent to freeze is on a fourth.
fn boot(name: &str) -> Lab {
    let stamp = "--trim --span 4 --rate 60 /dev/vda /dev/vdb /dev/sda";
    let lab = Lab::boot_with(name, |builder| {
        builder
            .disk(Disk::qcow2("vda", 8 * MIB).iothread(true))
            .disk(Disk::raw("vdb", 8 * MIB))
            .disk(Disk::qcow2("vdc", 16 * MIB).ext4())
            .disk(Disk::qcow2("sda", 8 * MIB).bus(Bus::Scsi))
            .mount("/dev/vdc", "/data")
            .agent(true)
            .program(Program::Stamp(stamp.to_owned()))
    });
    wait_for("the agent never connects", || {
        agent(&lab, "guest-ping").is_some()
    });
    lab
}

fn agent(lab: &Lab, command: &str) -> Option<Value> {
    ask(lab, &json!({ "execute": command }))
}

fn ask(lab: &Lab, request: &Value) -> Option<Value> {
    let words = [
        "qemu-agent-command",
        lab.domain.name(),
        &request.to_string(),
        "--timeout",
        "5",
    ];
    serde_json::from_str(&lab.domain.virsh(&words).ok()?).ok()
}

/// Runs a line in a guest and does not wait for it.
fn shell(line: &str) -> Value {
    json!({ "execute": "guest-exec", "arguments": { "path": "/bin/sh", "arg": ["-c", line] } })
}

fn point<'a>(ended: &'a Ended, target: &str) -> &'a Value {
    let targets = ended.json["targets"].as_array().unwrap();
    let found = targets.iter().find(|entry| entry["target"] == target);
    found.map_or(&Value::Null, |entry| &entry["point"])
}

/// The points of these targets are exact and say that they are of one group; the others have none.
fn check(labs: &mut [Lab], what: &str, ended: &Ended, targets: &[&str], one_instant: bool) {
    let together = &ended.json["together"];
    assert_eq!(together["targets"], json!(targets), "{what}: {ended:#?}");
    assert_eq!(together["one_instant"], one_instant, "{what}: {ended:#?}");
    let spread = together["spread_ms"].as_u64().unwrap();
    assert!(spread < 2000, "{what}: {spread} ms");
    assert_eq!(
        ended.json["targets"].as_array().unwrap().len(),
        targets.len()
    );
    println!("{what}: {} targets within {spread} ms", targets.len());
    for target in targets {
        let made = point(ended, target);
        assert_eq!(&made["together"], together, "{what}");
        let id = made["id"].as_str().unwrap().to_owned();
        let step = labs[0].step_of(&id);
        println!(
            "  {target}: write {step}, quiesced {} for {} ms, freeze {} ms, released {} ms",
            made["quiesce"], made["quiesced_ms"], made["freeze_ms"], made["released_ms"]
        );
        let shown = labs[0].run(&["show", &id]).code(0);
        assert_eq!(&shown.json["point"]["statistics"]["together"], together);
    }
    for lab in labs {
        assert_eq!(lab.leftovers(), Vec::<String>::new(), "{what}");
        lab.progresses();
    }
}

fn is_thawed(lab: &Lab) -> bool {
    agent(lab, "guest-fsfreeze-status").is_some_and(|said| said["return"] == "thawed")
}

#[test]
fn several_domains_are_of_one_instant_and_one_that_hangs_is_left_out() {
    let mut labs = ["one-a", "one-b", "one-c"].map(boot);
    let all = ["one-a", "one-b", "one-c"];

    let ended = labs[0]
        .run(&["backup", "one-a", "one-b", "one-c", "--together"])
        .code(0);
    check(&mut labs, "all", &ended, &all, true);
    let ended = labs[0]
        .run(&["backup", "one-*", "--together", "--quiesce", "always"])
        .code(0);
    check(&mut labs, "again", &ended, &all, true);
    for target in all {
        assert_eq!(point(&ended, target)["quiesce"], "quiesced");
    }
    // libvirt's own snapshots, with frozen guests and without.
    for (quiesce, one_instant) in [("always", true), ("never", false)] {
        let words = ["backup", "one-*", "--together", "--freeze", "snapshot"];
        let ended = labs[0]
            .run(&[&words[..], &["--quiesce", quiesce]].concat())
            .code(0);
        let what = format!("snapshots, quiesce {quiesce}");
        check(&mut labs, &what, &ended, &all, one_instant);
        for lab in &labs {
            let disks = lab.domain.virsh(&["domblklist", lab.domain.name()]);
            assert!(!disks.unwrap().contains("overlay"), "{what}");
            lab.is_clean();
        }
    }
    // One after the other they are several instants.
    let ended = labs[0].run(&["backup", "one-a", "one-b"]).code(0);
    assert_eq!(ended.json.get("together"), None);
    assert_eq!(point(&ended, "one-b")["together"], Value::Null);

    // An agent that was asleep before.
    ask(&labs[2], &shell("killall -STOP qemu-ga; sleep 600")).unwrap();
    wait_for("the agent does not sleep", || {
        agent(&labs[2], "guest-ping").is_none()
    });
    let ended = labs[0].run(&["backup", "--all", "--together"]).code(3);
    check(&mut labs, "one asleep", &ended, &all, false);
    assert_eq!(point(&ended, "one-c")["quiesce"], "crash-consistent");
    assert_eq!(point(&ended, "one-a")["quiesce"], "quiesced");
    let ended = labs[0]
        .run(&["backup", "one-*", "--together", "--quiesce", "always"])
        .code(1);
    check(&mut labs, "one asleep, always", &ended, &all[..2], true);
    assert!(
        ended.json["errors"].to_string().contains("one-c"),
        "{ended:?}"
    );
    labs[2].domain.destroy().unwrap();
    labs[2].start_again();
    wait_for("the agent never connects", || {
        agent(&labs[2], "guest-ping").is_some()
    });

    // One that falls asleep when all are about to freeze, and wakes later.
    let sleeps = shell("killall -STOP qemu-ga; sleep 12; killall -CONT qemu-ga").to_string();
    let hook = format!(
        "if [ $FORERUN_TARGET = one-c ]; then virsh -c \"$LIBVIRT_DEFAULT_URI\" qemu-agent-command one-c '{sleeps}' && sleep 1; fi"
    );
    let begin = clock::now();
    let words = ["backup", "one-*", "--together", "--freeze-timeout", "2s"];
    let ended = labs[0]
        .run(&[&words[..], &["--pre-freeze", &hook]].concat())
        .code(4);
    let took = clock::now() - begin;
    check(&mut labs, "one falls asleep", &ended, &all[..2], true);
    assert!(took < Duration::from_secs(100), "{took:?}");
    assert!(
        ended.json["errors"].to_string().contains("left out"),
        "{ended:?}"
    );
    for target in &all[..2] {
        let frozen = point(&ended, target)["quiesced_ms"].as_u64().unwrap();
        assert!(frozen < 8000, "{target}: {frozen} ms");
    }
    wait_for("a guest stays frozen", || labs.iter().all(is_thawed));

    // One that is off has no instant, one that is not there no point.
    labs[2].domain.destroy().unwrap();
    let ended = labs[0]
        .run(&["backup", "one-*", "nowhere", "--together"])
        .code(2);
    assert_eq!(point(&ended, "one-c")["quiesce"], "offline");
    assert_eq!(point(&ended, "one-c")["together"], Value::Null);
    assert_eq!(ended.json["together"]["targets"], json!(all[..2]));
    assert_eq!(ended.json["together"]["one_instant"], true);
}
