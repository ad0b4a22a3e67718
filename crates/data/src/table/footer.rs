//! The schema in a Parquet file's footer, looked at before the library takes it at its word.
//!
//! The library (60.1) reserves as many children as a group claims to have, up to 2^31 - 1, and goes
//! into groups within groups without a limit: a file of some hundred bytes takes 16 GiB, one of a
//! megabyte all of the stack, and either ends the process.
//!
//! Of a field that it knows, the library passes over the type that stands there and reads the one
//! that the format has. What is looked at here is only what it reads if these are the same; so a
//! schema in which they are not is refused.
//! Source: <https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift>.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::compact::{Compact, BINARY, BOOLS, BYTE, INTEGERS, LIST, STRUCT};
use crate::cast::to_usize;

/// Structures within structures; a list takes two. No schema in use is as deep.
const DEPTH_MAX: usize = 64;

/// Structures within structures in a field that is not known.
const UNKNOWN_DEPTH_MAX: u32 = 8;

/// Behind the footer: its length, and the magic.
const TAIL_BYTES: u64 = 8;

/// Looks at the schema of a file. One that is too short to have a footer is left to the library.
pub(super) fn check(file: &File) -> Result<(), String> {
    let failed = |error: std::io::Error| error.to_string();
    let bytes = file.metadata().map_err(failed)?.len();
    let Some(end) = bytes.checked_sub(TAIL_BYTES) else { return Ok(()) };
    let mut footer_bytes = [0; 4];
    file.read_exact_at(&mut footer_bytes, end).map_err(failed)?;
    let footer_bytes = u64::from(u32::from_le_bytes(footer_bytes));
    let Some(start) = end.checked_sub(footer_bytes) else {
        return Err(format!("its footer claims {footer_bytes} of {bytes} bytes"));
    };
    let mut footer = vec![0; to_usize(footer_bytes)];
    file.read_exact_at(&mut footer, start).map_err(failed)?;
    check_schema(&footer)
}

/// Elements stand in the order of a walk through the tree, each with how many children it has.
fn check_schema(footer: &[u8]) -> Result<(), String> {
    let mut input = Compact { rest: footer };
    let count = input.schema().ok_or("its footer does not begin with a schema")?;
    // Of each group around the next element how many children are still to come, and of all of them
    // together.
    let (mut groups, mut due): (Vec<u64>, u64) = (Vec::new(), 0);
    for number in 0..count {
        let element = input.element();
        let children = element.ok_or_else(|| format!("element {number} of its schema is none"))?;
        if let Some(rest) = groups.last_mut() {
            *rest -= 1;
            due -= 1;
        }
        due = due.saturating_add(children);
        if due > count - number - 1 {
            return Err(format!(
                "element {number} of {count} in its schema claims {children} children"
            ));
        }
        if children > 0 {
            groups.push(children);
        }
        if groups.len() > DEPTH_MAX {
            return Err(format!("its columns lie in more than {DEPTH_MAX} structures"));
        }
        while groups.last() == Some(&0) {
            groups.pop();
        }
    }
    Ok(())
}

/// Types that a field may have.
type Kinds = &'static [u8];

impl Compact<'_> {
    /// How many elements the schema has, which begins here: field 2 of the footer, behind the
    /// version.
    fn schema(&mut self) -> Option<u64> {
        let mut id = 0;
        self.known(&mut id, 1, &INTEGERS)?;
        let is_next = self.field(&mut id)?? == LIST && id == 2;
        let (of, count) = self.list().filter(|_| is_next)?;
        (of == STRUCT).then_some(count)
    }

    /// Passes over the next field, which has this number and one of these types.
    fn known(&mut self, id: &mut i16, expected: i16, kinds: Kinds) -> Option<()> {
        let kind = self.field(id)??;
        (*id == expected && kinds.contains(&kind)).then_some(())?;
        self.skip(kind, 1)
    }

    /// How many children an element has.
    fn element(&mut self) -> Option<u64> {
        let (mut children, mut id) = (0, 0);
        while let Some(kind) = self.field(&mut id)? {
            match id {
                1..=3 | 6..=9 => self.plain(kind, &INTEGERS)?,
                4 => self.plain(kind, &[BINARY])?,
                5 => children = self.size(kind)?,
                10 if kind == STRUCT => self.logical_type()?,
                10 => return None,
                _ => self.unknown(kind, UNKNOWN_DEPTH_MAX)?,
            }
        }
        Some(children)
    }

    /// Passes over a value of a type that is one of these, and neither a structure nor a list.
    fn plain(&mut self, kind: u8, kinds: Kinds) -> Option<()> {
        kinds.contains(&kind).then_some(())?;
        self.skip(kind, 1)
    }

    /// Passes over a union of structures: of numbers, or of nothing.
    fn logical_type(&mut self) -> Option<()> {
        let mut id = 0;
        let kind = self.field(&mut id)??;
        match id {
            1..=4 | 6 | 11..=15 | 19 => self.nothing()?,
            5 => self.structure(&[&INTEGERS, &INTEGERS])?,
            // Of time: whether it is universal, and its unit.
            7 | 8 => self.structure(&[&BOOLS, &[STRUCT]])?,
            10 => self.structure(&[&[BYTE], &BOOLS])?,
            16 => self.structure(&[&[BYTE]])?,
            17 => self.structure(&[&[BINARY]])?,
            18 => self.structure(&[&[BINARY], &INTEGERS])?,
            _ => self.unknown(kind, UNKNOWN_DEPTH_MAX)?,
        }
        self.field(&mut id)?.is_none().then_some(())
    }

    /// Passes over a structure whose first fields have these types; one that is a structure itself
    /// is a union of empty ones.
    fn structure(&mut self, fields: &[Kinds]) -> Option<()> {
        let mut id = 0;
        while let Some(kind) = self.field(&mut id)? {
            let at = usize::try_from(id).ok().and_then(|id| id.checked_sub(1));
            match at.and_then(|at| fields.get(at)) {
                None => self.unknown(kind, UNKNOWN_DEPTH_MAX)?,
                Some(kinds) if kind == STRUCT && kinds.contains(&STRUCT) => {
                    let mut unit = 0;
                    self.field(&mut unit)??;
                    self.nothing()?;
                    self.field(&mut unit)?.is_none().then_some(())?;
                }
                Some(kinds) => self.plain(kind, kinds)?,
            }
        }
        Some(())
    }

    /// A structure without fields.
    fn nothing(&mut self) -> Option<()> {
        (self.byte()? == 0).then_some(())
    }

    /// Passes over a field that is not known. Lists and maps, of which libraries pass over the
    /// elements in different ways, are none.
    fn unknown(&mut self, kind: u8, depth: u32) -> Option<()> {
        if kind != STRUCT {
            return if matches!(kind, 9..=11) { None } else { self.skip(kind, 1) };
        }
        let (depth, mut id) = (depth.checked_sub(1)?, 0);
        while let Some(of) = self.field(&mut id)? {
            self.unknown(of, depth)?;
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A footer of these elements and nothing else.
    fn told(elements: &[&[u8]]) -> Result<(), String> {
        let count = u8::try_from(elements.len()).unwrap();
        let head = [0x15, 4, 0x19, 0xFC, count];
        check_schema(&[&head, &*elements.concat(), &[0]].concat())
    }

    /// A column of numbers: type, repetition and name.
    const COLUMN: &[u8] = &[0x15, 2, 0x25, 0, 0x18, 1, b'x', 0];

    /// A group of so many children.
    fn group(children: u8) -> Vec<u8> {
        vec![0x35, 2, 0x18, 1, b'g', 0x15, 2 * children, 0]
    }

    #[test]
    fn children_must_be_there() {
        let [one, two] = [1, 2].map(group);
        assert_eq!(told(&[&one, COLUMN]), Ok(()));
        assert_eq!(told(&[&two, &one, COLUMN, COLUMN]), Ok(()));
        assert_eq!(told(&[&two, COLUMN, &two, COLUMN, COLUMN]), Ok(()));
        // What is too few is the library's to say.
        let claims = |at: usize, count: usize, children: usize| {
            Err(format!("element {at} of {count} in its schema claims {children} children"))
        };
        assert_eq!(told(&[&two, COLUMN]), claims(0, 2, 2));
        assert_eq!(told(&[&two, &two, COLUMN, COLUMN]), claims(1, 4, 2));
        let deep = |depth: usize| [vec![one.clone(); depth], vec![COLUMN.to_vec()]].concat();
        for (depth, is_good) in [(DEPTH_MAX, true), (DEPTH_MAX + 1, false), (200, false)] {
            let elements = deep(depth);
            let elements: Vec<&[u8]> = elements.iter().map(Vec::as_slice).collect();
            assert_eq!(told(&elements).is_ok(), is_good, "{depth}");
        }
    }

    #[test]
    fn a_type_that_the_format_does_not_have_is_refused() {
        // The number of children as a truth value, which has no bytes: the library would read what
        // follows.
        for bad in [
            &[0x35, 2, 0x18, 1, b'g', 0x11, 0xFE, 0xFF, 0xFF, 0xFF, 0x0F, 0][..],
            // A type as a truth value, a name as a number, negative children, a list in a field
            // that is not known.
            &[0x11, 0],
            &[0x45, 2, 0],
            &[0x48, 1, b'g', 0x15, 1, 0],
            &[0x48, 1, b'g', 0x09, 40, 0x11, 0],
        ] {
            assert!(told(&[bad, COLUMN]).is_err(), "{bad:?}");
        }
        // Logical types: a decimal, a time, an integer, a string; then a decimal with a truth
        // value, a unit and a string with a field.
        let element = |logical: &[u8]| [&[0x48, 1, b'g', 0x6C][..], logical, &[0]].concat();
        for (logical, is_good) in [
            (&[0x5C, 0x15, 4, 0x15, 8, 0, 0][..], true),
            (&[0x7C, 0x11, 0x1C, 0x2C, 0, 0, 0, 0], true),
            (&[0xAC, 0x13, 8, 0x11, 0, 0], true),
            (&[0x1C, 0, 0], true),
            (&[0x5C, 0x11, 0x15, 8, 0, 0], false),
            (&[0x7C, 0x11, 0x1C, 0x2C, 0x15, 2, 0, 0, 0, 0], false),
            (&[0x1C, 0x15, 2, 0, 0], false),
        ] {
            assert_eq!(told(&[&element(logical)]).is_ok(), is_good, "{logical:?}");
        }
    }
}
