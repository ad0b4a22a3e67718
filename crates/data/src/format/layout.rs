//! Where the checksums of a shard lie: behind what they are of, to the file's end.
//!
//! A file is cut into blocks of [`BLOCK_BYTES`]; each has a checksum, and [`PAGE_BLOCKS`] checksums
//! are a page, whose own checksum is in the index.

use crate::cast::to_u64;

/// Bytes of a block with a checksum of its own: small enough to verify on first touch.
pub(crate) const BLOCK_BYTES: usize = 1 << 20;

/// Checksums of blocks in a page.
pub(crate) const PAGE_BLOCKS: u64 = 1024;

/// The tensor of checksums.
pub(crate) const CHECKSUMS: &str = "block_crc32c";

/// Bytes of a checksum.
pub(crate) const CHECKSUM_BYTES: u64 = 4;

/// How a file is divided into content and checksums.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct BlockLayout {
    /// Bytes before the checksums.
    pub(crate) content_bytes: u64,
    /// Blocks of these; each has a checksum.
    pub(crate) blocks: u64,
}

impl BlockLayout {
    /// The layout of a file of this size; there are sizes that no file has.
    pub(crate) fn of(file_bytes: u64) -> Option<Self> {
        let block_bytes = to_u64(BLOCK_BYTES);
        let blocks = file_bytes.div_ceil(block_bytes + CHECKSUM_BYTES);
        let content_bytes = file_bytes.checked_sub(blocks * CHECKSUM_BYTES)?;
        let is_whole = content_bytes.div_ceil(block_bytes) == blocks;
        is_whole.then_some(BlockLayout { content_bytes, blocks })
    }

    /// The layout of a file of so many bytes without their checksums.
    pub(crate) fn for_content(content_bytes: u64) -> Self {
        BlockLayout { content_bytes, blocks: content_bytes.div_ceil(to_u64(BLOCK_BYTES)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_tells_where_the_checksums_begin() {
        let block = to_u64(BLOCK_BYTES);
        for content in [1, 4095, block - 1, block, block + 1, 7 * block - 3, 7 * block, 3 << 40] {
            let layout = BlockLayout::for_content(content);
            let file_bytes = content + 4 * layout.blocks;
            assert_eq!(BlockLayout::of(file_bytes), Some(layout), "{content}");
        }
        // One block with its checksum, and another checksum of nothing.
        assert_eq!(BlockLayout::of(block + 4 + 4), None);
        assert_eq!(BlockLayout::of(3), None);
        assert_eq!(BlockLayout::of(0), Some(BlockLayout::default()));
        assert!(BlockLayout::of(u64::MAX).is_some());
    }
}
