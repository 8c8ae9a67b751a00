//! The NBD client against a server made of a socket pair and a thread: what real servers do rarely, late or never.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test may panic"
)]

use std::{
    io::{Read, Write},
    net::Shutdown,
    ops::ControlFlow,
    os::unix::net::UnixStream,
    time::Duration,
};

use forerun::{
    nbd::{ALLOCATION, Client, Endpoint, Error, ReadOptions, Writer},
    units::Extent,
};
use proptest::prelude::*;

const SIZE: u64 = 1 << 20;
const PIECE: u32 = 64 << 10;

#[derive(Debug, Clone, Copy)]
struct Request {
    command: u16,
    cookie: u64,
    offset: u64,
    length: u32,
}

/// The server's end, after the negotiation.
struct Fake(UnixStream);

impl Fake {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut out = [0; N];
        self.0.read_exact(&mut out).ok().map(|()| out)
    }

    /// Reads the client's side of the negotiation, whose answers were sent before.
    fn negotiated(mut socket: UnixStream) -> Self {
        socket.write_all(&negotiation()).unwrap();
        let mut fake = Self(socket);
        fake.take::<4>().unwrap();
        loop {
            let head = fake.take::<16>().unwrap();
            let length = u32::from_be_bytes(head[12..].try_into().unwrap());
            let mut data = vec![0; length as usize];
            fake.0.read_exact(&mut data).unwrap();
            if head[11] == 7 {
                return fake;
            }
        }
    }

    fn request(&mut self) -> Option<Request> {
        let bytes = self.take::<28>()?;
        assert_eq!(&bytes[..4], &[0x25, 0x60, 0x95, 0x13]);
        let request = Request {
            command: u16::from_be_bytes(bytes[6..8].try_into().unwrap()),
            cookie: u64::from_be_bytes(bytes[8..16].try_into().unwrap()),
            offset: u64::from_be_bytes(bytes[16..24].try_into().unwrap()),
            length: u32::from_be_bytes(bytes[24..].try_into().unwrap()),
        };
        if request.command == 1 {
            let mut data = vec![0; request.length as usize];
            self.0.read_exact(&mut data).unwrap();
        }
        Some(request)
    }

    fn requests(&mut self, count: usize) -> Vec<Request> {
        (0..count).map(|_| self.request().unwrap()).collect()
    }

    fn say(&mut self, bytes: &[u8]) {
        // The client may have given up, as it should.
        self.0.write_all(bytes).ok();
    }
}

fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    for field in [option, kind, data.len() as u32] {
        out.extend(field.to_be_bytes());
    }
    out.extend(data);
    out
}

/// An export of 1 MiB with every flag, and two contexts with the ids 1 and 2.
fn negotiation() -> Vec<u8> {
    let mut info = vec![0, 0];
    info.extend(SIZE.to_be_bytes());
    info.extend([0x0f, 0xfd]);
    [
        b"NBDMAGICIHAVEOPT\0\x03".to_vec(),
        option_reply(8, 1, &[]),
        option_reply(10, 4, b"\0\0\0\x01base:allocation"),
        option_reply(10, 4, b"\0\0\0\x02qemu:dirty-bitmap:b0"),
        option_reply(10, 1, &[]),
        option_reply(7, 3, &info),
        option_reply(7, 1, &[]),
    ]
    .concat()
}

fn chunk(cookie: u64, last: bool, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![0x66, 0x8e, 0x33, 0xef, 0, u8::from(last)];
    out.extend(kind.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out.extend((payload.len() as u32).to_be_bytes());
    out.extend(payload);
    out
}

fn data(cookie: u64, last: bool, offset: u64, bytes: &[u8]) -> Vec<u8> {
    chunk(cookie, last, 1, &[&offset.to_be_bytes(), bytes].concat())
}

fn hole(cookie: u64, last: bool, offset: u64, length: u32) -> Vec<u8> {
    chunk(
        cookie,
        last,
        2,
        &[&offset.to_be_bytes()[..], &length.to_be_bytes()].concat(),
    )
}

fn status(cookie: u64, last: bool, id: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut payload = id.to_be_bytes().to_vec();
    for (length, flags) in extents {
        payload.extend(length.to_be_bytes());
        payload.extend(flags.to_be_bytes());
    }
    chunk(cookie, last, 5, &payload)
}

/// What the disk holds: every eight bytes are their own offset.
fn pattern(offset: u64, length: u32) -> Vec<u8> {
    (offset / 8..(offset + u64::from(length)) / 8)
        .flat_map(|word| (word * 8).to_be_bytes())
        .collect()
}

fn whole(request: Request) -> Vec<u8> {
    data(
        request.cookie,
        true,
        request.offset,
        &pattern(request.offset, request.length),
    )
}

/// Runs a client against a server's script; a script that ends closes the connection.
fn with<T>(
    serve: impl FnOnce(&mut Fake) + Send,
    timeout: Duration,
    run: impl FnOnce(Client) -> T,
) -> T {
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || serve(&mut Fake::negotiated(theirs)));
        let endpoint = Endpoint::new("", "vda")
            .allocation()
            .bitmap("b0")
            .timeout(timeout);
        run(endpoint.connect_on(ours).unwrap())
    })
}

const LONG: Duration = Duration::from_secs(20);

fn extent(offset: u64, length: u64) -> Extent {
    Extent { offset, length }
}

/// Reads the first `pieces` pieces, all in flight at once, checks each against the pattern, gives their offsets.
fn read(client: &mut Client, pieces: u64) -> Result<Vec<u64>, Error> {
    let options = ReadOptions {
        request_bytes: PIECE,
        depth: 8,
        spare_buffers: 0,
        holes: true,
    };
    let mut offsets = Vec::new();
    let work = [extent(0, pieces * u64::from(PIECE))];
    client.read_all(work, options, &|_| ControlFlow::Continue(()), &mut |done| {
        let expected = pattern(done.extent.offset, PIECE);
        let got = done.data.as_deref().unwrap();
        for at in 0..expected.len() {
            let at_disk = done.extent.offset + at as u64;
            let in_hole = |hole: &Extent| (hole.offset..hole.end()).contains(&at_disk);
            let zero = done.holes.iter().any(in_hole);
            assert_eq!(got[at], if zero { 0 } else { expected[at] });
        }
        offsets.push(done.extent.offset);
        ControlFlow::Continue(())
    })?;
    Ok(offsets)
}

#[test]
fn replies_in_any_order_and_chunks_interleaved_are_put_together() {
    let serve = |fake: &mut Fake| {
        let mut requests = fake.requests(4);
        requests.reverse();
        // The second half of each first, with an empty last chunk for some.
        let half = PIECE / 2;
        for request in &requests {
            let middle = request.offset + u64::from(half);
            fake.say(&data(request.cookie, false, middle, &pattern(middle, half)));
        }
        for (index, request) in requests.iter().enumerate() {
            let last = index % 2 == 0;
            if index == 0 {
                fake.say(&hole(request.cookie, false, request.offset, 512));
                let rest = request.offset + 512;
                fake.say(&data(
                    request.cookie,
                    last,
                    rest,
                    &pattern(rest, half - 512),
                ));
            } else {
                let first = pattern(request.offset, half);
                fake.say(&data(request.cookie, last, request.offset, &first));
            }
            if !last {
                fake.say(&chunk(request.cookie, true, 0, &[]));
            }
        }
        assert_eq!(fake.request().unwrap().command, 2, "goodbye");
    };
    let piece = u64::from(PIECE);
    let offsets = with(serve, LONG, |mut client| read(&mut client, 4)).unwrap();
    assert_eq!(offsets, [3 * piece, 2 * piece, piece, 0]);
}

#[test]
fn an_error_is_reported_after_everything_in_flight_and_the_connection_stays() {
    let serve = |fake: &mut Fake| {
        let requests = fake.requests(4);
        let payload = [
            &[0, 0, 0, 5, 0, 3][..],
            b"bad",
            &(64_u64 << 10).to_be_bytes(),
        ]
        .concat();
        fake.say(&chunk(requests[1].cookie, false, 0x8002, &payload));
        fake.say(&whole(requests[3]));
        fake.say(&chunk(requests[1].cookie, true, 0, &[]));
        fake.say(&whole(requests[0]));
        fake.say(&whole(requests[2]));
        let again = fake.request().unwrap();
        fake.say(&whole(again));
    };
    with(serve, LONG, |mut client| {
        let error = read(&mut client, 4).unwrap_err();
        assert_eq!(
            error.to_string(),
            "nbd server failed to read 65536 bytes at offset 0x10000: EIO: bad"
        );
        assert!(error.is_recoverable() && !client.is_spent());
        assert_eq!(read(&mut client, 1).unwrap(), [0]);
    });
}

#[test]
fn answers_to_a_read_that_break_the_protocol_end_the_connection() {
    type Answer = fn(Request) -> Vec<u8>;
    let answers: [(&str, Answer); 10] = [
        ("answered in part", |r| hole(r.cookie, true, 0, 512)),
        ("not in flight", |r| hole(r.cookie + 9, true, 0, PIECE)),
        ("came twice", |r| {
            [hole(r.cookie, false, 0, PIECE), hole(r.cookie, true, 0, 1)].concat()
        }),
        ("for a read of", |r| hole(r.cookie, true, 0, PIECE + 1)),
        ("for a read of", |r| {
            data(r.cookie, true, u64::from(PIECE), &[1])
        }),
        ("not in flight", |r| [whole(r), whole(r)].concat()),
        ("simple reply", |r| {
            [
                &[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0][..],
                &r.cookie.to_be_bytes(),
            ]
            .concat()
        }),
        ("block status", |r| status(r.cookie, true, 1, &[(512, 0)])),
        ("magic", |_| vec![0xaa; 64]),
        ("closed", |_| vec![0x66]),
    ];
    for (what, answer) in answers {
        let serve = |fake: &mut Fake| {
            let requests = fake.requests(2);
            fake.say(&answer(requests[0]));
        };
        with(serve, LONG, |mut client| {
            let error = read(&mut client, 2).unwrap_err();
            assert!(
                error.to_string().contains(what),
                "{error} does not say {what}"
            );
            assert!(!error.is_recoverable() && client.is_spent());
        });
    }
}

#[test]
fn a_stall_in_the_middle_of_a_chunk_is_a_timeout() {
    let (release, hold) = std::sync::mpsc::channel::<()>();
    let serve = move |fake: &mut Fake| {
        let request = fake.request().unwrap();
        fake.say(&whole(request)[..1000]);
        hold.recv().ok();
    };
    with(serve, Duration::from_millis(100), |mut client| {
        let error = read(&mut client, 1).unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
        release.send(()).unwrap();
    });
}

#[test]
fn a_deadline_ends_a_run_that_still_makes_progress() {
    let serve = |fake: &mut Fake| {
        while let Some(request) = fake.request() {
            fake.say(&whole(request));
        }
    };
    with(serve, LONG, |mut client| {
        client.set_deadline(Some(forerun::clock::Deadline::after(Duration::ZERO)));
        let error = read(&mut client, 4).unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
    });
}

#[test]
fn contexts_that_are_told_in_different_steps_come_out_whole() {
    let serve = |fake: &mut Fake| {
        let mut step = 0;
        while let Some(request) = fake.request().filter(|request| request.command == 7) {
            step += 1;
            let (first, second) = (4096 * (step % 7 + 1), 65536 / (step % 5 + 1));
            // The last may end behind the request, none may start there.
            let two = [(first, 1), (first, 1)];
            let told = if first < request.length {
                &two[..]
            } else {
                &two[..1]
            };
            fake.say(&status(request.cookie, false, 2, told));
            let left = request.length.min(second);
            fake.say(&status(
                request.cookie,
                true,
                1,
                &[(left, u32::from(request.offset > 65536))],
            ));
        }
    };
    with(serve, LONG, |mut client| {
        let all = client.block_status_all(extent(0, SIZE)).unwrap();
        assert_eq!(all[1].1, [(extent(0, SIZE), 1)]);
        let mut at = 0;
        for (extent, _) in &all[0].1 {
            assert_eq!(extent.offset, at);
            at = extent.end();
        }
        assert_eq!(at, SIZE);
    });
}

#[test]
fn status_that_breaks_the_protocol_ends_the_connection() {
    type Answer = fn(Request) -> Vec<u8>;
    let answers: [(&str, Answer); 5] = [
        ("no status for", |r| status(r.cookie, true, 2, &[(512, 0)])),
        ("status for context", |r| {
            status(r.cookie, true, 3, &[(512, 0)])
        }),
        ("status for context", |r| {
            [
                status(r.cookie, false, 1, &[(512, 0)]),
                status(r.cookie, false, 1, &[(512, 0)]),
            ]
            .concat()
        }),
        ("status of 0 bytes", |r| {
            status(r.cookie, true, 1, &[(0, 0)])
        }),
        ("no end", |r| {
            status(r.cookie, false, 1, &[(512, 0)])
                .into_iter()
                .chain((0..9).flat_map(|_| chunk(r.cookie, false, 0x8001, &[0, 0, 0, 5, 0, 0])))
                .collect()
        }),
    ];
    for (what, answer) in answers {
        let serve = |fake: &mut Fake| {
            let request = fake.request().unwrap();
            fake.say(&answer(request));
        };
        with(serve, LONG, |mut client| {
            let error = client
                .block_status(extent(0, SIZE), ALLOCATION)
                .unwrap_err();
            assert!(
                error.to_string().contains(what),
                "{error} does not say {what}"
            );
        });
    }
}

#[test]
fn writes_are_answered_in_any_order_and_either_form() {
    let serve = |fake: &mut Fake| {
        let mut requests = fake.requests(3);
        requests.reverse();
        fake.say(&chunk(requests[0].cookie, true, 0, &[]));
        fake.say(&chunk(
            requests[1].cookie,
            true,
            0x8001,
            &[0, 0, 0, 28, 0, 0],
        ));
        let simple = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0];
        fake.say(&[&simple[..], &requests[2].cookie.to_be_bytes()].concat());
        let flush = fake.request().unwrap();
        assert_eq!(flush.command, 3);
        fake.say(&chunk(flush.cookie, true, 0, &[]));
    };
    with(serve, LONG, |client| {
        let mut writer = Writer::new(client, 4).unwrap();
        for block in 0..3 {
            writer.write(block * 4096, &[1; 4096]).unwrap();
        }
        let error = writer.flush().unwrap_err();
        assert_eq!(
            error.to_string(),
            "nbd server failed to write 4096 bytes at offset 0x1000: ENOSPC"
        );
        writer.flush().unwrap();
    });
}

#[test]
fn a_callback_that_panics_leaves_a_client_that_refuses() {
    let serve = |fake: &mut Fake| {
        let requests = fake.requests(2);
        fake.say(&whole(requests[0]));
    };
    with(serve, LONG, |mut client| {
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let options = ReadOptions {
                request_bytes: PIECE,
                ..ReadOptions::default()
            };
            client.read_all(
                [extent(0, 2 * u64::from(PIECE))],
                options,
                &|_| ControlFlow::Continue(()),
                &mut |_| panic!("expected in this test"),
            )
        }));
        assert!(panicked.is_err() && client.is_spent());
    });
}

/// Whatever a server answers, alone or after a good start, a call ends with a result.
fn hostile(answer: &[u8], run: impl FnOnce(&mut Client)) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&negotiation()).unwrap();
    theirs.write_all(answer).unwrap();
    theirs.shutdown(Shutdown::Write).unwrap();
    let endpoint = Endpoint::new("", "vda")
        .allocation()
        .bitmap("b0")
        .timeout(LONG);
    run(&mut endpoint.connect_on(ours).unwrap());
}

fn any_chunk() -> impl Strategy<Value = Vec<u8>> {
    let kinds = prop::sample::select(vec![0u16, 1, 2, 5, 0x8001, 0x8002, 0x8009, 3]);
    let payload = prop::collection::vec(prop::sample::select(vec![0u8, 1, 2, 4, 16, 255]), 0..40);
    (0u64..4, any::<bool>(), kinds, payload)
        .prop_map(|(cookie, last, kind, payload)| chunk(cookie, last, kind, &payload))
}

proptest! {
    #[test]
    fn hostile_bytes_never_panic(answer in prop::collection::vec(any::<u8>(), 0..200)) {
        hostile(&answer, |client| assert!(read(client, 3).is_err()));
        hostile(&answer, |client| assert!(client.block_status(extent(0, SIZE), ALLOCATION).is_err()));
    }

    #[test]
    fn hostile_chunks_never_panic(chunks in prop::collection::vec(any_chunk(), 0..12)) {
        let answer = chunks.concat();
        hostile(&answer, |client| {
            let options = ReadOptions { request_bytes: PIECE, ..ReadOptions::default() };
            let work = [extent(0, 3 * u64::from(PIECE))];
            client.read_all(work, options, &|_| ControlFlow::Continue(()), &mut |_| ControlFlow::Continue(())).ok();
        });
        hostile(&answer, |client| drop(client.block_status_all(extent(0, SIZE))));
    }
}
