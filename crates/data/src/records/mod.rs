//! Records of named, typed columns: images and labels, features, audio of any length.
//!
//! A folder holds
//!
//! ```text
//! index.json                   what is here: fields, counts, sizes, checksums, fingerprint
//! records-00000.safetensors    a tensor for each field; data start at a multiple of 4096
//! records-00001.safetensors    …
//! conversion.jsonl             what was converted, if it was
//! ```
//!
//! A field of a fixed shape is the tensor `name` [records, shape…]; a variable one is `name`
//! [elements of all records] with `name.offsets` U64 [records + 1]: record i is elements
//! `offsets[i]..offsets[i + 1]`. Any program that reads safetensors reads a shard. Each 1 MiB block
//! of a file has a checksum in the index, compared when it is first touched.
//!
//! ```
//! use phalanx_data::records::{ColumnValue, Field, Records, RecordWriter};
//! use phalanx_data::batches::Scratch;
//! use phalanx_data::{Access, DType};
//!
//! # fn main() -> phalanx_data::Result<()> {
//! # let folder = tempfile::tempdir().unwrap();
//! # let target = folder.path().join("digits");
//! let fields = vec![Field::fixed("image", DType::U8, [2, 2]), Field::variable("boxes", DType::F32)];
//! let mut writer = RecordWriter::create(&target, fields, RecordWriter::SHARD_BYTES)?;
//! writer.push(&[ColumnValue::of(&[1_u8, 2, 3, 4]), ColumnValue::of(&[0.5_f32, 1.5])])?;
//! writer.push(&[ColumnValue::of(&[5_u8, 6, 7, 8]), ColumnValue::of::<f32>(&[])])?;
//! writer.finish()?;
//!
//! let records = Records::open(&target, Access::Read)?;
//! let (mut image, mut scratch) = ([0; 4], Scratch::default());
//! records.read(1, 0, &mut image, &mut scratch)?;
//! assert_eq!((records.record_count(), image), (2, [5, 6, 7, 8]));
//! assert_eq!(records.elements(0, 1, &mut scratch)?, 2);
//! # Ok(())
//! # }
//! ```

pub(crate) mod arrays;
#[cfg(feature = "parquet")]
pub(crate) mod columns;
mod convert;
mod field;
mod index;
mod packed;
pub(crate) mod reader;
mod samples;
mod writer;

pub use arrays::convert_safetensors;
#[cfg(feature = "parquet")]
pub use columns::convert_columns;
pub use convert::{ConvertedRecords, RecordOptions};
pub use field::{ColumnValue, Field, FieldShape};
pub use index::{RecordIndex, RecordShard};
pub use reader::Records;
pub use samples::RecordSamples;
pub use writer::RecordWriter;
