//! The guard: a small process of the same binary that frees the guest when the main one dies, or hangs past its deadline,
//! between the freeze and the release.
//!
//! It inherits the monitor's connection (a QMP socket serves one client, and the dead one's is it; libvirt serves many, so
//! for a domain the guard connects by itself), the target's lock, and one end of a socket pair. A byte `D` on that pair is the dismissal; its end without one is the main process's
//! death. The guard runs in a process session of its own, in a systemd scope of its own where systemd runs, so that what
//! ends the main process does not end it.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::process::{Pid, Signal};

use crate::clock::{self, Deadline};
use crate::hoststate::{Journal, Lock};
use crate::libvirt;
use crate::qmp::agent::THAW_FOR;
use crate::qmp::socket::QmpSocket;
use crate::qmp::{Handover, Monitor};
use crate::{settle, spawn};

/// How long a new guard may take to say that it is there. The guest is not held yet, so a slow host gets its time.
const READY: Duration = Duration::from_secs(60);
/// The deadline of a guard that watches for a death only.
const FOR_EVER: Duration = Duration::from_secs(365 * 86_400);
/// The hidden command that a guard is started with.
pub const COMMAND: &str = "guard";

/// The main process's side of its guard. Dropped without [`dismiss`](Self::dismiss), the guard takes over.
#[derive(Debug)]
pub struct Guard {
    pair: UnixStream,
    child: Child,
}

impl Guard {
    /// Starts a guard over a monitor and what the journal lists, and waits until it watches.
    pub fn start(
        monitor: &dyn Monitor,
        journal: &Path,
        lock: &Lock,
        deadline: Duration,
    ) -> Result<Self> {
        let mut binary = std::env::current_exe().context("find this program's own file")?;
        if !binary.exists() {
            // It was replaced by a newer one while we run; what runs is still there.
            binary = "/proc/self/exe".into();
        }
        let scoped = scope_command(&binary);
        if let Some(command) = scoped
            && let Ok(guard) = Self::start_with(command, monitor, journal, lock, deadline)
        {
            return Ok(guard);
        }
        Self::start_with(Command::new(binary), monitor, journal, lock, deadline)
    }

    fn start_with(
        mut command: Command,
        monitor: &dyn Monitor,
        journal: &Path,
        lock: &Lock,
        deadline: Duration,
    ) -> Result<Self> {
        let (pair, theirs) = UnixStream::pair().context("make the guard's socket pair")?;
        let mut domain = Vec::new();
        let inherited = match monitor.handover() {
            Handover::Descriptor(monitor) => {
                Stdio::from(monitor.try_clone_to_owned().context("share the monitor")?)
            }
            Handover::Domain { uri, uuid } => {
                domain.extend(["--connect", uri, "--domain", uuid]);
                Stdio::null()
            }
        };
        let one_at_a_time = spawn::alone();
        let held = lock.file().try_clone().context("share the target's lock")?;
        // The only descriptor that the child gets without being told: the lock, held until it ends.
        let flags = fcntl_getfd(&held).context("share the target's lock")?;
        fcntl_setfd(&held, flags - FdFlags::CLOEXEC).context("share the target's lock")?;
        crate::fault::spare(&mut command);
        let child = command
            .arg(COMMAND)
            .arg("--journal")
            .arg(journal)
            .arg("--deadline-ms")
            .arg(deadline.as_millis().to_string())
            .arg("--main")
            .arg(std::process::id().to_string())
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .args(domain)
            .stdout(inherited)
            .spawn()
            .context("start the guard");
        drop(held);
        drop(one_at_a_time);
        let mut guard = Self {
            pair,
            child: child?,
        };
        guard
            .pair
            .set_read_timeout(Some(READY))
            .context("wait for the guard")?;
        let mut ready = [0];
        if let Err(error) = guard.pair.read_exact(&mut ready) {
            guard.child.kill().ok();
            guard.child.wait().ok();
            return Err(error).context("the guard did not report that it watches");
        }
        crate::fault::guard(u32::from_be_bytes(guard.read_pid()?));
        crate::fault::step("guard:start:after");
        Ok(guard)
    }

    fn read_pid(&mut self) -> Result<[u8; 4]> {
        let mut pid = [0; 4];
        self.pair
            .read_exact(&mut pid)
            .context("hear the guard's process id")?;
        Ok(pid)
    }

    /// What comes now takes as long as it takes (a commit of an overlay that the guard would only repeat): the guard
    /// watches for our death, no longer for the time.
    pub fn lift_deadline(&mut self) -> Result<()> {
        self.allow(FOR_EVER)
    }

    /// So much time from now on, whatever it was before.
    pub fn allow(&mut self, time: Duration) -> Result<()> {
        let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let mut word = b"T".to_vec();
        word.extend(millis.to_be_bytes());
        self.pair
            .write_all(&word)
            .context("set the guard's deadline")
    }

    /// Everything is released: the guard goes.
    pub fn dismiss(mut self) -> Result<()> {
        crate::fault::step("guard:dismiss:before");
        self.pair.write_all(b"D").context("dismiss the guard")?;
        self.child.wait().context("wait for the guard")?;
        crate::fault::guard(0);
        crate::fault::step("guard:dismiss:after");
        Ok(())
    }
}

/// `systemd-run --scope` where systemd runs, so that stopping our unit does not stop the guard.
fn scope_command(binary: &Path) -> Option<Command> {
    if !Path::new("/run/systemd/system").is_dir() || binary.starts_with("/proc/self") {
        return None;
    }
    let mut command = Command::new("systemd-run");
    if !rustix::process::geteuid().is_root() {
        command.arg("--user");
    }
    command
        .args(["--scope", "--quiet", "--collect", "--"])
        .arg(binary);
    Some(command)
}

/// What a guard watches.
#[derive(Debug)]
pub struct Watched<'a> {
    /// What the run has in the VM.
    pub journal: &'a Path,
    /// After so long the run counts as hung.
    pub deadline: Duration,
    /// The run's process id.
    pub main: i32,
    /// URI and UUID of a domain; without them standard output is the monitor.
    pub domain: Option<(&'a str, &'a str)>,
}

/// The guard's own life.
pub fn run(watched: &Watched<'_>) -> Result<()> {
    let (journal, main) = (watched.journal, watched.main);
    rustix::process::setsid().ok();
    let mut deadline = Deadline::after(watched.deadline);
    let pair = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("take the socket pair")?;
    let mut monitor: Box<dyn Monitor> = if let Some((uri, uuid)) = watched.domain {
        libvirt::monitor(uri, uuid)?
    } else {
        let monitor = std::io::stdout()
            .as_fd()
            .try_clone_to_owned()
            .context("take the monitor")?;
        Box::new(QmpSocket::inherit(UnixStream::from(monitor))?)
    };
    let mut pair = UnixStream::from(pair);
    let own = std::process::id().to_be_bytes();
    // A main process that died meanwhile hears nothing; its end is seen below.
    pair.write_all(&[b'R', own[0], own[1], own[2], own[3]]).ok();
    if dismissed(&mut pair, &mut deadline)? {
        return Ok(());
    }
    if deadline.passed() {
        end_main(main, &mut pair)?;
    }
    if !journal.exists() {
        // The main process had released everything.
        return Ok(());
    }
    let mut journal = Journal::load(journal.to_path_buf())?;
    let manager = monitor.manager();
    let taken = settle::take_back(
        &mut journal,
        Some(&mut monitor),
        manager.as_deref(),
        THAW_FOR,
    )?;
    for hook in &taken.failed_hooks {
        tracing::error!("{hook}");
    }
    tracing::warn!(removed = ?taken.removed, "the guard released the VM for a dead run");
    Ok(())
}

/// Waits for the dismissal; `false` when the main process died or the deadline passed first.
fn dismissed(pair: &mut UnixStream, deadline: &mut Deadline) -> Result<bool> {
    loop {
        let left = deadline.left().max(Duration::from_millis(1));
        pair.set_read_timeout(Some(left))
            .context("watch the main process")?;
        let mut byte = [0];
        match pair.read(&mut byte) {
            Ok(1) if byte == *b"D" => return Ok(true),
            Ok(1) if byte == *b"T" => {
                let mut millis = [0; 8];
                // It comes in one piece, unless the main process died.
                if pair.read_exact(&mut millis).is_err() {
                    return Ok(false);
                }
                let time = Duration::from_millis(u64::from_be_bytes(millis));
                *deadline = Deadline::after(time.min(FOR_EVER));
            }
            Ok(0) => return Ok(false),
            Ok(_) => bail!("an unknown word from the main process"),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                ) =>
            {
                if deadline.passed() {
                    return Ok(false);
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(false),
            Err(error) => return Err(error).context("watch the main process"),
        }
    }
}

/// A main process that hangs with the guest in its hands is ended, so that two do not talk on one connection.
fn end_main(main: i32, pair: &mut UnixStream) -> Result<()> {
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get());
    if parent == Some(main)
        && let Some(pid) = Pid::from_raw(main)
    {
        tracing::error!("the main process hangs while the VM is held: ending it");
        rustix::process::kill_process(pid, Signal::KILL).context("end the hanging process")?;
    }
    let gone = Deadline::after(Duration::from_secs(5));
    while !gone.passed() {
        let mut byte = [0];
        pair.set_read_timeout(Some(Duration::from_millis(100)))
            .context("watch the main process")?;
        if matches!(pair.read(&mut byte), Ok(0)) {
            return Ok(());
        }
        clock::sleep(Duration::from_millis(5));
    }
    bail!("the hanging main process does not end")
}
