//! What is done around the instant: the host's hooks, the guest agent's freeze, the one transaction, thaw; each with a
//! deadline. Where several targets are backed up together, they meet before each of these steps.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Cut, GUARD_GRACE, GivenUp, NotQuiesced, millis};
use crate::backup::together::Stage;
use crate::backup::turn::FREEZE_WAIT;
use crate::backup::{Quiesce, Runner};
use crate::clock::{self, Deadline};
use crate::exit::{Failure, Kind};
use crate::guard::Guard;
use crate::hooks::When;
use crate::qmp::agent::{Address, Agent, Status};
use crate::qmp::freeze::Freeze;
use crate::vm::Hold;

/// How long they may take to thaw while the block snapshot is held.
pub(super) const THAW: Duration = Duration::from_secs(3);
/// How long somebody else's freeze is waited for.
const FROZEN_WAIT: Duration = Duration::from_secs(30);
/// How long a target that is prepared waits for the others; its guest does not feel it.
const PREPARED_WAIT: Duration = Duration::from_secs(15);
/// How long a guest that is frozen waits for the others, beyond the time that each has for its freeze.
const TOGETHER_WAIT: Duration = Duration::from_secs(2);

/// A guest whose agent answers.
pub(super) type Answering = (Agent, Address);

impl Runner {
    /// The agent, when the guest is to be quiesced and nobody else has it frozen.
    pub(super) fn agent(&mut self, hold: &Hold) -> Result<Option<Answering>> {
        let wanted = self.options.quiesce;
        let of_domain = match (&self.vm.domain, wanted) {
            (Some(domain), Quiesce::Auto | Quiesce::Always) => domain.agent_connected()?,
            _ => None,
        };
        let address = match (&self.options.agent, of_domain, wanted) {
            (_, _, Quiesce::Never) => {
                // Perhaps because it did not work a moment ago.
                let never = || "it was not asked for".to_owned();
                self.not_quiesced.get_or_insert_with(never);
                return Ok(None);
            }
            (Some(socket), ..) => Address::Socket(socket.clone()),
            (None, None, Quiesce::Auto) => {
                // That is how this VM is: nothing to warn of every night.
                self.not_quiesced = Some("the VM has no channel to a guest agent".to_owned());
                return Ok(None);
            }
            (None, Some(false), Quiesce::Auto) => {
                self.fall_back("no guest agent is connected, so the guest is not quiesced");
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
                    self.fall_back(&format!(
                        "the guest agent does not answer, so the guest is not quiesced: {error}"
                    ));
                    return Ok(None);
                }
                Err(error) => return Err(error).context("the guest agent does not answer"),
            }
        }
    }

    /// The point will be crash-consistent although it need not have been.
    pub(super) fn fall_back(&mut self, why: &str) {
        self.warnings.push(why.to_owned());
        self.not_quiesced = Some(why.to_owned());
    }

    /// How long the guard lets pass until the file systems are about to be frozen.
    pub(super) fn until_the_cut(&self) -> Duration {
        let mut time = GUARD_GRACE + self.until_due();
        if self.options.hooks.around_freeze() {
            time += self.options.hooks.timeout;
        }
        if self.seat.is_some() {
            time += PREPARED_WAIT + self.wait_of(Stage::Ready).unwrap_or_default();
        }
        time
    }

    /// And from then until the guest is free.
    pub(super) fn held_at_most(&self) -> Duration {
        let mut time = self.options.deadline + GUARD_GRACE + self.options.freeze_timeout + THAW;
        if self.seat.is_some() {
            time += self.wait_of(Stage::Frozen).unwrap_or_default() + TOGETHER_WAIT;
        }
        time
    }

    fn wait_of(&self, stage: Stage) -> Option<Duration> {
        match stage {
            Stage::Copied | Stage::Close | Stage::Released => None,
            Stage::Prepared => Some(PREPARED_WAIT),
            Stage::Ready => Some(TOGETHER_WAIT + self.options.hooks.timeout),
            Stage::Frozen => Some(TOGETHER_WAIT + self.options.freeze_timeout),
            Stage::Cut => Some(TOGETHER_WAIT),
        }
    }

    /// Waits for the other targets of the common instant, if there are any.
    pub(in crate::backup) fn meet(&self, stage: Stage) -> Result<()> {
        let Some(seat) = &self.seat else {
            return Ok(());
        };
        let limit = self.wait_of(stage);
        seat.meet(stage, limit, &|| self.check_interrupt())
    }

    /// The hook that comes before the freeze. From here on the one after the thaw is owed; the journal says so already.
    fn pre_freeze(&self) -> Result<()> {
        let Some(hook) = self.options.hooks.of(When::PreFreeze) else {
            return Ok(());
        };
        let ran = hook.run(&|| self.check_interrupt().is_err());
        self.check_interrupt()?;
        ran.map_err(|error| {
            Failure::hinted(
                Kind::Attention,
                error.to_string(),
                "the guest was not frozen and no point was made: see what the hook printed, and that it ends with 0 within `--hook-timeout`",
            )
        })
    }

    /// Starts the hook that comes after the thaw; the guest's blocks are read meanwhile.
    fn start_post_thaw(&mut self, hold: &mut Hold) {
        let Some(hook) = hold.journal.hook().cloned() else {
            return;
        };
        match hook.start() {
            Ok(running) => self.post_thaw = Some(running),
            Err(error) => self.warnings.push(error.to_string()),
        }
        // On disk it stays until the journal goes: a run that dies now may have it run twice.
        hold.journal.set_hook(None);
    }

    /// Waits for the hook that comes after the thaw.
    pub(super) fn end_post_thaw(&mut self) {
        let running = self.post_thaw.take();
        if let Some(Err(error)) = running.map(|running| running.end(&|| false)) {
            self.warnings.push(error.to_string());
        }
    }

    /// The instant itself.
    pub(super) fn cut(
        &mut self,
        hold: &mut Hold,
        freeze: &Freeze,
        agent: Option<Answering>,
        guard: &mut Option<Guard>,
    ) -> Result<(Cut, Instant)> {
        self.wait_prepared()?;
        let time = FREEZE_WAIT + self.until_the_cut();
        self.turn_to_freeze(&mut || guard.as_mut().map_or(Ok(()), |guard| guard.allow(time)))?;
        self.meet(Stage::Prepared)?;
        self.pre_freeze()?;
        self.meet(Stage::Ready)?;
        if let Some(guard) = guard {
            guard.allow(self.held_at_most())?;
        }
        let frozen_at = clock::now();
        let mut agent = self.quiesce(agent)?;
        let cut = self.meet(Stage::Frozen).and_then(|()| {
            let begin = clock::now();
            Ok((begin, transact(hold, freeze)?))
        });
        let (ended, at) = (clock::now(), clock::utc_now());
        // Nobody thaws before the last transaction.
        let cut = cut.and_then(|cut| self.meet(Stage::Cut).map(|()| cut));
        if cut.is_err() {
            self.seat = None;
        }
        let mut quiesced = false;
        let mut quiesced_ms = None;
        if let Some((agent, _)) = &mut agent {
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
        self.start_post_thaw(hold);
        let (begin, took) = cut?;
        let file_systems = agent.map(|(_, count)| count);
        if let Some(count) = file_systems
            && !quiesced
        {
            let message = match count {
                0 => "the guest agent found no file system to freeze",
                _ => "the guest thawed its file systems before the instant",
            };
            if self.options.quiesce == Quiesce::Always {
                return Err(Failure::plain(Kind::Failed, message));
            }
            self.fall_back(message);
        }
        if let Some(seat) = &self.seat {
            seat.note(begin, ended, quiesced);
        }
        let cut = Cut {
            at,
            freeze_ms: millis(took),
            released_ms: 0,
            quiesced_ms,
            file_systems: file_systems.filter(|_| quiesced),
            scratch_bytes: 0,
            quiesced,
        };
        Ok((cut, ended))
    }

    /// Freezes the guest's file systems; says how many.
    fn quiesce(&mut self, agent: Option<Answering>) -> Result<Option<(Agent, u64)>> {
        let Some((mut agent, _)) = agent else {
            return Ok(None);
        };
        match agent.freeze(self.options.freeze_timeout) {
            Ok(count) => Ok(Some((agent, u64::try_from(count).unwrap_or(0)))),
            Err(error) => {
                // The others are frozen and wait.
                self.seat = None;
                // A freeze that was not answered may be executed yet: what thaws it stands behind it in the queue.
                agent.thaw_later().ok();
                Err(NotQuiesced(error.to_string()).into())
            }
        }
    }
}

/// The transaction; returns how long it took.
fn transact(hold: &mut Hold, freeze: &Freeze) -> Result<Duration> {
    if let Some(why) = freeze.unfit(&mut hold.monitor)? {
        return Err(GivenUp(why).into());
    }
    match freeze.transact(&mut hold.monitor) {
        Err(crate::qmp::Error::Command { description, .. })
            if description.contains("in use by block job") =>
        {
            Err(Failure::hinted(
                Kind::Busy,
                format!("somebody else's block job is on a disk: {description}"),
                "wait for its end or cancel it, then run the command again",
            ))
        }
        cut => cut.context("the freeze"),
    }
}
