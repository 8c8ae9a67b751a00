//! What goes into a repository comes out of it: whole disks, zeros, duplicates, a short last block, increments, restores from
//! every point, also after others changed since.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by it, and the disks here are small"
)]

mod image_common;

use forerun::image::{Content, Encoded, Entry, MapReader, Session, VerifyOptions, build_map, diff};
use image_common::{BLOCK, Bench, restore};

#[test]
fn a_disk_with_zeros_duplicates_and_a_short_end_comes_back() {
    let mut bench = Bench::new(5 * BLOCK + 1000);
    bench.write(0, &vec![1; BLOCK]);
    bench.write(2 * BLOCK, &vec![1; BLOCK]);
    bench.write(3 * BLOCK + 17, b"something");
    bench.write(5 * BLOCK, &[7; 1000]);
    let point = bench.backup();
    assert_eq!(restore(&bench.repo, &point.disks[0]).unwrap(), bench.disk);
    let map = MapReader::open(&bench.repo, &point.disks[0].map).unwrap();
    assert_eq!(map.get(1).unwrap(), Entry::Zero);
    assert_eq!(map.get(0).unwrap(), map.get(2).unwrap());
    assert_eq!(map.get(6).unwrap(), Entry::Unset);
    let report = bench.repo.verify(&VerifyOptions::default()).unwrap();
    assert!(report.damage.is_empty(), "{report:?}");
    // Block 0 twice, block 3, the short one.
    assert_eq!(report.checked_blocks, 3);
    assert!(report.complete);
}

#[test]
fn a_zeroed_block_stays_zero_in_the_next_point() {
    let mut bench = Bench::new(4 * BLOCK);
    bench.write(0, &vec![9; 4 * BLOCK]);
    let before = bench.backup();
    let old = bench.disk.clone();
    bench.write(BLOCK, &vec![0; BLOCK]);
    let after = bench.backup();
    assert_eq!(restore(&bench.repo, &before.disks[0]).unwrap(), old);
    assert_eq!(restore(&bench.repo, &after.disks[0]).unwrap(), bench.disk);
    let changed: Vec<_> = diff(&bench.repo, &before.disks[0].map, &after.disks[0].map)
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(changed.len(), 1);
    assert_eq!((changed[0].first, changed[0].count), (1, 1));
}

#[test]
fn an_increment_without_changes_writes_no_layer_and_no_pack() {
    let mut bench = Bench::new(4 * BLOCK);
    bench.write(0, &vec![9; BLOCK]);
    let before = bench.backup();
    let objects = bench.objects("maps/").len() + bench.objects("packs/").len();
    let after = bench.backup();
    assert_eq!(before.disks[0].map, after.disks[0].map);
    assert_eq!(
        objects,
        bench.objects("maps/").len() + bench.objects("packs/").len()
    );
    assert!(bench.objects("sessions/").is_empty());
}

#[test]
fn known_blocks_are_found_after_the_seal_and_only_then() {
    let bench = Bench::new(BLOCK);
    let plain = vec![3; BLOCK];
    let mut writer = bench.repo.pack_writer("vda pass 1");
    let first = bench.repo.encode(&plain).unwrap();
    assert!(matches!(first, Encoded::New(_)));
    let content = writer.put(first).unwrap();
    let Content::Data(id) = content else {
        panic!("{content:?}");
    };
    assert!(bench.repo.read_block(id).is_err());
    let again = bench.repo.encode(&plain).unwrap();
    assert_eq!(writer.put(again).unwrap(), content);
    let stats = writer.seal().unwrap();
    assert_eq!(
        (stats.packs, stats.new_blocks, stats.known_blocks),
        (1, 1, 1)
    );
    assert!(matches!(
        bench.repo.encode(&plain).unwrap(),
        Encoded::Known(_)
    ));
    assert_eq!(bench.repo.read_block(id).unwrap(), plain);
    assert!(bench.repo.encode(&[]).is_err());
}

#[test]
fn a_first_copy_names_the_first_missing_block() {
    let bench = Bench::new(4 * BLOCK);
    let error = bench.commit_blocks(None, &[(0, Content::Zero), (2, Content::Zero)], 4 * BLOCK);
    assert_eq!(
        error.unwrap_err().to_string(),
        "block 1 of 4 is neither set nor in the base"
    );
}

#[test]
fn growing_and_shrinking_ask_for_what_the_base_does_not_have_in_full() {
    let bench = Bench::new(BLOCK);
    let zeros: Vec<_> = (0..4).map(|block| (block, Content::Zero)).collect();
    let short = bench.commit_blocks(None, &zeros, 3 * BLOCK + 5).unwrap();
    // Block 3 is short in the base and whole in the new disk.
    let missing = bench.commit_blocks(Some(&short), &[(4, Content::Zero)], 5 * BLOCK);
    assert!(missing.unwrap_err().to_string().starts_with("block 3 of 5"));
    let same = bench.commit_blocks(
        Some(&short),
        &[(3, Content::Same), (4, Content::Zero)],
        5 * BLOCK,
    );
    assert!(same.unwrap_err().to_string().starts_with("block 3 of 5"));
    let grown = bench
        .commit_blocks(
            Some(&short),
            &[(3, Content::Zero), (4, Content::Zero)],
            5 * BLOCK,
        )
        .unwrap();
    let shrunk = bench.commit_blocks(Some(&grown), &[], 2 * BLOCK).unwrap();
    assert_eq!(shrunk.layers, grown.layers);
    let reader = MapReader::open(&bench.repo, &shrunk).unwrap();
    assert_eq!(reader.get(2).unwrap(), Entry::Unset);
    assert_eq!(
        reader.runs().map(|run| run.unwrap().count()).sum::<u64>(),
        2
    );
    // Grown again, what the old layers have beyond the small size must not show.
    let again = bench.commit_blocks(Some(&shrunk), &[(2, Content::Zero)], 4 * BLOCK);
    assert!(again.unwrap_err().to_string().starts_with("block 3 of 4"));
}

#[test]
fn a_session_is_found_by_its_key_until_it_is_removed() {
    let bench = Bench::new(BLOCK);
    let repo = &bench.repo;
    let session = Session::create(repo, "vm a/ü", &serde_json::json!({"n": 1})).unwrap();
    assert!(Session::create(repo, "vm a/ü", &serde_json::json!({})).is_err());
    session.append(&serde_json::json!({"step": 1})).unwrap();
    let found = Session::find(repo, "vm a/ü").unwrap().unwrap();
    assert_eq!(found.id(), session.id());
    assert_eq!(found.header()["n"], 1);
    assert_eq!(found.append(&serde_json::json!({"step": 2})).unwrap(), 2);
    // The other handle does not know: it must not go on as if alone.
    let error = session.append(&serde_json::json!({"step": 2})).unwrap_err();
    assert!(
        matches!(error, forerun::image::Error::Busy { .. }),
        "{error}"
    );
    assert_eq!(found.items().unwrap().len(), 2);
    assert!(Session::find(repo, "vm b").unwrap().is_none());
    assert_eq!(Session::list(repo).unwrap().sessions.len(), 1);
    found.remove().unwrap();
    assert!(Session::find(repo, "vm a/ü").unwrap().is_none());
    assert!(bench.objects("sessions/").is_empty());
}

#[test]
fn more_segments_than_are_merged_at_once_give_the_same_map() {
    let bench = Bench::in_memory(BLOCK);
    let session = Session::create(&bench.repo, "many", &serde_json::Value::Null).unwrap();
    let mut model = vec![None; 40];
    for number in 0..300_u32 {
        let block = u64::from(number.wrapping_mul(2_654_435_761) % 40);
        let id = forerun::image::BlockId::from_bytes([number as u8; 32]);
        let content = if number % 5 == 0 {
            Content::Zero
        } else {
            Content::Data(id)
        };
        session
            .append_segment(&image_common::segment_header(), &[(block, content)])
            .unwrap();
        model[usize::try_from(block).unwrap()] = Some(content);
    }
    let segments = image_common::segments(&session).unwrap();
    let (map, stats) =
        build_map(&bench.repo, None, &session, &segments, 40 * BLOCK as u64).unwrap();
    assert_eq!(stats.changed_blocks, 40);
    let reader = MapReader::open(&bench.repo, &map).unwrap();
    for (block, expected) in (0..).zip(model) {
        let expected = match expected.unwrap() {
            Content::Data(id) => Entry::Data(id),
            _ => Entry::Zero,
        };
        assert_eq!(reader.get(block).unwrap(), expected, "{block}");
    }
    assert!(
        !bench
            .objects("sessions/")
            .iter()
            .any(|name| name.contains("merge-"))
    );
    session.remove().unwrap();
    assert!(bench.objects("sessions/").is_empty());
}
