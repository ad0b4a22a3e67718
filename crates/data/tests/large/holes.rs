//! A prepared folder of 10^9 samples and more. The files have holes: a terabyte takes some megabytes of disk.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use phalanx_data::format::{SpecialTokens, TokenStream, TokenWriter};
use phalanx_data::Access;

const SPECIAL: SpecialTokens = SpecialTokens::bert(0, 1, 2, 3, 4);
/// Tokens of a sample.
pub(crate) const SEQUENCE_LEN: usize = 512;
/// Samples in the folder, at least.
pub(crate) const SAMPLES: u64 = 1_000_000_000;
/// Of a shard of the converter's size.
const SHARD_TOKENS: u64 = 1 << 29;
const BLOCK: u64 = 1 << 20;

/// A shard of zeros in the documented format, and its entry in the index.
fn write_shard(folder: &Path, number: u64) -> anyhow::Result<serde_json::Value> {
    let (tokens_end, offsets_end) = (2 * SHARD_TOKENS, 2 * SHARD_TOKENS + 16);
    let content = 4096 + offsets_end;
    let blocks = content.div_ceil(BLOCK);
    let mut header = serde_json::json!({
        "tokens": {"dtype": "U16", "shape": [SHARD_TOKENS], "data_offsets": [0, tokens_end]},
        "doc_offsets": {"dtype": "U64", "shape": [2], "data_offsets": [tokens_end, offsets_end]},
        "block_crc32c":
            {"dtype": "U32", "shape": [blocks], "data_offsets": [offsets_end, offsets_end + 4 * blocks]},
    })
    .to_string()
    .into_bytes();
    header.resize(4096 - 8, b' ');
    let mut first = vec![0; 1 << 20];
    first[..8].copy_from_slice(&4088_u64.to_le_bytes());
    first[8..4096].copy_from_slice(&header);
    let mut last = vec![0; usize::try_from(content % BLOCK)?];
    let at = last.len() - 8;
    last[at..].copy_from_slice(&SHARD_TOKENS.to_le_bytes());
    let zeros = crc32c::crc32c(&vec![0; 1 << 20]);
    let mut sums = vec![zeros; usize::try_from(blocks)?];
    sums[0] = crc32c::crc32c(&first);
    if let Some(sum) = sums.last_mut() {
        *sum = crc32c::crc32c(&last);
    }
    let sums: Vec<u8> = sums.into_iter().flat_map(u32::to_le_bytes).collect();
    let name = format!("tokens-{number:05}.safetensors");
    let file = File::create(folder.join(&name))?;
    file.write_all_at(&first[..4096], 0)?;
    file.write_all_at(&last[at..], content - 8)?;
    file.write_all_at(&sums, content)?;
    let pages: Vec<u32> = sums.chunks(4096).map(crc32c::crc32c).collect();
    Ok(serde_json::json!({
        "file": name, "file_bytes": content + 4 * blocks, "token_count": SHARD_TOKENS,
        "document_count": 1, "crc32c": pages,
    }))
}

/// Writes the folder; gives the number of its shards.
pub(crate) fn write(target: &Path) -> anyhow::Result<u64> {
    let shards = (SAMPLES * (SEQUENCE_LEN as u64 - 2)).div_ceil(SHARD_TOKENS);
    // The rest of the index as the writer makes it.
    let mut writer = TokenWriter::create(target, b"{}", 500, SPECIAL, 1 << 20)?;
    writer.tokens(&[7, 3])?;
    writer.finish(0)?;
    let path = target.join("index.json");
    let mut index: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    let entries: anyhow::Result<Vec<_>> =
        (0..shards).map(|number| write_shard(target, number)).collect();
    index["shards"] = entries?.into();
    index["token_count"] = (shards * SHARD_TOKENS).into();
    index["document_count"] = shards.into();
    std::fs::write(&path, index.to_string())?;
    // The error says which fingerprint it should have.
    let error = match TokenStream::open(target, Access::Read) {
        Err(error) => error.to_string(),
        Ok(_) => anyhow::bail!("any fingerprint will do"),
    };
    let Some((_, fingerprint)) = error.split_once("expected ") else { anyhow::bail!(error) };
    index["fingerprint"] = fingerprint[..16].into();
    std::fs::write(&path, index.to_string())?;
    Ok(shards)
}
