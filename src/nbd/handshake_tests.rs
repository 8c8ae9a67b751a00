//! What a server may not say in the negotiation, and hostile bytes.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing,
    reason = "a test may panic"
)]

use std::{io::Write as _, net::Shutdown, os::unix::net::UnixStream, time::Duration};

use proptest::prelude::*;

use super::*;

/// Negotiates with a server that says these bytes, whatever is asked.
fn with(bytes: &[u8], contexts: &[&str]) -> Result<(ExportInfo, Vec<Context>), Error> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(bytes).unwrap();
    theirs.shutdown(Shutdown::Write).unwrap();
    let contexts: Vec<String> = contexts.iter().map(ToString::to_string).collect();
    negotiate(
        &mut Stream::new(ours, Duration::from_secs(5)),
        "vda",
        &contexts,
    )
}

fn greeting(flags: u8) -> Vec<u8> {
    [b"NBDMAGICIHAVEOPT", &[0, flags][..]].concat()
}

fn answer(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = wire::OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    out.extend(data);
    out
}

fn size_info(size: u64) -> Vec<u8> {
    let data = [&[0, 0][..], &size.to_be_bytes(), &[0x01, 0x03]].concat();
    answer(wire::OPT_GO, wire::REP_INFO, &data)
}

fn block_info(sizes: [u32; 3]) -> Vec<u8> {
    let mut data = vec![0, 3];
    for size in sizes {
        data.extend(size.to_be_bytes());
    }
    answer(wire::OPT_GO, wire::REP_INFO, &data)
}

fn granted(id: u32, name: &str) -> Vec<u8> {
    let data = [&id.to_be_bytes()[..], name.as_bytes()].concat();
    answer(wire::OPT_SET_META_CONTEXT, wire::REP_META_CONTEXT, &data)
}

fn start() -> Vec<u8> {
    let mut out = greeting(3);
    out.extend(answer(wire::OPT_STRUCTURED_REPLY, wire::REP_ACK, &[]));
    out
}

#[test]
fn an_export_with_contexts_is_accepted() {
    let script = [
        start(),
        granted(1, "base:allocation"),
        answer(wire::OPT_SET_META_CONTEXT, wire::REP_ACK, &[]),
        answer(wire::OPT_GO, wire::REP_INFO, &[0, 1, b'x']),
        size_info(1 << 30),
        block_info([512, 4096, 32 << 20]),
        answer(wire::OPT_GO, wire::REP_ACK, &[]),
    ]
    .concat();
    let (info, contexts) = with(&script, &["base:allocation"]).unwrap();
    assert_eq!((info.size, info.min_block), (1 << 30, 512));
    assert!(info.read_only() && info.multi_conn() && !info.can_flush());
    assert_eq!(contexts[0].id, 1);
}

#[test]
fn what_a_server_may_not_say_is_refused() {
    let set = wire::OPT_SET_META_CONTEXT;
    let end = answer(set, wire::REP_ACK, &[]);
    let done = answer(wire::OPT_GO, wire::REP_ACK, &[]);
    let unsupported = answer(wire::OPT_STRUCTURED_REPLY, wire::REP_ERROR_BIT | 1, b"");
    let unknown = answer(
        wire::OPT_GO,
        wire::REP_ERROR_BIT | 6,
        b"export 'vda' not present",
    );
    for (script, what) in [
        (vec![vec![b'x'; 18]], "not NBD's"),
        (
            vec![b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0".to_vec()],
            "oldstyle",
        ),
        (vec![greeting(0)], "fixed newstyle"),
        (
            vec![greeting(3), unsupported],
            "structured replies: not supported",
        ),
        (vec![start(), end.clone()], "no meta context `a`"),
        (
            vec![start(), granted(1, "a"), granted(2, "a")],
            "granted twice",
        ),
        (
            vec![start(), granted(1, "a"), granted(1, "b")],
            "granted twice",
        ),
        (vec![start(), granted(1, "c")], "not asked for"),
        (
            vec![start(), granted(1, "a"), end.clone()],
            "no meta context `b`",
        ),
        (
            vec![
                start(),
                granted(1, "a"),
                granted(2, "b"),
                end.clone(),
                done.clone(),
            ],
            "without its size",
        ),
        (
            vec![
                start(),
                granted(1, "a"),
                granted(2, "b"),
                end.clone(),
                unknown,
            ],
            "no such export: export 'vda' not present",
        ),
        (
            vec![
                start(),
                granted(1, "a"),
                granted(2, "b"),
                end.clone(),
                size_info(1 << 63),
                done.clone(),
            ],
            "export of",
        ),
        (
            vec![
                start(),
                granted(1, "a"),
                granted(2, "b"),
                end.clone(),
                size_info(1),
                block_info([3, 4, 8]),
                done.clone(),
            ],
            "block sizes",
        ),
        (
            vec![
                start(),
                granted(1, "a"),
                granted(2, "b"),
                end.clone(),
                size_info(1),
                block_info([0, 0, 0]),
                done,
            ],
            "block sizes",
        ),
        (
            vec![start(), answer(wire::OPT_GO, wire::REP_ACK, &[])],
            "answered as option",
        ),
        (vec![start(), vec![0; 20]], "magic"),
        (vec![start()], "closed"),
    ] {
        let error = with(&script.concat(), &["a", "b"]).unwrap_err().to_string();
        assert!(error.contains(what), "{error} does not say {what}");
    }
}

#[test]
fn a_reply_longer_than_the_bound_is_refused_before_it_is_read() {
    let mut script = start();
    script.extend(wire::OPTION_REPLY_MAGIC.to_be_bytes());
    script.extend(wire::OPT_GO.to_be_bytes());
    script.extend([0, 0, 0, 3, 0xff, 0xff, 0xff, 0xff]);
    let error = with(&script, &[]).unwrap_err().to_string();
    assert!(error.contains("more than 65536"), "{error}");
}

proptest! {
    #[test]
    fn hostile_servers_never_panic(tail in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut script = start();
        script.extend(&tail);
        prop_assert!(with(&tail, &[]).is_err());
        prop_assert!(with(&script, &["a"]).is_err());
    }

    #[test]
    fn hostile_answers_never_panic(
        kinds in prop::collection::vec((prop::sample::select(vec![1u32, 3, 4, 1 << 31]), prop::collection::vec(any::<u8>(), 0..32)), 0..8)
    ) {
        let mut script = start();
        for (kind, data) in kinds {
            script.extend(answer(wire::OPT_GO, kind, &data));
        }
        drop(with(&script, &[]));
    }
}
