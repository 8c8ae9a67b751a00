//! Connecting to an export without holding the guest up.
//!
//! QEMU drains its disks for a transaction, for a guest's reset, for an operator's command: it waits until no request is under
//! way. A client whose negotiation ends just then is waited for as well, and that wait lasts as long as the connection does: the
//! main loop spins, and no disk takes a request (seen with QEMU 10.0; `nbd/server.c` marks the clients that there are when a drain
//! begins, and then waits for those that there are).

use std::time::Duration;

use anyhow::Result;
use crossbeam_channel::{RecvTimeoutError, bounded};
use qapi::qmp;
use serde_json::json;

use crate::exit::{Failure, Kind};
use crate::nbd::{Client, Endpoint};
use crate::qmp::Monitor;
use crate::qmp::command::list;

/// A QEMU that does not answer for so long is waiting for us, or for a disk that is as slow.
const ANSWERS: Duration = Duration::from_secs(2);

/// The connection was hung up to free QEMU. It may be made again.
#[derive(Debug, thiserror::Error)]
#[error("QEMU was waiting for its disks when a connection was made, and did not go on")]
pub struct Drained;

/// Connects, and asks QEMU something. When it does not answer, the connection is hung up, which frees it.
pub fn connect(monitor: &mut dyn Monitor, endpoint: &Endpoint) -> Result<Client> {
    let client = endpoint.connect()?;
    let line = client.line()?;
    let (answered, answers) = bounded::<()>(0);
    let hung_up = std::thread::scope(|scope| {
        let watch = scope.spawn(move || {
            let late = answers.recv_timeout(ANSWERS) == Err(RecvTimeoutError::Timeout);
            if late {
                line.hang_up();
            }
            late
        });
        let asked = list::<qmp::query_block_exports>(monitor, json!({}));
        drop(answered);
        let hung_up = watch.join().unwrap_or(true);
        asked.map(|_| hung_up)
    })?;
    if hung_up {
        let failure = Failure::hinted(
            Kind::Busy,
            "the connection was hung up to free it",
            "run the command again",
        );
        return Err(failure.context(Drained));
    }
    Ok(client)
}
