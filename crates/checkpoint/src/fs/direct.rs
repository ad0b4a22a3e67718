//! Files that are written past the page cache (`O_DIRECT`): a checkpoint is not read again soon, and its pages would push out those that
//! are. What is not aligned, and what the file system does not take so, is written as usual.
//!
//! Source: open(2); on the disks tried this was two to three times as fast until durable as writing and syncing.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;

use rustix::fs::{fcntl_getfl, fcntl_setfl, OFlags};

use super::Output;
use crate::buffer::ALIGNMENT_BYTES;

/// A file that is being written, directly as long as that is possible.
pub(super) struct Direct {
    file: File,
    is_direct: bool,
}

impl Direct {
    /// A new file.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        let mut output = Self { file: File::create_new(path)?, is_direct: false };
        // Not every file system has it.
        output.is_direct = output.set(true).is_ok();
        Ok(output)
    }

    fn set(&self, direct: bool) -> io::Result<()> {
        let mut flags = fcntl_getfl(&self.file)?;
        flags.set(OFlags::DIRECT, direct);
        Ok(fcntl_setfl(&self.file, flags)?)
    }

    fn write_plainly(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.is_direct {
            self.set(false)?;
            self.is_direct = false;
        }
        self.file.write_all(bytes)
    }
}

impl Output for Direct {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let is_aligned = bytes.as_ptr().align_offset(ALIGNMENT_BYTES) == 0;
        if !self.is_direct || !is_aligned {
            return self.write_plainly(bytes);
        }
        let whole = bytes.len() - bytes.len() % ALIGNMENT_BYTES;
        let mut rest = bytes;
        // All that was written before was a multiple of a page: what is not is the last.
        while bytes.len() - rest.len() < whole {
            let left = whole - (bytes.len() - rest.len());
            match self.file.write(&rest[..left]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                // A part of a page would leave the file's end where the next write cannot begin.
                Ok(count) if count % ALIGNMENT_BYTES != 0 => {
                    return self.write_plainly(&rest[count..])
                }
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => break,
                Err(error) => return Err(error),
            }
        }
        if rest.is_empty() {
            return Ok(());
        }
        self.write_plainly(rest)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Buffer;

    #[test]
    fn bytes_of_any_length_and_place_arrive() {
        let folder = tempfile::tempdir().unwrap();
        for (number, lens) in
            [vec![0], vec![1], vec![4096], vec![8192, 4097, 5, 4096], vec![3, 8192]]
                .into_iter()
                .enumerate()
        {
            let path = folder.path().join(number.to_string());
            let mut file = Direct::create(&path).unwrap();
            let mut expected = Vec::new();
            for (round, len) in lens.into_iter().enumerate() {
                let mut buffer = Buffer::default();
                buffer.resize(len);
                buffer.fill(u8::try_from(7 + round).unwrap());
                file.write(&buffer).unwrap();
                file.write(buffer.get(1..).unwrap_or_default()).unwrap();
                expected.extend_from_slice(&buffer);
                expected.extend_from_slice(buffer.get(1..).unwrap_or_default());
            }
            file.sync().unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), expected, "{number}");
        }
    }
}
