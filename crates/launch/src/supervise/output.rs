//! What the ranks say, on its way to the screen and their logs.

use std::io::{self, Read as _};

use super::Supervisor;
use crate::screen::{Screen, Stream};

const READ_BYTES: usize = 64 << 10;
/// Reads of one stream before the others get their turn.
const READS_PER_TURN: usize = 8;
pub(super) const STREAMS: [Stream; 2] = [Stream::Output, Stream::Error];

impl Supervisor {
    /// Reads what a rank has written, and shows it.
    pub(super) fn read(&mut self, at: usize) {
        let mut buffer = vec![0; READ_BYTES];
        for (which, stream) in STREAMS.into_iter().enumerate() {
            for _ in 0..READS_PER_TURN {
                let rank = &mut self.ranks[at];
                let Some(file) = &mut rank.process.streams[which] else { break };
                let count = match file.read(&mut buffer) {
                    Ok(count) => count,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    // A pseudo-terminal whose other end is closed answers EIO: that is its end of file.
                    Err(_) => 0,
                };
                if count == 0 {
                    self.close(at, which);
                    break;
                }
                rank.keep(stream, &buffer[..count]);
                let shown = rank.lines[which].push(&buffer[..count]);
                self.show(stream, &shown, at);
            }
        }
    }

    pub(super) fn close(&mut self, at: usize, which: usize) {
        self.ranks[at].process.streams[which] = None;
        let rest = self.ranks[at].lines[which].finish();
        self.show(STREAMS[which], &rest, at);
    }

    /// Writes to the screen; a progress bar of another stream that stands there is cleared first, and redraws itself.
    fn show(&mut self, stream: Stream, bytes: &[u8], from: usize) {
        if bytes.is_empty() {
            return;
        }
        for (at, rank) in self.ranks.iter_mut().enumerate() {
            let is_itself = at == from && stream == Stream::Error;
            if rank.lines[1].is_inside_line() && !is_itself && Screen::is_terminal(stream) {
                self.screen.write(Stream::Error, b"\r\x1b[2K");
                rank.lines[1].line_was_cleared();
            }
        }
        self.screen.write(stream, bytes);
    }

    /// A line of the launcher's own, below a progress bar that stands there.
    pub(crate) fn notice(&mut self, line: &str) {
        for rank in &mut self.ranks {
            if rank.lines[1].is_inside_line() {
                self.screen.write(Stream::Error, b"\n");
                rank.lines[1].line_was_cleared();
            }
        }
        self.screen.notice(line);
    }
}
