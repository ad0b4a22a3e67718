//! One string out of a line of JSON, by its path: what lies beside the path is passed over, not
//! built, so that a line takes no more memory than its string. As in most readers, of fields with
//! one name the last counts.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// The string at a path of fields (`text`, `page.body`) of an object.
pub(crate) fn json_text(line: &str, field: &str) -> Result<Cow<'static, str>, String> {
    let mut reader = serde_json::Deserializer::from_str(line);
    let found = At(Some(field)).deserialize(&mut reader);
    let found = found.and_then(|found| reader.end().map(|()| found));
    match found.map_err(|error| format!("it is not JSON: {error}"))? {
        FieldValue::Text(text) => Ok(text.into()),
        FieldValue::Other(kind) => Err(format!("its field `{field}` is {kind}, not a string")),
        FieldValue::Nothing => {
            Err(format!("it has no field `{field}`; choose another with --field"))
        }
    }
}

/// What is at the end of a path.
enum FieldValue {
    Text(String),
    Other(&'static str),
    Nothing,
}

/// The rest of a path; `None` at its end.
#[derive(Clone, Copy)]
struct At<'a>(Option<&'a str>);

impl At<'_> {
    fn other(self, kind: &'static str) -> FieldValue {
        if self.0.is_some() {
            return FieldValue::Nothing;
        }
        FieldValue::Other(kind)
    }
}

impl<'de> DeserializeSeed<'de> for At<'_> {
    type Value = FieldValue;

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<FieldValue, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for At<'_> {
    type Value = FieldValue;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E: Error>(self) -> Result<FieldValue, E> {
        Ok(self.other("null"))
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<FieldValue, E> {
        Ok(self.other("a truth value"))
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<FieldValue, E> {
        Ok(self.other("a number"))
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<FieldValue, E> {
        Ok(self.other("a number"))
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<FieldValue, E> {
        Ok(self.other("a number"))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<FieldValue, E> {
        Ok(if self.0.is_none() { FieldValue::Text(text.to_owned()) } else { FieldValue::Nothing })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<FieldValue, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(self.other("a list"))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<FieldValue, A::Error> {
        let Some(path) = self.0 else {
            while object.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            return Ok(FieldValue::Other("an object"));
        };
        let (name, rest) =
            path.split_once('.').map_or((path, None), |(name, rest)| (name, Some(rest)));
        let mut found = FieldValue::Nothing;
        while let Some(is_it) = object.next_key_seed(Is(name))? {
            if is_it {
                found = object.next_value_seed(At(rest))?;
            } else {
                object.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

/// Whether a name is this one.
struct Is<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Is<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<bool, D::Error> {
        reader.deserialize_str(self)
    }
}

impl Visitor<'_> for Is<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<bool, E> {
        Ok(name == self.0)
    }
}
