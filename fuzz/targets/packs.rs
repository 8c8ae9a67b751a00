//! Hostile packs and index runs under right checksums: entries whose fields, lengths and compressed bytes are the input's, and an
//! index that says anything about them. A block that is handed out hashes to its id, whatever they say.
#![no_main]

use std::sync::Arc;

use forerun::image::{BlockId, Repository, VerifyOptions};
use forerun_fuzz::{Input, Memory, empty, seal_binary};
use libfuzzer_sys::fuzz_target;
use sha2::{Digest, Sha256};

const PACK: [u8; 16] = [0xab; 16];

/// Where a block is said to be, as footers and indexes say it.
struct Said {
    id: [u8; 32],
    offset: u32,
    codec: u8,
    stored: u32,
    plain: u32,
}

impl Said {
    fn fields(&self) -> Vec<u8> {
        let stored = self.stored.to_le_bytes();
        let mut bytes = self.offset.to_le_bytes().to_vec();
        bytes.extend([self.codec, stored[0], stored[1], stored[2]]);
        bytes.extend(self.plain.to_le_bytes());
        bytes
    }
}

/// The entries of a pack, and what the index is told of them.
fn entries(input: &mut Input<'_>) -> Option<(Vec<u8>, Vec<Said>)> {
    let (mut body, mut said) = (Vec::new(), Vec::new());
    for _ in 0..input.byte()? % 4 {
        let stored = input.data()?;
        let codec = input.byte()? % 4;
        let plain = input.number(&[stored.len() as u32, 64, 1, 1 << 20, 0])?;
        let id = match input.byte()? % 2 {
            0 => Sha256::digest(stored).into(),
            _ => [input.byte()?; 32],
        };
        let mut entry = b"fBlk".to_vec();
        entry.extend([1, codec, 0, 0]);
        entry.extend(id);
        entry.extend(plain.to_le_bytes());
        entry.extend(input.number(&[stored.len() as u32])?.to_le_bytes());
        let mut sum = crc32fast::Hasher::new();
        sum.update(&entry);
        sum.update(stored);
        entry.extend(sum.finalize().to_le_bytes());
        let offset = 16 + body.len() as u32;
        said.push(Said {
            id,
            offset: input.number(&[offset, 16, 0])?,
            codec: input.number(&[u32::from(codec)])? as u8,
            stored: input.number(&[stored.len() as u32])?,
            plain: input.number(&[plain, 1])?,
        });
        body.extend(entry);
        body.extend(stored);
    }
    Some((body, said))
}

fn run_of(input: &mut Input<'_>, said: &mut [Said]) -> Option<Vec<u8>> {
    said.sort_by_key(|said| (said.id, said.offset));
    let mut entries = Vec::new();
    for said in &*said {
        entries.extend(said.id);
        entries.extend(input.number(&[0, 1])?.to_le_bytes());
        entries.extend(said.fields());
    }
    let mut page = (said.len() as u16).to_le_bytes().to_vec();
    page.extend([0, 0]);
    page.extend(entries);
    let mut body = crc32fast::hash(&page).to_le_bytes().to_vec();
    body.extend(page);
    body.extend(PACK);
    let bits = match input.byte()? % 2 {
        0 => vec![0xff; 60],
        _ => [input.data()?, &[0; 60]].concat()[..60].to_vec(),
    };
    body.extend(crc32fast::hash(&bits).to_le_bytes());
    body.extend(bits);
    let mut footer = vec![7; 16];
    footer.extend(u64::from(input.number(&[said.len() as u32, 86])?).to_le_bytes());
    footer.extend(said.first()?.id);
    footer.extend(said.last()?.id);
    footer.extend(input.number(&[1, 0])?.to_le_bytes());
    footer.extend(Sha256::digest(PACK));
    footer.extend(input.number(&[1, 0, u32::MAX])?.to_le_bytes());
    Some(seal_binary(*b"fr-indx\0", &body, &footer))
}

fn run(data: &[u8]) -> Option<()> {
    let mut input = Input(data);
    let (body, mut said) = entries(&mut input)?;
    let mut footer = PACK.to_vec();
    let label = input.data()?;
    footer.extend((label.len() as u16).to_le_bytes());
    footer.extend(label);
    footer.extend(input.number(&[said.len() as u32])?.to_le_bytes());
    for said in &said {
        footer.extend(said.id);
        footer.extend(said.fields());
    }
    let mut objects = empty();
    objects.insert(
        format!("packs/ab/{}", "ab".repeat(16)),
        seal_binary(*b"fr-pack\0", &body, &footer),
    );
    if let Some(run) = run_of(&mut input, &mut said) {
        objects.insert(format!("index/{}", "0".repeat(32)), run);
    }
    let repo = Repository::open_store(Arc::new(Memory::new(objects))).expect("the config is sound");
    let read = |when: &str| {
        for said in &said {
            if let Ok(plain) = repo.read_block(BlockId::from_bytes(said.id)) {
                let id: [u8; 32] = Sha256::digest(&plain).into();
                assert!(id == said.id, "{when}: another block was handed out");
            }
        }
    };
    read("as it is");
    repo.encode(&[1; 64]).ok();
    repo.verify(&VerifyOptions::default()).ok();
    repo.rebuild_index().ok();
    read("with an index made anew");
    Some(())
}

fuzz_target!(|data: &[u8]| {
    run(data);
});
