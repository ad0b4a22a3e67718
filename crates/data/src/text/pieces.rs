//! Text to the pieces that byte-level encoders take for words: the patterns of GPT-2, Llama 3 and
//! Qwen.
//!
//! The `tokenizers` crate splits with regular expressions whose look-ahead makes them slow. Each of
//! these patterns takes some piece at every place, so the pieces cover the text, and where each
//! ends can be told from the classes of the characters that come next. Any other pattern is matched
//! as it is. Tests compare all of them with the crate.
//! Source: `tokenizers` 0.22, `pre_tokenizers/byte_level.rs` and `pre_tokenizers/split.rs`;
//! classes: those of `regex-syntax`, which the crate's expressions use.

use regex_syntax::hir::{Class as HirClass, HirKind};
use tokenizers::pre_tokenizers::split::Split;

use crate::error::{Error, Result};

/// GPT-2's pattern, which is also that of the crate's `ByteLevel`.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// What Llama's and Qwen's patterns share around that of digits.
const LLAMA: (&str, &str) = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// One pattern.
#[derive(Debug)]
pub(crate) enum Pattern {
    /// GPT-2's.
    Gpt2,
    /// Llama 3's with three digits in a piece at most, Qwen's with one.
    Llama { digits_max: usize },
    /// Matches and what lies between them are pieces.
    Other(Box<Split>),
}

impl Pattern {
    /// The pattern of a regular expression that isolates its matches.
    pub(crate) fn of(split: &Split, expression: &str) -> Self {
        let digits = expression.strip_prefix(LLAMA.0).and_then(|rest| rest.strip_suffix(LLAMA.1));
        match digits {
            _ if expression == GPT2 => Pattern::Gpt2,
            Some(r"\p{N}") => Pattern::Llama { digits_max: 1 },
            Some(r"\p{N}{1,3}") => Pattern::Llama { digits_max: 3 },
            _ => Pattern::Other(Box::new(split.clone())),
        }
    }
}

/// What the patterns tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum CharClass {
    /// `[^\s\p{L}\p{N}]`
    Other,
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `\s` but for the next.
    Space,
    /// `[\r\n]`
    Newline,
}

/// Splits text by patterns.
#[derive(Debug)]
pub(crate) struct Splitter {
    /// Of each code point.
    classes: Vec<CharClass>,
    patterns: Vec<Pattern>,
}

impl Splitter {
    /// Splits by the first pattern, each piece by the next, and so on.
    pub(crate) fn new(patterns: Vec<Pattern>) -> Result<Self> {
        let mut classes = vec![CharClass::Other; 0x11_0000];
        let known = [
            (r"\p{L}", CharClass::Letter),
            (r"\p{N}", CharClass::Number),
            (r"\s", CharClass::Space),
        ];
        for (expression, class) in known {
            let failed = |message| Error::Tokenizer { action: "tell letters apart", message };
            let parsed = regex_syntax::parse(expression);
            let parsed = parsed.map_err(|error| failed(error.to_string()))?;
            let HirKind::Class(HirClass::Unicode(ranges)) = parsed.kind() else {
                return Err(failed(format!("{expression} is no class of characters")));
            };
            for range in ranges.ranges() {
                classes[range.start() as usize..=range.end() as usize].fill(class);
            }
        }
        for newline in ['\r', '\n'] {
            classes[newline as usize] = CharClass::Newline;
        }
        Ok(Splitter { classes, patterns })
    }

    /// Calls `piece` for each piece of `text`, in order.
    pub(crate) fn for_each(
        &self,
        text: &str,
        piece: &mut impl FnMut(&str) -> Result<()>,
    ) -> Result<()> {
        self.split(&self.patterns, text, piece)
    }

    fn split(
        &self,
        patterns: &[Pattern],
        text: &str,
        piece: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<()> {
        let Some((pattern, later)) = patterns.split_first() else {
            return piece(text);
        };
        let mut at = 0;
        if let Pattern::Other(split) = pattern {
            for (start, end) in split.regex.find_iter(text) {
                for part in [&text[at..start], &text[start..end]] {
                    if !part.is_empty() {
                        self.split(later, part, piece)?;
                    }
                }
                at = end;
            }
            return if at < text.len() { self.split(later, &text[at..], piece) } else { Ok(()) };
        }
        while at < text.len() {
            let end = match pattern {
                Pattern::Llama { digits_max } => self.llama(text, at, *digits_max),
                _ => self.gpt2(text, at),
            };
            match later {
                [] => piece(&text[at..end])?,
                _ => self.split(later, &text[at..end], piece)?,
            }
            at = end;
        }
        Ok(())
    }

    /// The class of the character at `at`, and where it ends. `None` at the end.
    #[inline]
    fn at(&self, text: &str, at: usize) -> Option<(CharClass, usize)> {
        let byte = *text.as_bytes().get(at)?;
        if byte.is_ascii() {
            return Some((self.classes[usize::from(byte)], at + 1));
        }
        let character = text[at..].chars().next()?;
        Some((self.classes[character as usize], at + character.len_utf8()))
    }

    #[inline]
    fn is(&self, class: CharClass, text: &str, at: usize) -> bool {
        self.at(text, at).is_some_and(|(found, _)| found == class)
    }

    /// Where the run of `class` that goes on at `at` ends.
    #[inline]
    fn run(&self, class: CharClass, text: &str, mut at: usize) -> usize {
        while let Some((_, next)) = self.at(text, at).filter(|(found, _)| *found == class) {
            at = next;
        }
        at
    }

    /// Where GPT-2's piece at `at` ends.
    fn gpt2(&self, text: &str, at: usize) -> usize {
        if let Some(end) = contraction(text, at, false) {
            return end;
        }
        let start = at + usize::from(text.as_bytes()[at] == b' ');
        match self.at(text, start) {
            Some((class @ (CharClass::Letter | CharClass::Number | CharClass::Other), next)) => {
                self.run(class, text, next)
            }
            _ => self.white_space(text, at).end,
        }
    }

    /// Where Llama's piece at `at` ends.
    fn llama(&self, text: &str, at: usize, digits_max: usize) -> usize {
        if let Some(end) = contraction(text, at, true) {
            return end;
        }
        let Some((class, next)) = self.at(text, at) else { return text.len() };
        match class {
            CharClass::Letter => return self.run(CharClass::Letter, text, next),
            CharClass::Number => {
                let mut end = next;
                for _ in 1..digits_max {
                    match self.at(text, end) {
                        Some((CharClass::Number, after)) => end = after,
                        _ => break,
                    }
                }
                return end;
            }
            CharClass::Space | CharClass::Other if self.is(CharClass::Letter, text, next) => {
                return self.run(CharClass::Letter, text, next);
            }
            _ => {}
        }
        let start = at + usize::from(text.as_bytes()[at] == b' ');
        if self.is(CharClass::Other, text, start) {
            return self.run(CharClass::Newline, text, self.run(CharClass::Other, text, start));
        }
        let spaces = self.white_space(text, at);
        spaces.newline_end.unwrap_or(spaces.end)
    }

    /// The white space at `at`.
    fn white_space(&self, text: &str, at: usize) -> WhiteSpace {
        let (mut end, mut last, mut newline_end) = (at, at, None);
        while let Some((class @ (CharClass::Space | CharClass::Newline), next)) = self.at(text, end)
        {
            (last, end) = (end, next);
            if class == CharClass::Newline {
                newline_end = Some(end);
            }
        }
        // `\s+(?!\S)`: without its last character if something follows, unless that is all there
        // is.
        let whole = end == text.len() || last == at;
        WhiteSpace { end: if whole { end } else { last }, newline_end }
    }
}

/// A run of white space.
struct WhiteSpace {
    /// Where the piece ends.
    end: usize,
    /// After the run's last line break.
    newline_end: Option<usize>,
}

/// Where a contraction (`'s`, `'ll`) at `at` ends, if there is one.
fn contraction(text: &str, at: usize, any_case: bool) -> Option<usize> {
    let rest = text.as_bytes()[at..].strip_prefix(b"'")?;
    let letter = |place: usize| {
        let byte = rest.get(place).copied()?;
        Some(if any_case { byte.to_ascii_lowercase() } else { byte })
    };
    let len = match (letter(0)?, letter(1)) {
        (b's' | b't' | b'm' | b'd', _) => 2,
        (b'r' | b'v', Some(b'e')) | (b'l', Some(b'l')) => 3,
        // In Unicode the long s is an s of another case.
        _ if any_case && rest.starts_with("ſ".as_bytes()) => 1 + 'ſ'.len_utf8(),
        _ => return None,
    };
    Some(at + len)
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;
    use tokenizers::pre_tokenizers::split::SplitPattern;
    use tokenizers::{
        OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior,
    };

    use super::*;

    /// Digits and words of a kind of their own.
    const OTHER: &str = r"\d{2}|[A-Z]+|\s+(?!\S)";

    fn expressions() -> Vec<String> {
        let llama = |digits: &str| format!("{}{digits}{}", LLAMA.0, LLAMA.1);
        vec![GPT2.to_owned(), llama(r"\p{N}{1,3}"), llama(r"\p{N}"), OTHER.to_owned()]
    }

    fn split_of(expression: &str) -> Split {
        let pattern = SplitPattern::Regex(expression.to_owned());
        Split::new(pattern, SplitDelimiterBehavior::Isolated, false).unwrap()
    }

    fn ours(splitter: &Splitter, text: &str) -> Vec<String> {
        let mut pieces = Vec::new();
        splitter
            .for_each(text, &mut |piece| {
                pieces.push(piece.to_owned());
                Ok(())
            })
            .unwrap();
        pieces
    }

    fn theirs(splits: &[&Split], text: &str) -> Vec<String> {
        let mut pieces = PreTokenizedString::from(text);
        splits.iter().for_each(|split| split.pre_tokenize(&mut pieces).unwrap());
        let found = pieces.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
        found.into_iter().map(|(piece, _, _)| piece.to_owned()).collect()
    }

    fn splitter(expressions: &[&str]) -> Splitter {
        let of = |expression: &&str| Pattern::of(&split_of(expression), expression);
        Splitter::new(expressions.iter().map(of).collect()).unwrap()
    }

    /// Each expression as it is, and as the crate reads it.
    static ALL: LazyLock<Vec<(String, Split)>> = LazyLock::new(|| {
        expressions().into_iter().map(|one| (one.clone(), split_of(&one))).collect()
    });

    #[test]
    fn known_patterns_are_known() {
        let kinds: Vec<String> = expressions()
            .iter()
            .map(|one| format!("{:.12?}", Pattern::of(&split_of(one), one)))
            .collect();
        assert!(
            kinds[0].starts_with("Gpt2") && kinds[1].contains('3') && kinds[2].contains('1'),
            "{kinds:?}"
        );
        assert!(kinds[3].starts_with("Other"), "{kinds:?}");
    }

    #[test]
    fn pieces_are_those_that_the_patterns_are_known_for() {
        let text = "It's 12345 o'clock,\n\n  DON'T  stop!\r\n";
        let gpt2 = [
            "It", "'s", " 12345", " o", "'", "clock", ",", "\n\n ", " DON", "'", "T", " ", " stop",
            "!", "\r\n",
        ];
        assert_eq!(ours(&splitter(&[GPT2]), text), gpt2);
        let llama = expressions().swap_remove(1);
        let expected = [
            "It", "'s", " ", "123", "45", " o", "'clock", ",\n\n", " ", " DON", "'T", " ", " stop",
            "!\r\n",
        ];
        assert_eq!(ours(&splitter(&[&llama]), text), expected);
    }

    #[test]
    fn every_character_is_of_the_class_that_the_crate_thinks() {
        for (expression, split) in &*ALL {
            let one = splitter(&[expression]);
            let wanted = |c: &char| (*c as u32) < 0x3000 || (*c as u32).is_multiple_of(7);
            let characters: Vec<char> = ('\u{80}'..='\u{2ffff}').filter(wanted).collect();
            for some in characters.chunks(50) {
                let text: String = some.iter().map(|c| format!("a{c}{c}1 {c}'{c}")).collect();
                assert_eq!(ours(&one, &text), theirs(&[split], &text));
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn any_text_splits_as_the_tokenizers_crate_does(
            text in "([ -~\\t\\n\\r\\x00-\\x7f]|\\PC|[äéßİΣς́ 　\u{85}\u{a0}\u{2028}½²Ⅷ٣ſK]|'[sStTrRvVmMlLdDeEſ]{1,2}|[ \\n\\r\\t]{1,4}|[0-9]{1,5}){0,40}",
            which in 0..4_usize, then in 0..5_usize,
        ) {
            let used: Vec<&(String, Split)> = [ALL.get(which), ALL.get(then)].into_iter().flatten().collect();
            let expressions: Vec<&str> = used.iter().map(|(expression, _)| &**expression).collect();
            let splits: Vec<&Split> = used.iter().map(|(_, split)| split).collect();
            prop_assert_eq!(ours(&splitter(&expressions), &text), theirs(&splits, &text));
        }
    }
}
