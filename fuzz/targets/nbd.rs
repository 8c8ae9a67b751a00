//! A hostile NBD server: what it says in the negotiation, to reads and to block status, all in one go.
#![no_main]

use std::io::Write as _;
use std::net::Shutdown;
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use forerun::nbd::{Client, Endpoint};
use forerun::units::Extent;
use forerun_fuzz::Input;
use libfuzzer_sys::fuzz_target;

/// A server's side of a negotiation that grants both contexts, of an export of 1 MiB.
fn greeting() -> Vec<u8> {
    let answer = |option: u32, kind: u32, data: &[u8]| {
        let mut out = 0x3_e889_0455_65a9_u64.to_be_bytes().to_vec();
        out.extend(option.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend(u32::try_from(data.len()).expect("short").to_be_bytes());
        out.extend(data);
        out
    };
    let context =
        |id: u32, name: &str| answer(10, 4, &[&id.to_be_bytes()[..], name.as_bytes()].concat());
    [
        b"NBDMAGICIHAVEOPT\0\x03".to_vec(),
        answer(8, 1, &[]),
        context(1, "base:allocation"),
        context(2, "qemu:dirty-bitmap:b"),
        answer(10, 1, &[]),
        answer(
            7,
            3,
            &[&[0, 0][..], &(1_u64 << 20).to_be_bytes(), &[0x01, 0x03]].concat(),
        ),
        answer(7, 1, &[]),
    ]
    .concat()
}

/// The client, and the server's end: what is asked stays unread in it.
fn connect(bytes: &[u8]) -> Option<(Client, UnixStream)> {
    let (ours, mut theirs) = UnixStream::pair().ok()?;
    theirs.write_all(bytes).ok()?;
    theirs.shutdown(Shutdown::Write).ok()?;
    let endpoint = Endpoint::new("", "vda")
        .allocation()
        .bitmap("b")
        .timeout(Duration::from_secs(5));
    Some((endpoint.connect_on(ours).ok()?, theirs))
}

/// Option replies with right magics (proto.md, "Fixed newstyle negotiation").
fn negotiation(mut input: Input<'_>) -> Vec<u8> {
    let mut out = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    let mut reply = || {
        let option = input.number(&[7, 8, 10, 1, 3])?;
        let kind = input.number(&[1, 3, 4, 2, 0x8000_0001, 0x8000_0006])?;
        let data = input.data()?;
        out.extend(0x3_e889_0455_65a9_u64.to_be_bytes());
        out.extend(option.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend(input.number(&[data.len() as u32])?.to_be_bytes());
        out.extend(data);
        Some(())
    };
    while reply().is_some() {}
    out
}

/// Replies to requests with right magics (proto.md, "Simple reply message", "Structured reply chunk message").
fn replies(mut input: Input<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    let mut reply = || {
        if input.byte()? % 8 == 0 {
            out.extend(0x6744_6698_u32.to_be_bytes());
            out.extend(input.number(&[0, 5, 22])?.to_be_bytes());
            out.extend(u64::from(input.number(&[1, 2])?).to_be_bytes());
            out.extend(input.data()?);
            return Some(());
        }
        out.extend(0x668e_33ef_u32.to_be_bytes());
        out.extend((input.number(&[0, 1])? as u16).to_be_bytes());
        out.extend((input.number(&[0, 1, 2, 5, 0x8001, 0x8002])? as u16).to_be_bytes());
        out.extend(u64::from(input.number(&[1, 2])?).to_be_bytes());
        let offset = input.number(&[8192, 0, 4096])?;
        let head: &[u8] = match input.byte()? % 3 {
            0 => &[],
            1 => &u64::from(offset).to_be_bytes(),
            _ => &offset.to_be_bytes(),
        };
        let payload = [head, input.data()?].concat();
        out.extend(input.number(&[payload.len() as u32])?.to_be_bytes());
        out.extend(payload);
        Some(())
    };
    while reply().is_some() {}
    out
}

fuzz_target!(init: {
    // As in every Rust program: a write to a closed socket is an error.
    let ignored = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGPIPE, ignored).expect("a handler");
}, |data: &[u8]| {
    let Some((how, bytes)) = data.split_first() else {
        return;
    };
    if bytes.len() > 1 << 14 {
        return;
    }
    match how % 8 {
        0 => drop(connect(bytes)),
        1 => drop(connect(&negotiation(Input(bytes)))),
        how => answered(how, &[greeting(), replies(Input(bytes))].concat()),
    }
});

fn answered(how: u8, said: &[u8]) {
    let Some((mut client, _server)) = connect(said) else {
        return;
    };
    let whole = Extent {
        offset: 0,
        length: 1 << 20,
    };
    match how % 3 {
        0 => {
            let mut buffer = vec![0; 4096];
            client.read_at(8192, &mut buffer).ok();
        }
        1 => {
            client.block_status(whole, "base:allocation").ok();
        }
        _ => {
            let mut end = 0;
            client
                .dirty_extents("b", whole, &mut |extent| {
                    assert!(extent.offset >= end && extent.end() <= 1 << 20 && extent.length > 0);
                    end = extent.end();
                    ControlFlow::Continue(())
                })
                .ok();
        }
    }
}
