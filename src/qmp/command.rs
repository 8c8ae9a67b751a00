//! Typed commands: each request is checked against its `qapi` type, so a wrong shape or a missing argument is our error
//! before QEMU sees it. Answers that are states (`query-*`) are read leniently, field by field, since QEMU adds enum
//! values that generated types refuse.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use qapi::Command;
use qapi::qmp;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{Error, Monitor, REPLY_TIMEOUT, Result};

/// Runs the command `C` with these arguments.
pub fn call<C>(monitor: &mut dyn Monitor, arguments: Value) -> Result<Value>
where
    C: Command + Serialize + DeserializeOwned,
{
    call_within::<C>(monitor, arguments, None, REPLY_TIMEOUT)
}

/// Runs the command `C` with these arguments, a descriptor passed along, and its own time limit.
pub fn call_within<C>(
    monitor: &mut dyn Monitor,
    arguments: Value,
    fd: Option<BorrowedFd<'_>>,
    timeout: Duration,
) -> Result<Value>
where
    C: Command + Serialize + DeserializeOwned,
{
    let shape = |error| Error::Protocol(format!("arguments of {}: {error}", C::NAME));
    // What is sent is what was written: the types drop a `null` that QEMU tells from an absent member.
    C::deserialize(&arguments).map_err(shape)?;
    monitor.execute(C::NAME, arguments, fd, timeout)
}

/// A request as QMP and the guest agent read it.
pub(crate) fn request(command: &str, arguments: Value) -> Value {
    let mut request = json!({ "execute": command });
    if arguments.as_object().is_some_and(|map| !map.is_empty()) {
        request["arguments"] = arguments;
    }
    request
}

/// What an answer holds: a result, or an error of the other end's.
pub(crate) fn result(command: &str, mut answer: Value) -> Result<Value> {
    if let Some(error) = answer.get("error") {
        tracing::debug!(command, %error, "refused");
        return Err(Error::answered(command, error));
    }
    match answer.get_mut("return") {
        Some(value) => Ok(value.take()),
        None => Err(Error::Protocol(format!(
            "an answer to {command} without a result"
        ))),
    }
}

/// The array that a query returned.
pub fn list<C>(monitor: &mut dyn Monitor, arguments: Value) -> Result<Vec<Value>>
where
    C: Command + Serialize + DeserializeOwned,
{
    match call::<C>(monitor, arguments)? {
        Value::Array(items) => Ok(items),
        other => Err(Error::Protocol(format!(
            "{} returned {other}, not a list",
            C::NAME
        ))),
    }
}

/// A text field of an answer, empty when it is absent.
pub fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or("")
}

/// A yes/no field of an answer, no when it is absent.
pub fn flag(value: &Value, key: &str) -> bool {
    value.get(key).and_then(Value::as_bool).unwrap_or(false)
}

/// A bitmap to add in a transaction.
pub fn action_add_bitmap(node: &str, name: &str, granularity: u32, persistent: bool) -> Value {
    json!({ "type": "block-dirty-bitmap-add", "data": {
        "node": node, "name": name, "granularity": granularity, "persistent": persistent,
    }})
}

/// A bitmap to disable in a transaction.
pub fn action_disable_bitmap(node: &str, name: &str) -> Value {
    json!({ "type": "block-dirty-bitmap-disable", "data": { "node": node, "name": name } })
}

/// A bitmap to remove in a transaction.
pub fn action_remove_bitmap(node: &str, name: &str) -> Value {
    json!({ "type": "block-dirty-bitmap-remove", "data": { "node": node, "name": name } })
}

/// Runs all actions or none.
pub fn transaction(monitor: &mut dyn Monitor, actions: &[Value]) -> Result<()> {
    if actions.is_empty() {
        return Ok(());
    }
    call::<qmp::transaction>(monitor, json!({ "actions": actions })).map(drop)
}

/// The jobs that there are, as QEMU lists them.
pub fn jobs(monitor: &mut dyn Monitor) -> Result<Vec<Value>> {
    list::<qmp::query_jobs>(monitor, json!({}))
}

/// The status of a job, `None` when it is gone.
pub fn job_status(monitor: &mut dyn Monitor, id: &str) -> Result<Option<String>> {
    let jobs = jobs(monitor)?;
    Ok(jobs
        .iter()
        .find(|job| text(job, "id") == id)
        .map(|job| text(job, "status").to_owned()))
}
