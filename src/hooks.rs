//! Commands of the host's operator around the instant of a backup: before the guest is frozen, after it is thawed, and when
//! the backup has ended.
//!
//! A hook is run by `/bin/sh -c`, as the user of this process, in a process group of its own: at its deadline the whole
//! group is killed. Its standard input is empty, what it prints goes to standard error. It sees what the run is about in
//! variables that begin with `FORERUN_`, and none of those that forerun itself was given: they name key files.
//!
//! What must be run after the thaw is in the journal before the first hook runs, so that the guard, the next command on the
//! target or `recover` runs it for a run that died. Better twice than not at all: it must bear that.

use std::fmt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use serde::{Deserialize, Serialize};

use crate::clock::{self, Deadline};
use crate::spawn;

/// Between two looks at a hook that runs.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// What variables of forerun's begin with.
const PREFIX: &str = "FORERUN_";

/// When a hook is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    /// Before the guest's file systems are frozen.
    PreFreeze,
    /// After they are thawed.
    PostThaw,
    /// When the backup has ended.
    PostBackup,
}

impl When {
    /// As the option and `FORERUN_HOOK` have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::PreFreeze => "pre-freeze",
            Self::PostThaw => "post-thaw",
            Self::PostBackup => "post-backup",
        }
    }
}

/// The hooks of a run.
#[derive(Debug, Clone, Default)]
pub struct Hooks {
    /// Before the freeze.
    pub pre_freeze: Option<String>,
    /// After the thaw.
    pub post_thaw: Option<String>,
    /// After the backup.
    pub post_backup: Option<String>,
    /// How long each may take.
    pub timeout: Duration,
    /// What they are told beside `FORERUN_HOOK`: names without the prefix, and values.
    pub told: Vec<(String, String)>,
}

impl Hooks {
    /// Whether any is run around the freeze.
    #[must_use]
    pub fn around_freeze(&self) -> bool {
        self.pre_freeze.is_some() || self.post_thaw.is_some()
    }

    /// The hook of a moment, when there is one.
    #[must_use]
    pub fn of(&self, when: When) -> Option<Hook> {
        let command = match when {
            When::PreFreeze => &self.pre_freeze,
            When::PostThaw => &self.post_thaw,
            When::PostBackup => &self.post_backup,
        };
        Some(Hook {
            when,
            command: command.clone()?,
            told: self.told.clone(),
            timeout_ms: u64::try_from(self.timeout.as_millis()).unwrap_or(u64::MAX),
        })
    }
}

/// One hook with all that it takes to run it, also for another process later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    when: When,
    command: String,
    told: Vec<(String, String)>,
    timeout_ms: u64,
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the {} hook `{}`", self.when.name(), self.command)
    }
}

/// A hook that failed.
#[derive(Debug, thiserror::Error)]
#[error("{hook} {why}")]
pub struct Error {
    hook: Hook,
    why: String,
}

impl Hook {
    /// Tells it something more.
    #[must_use]
    pub fn tell(mut self, name: &str, value: impl Into<String>) -> Self {
        self.told.push((name.to_owned(), value.into()));
        self
    }

    /// Runs it to its end.
    pub fn run(&self, stop: &dyn Fn() -> bool) -> Result<(), Error> {
        self.start()?.end(stop)
    }

    /// Starts it.
    pub fn start(&self) -> Result<Running, Error> {
        let mut command = Command::new("/bin/sh");
        command
            .arg("-c")
            .arg(&self.command)
            .stdin(Stdio::null())
            .stdout(Stdio::from(std::io::stderr()))
            .process_group(0);
        let given = std::env::vars_os().map(|(name, _)| name);
        for name in given.filter(|name| name.as_encoded_bytes().starts_with(PREFIX.as_bytes())) {
            command.env_remove(name);
        }
        command.env(format!("{PREFIX}HOOK"), self.when.name());
        for (name, value) in &self.told {
            command.env(format!("{PREFIX}{name}"), value);
        }
        tracing::info!(hook = self.when.name(), command = self.command, "running");
        let name = self.when.name();
        crate::fault::step(&format!("hook:{name}:before"));
        let one_at_a_time = spawn::alone();
        let child = command.spawn();
        drop(one_at_a_time);
        let child = child.map_err(|error| self.failed(format!("cannot be started: {error}")))?;
        crate::fault::step(&format!("hook:{name}:started"));
        Ok(Running {
            hook: self.clone(),
            child,
            ended: false,
            deadline: Deadline::after(Duration::from_millis(self.timeout_ms)),
        })
    }

    fn failed(&self, why: String) -> Error {
        Error {
            hook: self.clone(),
            why,
        }
    }
}

/// A hook that runs. Dropped, it is killed.
#[derive(Debug)]
pub struct Running {
    hook: Hook,
    child: Child,
    ended: bool,
    deadline: Deadline,
}

impl Running {
    /// Waits for its end. At its deadline, or when `stop` says so, its process group is killed.
    pub fn end(mut self, stop: &dyn Fn() -> bool) -> Result<(), Error> {
        loop {
            let ended = self.child.try_wait();
            let ended = ended
                .map_err(|error| self.hook.failed(format!("cannot be waited for: {error}")))?;
            if let Some(status) = ended {
                self.ended = true;
                crate::fault::step(&format!("hook:{}:ended", self.hook.when.name()));
                return match (status.code(), status.signal()) {
                    (Some(0), _) => Ok(()),
                    (Some(code), _) => Err(self.hook.failed(format!("ended with code {code}"))),
                    (_, signal) => {
                        let signal = signal.unwrap_or(0);
                        Err(self.hook.failed(format!("was ended by signal {signal}")))
                    }
                };
            }
            let why = if self.deadline.passed() {
                let seconds = self.hook.timeout_ms.div_ceil(1000);
                format!("did not end within {seconds} s and was killed")
            } else if stop() {
                "was killed: the run was interrupted".to_owned()
            } else {
                clock::sleep(LOOK_AGAIN.min(self.deadline.left()));
                continue;
            };
            self.kill();
            return Err(self.hook.failed(why));
        }
    }

    fn kill(&mut self) {
        self.ended = true;
        let group = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(group) = group {
            // It may have ended by itself just now; its children may not.
            kill_process_group(group, Signal::KILL).ok();
        }
        self.child.wait().ok();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            self.kill();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(command: &str, timeout_ms: u64) -> Hook {
        Hook {
            when: When::PreFreeze,
            command: command.to_owned(),
            told: vec![("TARGET".to_owned(), "web 1".to_owned())],
            timeout_ms,
        }
    }

    #[test]
    fn a_hook_sees_what_the_run_is_about_and_nothing_of_ours() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().display();
        let seen = hook(
            &format!("env >{path}; cat >>{path}; echo \"$0\" >>{path}"),
            5000,
        );
        seen.tell("POINT", "0123").run(&|| false).unwrap();
        let said = std::fs::read_to_string(file.path()).unwrap();
        let ours: Vec<&str> = said
            .lines()
            .filter(|line| line.starts_with(PREFIX))
            .collect();
        for line in [
            "FORERUN_HOOK=pre-freeze",
            "FORERUN_TARGET=web 1",
            "FORERUN_POINT=0123",
        ] {
            assert!(ours.contains(&line), "{line} is not in {said}");
        }
        assert_eq!(ours.len(), 3, "{said}");
        assert!(
            said.contains("\nPATH=") || said.starts_with("PATH="),
            "{said}"
        );
    }

    #[test]
    fn how_a_hook_failed_is_said() {
        let words = |hook: Hook| hook.run(&|| false).unwrap_err().to_string();
        assert_eq!(
            words(hook("exit 4", 5000)),
            "the pre-freeze hook `exit 4` ended with code 4"
        );
        let killed = words(hook("kill -9 $$", 5000));
        assert!(killed.ends_with("was ended by signal 9"), "{killed}");
        let stopped = hook("sleep 60", 60_000).run(&|| true).unwrap_err();
        assert!(stopped.to_string().contains("interrupted"), "{stopped}");
    }

    #[test]
    fn at_its_deadline_all_of_it_is_killed() {
        let directory = tempfile::tempdir().unwrap();
        let pid = directory.path().join("pid");
        let command = format!("sleep 300 & echo $! >{}; wait", pid.display());
        let begin = clock::now();
        let words = hook(&command, 300).run(&|| false).unwrap_err().to_string();
        assert!(
            words.ends_with("did not end within 1 s and was killed"),
            "{words}"
        );
        assert!(clock::now() - begin < Duration::from_secs(20));
        let child = std::fs::read_to_string(&pid).unwrap();
        let gone = Deadline::after(Duration::from_secs(10));
        let status = format!("/proc/{}/stat", child.trim());
        // Nobody may have reaped it yet.
        while std::fs::read_to_string(&status).is_ok_and(|stat| !stat.contains(") Z ")) {
            assert!(!gone.passed(), "the hook's child lives on");
            clock::sleep(Duration::from_millis(5));
        }
    }
}
