//! A hostile QEMU: whatever JSON it answers with, looking at the machine ends with a description or an error.
#![no_main]

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use forerun::qmp::{self, Event, Monitor, Process, graph, machine};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

/// Answers with one value after the other, the last one for ever.
struct Answers {
    values: Vec<Value>,
    next: usize,
    process: Process,
    socket: UnixStream,
}

impl Monitor for Answers {
    fn execute(
        &mut self,
        _: &str,
        _: Value,
        _: Option<BorrowedFd<'_>>,
        _: Duration,
    ) -> qmp::Result<Value> {
        let value = self.values.get(self.next).or(self.values.last()).cloned();
        self.next += 1;
        value.ok_or(qmp::Error::Closed)
    }

    fn event(&mut self, _: Duration) -> qmp::Result<Option<Event>> {
        Ok(None)
    }

    fn process(&self) -> &Process {
        &self.process
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fuzz_target!(|data: &[u8]| {
    let values: Vec<Value> = data
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice(line).ok())
        .collect();
    if values.is_empty() {
        return;
    }
    let Ok((socket, _peer)) = UnixStream::pair() else {
        return;
    };
    let mut monitor = Answers {
        values,
        next: 0,
        process: Process { pid: 1, start: 1 },
        socket,
    };
    machine::identify(&mut monitor).ok();
    monitor.next = 0;
    if let Ok(graph) = graph::Graph::read(&mut monitor) {
        let names: Vec<String> = graph.names().map(str::to_owned).collect();
        for name in names {
            graph.disk("k", &name, Vec::new()).ok();
            graph.backing(&name);
            graph.has_parents(&name);
        }
    }
});
