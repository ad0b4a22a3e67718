//! What has come on a control socket and is not yet taken in. It is read to where it is looked at, and moved only where the rest of a
//! frame has no room behind its beginning. Pure.

/// At least so much is read at a time.
const READ_BYTES: usize = 1 << 16;

/// Bytes in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Intake {
    memory: Vec<u8>,
    /// What is before has been taken in.
    start: usize,
    end: usize,
}

impl Intake {
    /// Where to read what comes next.
    pub(super) fn space(&mut self) -> &mut [u8] {
        if self.memory.len() - self.end < READ_BYTES {
            self.memory.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.memory.len() - self.end < READ_BYTES {
            self.memory.resize(self.end + READ_BYTES, 0);
        }
        &mut self.memory[self.end..]
    }

    /// So many bytes were read into the space.
    pub(super) fn came(&mut self, bytes: usize) {
        self.end = self.memory.len().min(self.end + bytes);
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.end]
    }

    /// So many bytes are taken in.
    pub(super) fn take(&mut self, bytes: usize) {
        self.start = self.end.min(self.start + bytes);
        if self.start == self.end {
            self.clear();
        }
    }

    /// Forgets what is not taken in.
    pub(super) fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Frames of one length, in reads of another: whatever the two are, what comes in goes out.
    #[test]
    fn bytes_come_out_in_the_order_in_which_they_came() {
        for frame in [1, 7, READ_BYTES - 1, READ_BYTES, READ_BYTES + 1, 3 * READ_BYTES + 5] {
            for read in [1_000, READ_BYTES / 2 + 3, READ_BYTES] {
                let mut intake = Intake::default();
                let source: Vec<u8> = (0..=250).cycle().take(6 * frame.max(read) + 11).collect();
                let (mut given, mut taken) = (0, Vec::new());
                while given < source.len() {
                    let space = intake.space();
                    let bytes = read.min(space.len()).min(source.len() - given);
                    space[..bytes].copy_from_slice(&source[given..given + bytes]);
                    intake.came(bytes);
                    given += bytes;
                    let whole = intake.bytes().len() / frame * frame;
                    taken.extend_from_slice(&intake.bytes()[..whole]);
                    intake.take(whole);
                }
                taken.extend_from_slice(intake.bytes());
                assert_eq!(taken, source, "{frame} {read}");
                assert!(intake.memory.len() <= frame + 2 * READ_BYTES, "{frame} {read}");
            }
        }
    }
}
