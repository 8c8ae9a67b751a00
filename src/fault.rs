//! Named steps at which a test may end the process, and nothing at all without the cargo feature `fault-injection`.
//!
//! With the feature on, `FORERUN_FAULT` says what happens: `kill@N` sends SIGKILL to this process at its N-th step
//! (counted from 1), `kill-with-guard@N` first to the guard process too, and `count` appends each step's name as a line
//! to the file that `FORERUN_FAULT_LOG` names, so that a test knows how many steps there are to die at.

/// A step that changes something outside this process; call it before and after.
#[cfg(not(feature = "fault-injection"))]
#[inline]
pub fn step(_name: &str) {}

/// A step whose name is put together from a layer, an operation and the kind of the object.
#[cfg(not(feature = "fault-injection"))]
#[inline]
pub fn step_of(_layer: &str, _operation: &str, _object: &str) {}

/// Says which process is the guard, for `kill-with-guard`.
#[cfg(not(feature = "fault-injection"))]
#[inline]
pub fn guard(_pid: u32) {}

#[cfg(feature = "fault-injection")]
pub use on::{guard, step, step_of};

#[cfg(feature = "fault-injection")]
mod on {
    use std::fs::OpenOptions;
    use std::io::Write;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

    use rustix::process::{Pid, Signal, getpid, kill_process};

    static STEPS: AtomicU64 = AtomicU64::new(0);
    static GUARD: AtomicI32 = AtomicI32::new(0);
    static PLAN: OnceLock<Plan> = OnceLock::new();

    /// What `FORERUN_FAULT` asks for.
    enum Plan {
        Nothing,
        Kill { at: u64, guard_too: bool },
        Count,
    }

    fn plan() -> Plan {
        let Ok(text) = std::env::var("FORERUN_FAULT") else {
            return Plan::Nothing;
        };
        if text == "count" {
            return Plan::Count;
        }
        match text.split_once('@').map(|(what, at)| (what, at.parse())) {
            Some(("kill", Ok(at))) => Plan::Kill {
                at,
                guard_too: false,
            },
            Some(("kill-with-guard", Ok(at))) => Plan::Kill {
                at,
                guard_too: true,
            },
            _ => panic!("FORERUN_FAULT is not kill@N, kill-with-guard@N or count: {text}"),
        }
    }

    /// A step that changes something outside this process; call it before and after.
    pub fn step(name: &str) {
        match PLAN.get_or_init(plan) {
            Plan::Nothing => {}
            Plan::Count => log(name),
            Plan::Kill { at, guard_too } => {
                if STEPS.fetch_add(1, Ordering::SeqCst) + 1 == *at {
                    die(*guard_too);
                }
            }
        }
    }

    /// A step whose name is put together from a layer, an operation and the kind of the object.
    pub fn step_of(layer: &str, operation: &str, object: &str) {
        step(&format!("{layer}:{operation}:{object}"));
    }

    /// Says which process is the guard, for `kill-with-guard`.
    pub fn guard(pid: u32) {
        GUARD.store(i32::try_from(pid).unwrap_or(0), Ordering::SeqCst);
    }

    fn log(name: &str) {
        let Ok(path) = std::env::var("FORERUN_FAULT_LOG") else {
            return;
        };
        let written = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .and_then(|mut file| file.write_all(format!("{name}\n").as_bytes()));
        if let Err(error) = written {
            panic!("cannot log the step {name} to {path}: {error}");
        }
    }

    fn die(guard_too: bool) -> ! {
        if guard_too {
            let named = std::env::var("FORERUN_FAULT_GUARD")
                .ok()
                .and_then(|pid| pid.parse().ok());
            let pid = named.unwrap_or_else(|| GUARD.load(Ordering::SeqCst));
            if let Some(pid) = Pid::from_raw(pid) {
                // The guard may be gone already; the process dies either way.
                kill_process(pid, Signal::KILL).ok();
            }
        }
        kill_process(getpid(), Signal::KILL).ok();
        loop {
            std::thread::park();
        }
    }
}
