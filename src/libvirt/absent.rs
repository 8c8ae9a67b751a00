//! A build without libvirt: no domain is ever found.

#[path = "definition.rs"]
pub mod definition;

use definition::{Definition, Plan, Redefined};

use crate::qmp::machine::{LeftOut, Machine};
use crate::qmp::managed::Manager;
use crate::qmp::{Error, Monitor, Result};
use crate::target::Image;

/// No domain.
#[derive(Debug, Clone)]
pub enum Domain {}

fn absent<T>() -> Result<T> {
    Err(Error::Libvirt(
        "this forerun was built without it: name the VM `qmp:SOCKET`, or `disk:PATH` for an image of a VM that is off"
            .to_owned(),
    ))
}

/// Nothing can be reached.
pub fn monitor(_uri: &str, _uuid: &str) -> Result<Box<dyn Monitor>> {
    absent()
}

/// Nothing can be told.
pub fn identity(_xml: &str) -> Result<(String, String)> {
    absent()
}

/// Nothing can be changed.
pub fn redefine(_xml: &str, _plan: &Plan<'_>) -> Result<Redefined> {
    absent()
}

/// Nothing can be reached.
pub fn uri(_connect: Option<&str>) -> Result<String> {
    absent()
}

#[allow(missing_docs, reason = "nothing of it is ever called")]
impl Domain {
    pub fn find(_connect: Option<&str>, _name: &str) -> Result<Self> {
        absent()
    }

    pub fn all(_connect: Option<&str>) -> Result<Vec<Self>> {
        absent()
    }

    pub fn name(&self) -> &str {
        match *self {}
    }

    pub fn uuid(&self) -> &str {
        match *self {}
    }

    pub fn uri(&self) -> &str {
        match *self {}
    }

    pub fn active(&self) -> Result<bool> {
        match *self {}
    }

    pub fn is_saved(&self) -> Result<bool> {
        match *self {}
    }

    pub fn has_migrated(&self) -> Result<bool> {
        match *self {}
    }

    pub fn monitor(&self) -> Result<Box<dyn Monitor>> {
        match *self {}
    }

    pub fn manager(&self) -> Box<dyn Manager> {
        match *self {}
    }

    pub fn describe(&self, _machine: &mut Machine) -> Result<bool> {
        match *self {}
    }

    pub fn images(&self) -> Result<(Vec<Image>, Vec<LeftOut>)> {
        match *self {}
    }

    pub fn definition(&self, _secrets: bool) -> Result<Definition> {
        match *self {}
    }

    pub fn define(_connect: Option<&str>, _xml: &str) -> Result<Self> {
        absent()
    }

    pub fn agent_connected(&self) -> Result<Option<bool>> {
        match *self {}
    }
}
