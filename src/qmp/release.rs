//! Taking back what a run put into a VM. The same code serves the end of every batch and freeze, the guard that steps in
//! for a dead run, and `recover`: what is made is first written down as [`Leftover`]s, and [`release`] undoes whatever of
//! it is there, in an order that frees the guest first. It may be repeated at any time.

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use qapi::qmp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::agent::{self, Address};
use super::command::{call, flag, job_status, jobs, list, text};
use super::managed::{self, Managed};
use super::overlay::{self, Overlay};
use super::{Error, Monitor, Result};
use crate::clock::{self, Deadline};
use crate::unix_path::ShortPath;

/// How long QEMU may take to let go of a job or an export.
const LET_GO: Duration = Duration::from_secs(60);
/// How long a server that is ours may take to greet: a starved QEMU must not be taken for somebody else's.
const GREETING: Duration = Duration::from_secs(20);
/// Between two looks at a job or an export that is going away.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// One thing that a run put into a VM, written down before it is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Leftover {
    /// A guest whose file systems may be frozen.
    Frozen {
        /// The guest agent.
        agent: Address,
    },
    /// A block job: a fleecing job, or one that formats a scratch.
    Job {
        /// Its id.
        id: String,
    },
    /// A guest that must not stay stopped by a full scratch: it was running before.
    Running,
    /// An external snapshot that is to be committed back.
    Overlay(Overlay),
    /// An external snapshot that the VM's manager is to commit.
    Managed(Managed),
    /// An NBD export.
    Export {
        /// Its id.
        id: String,
    },
    /// The NBD server, listening on a socket that we passed.
    Server {
        /// The path of that socket.
        socket: PathBuf,
        /// The name that the descriptor was passed under.
        listener: String,
    },
    /// A block node.
    Node {
        /// Its name.
        name: String,
    },
    /// A file that QEMU opens by its path, until it has opened it.
    File {
        /// Its path.
        path: PathBuf,
    },
    /// A set of passed descriptors.
    FdSet {
        /// Its number.
        id: i64,
    },
}

/// What a release did, for reports.
#[derive(Debug, Default, Clone, Serialize)]
pub struct Released {
    /// What was found and taken back.
    pub removed: Vec<String>,
    /// The VM was stopped by a full scratch and goes on.
    pub resumed: bool,
    /// Agents that do not say that their guests' file systems are thawed.
    pub unthawed: Vec<Address>,
    /// Overlays that were long in use, in words.
    pub slow: Vec<String>,
}

/// Frees the guest: ends the jobs that hold up its writes, lets it run on, thaws it. The first half of [`release`].
/// `patience` is how long an agent that does not answer is asked again.
pub fn free_guest(
    monitor: &mut dyn Monitor,
    left: &[Leftover],
    patience: Duration,
    done: &mut Released,
) -> Result<()> {
    let ids: Vec<&str> = left
        .iter()
        .filter_map(|item| {
            if let Leftover::Job { id } = item {
                Some(id.as_str())
            } else {
                None
            }
        })
        .collect();
    let ended = end_jobs(monitor, &ids, done).and_then(|()| go_on(monitor, left, done));
    for item in left {
        if let Leftover::Frozen { agent } = item {
            match agent::thaw_until_thawed(agent, monitor, patience) {
                Ok(true) => done.removed.push("frozen guest file systems".to_owned()),
                Ok(false) => {}
                Err(_) => done.unthawed.push(agent.clone()),
            }
        }
    }
    ended
}

/// A VM that was running and that a full scratch has stopped goes on. That comes before the thaw: a guest that is stopped
/// cannot thaw.
fn go_on(monitor: &mut dyn Monitor, left: &[Leftover], done: &mut Released) -> Result<()> {
    if left.contains(&Leftover::Running) {
        let status = call::<qmp::query_status>(monitor, json!({}))?;
        if text(&status, "status") == "io-error" {
            call::<qmp::cont>(monitor, json!({}))?;
            done.resumed = true;
        }
    }
    Ok(())
}

/// Takes back everything of `left` that is there.
pub fn release(
    monitor: &mut dyn Monitor,
    left: &[Leftover],
    patience: Duration,
) -> Result<Released> {
    let mut done = Released::default();
    free_guest(monitor, left, patience, &mut done)?;
    release_rest(monitor, left, &mut done)?;
    Ok(done)
}

/// The second half of [`release`]: what the guest does not feel, and the overlays, whose commit takes its time.
pub fn release_rest(
    monitor: &mut dyn Monitor,
    left: &[Leftover],
    done: &mut Released,
) -> Result<()> {
    let exports = left.iter().filter_map(|item| match item {
        Leftover::Export { id } => Some(id.as_str()),
        _ => None,
    });
    delete_exports(monitor, &exports.collect::<Vec<_>>(), done)?;
    for item in left {
        if let Leftover::Server { socket, listener } = item {
            stop_server(monitor, socket, listener, done)?;
        }
    }
    // One that cannot be committed keeps no other from it.
    let mut failed = None;
    for item in left {
        let committed = match item {
            Leftover::Overlay(overlay) => Some(overlay::commit(monitor, overlay)),
            Leftover::Managed(overlay) => monitor
                .manager()
                .map(|manager| managed::commit(&*manager, overlay)),
            _ => None,
        };
        if let Some(committed) = committed {
            match committed {
                Ok(committed) => {
                    done.removed.extend(committed.what);
                    done.slow.extend(committed.slow);
                }
                Err(error) => {
                    failed.get_or_insert(error);
                }
            }
        }
    }
    if let Some(error) = failed {
        return Err(error);
    }
    for item in left {
        if let Leftover::Node { name } = item {
            delete_node(monitor, name, done)?;
        }
    }
    for item in left {
        if let Leftover::File { path } = item
            && std::fs::remove_file(path).is_ok()
        {
            done.removed.push(format!("file {}", path.display()));
        }
        if let Leftover::FdSet { id } = item {
            match call::<qmp::remove_fd>(monitor, json!({ "fdset-id": id })) {
                Ok(_) => done.removed.push(format!("descriptor set {id}")),
                Err(error) if error.refused() => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Ends jobs and waits until they are gone.
pub fn end_jobs(monitor: &mut dyn Monitor, ids: &[&str], done: &mut Released) -> Result<()> {
    if ids.is_empty() {
        return Ok(());
    }
    let deadline = Deadline::after(LET_GO);
    let mut first = true;
    loop {
        let there: Vec<(String, String)> = jobs(monitor)?
            .iter()
            .map(|job| (text(job, "id").to_owned(), text(job, "status").to_owned()))
            .filter(|(id, _)| ids.contains(&id.as_str()))
            .collect();
        if there.is_empty() {
            return Ok(());
        }
        if deadline.passed() {
            let command = format!("end job {}", there[0].0);
            return Err(Error::Timeout {
                command,
                seconds: LET_GO.as_secs(),
            });
        }
        for (id, status) in there {
            if first {
                done.removed.push(format!("job {id}"));
            }
            let ended = match status.as_str() {
                "concluded" => call::<qmp::job_dismiss>(monitor, json!({ "id": id })),
                "aborting" | "null" | "pending" => continue,
                _ => call::<qmp::block_job_cancel>(monitor, json!({ "device": id, "force": true })),
            };
            match ended {
                Err(error) if !error.refused() => return Err(error),
                _ => {}
            }
        }
        first = false;
        if job_status(monitor, ids[0])?.is_some() {
            clock::sleep(LOOK_AGAIN);
        }
    }
}

/// Deletes exports and waits until they are gone.
fn delete_exports(monitor: &mut dyn Monitor, ids: &[&str], done: &mut Released) -> Result<()> {
    if ids.is_empty() {
        return Ok(());
    }
    let deadline = Deadline::after(LET_GO);
    let mut asked = BTreeSet::new();
    loop {
        let exports = list::<qmp::query_block_exports>(monitor, json!({}))?;
        let ours = |export: &&Value| ids.contains(&text(export, "id"));
        let there: Vec<&Value> = exports.iter().filter(ours).collect();
        let Some(first) = there.first() else {
            return Ok(());
        };
        if deadline.passed() {
            let command = format!("delete export {}", text(first, "id"));
            return Err(Error::Timeout {
                command,
                seconds: LET_GO.as_secs(),
            });
        }
        for export in there {
            let id = text(export, "id");
            if asked.contains(id) && flag(export, "shutting-down") {
                continue;
            }
            match call::<qmp::block_export_del>(monitor, json!({ "id": id, "mode": "hard" })) {
                Err(error) if !error.refused() => return Err(error),
                _ => {}
            }
            if asked.insert(id.to_owned()) {
                done.removed.push(format!("export {id}"));
            }
        }
        clock::sleep(LOOK_AGAIN);
    }
}

/// Stops the NBD server when it is the one that we started and no export is left on it.
fn stop_server(
    monitor: &mut dyn Monitor,
    socket: &Path,
    listener: &str,
    done: &mut Released,
) -> Result<()> {
    // A descriptor that no server took still listens, and would be mistaken for one that hangs. Where QEMU makes the socket
    // itself there is none.
    if monitor.place().is_none() {
        match call::<qmp::closefd>(monitor, json!({ "fdname": listener })) {
            Err(error) if !error.refused() => return Err(error),
            _ => {}
        }
    }
    if greets(socket) {
        let exports = list::<qmp::query_block_exports>(monitor, json!({}))?;
        if exports.iter().any(|export| text(export, "type") == "nbd") {
            tracing::warn!("our NBD server stays up: others' exports are on it");
        } else {
            match call::<qmp::nbd_server_stop>(monitor, json!({})) {
                Ok(_) => done.removed.push("NBD server".to_owned()),
                Err(error) if error.refused() => {}
                Err(error) => return Err(error),
            }
        }
    }
    if let Err(error) = std::fs::remove_file(socket)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(%error, socket = %socket.display(), "cannot remove the socket");
    }
    Ok(())
}

/// Whether an NBD server answers on the socket that we made: then the VM's server is ours.
fn greets(socket: &Path) -> bool {
    use std::io::Read;
    let connected = ShortPath::of(socket).and_then(|short| UnixStream::connect(short.path()));
    let Ok(mut stream) = connected else {
        return false;
    };
    let mut magic = [0; 8];
    stream.set_read_timeout(Some(GREETING)).is_ok()
        && stream.read_exact(&mut magic).is_ok()
        && &magic == b"NBDMAGIC"
}

fn delete_node(monitor: &mut dyn Monitor, name: &str, done: &mut Released) -> Result<()> {
    let deadline = Deadline::after(LET_GO);
    loop {
        match call::<qmp::blockdev_del>(monitor, json!({ "node-name": name })) {
            Ok(_) => {
                done.removed.push(format!("node {name}"));
                return Ok(());
            }
            Err(Error::Command { description, .. })
                if description.contains("Failed to find node") =>
            {
                return Ok(());
            }
            Err(Error::Command { .. }) => {
                if deadline.passed() {
                    let command = format!("delete node {name}");
                    return Err(Error::Timeout {
                        command,
                        seconds: LET_GO.as_secs(),
                    });
                }
                clock::sleep(LOOK_AGAIN);
            }
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::overlay::FileVersion;
    use super::*;

    #[test]
    fn everything_that_is_written_down_can_be_read_again() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let id = "forerun-01234567-89abcdef-j0".to_owned();
        let overlay = Overlay {
            disk: "vda".to_owned(),
            base: "node".to_owned(),
            node: id.clone(),
            job: id.clone(),
            file: file.path().to_path_buf(),
            base_file: file.path().display().to_string(),
            base_version: FileVersion::of(file.path()),
            committing: false,
            deadline_ms: 1,
        };
        assert!(overlay.base_version.is_some());
        let left = vec![
            Leftover::Frozen {
                agent: Address::Socket("/agent".into()),
            },
            Leftover::Frozen {
                agent: Address::Domain,
            },
            Leftover::Job { id: id.clone() },
            Leftover::Running,
            Leftover::Managed(Managed {
                disk: overlay.disk.clone(),
                file: overlay.file.clone(),
                deadline_ms: 1,
            }),
            Leftover::Overlay(overlay),
            Leftover::Export { id: id.clone() },
            Leftover::Server {
                socket: "/socket".into(),
                listener: id.clone(),
            },
            Leftover::Node { name: id },
            Leftover::File {
                path: "/file".into(),
            },
            Leftover::FdSet { id: i64::MAX },
        ];
        let bytes = serde_json::to_vec(&left).unwrap();
        assert_eq!(
            serde_json::from_slice::<Vec<Leftover>>(&bytes).unwrap(),
            left
        );
    }
}
