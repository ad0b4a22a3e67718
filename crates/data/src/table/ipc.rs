//! What an Arrow file or stream says of its sizes, compared with the file before the library takes
//! it at its word.
//!
//! The library reserves what a block, a message or a compressed buffer claims to hold. A claim that
//! no memory satisfies would end the process, and that is not a panic which could be caught.
//! Source:
//! <https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc>.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use arrow_ipc::{root_as_footer, root_as_message, CompressionType, Message};

use crate::cast::to_usize;

/// Bytes that LZ4 makes of one, at most: a byte of a match's length stands for 255 of them.
pub(super) const LZ4_RATIO: u64 = 255;

/// Bytes that Zstandard makes of one, at most: a block of 128 KiB that repeats a byte takes four.
pub(super) const ZSTD_RATIO: u64 = 1 << 15;

/// What a compressed buffer may claim to hold, however small it is.
const CLAIM_BYTES_MIN: u64 = 1 << 17;

/// Before a message that is longer than its first four bytes say.
const CONTINUATION: [u8; 4] = [0xFF; 4];

type Result<T> = std::result::Result<T, String>;

/// Compares what a file says of its blocks, or a stream of its messages, with its size. A file that
/// ends early, or whose parts are not of their kind, is left to the library.
pub(super) fn check(file: &File, is_stream: bool) -> Result<()> {
    let bytes = file.metadata().map_err(failed)?.len();
    if is_stream {
        check_stream(file, bytes)
    } else {
        check_file(file, bytes)
    }
}

fn check_file(file: &File, bytes: u64) -> Result<()> {
    // The footer's length and the magic.
    let Some(end) = bytes.checked_sub(10) else { return Ok(()) };
    let footer_bytes = claim(i64::from(i32::from_le_bytes(array(file, end)?)), end, "its footer")?;
    let footer = read(file, end - footer_bytes, footer_bytes)?;
    let footer = root_as_footer(&footer).map_err(|error| format!("its footer: {error}"))?;
    let blocks = footer.dictionaries().into_iter().chain(footer.recordBatches()).flatten();
    for block in blocks {
        let at = claim(block.offset(), bytes, "the place of a block")?;
        let head_bytes = claim(i64::from(block.metaDataLength()), bytes - at, "a block")?;
        let body_at = at + head_bytes;
        let body_bytes = claim(block.bodyLength(), bytes - body_at, "a block")?;
        let head = read(file, at, head_bytes)?;
        let prefix = if head.starts_with(&CONTINUATION) { 8 } else { 4 };
        let message = root_as_message(head.get(prefix..).unwrap_or_default());
        check_message(file, &message.map_err(|error| error.to_string())?, body_at, body_bytes)?;
    }
    Ok(())
}

fn check_stream(file: &File, bytes: u64) -> Result<()> {
    let mut at = 0;
    while at + 8 <= bytes {
        let mut length: [u8; 4] = array(file, at)?;
        at += 4;
        if length == CONTINUATION {
            length = array(file, at)?;
            at += 4;
        }
        let head_bytes = claim(i64::from(i32::from_le_bytes(length)), bytes - at, "a message")?;
        if head_bytes == 0 {
            break;
        }
        let head = read(file, at, head_bytes)?;
        at += head_bytes;
        let message = root_as_message(&head).map_err(|error| error.to_string())?;
        let body_bytes = claim(message.bodyLength(), bytes - at, "a message")?;
        check_message(file, &message, at, body_bytes)?;
        at += body_bytes;
    }
    Ok(())
}

/// Compares what the compressed buffers of a message claim to hold with what they can.
fn check_message(file: &File, message: &Message<'_>, body_at: u64, body_bytes: u64) -> Result<()> {
    let of_dictionary = || message.header_as_dictionary_batch().and_then(|batch| batch.data());
    let Some(batch) = message.header_as_record_batch().or_else(of_dictionary) else {
        return Ok(());
    };
    let Some(compression) = batch.compression() else { return Ok(()) };
    let is_lz4 = compression.codec() == CompressionType::LZ4_FRAME;
    let ratio = if is_lz4 { LZ4_RATIO } else { ZSTD_RATIO };
    let mut rest = body_bytes;
    for buffer in batch.buffers().into_iter().flatten() {
        // What lies twice in a message would be unpacked twice.
        let len = claim(buffer.length(), rest, "a buffer")?;
        let at = claim(buffer.offset(), body_bytes - len, "the place of a buffer")?;
        rest -= len;
        if len < 8 {
            continue;
        }
        // -1: it is not compressed.
        let claimed = i64::from_le_bytes(array(file, body_at + at)?);
        let most = CLAIM_BYTES_MIN.saturating_add(len.saturating_mul(ratio));
        if claimed > 0 && claimed.unsigned_abs() > most {
            return Err(format!("a buffer of {len} bytes claims to hold {claimed}"));
        }
    }
    Ok(())
}

/// A number that must not be negative nor more than there is.
fn claim(claimed: i64, available: u64, what: &str) -> Result<u64> {
    u64::try_from(claimed)
        .ok()
        .filter(|&bytes| bytes <= available)
        .ok_or_else(|| format!("{what} claims {claimed} of {available} bytes"))
}

fn read(file: &File, at: u64, bytes: u64) -> Result<Vec<u8>> {
    let mut out = vec![0; to_usize(bytes)];
    file.read_exact_at(&mut out, at).map_err(failed)?;
    Ok(out)
}

fn array<const N: usize>(file: &File, at: u64) -> Result<[u8; N]> {
    let mut out = [0; N];
    file.read_exact_at(&mut out, at).map_err(failed)?;
    Ok(out)
}

#[expect(clippy::needless_pass_by_value, reason = "what `map_err` gives")]
fn failed(error: io::Error) -> String {
    error.to_string()
}
