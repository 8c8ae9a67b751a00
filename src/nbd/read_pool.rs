//! Several connections to one export, reading from one queue of work with one bounded set of buffers.
//!
//! Each connection has a thread for the time of a run; a piece goes to whichever connection has room first. The first
//! error of any connection ends the run: the others take no more work, receive what they have in flight and return.

use std::{
    ops::ControlFlow,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{
    buffer::BufferPool,
    client::{Client, Endpoint},
    error::Error,
    handshake::ExportInfo,
    reader::{Pieces, ReadDone, ReadOptions, ReadSummary, Work},
};
use crate::{clock::Deadline, units::Extent};

/// Connections to one export; more only wait for the same server.
const MAX_CONNECTIONS: usize = 16;

/// Connections to one export that read together.
#[derive(Debug)]
pub struct ReadPool {
    clients: Vec<Client>,
    buffers: Option<BufferPool>,
}

impl ReadPool {
    /// Makes `connections` connections, 1 to 16. Reading needs no multi-conn promise of the server: that is about
    /// writes.
    pub fn connect(endpoint: &Endpoint, connections: usize) -> Result<Self, Error> {
        if !(1..=MAX_CONNECTIONS).contains(&connections) {
            return Err(Error::Input(format!(
                "{connections} connections are not 1 to {MAX_CONNECTIONS}"
            )));
        }
        let clients: Vec<Client> = (0..connections)
            .map(|_| endpoint.connect())
            .collect::<Result<_, _>>()?;
        let sizes = clients
            .windows(2)
            .all(|pair| pair[0].info() == pair[1].info());
        if !sizes {
            return Err(Error::Protocol(format!(
                "export `{}` differs between two connections",
                endpoint.export()
            )));
        }
        Ok(Self {
            clients,
            buffers: None,
        })
    }

    /// The export's size, flags and block sizes.
    pub fn info(&self) -> ExportInfo {
        self.clients[0].info()
    }

    /// One of the connections, for block status.
    pub fn client(&mut self) -> &mut Client {
        &mut self.clients[0]
    }

    /// As [`Client::set_deadline`], for all of them.
    pub fn set_deadline(&mut self, deadline: Option<Deadline>) {
        for client in &mut self.clients {
            client.set_deadline(deadline);
        }
    }

    /// As [`Client::read_all`], with the callbacks called by several threads at once.
    pub fn read_all<I>(
        &mut self,
        extents: I,
        options: ReadOptions,
        permit: &(dyn Fn(u64) -> ControlFlow<()> + Sync),
        on_done: &(dyn Fn(ReadDone) -> ControlFlow<()> + Sync),
    ) -> Result<ReadSummary, Error>
    where
        I: IntoIterator<Item = Extent>,
        I::IntoIter: Send,
    {
        let connections = self.clients.len();
        let pool = match self.buffers.take() {
            Some(pool) if options.fit(&pool, connections) => pool,
            _ => options.pool(connections),
        };
        let queue = Queue {
            pieces: Mutex::new(Pieces::new(extents.into_iter(), options.request_bytes)),
            ended: AtomicBool::new(false),
        };
        let run = |client: &mut Client| {
            // Also at a regular end, when the queue is empty anyway.
            let _end = EndOnDrop(&queue.ended);
            client.run_reads(Work {
                options,
                pool: &pool,
                next: &mut || queue.next(),
                permit,
                on_done: &mut |done| on_done(done),
            })
        };
        let results = run_each(&mut self.clients, &run);
        self.buffers = Some(pool);
        merge(results)
    }

    /// As [`Client::disconnect`], for all of them; the first error.
    pub fn disconnect(self) -> Result<(), Error> {
        let results: Vec<_> = self.clients.into_iter().map(Client::disconnect).collect();
        results.into_iter().collect()
    }
}

/// Runs a function on every client at once, the first on this thread. A panic in one of them goes on in the caller.
fn run_each<T: Send>(clients: &mut [Client], run: &(dyn Fn(&mut Client) -> T + Sync)) -> Vec<T> {
    let Some((first, others)) = clients.split_first_mut() else {
        return Vec::new();
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = others
            .iter_mut()
            .map(|client| scope.spawn(move || run(client)))
            .collect();
        let mut results = vec![run(first)];
        for thread in threads {
            match thread.join() {
                Ok(result) => results.push(result),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        results
    })
}

/// The sum, or the error that says most: one that spends a connection before one that does not.
fn merge(results: Vec<Result<ReadSummary, Error>>) -> Result<ReadSummary, Error> {
    let mut sum = ReadSummary::default();
    let mut failed: Option<Error> = None;
    for result in results {
        match (result, &failed) {
            (Ok(part), _) => {
                sum.requests += part.requests;
                sum.bytes += part.bytes;
                sum.stopped |= part.stopped;
            }
            (Err(error), None) => failed = Some(error),
            (Err(error), Some(had)) if had.is_recoverable() && !error.is_recoverable() => {
                failed = Some(error);
            }
            (Err(_), Some(_)) => {}
        }
    }
    failed.map_or(Ok(sum), Err)
}

struct Queue<I> {
    pieces: Mutex<Pieces<I>>,
    ended: AtomicBool,
}

impl<I: Iterator<Item = Extent>> Queue<I> {
    fn next(&self) -> Option<Extent> {
        if self.ended.load(Ordering::Relaxed) {
            return None;
        }
        // Only the caller's iterator runs under the lock; when it has panicked, so does the run.
        self.pieces
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .next()
    }
}

/// Ends the run of the other connections when this one leaves early, by an error or a panic.
struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
