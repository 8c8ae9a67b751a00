//! Golden bytes, the table of what is refused, and hostile bytes for the parsers of [`super`].
#![allow(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing,
    reason = "a test may panic"
)]

use proptest::prelude::*;

use super::*;

#[test]
fn a_request_is_laid_out_as_the_document_says() {
    let bytes = request(0, Command::BlockStatus, 0x0102, 0x1_0000, 512);
    let golden = [
        0x25, 0x60, 0x95, 0x13, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0,
        2, 0,
    ];
    assert_eq!(bytes, golden);
}

#[test]
fn an_option_carries_its_length() {
    let bytes = option(OPT_STRUCTURED_REPLY, b"").unwrap();
    assert_eq!(bytes, b"IHAVEOPT\0\0\0\x08\0\0\0\0");
}

#[test]
fn chunks_whose_length_does_not_fit_their_type_are_refused() {
    for (flags, kind, length, what) in [
        (1, 0, 1, "none with a payload"),
        (0, 0, 0, "none that is not the last"),
        (1, 1, 8, "data without a byte"),
        (1, 1, MAX_PAYLOAD + 9, "data beyond the bound"),
        (1, 2, 11, "short hole"),
        (1, 2, 13, "long hole"),
        (1, 5, 4, "status without an extent"),
        (1, 5, 13, "status with half an extent"),
        (1, 5, MAX_STATUS_PAYLOAD + 8, "status beyond the bound"),
        (1, 0x8001, 5, "short error"),
        (1, 0x8002, 13, "short error with offset"),
        (1, 0x8001, MAX_MESSAGE + 1, "error beyond the bound"),
        (1, 3, 8, "unknown type"),
    ] {
        assert!(chunk(flags, kind, 1, length).is_err(), "{what}");
    }
    assert_eq!(
        chunk(1, 0x8fff, 7, 6).unwrap().kind,
        ChunkKind::OtherError,
        "errors of later protocols are errors"
    );
}

#[test]
fn errors_without_a_number_or_with_a_torn_message_are_refused() {
    assert!(Failure::parse(&[0, 0, 0, 0, 0, 0]).is_err());
    assert!(Failure::parse(&[0, 0, 0, 5, 0, 9, b'x']).is_err());
    let failure = Failure::parse(b"\0\0\0\x05\0\x05bad\n!").unwrap();
    assert_eq!((failure.errno, failure.message.as_str()), (5, ": bad !"));
}

#[test]
fn names_have_a_limit() {
    let mut out = Vec::new();
    assert!(push_string(&mut out, &"x".repeat(MAX_STRING + 1)).is_err());
    assert!(out.is_empty());
    push_string(&mut out, "ab").unwrap();
    assert_eq!(out, b"\0\0\0\x02ab");
}

proptest! {
    #[test]
    fn hostile_heads_never_panic(bytes: [u8; 20], flags: u16, kind: u16, length: u32) {
        drop(option_reply(bytes, OPT_GO).map(|reply| assert!(reply.length <= MAX_MESSAGE)));
        let mut head = [0; SIMPLE_REPLY_BYTES];
        head.copy_from_slice(&bytes[..SIMPLE_REPLY_BYTES]);
        drop(reply_head(head));
        if let Ok(chunk) = chunk(flags, kind, 0, length) {
            assert!(chunk.length <= MAX_PAYLOAD + 8);
        }
    }

    #[test]
    fn hostile_errors_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        drop(Failure::parse(&bytes));
    }
}
