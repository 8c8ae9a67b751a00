//! The guest agent around the instant: freeze, the one transaction, thaw; each with a deadline.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Cut, NotQuiesced, millis};
use crate::backup::{Quiesce, Runner};
use crate::clock::{self, Deadline};
use crate::exit::{Failure, Kind};
use crate::qmp::agent::{Address, Agent, Status};
use crate::qmp::freeze::Freeze;
use crate::vm::Hold;

/// How long they may take to thaw while the block snapshot is held.
pub(super) const THAW: Duration = Duration::from_secs(3);
/// How long somebody else's freeze is waited for.
const FROZEN_WAIT: Duration = Duration::from_secs(30);

impl Runner {
    /// The agent, when the guest is to be quiesced and nobody else has it frozen.
    pub(super) fn agent(&mut self, hold: &Hold) -> Result<Option<(Agent, Address)>> {
        let wanted = self.options.quiesce;
        let of_domain = match (&self.vm.domain, wanted) {
            (Some(domain), Quiesce::Auto | Quiesce::Always) => domain.agent_connected()?,
            _ => None,
        };
        let address = match (&self.options.agent, of_domain, wanted) {
            (_, _, Quiesce::Never) | (None, None, Quiesce::Auto) => return Ok(None),
            (Some(socket), ..) => Address::Socket(socket.clone()),
            (None, Some(false), Quiesce::Auto) => {
                let message = "no guest agent is connected, so the guest is not quiesced";
                self.warnings.push(message.to_owned());
                return Ok(None);
            }
            (None, Some(_), _) => Address::Domain,
            (None, None, Quiesce::Always) => {
                let message = "the guest is to be quiesced, but there is no agent to ask";
                return Err(Failure::hinted(
                    Kind::Usage,
                    message,
                    "name its socket with `--agent SOCKET`; a domain needs a channel `org.qemu.guest_agent.0`",
                ));
            }
        };
        let deadline = Deadline::after(FROZEN_WAIT);
        loop {
            let status = Agent::connect(&address, &hold.monitor)
                .and_then(|mut agent| Ok((agent.status()?, agent)));
            match status {
                Ok((Status::Thawed, agent)) => return Ok(Some((agent, address))),
                Ok((Status::Frozen, _)) if deadline.passed() => {
                    let message = "the guest's file systems are frozen by somebody else";
                    return Err(Failure::hinted(
                        Kind::Busy,
                        message,
                        "thaw them, or wait for the one who froze them",
                    ));
                }
                Ok((Status::Frozen, _)) => clock::sleep(Duration::from_millis(500)),
                Err(error) if wanted == Quiesce::Auto => {
                    self.warnings.push(format!(
                        "the guest agent does not answer, so the guest is not quiesced: {error}"
                    ));
                    return Ok(None);
                }
                Err(error) => return Err(error).context("the guest agent does not answer"),
            }
        }
    }

    /// The instant itself.
    pub(super) fn cut(
        &mut self,
        hold: &mut Hold,
        freeze: &Freeze,
        agent: Option<(Agent, Address)>,
    ) -> Result<(Cut, Instant)> {
        let frozen_at = clock::now();
        let mut agent = self.quiesce(agent)?;
        let cut = freeze.transact(&mut hold.monitor);
        let (ended, at) = (clock::now(), clock::utc_now());
        let mut quiesced = false;
        let mut quiesced_ms = None;
        if let Some(agent) = &mut agent {
            quiesced = cut.is_ok() && agent.status().is_ok_and(|status| status == Status::Frozen);
            // An agent that hangs here is not waited for: the block snapshot is given up, and thawing goes on after that.
            match agent.thaw(THAW).and_then(|_| agent.status()) {
                Ok(Status::Thawed) => {}
                Ok(Status::Frozen) => {
                    return Err(anyhow::anyhow!("the guest's file systems stay frozen"));
                }
                Err(error) => return Err(error).context("thaw the guest's file systems"),
            }
            quiesced_ms = Some(millis(clock::now() - frozen_at));
        }
        let took = match cut {
            Err(crate::qmp::Error::Command { description, .. })
                if description.contains("in use by block job") =>
            {
                return Err(Failure::hinted(
                    Kind::Busy,
                    format!("somebody else's block job is on a disk: {description}"),
                    "wait for its end or cancel it, then run the command again",
                ));
            }
            cut => cut.context("the freeze")?,
        };
        if agent.is_some() && !quiesced {
            let message = "the guest thawed its file systems before the instant";
            if self.options.quiesce == Quiesce::Always {
                return Err(Failure::plain(Kind::Failed, message));
            }
            self.warnings.push(message.to_owned());
        }
        let cut = Cut {
            at,
            freeze_ms: millis(took),
            released_ms: 0,
            quiesced_ms,
            scratch_bytes: 0,
            quiesced,
        };
        Ok((cut, ended))
    }

    fn quiesce(&self, agent: Option<(Agent, Address)>) -> Result<Option<Agent>> {
        let Some((mut agent, _)) = agent else {
            return Ok(None);
        };
        match agent.freeze(self.options.freeze_timeout) {
            Ok(_) => Ok(Some(agent)),
            Err(error) => {
                // A freeze that was not answered may be executed yet: what thaws it stands behind it in the queue.
                agent.thaw_later().ok();
                Err(NotQuiesced(error.to_string()).into())
            }
        }
    }
}
