//! Named steps at which a test may end the process, and nothing at all without the cargo feature `fault-injection`.
//!
//! With the feature on, `FORERUN_FAULT` says what happens: `count` appends each step's name as a line to the file that
//! `FORERUN_FAULT_LOG` names, so that a test knows which steps there are. `ACTION@STEP` acts at one step and appends that
//! step's name to the log first, with the word `guarded` while a guard watches. A step is a number, counted from 1, or `NAME#K`, the K-th step of that name.
//!
//! | action | what happens to this process |
//! |---|---|
//! | `kill` | SIGKILL |
//! | `kill-with-guard` | SIGKILL to the guard process first, then to this one |
//! | `stop` | SIGSTOP: it hangs, and whoever knows it may let it go on |
//! | `term` | SIGTERM |

/// A step that changes something outside this process; call it before and after.
#[cfg(not(feature = "fault-injection"))]
#[inline]
pub fn step(_name: &str) {}

/// A step whose name is put together from a layer, an operation and the kind of the object.
#[cfg(not(feature = "fault-injection"))]
#[inline]
pub fn step_of(_layer: &str, _operation: &str, _object: &str) {}

/// Says which process is the guard, for `kill-with-guard`; 0 when there is none any more.
#[cfg(not(feature = "fault-injection"))]
#[inline]
pub fn guard(_pid: u32) {}

/// Keeps a child from acting on this process's plan: the guard has steps of the same names.
#[cfg(not(feature = "fault-injection"))]
#[inline]
pub fn spare(_child: &mut std::process::Command) {}

#[cfg(feature = "fault-injection")]
pub use on::{guard, spare, step, step_of};

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
        Count,
        Act {
            signal: Signal,
            guard_too: bool,
            at: u64,
            name: Option<String>,
        },
    }

    fn plan() -> Plan {
        let Ok(text) = std::env::var("FORERUN_FAULT") else {
            return Plan::Nothing;
        };
        if text == "count" {
            return Plan::Count;
        }
        let Some(plan) = parse(&text) else {
            panic!("FORERUN_FAULT is neither count nor ACTION@STEP: {text}");
        };
        plan
    }

    fn parse(text: &str) -> Option<Plan> {
        let (action, step) = text.split_once('@')?;
        let (signal, guard_too) = match action {
            "kill" => (Signal::KILL, false),
            "kill-with-guard" => (Signal::KILL, true),
            "stop" => (Signal::STOP, false),
            "term" => (Signal::TERM, false),
            _ => return None,
        };
        let (name, at) = match step.split_once('#') {
            Some((name, at)) => (Some(name.to_owned()), at),
            None => (None, step),
        };
        let at = at.parse().ok()?;
        Some(Plan::Act {
            signal,
            guard_too,
            at,
            name,
        })
    }

    /// A step that changes something outside this process; call it before and after.
    pub fn step(name: &str) {
        match PLAN.get_or_init(plan) {
            Plan::Nothing => {}
            Plan::Count => log(name),
            Plan::Act {
                signal,
                guard_too,
                at,
                name: wanted,
            } => {
                let counts = wanted.as_ref().is_none_or(|wanted| wanted == name);
                if counts && STEPS.fetch_add(1, Ordering::SeqCst) + 1 == *at {
                    let guarded = GUARD.load(Ordering::SeqCst) != 0;
                    log(&format!("{name}{}", if guarded { " guarded" } else { "" }));
                    act(*signal, *guard_too);
                }
            }
        }
    }

    /// A step whose name is put together from a layer, an operation and the kind of the object.
    pub fn step_of(layer: &str, operation: &str, object: &str) {
        step(&format!("{layer}:{operation}:{object}"));
    }

    /// Says which process is the guard, for `kill-with-guard`; 0 when there is none any more.
    pub fn guard(pid: u32) {
        GUARD.store(i32::try_from(pid).unwrap_or(0), Ordering::SeqCst);
    }

    /// Keeps a child from acting on this process's plan: the guard has steps of the same names.
    pub fn spare(child: &mut std::process::Command) {
        child.env_remove("FORERUN_FAULT");
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

    fn act(signal: Signal, guard_too: bool) {
        if guard_too && let Some(pid) = Pid::from_raw(GUARD.load(Ordering::SeqCst)) {
            // The guard may be gone already; the process dies either way.
            kill_process(pid, Signal::KILL).ok();
        }
        kill_process(getpid(), signal).ok();
        if signal == Signal::KILL {
            loop {
                std::thread::park();
            }
        }
    }
}
