//! The residual of an image of a VM that is off.

use std::time::Duration;

use anyhow::Result;

use super::{Cut, GivenUp, Residual, machine_record, millis};
use crate::backup::Runner;
use crate::backup::pass::start_server;
use crate::backup::spool::Spool;
use crate::bitmap::rotate;
use crate::clock::{self, Deadline};
use crate::qmp::export::{self, Listening};
use crate::qmp::freeze::{Freeze, Method};
use crate::vm::{Hold, SAVED};

impl Runner {
    /// The residual of an image of a VM that is off: its lock is held, so it is its own snapshot.
    pub(super) fn read_offline(&mut self, hold: &mut Hold) -> Result<Residual> {
        let before = hold.look()?.0.clone();
        let asleep = before.state == SAVED;
        if asleep {
            self.warnings.push(
                "the domain has a managed save: its disks are as after a power cut, since the guest's memory is not in the point"
                    .to_owned(),
            );
        }
        let rotation = self.intend_freeze(hold)?;
        rotate::Port::add(hold, &rotation.add)?;
        if !rotation.disable.is_empty() {
            rotate::Port::disable(hold, &rotation.disable)?;
        }
        hold.look()?;
        let at = clock::utc_now();
        let mut configuration = self.configuration();
        if let Some(configuration) = &mut configuration {
            configuration.take();
        }
        let begin = clock::now();
        let directory = self.scratch_directory();
        let mut spool = Spool::new(&directory)?;
        let listening = Listening::place(&hold.monitor, self.vm.state.directory(), &self.run);
        let mut left = vec![listening.leftover()];
        left.extend(
            (0..self.disks.len()).flat_map(|disk| export::leftovers(&self.run, disk, true)),
        );
        hold.journal.write(left)?;
        start_server(&listening, hold)?;
        let disks = self.freeze_disks(hold, &rotation)?;
        let no_overlay = Duration::ZERO;
        let run = self.run.clone();
        let method = Method::Snapshot;
        let freeze = Freeze::new(method, run, disks, directory, no_overlay, &hold.monitor);
        let deadline = Deadline::after(self.options.deadline);
        self.spool_residual(hold, &freeze, &listening, deadline, &mut spool)?;
        if !hold.unchanged() {
            return Err(GivenUp("the image was written to meanwhile".to_owned()).into());
        }
        hold.release()?;
        let released_ms = millis(clock::now() - begin);
        let instant = Cut {
            at,
            freeze_ms: 0,
            released_ms,
            quiesced_ms: None,
            file_systems: None,
            scratch_bytes: 0,
            quiesced: !asleep,
        };
        Ok(Residual {
            instant,
            spool,
            machine: machine_record(&before),
            configuration,
        })
    }
}
