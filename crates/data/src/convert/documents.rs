//! From a block to documents: pure functions of its text.

use std::borrow::Cow;

use super::json_field::json_text;
use super::options::Document;
use crate::cast::to_u64;

/// A document, or a part of one.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Passage<'a> {
    pub(crate) text: Cow<'a, str>,
    /// Where the block goes on after it and what separates it from the next.
    pub(crate) end: usize,
    /// Lines of the block up to `end`.
    pub(crate) lines: u64,
    pub(crate) ends_document: bool,
}

/// Calls `each` for every segment of a block of plain text.
pub(crate) fn of_text<E>(
    text: &str,
    unit: Document,
    mut each: impl FnMut(Passage<'_>) -> Result<(), E>,
) -> Result<(), E> {
    match unit {
        Document::File => {
            let (end, lines) = (text.len(), 0);
            each(Passage { text: text.into(), end, lines, ends_document: false })
        }
        Document::Line => {
            let (mut at, mut number) = (0, 0);
            for line in text.split_inclusive('\n') {
                at += line.len();
                number += 1;
                if !line.trim_ascii().is_empty() {
                    let line = line.trim_end_matches(['\n', '\r']).into();
                    each(Passage { text: line, end: at, lines: number, ends_document: true })?;
                }
            }
            Ok(())
        }
        Document::BlankLine => paragraphs(text, each),
    }
}

/// Runs of lines between empty ones.
fn paragraphs<E>(text: &str, mut each: impl FnMut(Passage<'_>) -> Result<(), E>) -> Result<(), E> {
    // The paragraph is `text[begin..close]`; `close == begin` while there is none.
    let (mut begin, mut close, mut at, mut number, mut gap) = (0, 0, 0, 0_u64, false);
    for line in text.split_inclusive('\n') {
        let is_blank = line.trim_ascii().is_empty();
        if !is_blank && gap {
            let paragraph = text[begin..close].trim_end_matches(['\n', '\r']).into();
            each(Passage { text: paragraph, end: at, lines: number, ends_document: true })?;
            (begin, close, gap) = (at, at, false);
        }
        at += line.len();
        number += 1;
        if !is_blank {
            close = at;
        } else if close == begin {
            (begin, close) = (at, at);
        } else {
            gap = true;
        }
    }
    if close == begin {
        return Ok(());
    }
    // Without an empty line after it the paragraph may go on in the next block: its last line break
    // belongs to it.
    let last = &text[begin..close];
    let last = if gap { last.trim_end_matches(['\n', '\r']) } else { last };
    each(Passage { text: last.into(), end: at, lines: number, ends_document: gap })
}

/// Calls `each` for every line of a block of JSON objects: with its text, or with what is wrong
/// with the line. The block begins at byte `offset` of its file. Each line is parsed for itself, so
/// that a bad one does not change the others, wherever the block was cut.
pub(crate) fn of_json_lines<E>(
    block: &[u8],
    offset: u64,
    field: &str,
    mut each: impl FnMut(Result<Passage<'_>, BadJson>) -> Result<(), E>,
) -> Result<(), E> {
    let (mut at, mut number) = (0, 0);
    for line in block.split_inclusive(|&byte| byte == b'\n') {
        let start = offset + to_u64(at);
        at += line.len();
        number += 1;
        if line.trim_ascii().is_empty() {
            continue;
        }
        let found = std::str::from_utf8(line).map_err(|error| {
            format!("it is not UTF-8 at byte {} of the file", start + to_u64(error.valid_up_to()))
        });
        let found = found.and_then(|text| json_text(text, field));
        let found = found.map(|text| Passage { text, end: at, lines: number, ends_document: true });
        each(found.map_err(|reason| BadJson { line: number, reason }))?;
    }
    Ok(())
}

/// What is wrong with a line.
#[derive(Debug)]
pub(crate) struct BadJson {
    /// From 1, in the block.
    pub(crate) line: u64,
    pub(crate) reason: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str, unit: Document) -> Vec<(String, usize, bool)> {
        let mut found = Vec::new();
        let done: Result<(), ()> = of_text(text, unit, |segment| {
            found.push((segment.text.into_owned(), segment.end, segment.ends_document));
            Ok(())
        });
        done.unwrap();
        found
    }

    #[test]
    fn lines_are_documents_and_empty_ones_are_not() {
        let found = text("one\r\n\n two \nthree", Document::Line);
        let expected = [
            ("one".to_owned(), 5, true),
            (" two ".to_owned(), 12, true),
            ("three".to_owned(), 17, true),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn paragraphs_end_at_empty_lines() {
        let found = text("a\nb\n\n \nc\r\n\r\nd\n", Document::BlankLine);
        let expected = [
            ("a\nb".to_owned(), 7, true),
            ("c".to_owned(), 12, true),
            ("d\n".to_owned(), 14, false),
        ];
        assert_eq!(found, expected);
        assert_eq!(text("\n \n", Document::BlankLine), []);
        assert_eq!(text("\n\na\n\n\n", Document::BlankLine), [("a".to_owned(), 6, true)]);
    }

    #[test]
    fn a_file_is_one_document() {
        assert_eq!(text("a\n\nb", Document::File), [("a\n\nb".to_owned(), 4, false)]);
    }

    #[test]
    fn what_is_not_asked_for_is_passed_over() {
        // Neither a number beyond all types nor lists in lists in lists are built.
        let nested = format!("{}{}", "[".repeat(500), "]".repeat(500));
        let line = format!(r#"{{"n":1e999,"deep":{nested},"a":{{"c":[1],"b":"x"}}}}"#);
        assert_eq!(json_text(&line, "a.b").unwrap(), "x");
        assert_eq!(json_text(r#"{"a":{"b":"x"},"a":{"b":"y"}}"#, "a.b").unwrap(), "y");
        assert!(json_text(r#"{"a":"x"}"#, "a.b").unwrap_err().starts_with("it has no field"));
        assert!(json_text(r#"{"a":"x"} y"#, "a").unwrap_err().starts_with("it is not JSON"));
        assert!(json_text("[1,2]", "a").unwrap_err().starts_with("it has no field"));
    }

    #[test]
    fn fields_of_json_are_found_and_what_is_wrong_is_said() {
        let text = b"{\"a\":{\"b\":\"x\\ny\"}}\n\n{\"a\":1}\n{\"a\":{\"b\":[1]}}\nno\n{\"n\":\"\xe9\",\"a\":{\"b\":\"z\"}}\n";
        let mut found = Vec::new();
        let done: Result<(), ()> = of_json_lines(text, 1000, "a.b", |segment| {
            found.push(match segment {
                Ok(segment) => format!("{} until {}", segment.text, segment.lines),
                Err(bad) => format!("{}: {}", bad.line, bad.reason),
            });
            Ok(())
        });
        done.unwrap();
        assert_eq!(found[0], "x\ny until 1");
        assert!(found[1].starts_with("3: it has no field `a.b`"), "{found:?}");
        assert_eq!(found[2], "4: its field `a.b` is a list, not a string");
        assert!(found[3].starts_with("5: it is not JSON"), "{found:?}");
        // Also where it is passed over.
        let offset = 1000 + text.iter().position(|&byte| byte == 0xe9).unwrap();
        assert_eq!(found[4], format!("6: it is not UTF-8 at byte {offset} of the file"));
        assert_eq!(found.len(), 5);
    }
}
