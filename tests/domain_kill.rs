//! The program dies while it holds a libvirt domain, with its guard or without: the guest runs on, thawed, what was put
//! into the VM comes out, and the next run goes on from there.
#![cfg(all(feature = "libvirt", feature = "fault-injection"))]
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod domain_common;
mod vm_common;

use std::os::unix::process::ExitStatusExt;

use domain_common::Lab;
use forerun_rig::guest::{Disk, Program};
use vm_common::{MIB, WAIT, wait_for};

/// Steps between the journal and the release; right after the transaction everything of a freeze is in the VM.
const STEPS: [&str; 5] = [
    "qmp:blockdev-add:before#1",
    "qmp:blockdev-add:answered#1",
    "qmp:transaction:answered#1",
    "qmp:block-export-add:answered#1",
    "qmp:block-job-cancel:answered#1",
];

#[test]
fn killed_in_the_freeze_the_domain_is_released() {
    let mut lab = Lab::boot("kill", 16 * MIB, "--trim --span 4 --rate 300");
    let name = lab.name();
    lab.backup(&[]).done();
    let mut last = 0;
    for (number, step) in STEPS.iter().enumerate() {
        for action in ["kill", "kill-with-guard"] {
            if number % 2 == 0 && number != 2 && action == "kill" {
                continue;
            }
            let fault = format!("{action}@{step}");
            let ended = lab.start(&["backup", &name], &fault).end();
            assert_eq!(ended.status.signal(), Some(9), "{fault}: {ended:#?}");
            let guarded = lab.steps()[0].ends_with(" guarded") && action == "kill";
            if guarded {
                wait_for("the guard does not release", || lab.leftovers().is_empty());
            }
            lab.progresses();
            let recovered = lab.run(&["recover", &name]).code(0);
            assert!(
                guarded || number == 0 || recovered.json.to_string().contains("forerun-"),
                "{fault}: {recovered:#?}"
            );
            lab.is_clean();
        }
        let next = lab.backup(&[]).done();
        assert!(next.rescanned().is_empty(), "{step}: {next:#?}");
        lab.is_clean();
        let write = lab.step_of(&next.point());
        assert!(write > last, "{step}: {write} after {last}");
        last = write;
    }
    lab.run(&["verify"]).code(0);
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
    wait_for("the agent never connects", || {
        let ping = r#"{"execute":"guest-ping"}"#;
        lab.domain
            .virsh(&["qemu-agent-command", &name, ping])
            .is_ok()
    });
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
