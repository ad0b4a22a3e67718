//! Where text may be cut: pure functions of the bytes from its start on, whose result the tokens do
//! not depend on.
//!
//! A [boundary](is_boundary) has white space on one side. Tokenizers of BERT's kind split at all
//! white space. The patterns of GPT-2, Llama 3 and Qwen ([`crate::text::pieces`]) look behind a
//! piece for one thing only: whether white space ends there or goes on. Of a run of white space
//! they leave the last character to what follows (`\s+(?!\S)`), or end after its last line break.
//! So a piece begins with a run's last character where that is no line break, and the run before it
//! is the same piece if the text ends there; and one begins after a line break that has no white
//! space around it. Nothing composes across either (NFC). Encoders of other kinds mostly split at
//! single spaces, which therefore come first.

/// Large enough that starting one costs nothing, small enough to spread a small text over all
/// threads.
pub(crate) const BLOCK_BYTES: usize = 64 << 10;

/// What is encoded at once, where a document can be cut: encoders of the `tokenizers` crate need
/// some hundred bytes of memory for each.
pub(crate) const PIECE_BYTES: usize = 256 << 10;

/// A run without a boundary is cut after so many bytes: no word of a vocabulary is as long.
const RUN_BYTES_MAX: usize = 1 << 20;

/// A line is held in memory whole. Longer ones are rather files of another kind, and nothing is
/// kept of them.
pub(crate) const LINE_BYTES_MAX: usize = 256 << 20;

/// Where blocks may end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CutRule {
    /// After white space: for encoders to which words are all that counts.
    Space,
    /// After a line. Lines stay whole.
    Line,
    /// After an empty line. What is longer than [`PIECE_BYTES`] without one is cut as a piece.
    BlankLine,
    /// As pieces: see [`piece_len`].
    Piece,
}

impl CutRule {
    /// How long the next block is, if that can be told from what was read.
    pub(crate) fn block_len(self, buffer: &[u8], ended: bool) -> Option<usize> {
        let len = buffer.len();
        let whole_bytes_max = match self {
            CutRule::Space => RUN_BYTES_MAX - 1,
            CutRule::Piece => PIECE_BYTES,
            CutRule::Line | CutRule::BlankLine => usize::MAX,
        };
        if ended && len <= whole_bytes_max {
            return Some(len);
        }
        if len < BLOCK_BYTES {
            return None;
        }
        let end = match self {
            // What lies behind the window depends on how the buffer was filled; the cut must not.
            CutRule::Space => space_end(&buffer[..len.min(RUN_BYTES_MAX)])
                .or_else(|| buffer.get(..RUN_BYTES_MAX).map(run_end)),
            CutRule::Line => line_end(buffer),
            CutRule::BlankLine => blank_line_end(buffer).or_else(|| piece_len(buffer)),
            CutRule::Piece => piece_len(buffer),
        };
        end.or(ended.then_some(len))
    }

    /// Whether a document may go on after a block of that content.
    pub(crate) fn goes_on(self, block: &[u8]) -> bool {
        match self {
            CutRule::Space | CutRule::Piece => true,
            CutRule::Line => false,
            CutRule::BlankLine => blank_line_end(block) != Some(block.len()),
        }
    }
}

/// How long the first piece of a text of more than [`PIECE_BYTES`] is. `None` if more bytes are
/// needed.
pub(super) fn piece_len(text: &[u8]) -> Option<usize> {
    bounded_piece_len(text, PIECE_BYTES, RUN_BYTES_MAX)
}

/// The last boundary within `piece_bytes`, or the first one after them, or some end within
/// `run_bytes_max`.
fn bounded_piece_len(text: &[u8], piece_bytes: usize, run_bytes_max: usize) -> Option<usize> {
    if text.len() <= piece_bytes {
        return None;
    }
    // What lies behind the window depends on how the buffer was filled; the cut must not.
    let window = &text[..text.len().min(run_bytes_max)];
    let mut later = piece_bytes..window.len();
    last_boundary(&text[..piece_bytes])
        .or_else(|| later.find(|&at| boundary(window, at).is_some()))
        .or_else(|| text.get(..run_bytes_max).map(run_end))
}

/// Kinds of boundaries, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Boundary {
    /// Before a space between two characters that are none.
    Space,
    /// After a line break between two characters that are no white space.
    Line,
    /// Before the last character of a run of white space, which is no line break.
    Run,
}

/// The last boundary of the best kind that there is.
fn last_boundary(window: &[u8]) -> Option<usize> {
    let (mut line, mut run) = (None, None);
    for at in (1..window.len()).rev() {
        match boundary(window, at) {
            Some(Boundary::Space) => return Some(at),
            Some(Boundary::Line) => line = line.or(Some(at)),
            Some(Boundary::Run) => run = run.or(Some(at)),
            None => {}
        }
    }
    line.or(run)
}

/// The boundary before the character that begins at `at`, if there is one and what tells it is
/// there.
fn boundary(text: &[u8], at: usize) -> Option<Boundary> {
    if !is_start(text[at]) {
        return None;
    }
    let stands = |character: Option<char>| character.is_some_and(|one| !one.is_whitespace());
    let here = first_char(&text[at..])?;
    let before = &text[..at];
    if !here.is_whitespace() {
        let line = before.strip_suffix(b"\n")?;
        return stands(last_char(line)).then_some(Boundary::Line);
    }
    // BERT takes control characters, line breaks among them, for nothing at all.
    if (here.is_control() && here != '\t') || !stands(first_char(&text[at + here.len_utf8()..])) {
        return None;
    }
    let is_single = here == ' ' && stands(last_char(before));
    Some(if is_single { Boundary::Space } else { Boundary::Run })
}

/// The character that bytes begin with, if they hold all of it.
fn first_char(bytes: &[u8]) -> Option<char> {
    bytes[..bytes.len().min(4)].utf8_chunks().next()?.valid().chars().next()
}

/// The character that bytes end with.
fn last_char(bytes: &[u8]) -> Option<char> {
    let tail = &bytes[bytes.len().saturating_sub(4)..];
    let start = tail.iter().rposition(|&byte| is_start(byte))?;
    first_char(&tail[start..]).filter(|character| start + character.len_utf8() == tail.len())
}

/// A byte that is not a continuation byte starts a character.
fn is_start(byte: u8) -> bool {
    byte & 0xC0 != 0x80
}

pub(super) fn line_end(bytes: &[u8]) -> Option<usize> {
    bytes.iter().rposition(|&byte| byte == b'\n').map(|at| at + 1)
}

fn space_end(bytes: &[u8]) -> Option<usize> {
    let is_space = |byte: &u8| matches!(byte, b' ' | b'\n' | b'\t' | b'\r');
    bytes.iter().rposition(is_space).map(|at| at + 1)
}

/// The end of the last empty line.
fn blank_line_end(bytes: &[u8]) -> Option<usize> {
    let mut later = line_end(bytes)?;
    // Lines from the last one on, each `start..later`.
    while later > 0 {
        let start = line_end(&bytes[..later - 1]).unwrap_or(0);
        if start > 0 && bytes[start..later].trim_ascii().is_empty() {
            return Some(later);
        }
        later = start;
    }
    None
}

/// Somewhere in a run without boundaries: after a line or white space, else before the last
/// character that begins in it. A function of these bytes alone, so that reading that goes on in
/// the middle of a file cuts where reading it whole does.
fn run_end(run: &[u8]) -> usize {
    let character = || run.iter().rposition(|&byte| is_start(byte)).filter(|&at| at > 0);
    let end = line_end(run).or_else(|| space_end(run)).or_else(|| last_boundary(run));
    end.or_else(character).unwrap_or(run.len())
}

/// The pieces of a text, cut as small as `piece_bytes` where there are boundaries, and nowhere
/// else.
#[cfg(test)]
pub(super) fn small_pieces(text: &str, piece_bytes: usize) -> Vec<&str> {
    let (mut rest, mut pieces) = (text, Vec::new());
    while let Some(len) = bounded_piece_len(rest.as_bytes(), piece_bytes, usize::MAX) {
        let (piece, later) = rest.split_at(len);
        pieces.push(piece);
        rest = later;
    }
    pieces.push(rest);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_boundary_of_a_window_is_its_last_single_space() {
        let end = |text: &'static str| last_boundary(text.as_bytes()).map(|at| &text[..at]);
        assert_eq!(end("one two\nthree  four"), Some("one"));
        assert_eq!(end("one  two\nthree  four"), Some("one  two\n"));
        assert_eq!(end("one  two\n\tthree \n four"), Some("one  two\n\tthree \n"));
        assert_eq!(end("一\n\u{3000}\u{3000}二"), Some("一\n\u{3000}"));
        // White space that something may still be part of, or that BERT does not see.
        for none in
            ["one ", "one\n", "one\n\ntwo", "one\r\ntwo", "one\u{b}two", "onetwo", "", " one"]
        {
            assert_eq!(end(none), None, "{none:?}");
        }
        // The last character is not all there, or is none.
        assert_eq!(last_boundary(&"one é".as_bytes()[..5]), None);
        assert_eq!(last_boundary(b"one\xff two \xfe\xff"), Some(4));
    }

    #[test]
    fn a_piece_is_as_long_as_it_may_be_or_ends_at_the_next_boundary() {
        let mut text = "x".repeat(PIECE_BYTES + 1000).into_bytes();
        text[PIECE_BYTES + 500] = b' ';
        text[PIECE_BYTES + 700] = b' ';
        assert_eq!(piece_len(&text), Some(PIECE_BYTES + 500));
        // More has to be read.
        assert_eq!(piece_len(&text[..PIECE_BYTES + 501]), None);
        text[1000] = b'\n';
        assert_eq!(piece_len(&text), Some(1001));
        text[2000..2002].copy_from_slice(b"  ");
        assert_eq!(piece_len(&text), Some(1001));
        text[500] = b' ';
        assert_eq!(piece_len(&text), Some(500));
        assert_eq!(piece_len(&text[..PIECE_BYTES]), None);
    }

    #[test]
    fn a_run_is_cut_after_a_mebibyte_however_much_was_read() {
        let long = "x".repeat(5 << 20).into_bytes();
        assert_eq!(piece_len(&long), Some(RUN_BYTES_MAX - 1));
        assert_eq!(piece_len(&long[..RUN_BYTES_MAX]), Some(RUN_BYTES_MAX - 1));
        let spaced = [&long[..], b" more"].concat();
        assert_eq!(CutRule::Space.block_len(&spaced, false), Some(RUN_BYTES_MAX - 1));
        assert_eq!(CutRule::Space.block_len(&spaced, true), Some(RUN_BYTES_MAX - 1));
        let lines = "x\r\n".repeat(1 << 20).into_bytes();
        assert_eq!(piece_len(&lines), Some(RUN_BYTES_MAX / 3 * 3), "after a line at least");
    }

    proptest::proptest! {
        #[test]
        fn a_cut_does_not_depend_on_how_much_was_read_behind_it(
            characters in proptest::collection::vec(0_usize..8, 1..40),
        ) {
            let all = [" ", "\n", "\r", "\t", "\u{3000}", "x", "é", "一"];
            let text: String = characters.into_iter().map(|at| all[at]).collect();
            let text = text.as_bytes();
            let (piece, run) = (8, 16);
            let whole = bounded_piece_len(text, piece, run);
            for read in 0..=text.len() {
                let cut = bounded_piece_len(&text[..read], piece, run);
                assert!(cut.is_none() || cut == whole, "{read} of {text:?}: {cut:?}, {whole:?}");
                assert!(cut.is_some() || read < run, "{read} of {text:?} are enough");
            }
        }
    }

    #[test]
    fn documents_go_on_after_a_piece_and_not_after_an_empty_line() {
        assert!(CutRule::BlankLine.goes_on(b"a\n\nb\n") && CutRule::BlankLine.goes_on(b"a\n\nb"));
        assert!(!CutRule::BlankLine.goes_on(b"a\n\n") && !CutRule::BlankLine.goes_on(b"a\n \r\n"));
        assert!(CutRule::Piece.goes_on(b"a\n\n") && !CutRule::Line.goes_on(b"a"));
    }
}
