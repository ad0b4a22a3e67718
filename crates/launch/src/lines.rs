//! Cuts a stream of bytes into what may be shown: whole lines with a prefix, or a terminal's raw stream. Pure.

use std::collections::VecDeque;

/// A line longer than this is shown in pieces: memory stays bounded.
const LINE_BYTES_MAX: usize = 64 << 10;
/// Last lines kept for the report.
const TAIL_LINES: usize = 8;
const TAIL_LINE_BYTES: usize = 400;

/// How a stream is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// As it comes, whole lines.
    Plain,
    /// Whole lines, each after this.
    Prefixed(String),
    /// A terminal behind it: shown at once, carriage returns and all; only lines that begin with text are prefixed.
    Terminal(String),
}

/// One stream on its way to the screen.
#[derive(Debug)]
pub(crate) struct Lines {
    style: Style,
    partial: Vec<u8>,
    at_line_start: bool,
}

impl Lines {
    pub(crate) const fn new(style: Style) -> Self {
        Self { style, partial: Vec::new(), at_line_start: true }
    }

    /// Takes `bytes` and returns what to show now.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Vec<u8> {
        match self.style.clone() {
            Style::Terminal(prefix) => self.push_terminal(bytes, &prefix),
            Style::Plain => self.push_lines(bytes, ""),
            Style::Prefixed(prefix) => self.push_lines(bytes, &prefix),
        }
    }

    fn push_lines(&mut self, bytes: &[u8], prefix: &str) -> Vec<u8> {
        let mut shown = Vec::new();
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            shown.extend(prefix.as_bytes());
            shown.append(&mut self.partial);
            shown.extend(&rest[..=end]);
            rest = &rest[end + 1..];
        }
        self.partial.extend(rest);
        if self.partial.len() > LINE_BYTES_MAX {
            shown.extend(prefix.as_bytes());
            shown.append(&mut self.partial);
            shown.push(b'\n');
        }
        shown
    }

    fn push_terminal(&mut self, bytes: &[u8], prefix: &str) -> Vec<u8> {
        let mut shown = Vec::new();
        self.partial.extend(bytes);
        let pending = std::mem::take(&mut self.partial);
        let mut at = 0;
        while at < pending.len() {
            if self.at_line_start {
                match starts_with_text(&pending[at..]) {
                    Some(true) => shown.extend(prefix.as_bytes()),
                    Some(false) => {}
                    None => {
                        self.partial = pending[at..].to_vec();
                        return shown;
                    }
                }
            }
            let line = pending[at..].iter().position(|&byte| byte == b'\n');
            let end = line.map_or(pending.len(), |line| at + line + 1);
            shown.extend(&pending[at..end]);
            self.at_line_start = line.is_some();
            at = end;
        }
        shown
    }

    /// Whether the screen's cursor was left inside a line by this stream.
    pub(crate) const fn is_inside_line(&self) -> bool {
        matches!(self.style, Style::Terminal(_)) && !self.at_line_start
    }

    /// Another stream wrote over the line this one had begun.
    pub(crate) fn line_was_cleared(&mut self) {
        self.at_line_start = true;
    }

    /// What is left when the stream has ended: a last line without its end gets one.
    pub(crate) fn finish(&mut self) -> Vec<u8> {
        let inside = self.is_inside_line();
        let mut shown = if self.partial.is_empty() { Vec::new() } else { self.push(b"\n") };
        if inside {
            shown.push(b'\n');
            self.at_line_start = true;
        }
        shown
    }
}

/// Whether a line that begins like this is text (perhaps coloured), rather than a redraw that moves the cursor.
/// `None`: too few bytes to tell.
fn starts_with_text(bytes: &[u8]) -> Option<bool> {
    match bytes {
        [] | [0x1b] => None,
        [b'\r' | b'\n', ..] => Some(false),
        [0x1b, b'[', rest @ ..] => match rest.iter().find(|byte| byte.is_ascii_alphabetic()) {
            // `m` sets colours; every other control sequence moves or clears.
            Some(b'm') => Some(true),
            Some(_) => Some(false),
            None if rest.len() < 32 => None,
            None => Some(false),
        },
        [0x1b, ..] => Some(false),
        _ => Some(true),
    }
}

/// The last lines of a stream, for the report, without colours and redraws.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    lines: VecDeque<String>,
    partial: Vec<u8>,
    /// The first panic's place and message: a backtrace after it would push them out.
    panic: Vec<String>,
}

impl Tail {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match byte {
                b'\n' => self.end_line(),
                // A carriage return starts the line anew, as it does on the screen.
                b'\r' => self.partial.clear(),
                _ if self.partial.len() < TAIL_LINE_BYTES => self.partial.push(byte),
                _ => {}
            }
        }
    }

    fn end_line(&mut self) {
        let line = without_escapes(&String::from_utf8_lossy(&self.partial));
        self.partial.clear();
        if line.trim().is_empty() {
            return;
        }
        let is_panic = line.starts_with("thread ") && line.contains(" panicked at ");
        if self.panic.len() == 1 || (self.panic.is_empty() && is_panic) {
            self.panic.push(line.trim().to_owned());
        }
        if self.lines.len() == TAIL_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line.trim().to_owned());
    }

    /// The lines, oldest first; of a panic its place and its message instead.
    pub(crate) fn lines(&mut self) -> Vec<String> {
        if !self.partial.is_empty() {
            self.end_line();
        }
        if self.panic.is_empty() {
            self.lines.iter().cloned().collect()
        } else {
            self.panic.clone()
        }
    }
}

fn without_escapes(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        if character != '\u{1b}' {
            if !character.is_control() || character == '\t' {
                plain.push(character);
            }
            continue;
        }
        if characters.next() == Some('[') {
            // Up to and including the letter that ends the sequence.
            while characters.next().is_some_and(|c| !c.is_ascii_alphabetic()) {}
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefixed() -> Lines {
        Lines::new(Style::Prefixed("[rank 1] ".to_owned()))
    }

    fn terminal() -> Lines {
        Lines::new(Style::Terminal("[rank 0] ".to_owned()))
    }

    fn text(bytes: &[u8]) -> String {
        String::from_utf8_lossy(bytes).into_owned()
    }

    #[test]
    fn lines_are_prefixed_once_whole_however_they_arrive() {
        let whole = "one\n\ntwo\nthree";
        for cut in 0..whole.len() {
            let mut lines = prefixed();
            let mut shown = lines.push(&whole.as_bytes()[..cut]);
            shown.extend(lines.push(&whole.as_bytes()[cut..]));
            assert_eq!(text(&shown), "[rank 1] one\n[rank 1] \n[rank 1] two\n", "cut at {cut}");
            assert_eq!(text(&lines.finish()), "[rank 1] three\n");
            assert_eq!(text(&lines.finish()), "");
        }
    }

    #[test]
    fn a_line_without_end_is_shown_in_pieces() {
        let mut lines = prefixed();
        let shown = lines.push(&vec![b'x'; LINE_BYTES_MAX + 1]);
        assert_eq!(shown.len(), "[rank 1] ".len() + LINE_BYTES_MAX + 1 + 1);
    }

    #[test]
    fn a_progress_bar_passes_a_terminal_stream_unchanged_and_text_is_prefixed() {
        let mut lines = terminal();
        let bar = "\r\u{1b}[2K##--- 40%";
        assert_eq!(text(&lines.push(bar.as_bytes())), bar);
        assert!(lines.is_inside_line());
        assert_eq!(text(&lines.push(b"\r##### 100%\n")), "\r##### 100%\n");
        assert!(!lines.is_inside_line());
        assert_eq!(text(&lines.push(b"step 1\nstep 2\n")), "[rank 0] step 1\n[rank 0] step 2\n");
        let coloured = "\u{1b}[32mINFO\u{1b}[0m x\n";
        assert_eq!(text(&lines.push(coloured.as_bytes())), format!("[rank 0] {coloured}"));
    }

    #[test]
    fn an_escape_sequence_cut_in_two_is_kept_until_it_is_whole() {
        for (sequence, expected) in
            [("\u{1b}[2Kbar", "\u{1b}[2Kbar"), ("\u{1b}[1mbold", "[rank 0] \u{1b}[1mbold")]
        {
            for cut in 0..4 {
                let mut lines = terminal();
                let mut shown = lines.push(&sequence.as_bytes()[..cut]);
                shown.extend(lines.push(&sequence.as_bytes()[cut..]));
                assert_eq!(text(&shown), expected, "cut at {cut}");
            }
        }
    }

    #[test]
    fn a_terminal_stream_that_ends_inside_a_line_ends_it() {
        let mut lines = terminal();
        lines.push(b"\rbar");
        assert_eq!(text(&lines.finish()), "\n");
        assert_eq!(text(&lines.finish()), "");
    }

    #[test]
    fn of_a_panic_its_place_and_message_are_kept_and_not_its_backtrace() {
        let mut tail = Tail::default();
        tail.push(b"before\n\nthread 'main' (7) panicked at src/a.rs:1:2:\nout of paper\nstack backtrace:\n");
        (0..50).for_each(|frame| tail.push(format!("{frame}: f\n").as_bytes()));
        tail.push(b"thread 'other' panicked at src/b.rs:1:2:\na consequence\n");
        assert_eq!(tail.lines(), ["thread 'main' (7) panicked at src/a.rs:1:2:", "out of paper"]);
    }

    #[test]
    fn the_tail_keeps_the_last_lines_as_they_were_seen() {
        let mut tail = Tail::default();
        for line in 0..20 {
            tail.push(format!("line {line}\n").as_bytes());
        }
        tail.push(b"\x1b[31merror\x1b[0m: bad\n\n  \n10%\r20%\rdone");
        let lines = tail.lines();
        assert_eq!(lines.len(), TAIL_LINES);
        assert_eq!(lines[TAIL_LINES - 2..], ["error: bad", "done"]);
        tail.push(&[b'x'; 5000]);
        assert!(tail.lines().iter().all(|line| line.len() <= TAIL_LINE_BYTES));
    }
}
