//! Everything that can go wrong between tensors in memory and tensors in files.
//!
//! Each variant says what is wrong and, where there is something, what to do about it.

use std::fmt::{self, Display};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// `Result` of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of somebody else's: of a process group, or of memory that could not be copied.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to open, read, write, rename or sync a file.
    #[error("cannot {action} {}: {cause}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said. It stands in the message, so it is not also the error's `source`.
        cause: io::Error,
    },
    /// The disk is full, or a quota is used up.
    #[error("no space left on {}: needs {}, {} free", path.display(), Bytes(*needed), Bytes(*free))]
    NoSpace {
        /// The folder of checkpoints.
        path: PathBuf,
        /// Bytes of the whole checkpoint.
        needed: u64,
        /// Bytes that were free when writing began.
        free: u64,
    },
    /// A checkpoint could not be saved. Earlier ones are as they were.
    #[error("checkpoint of step {step}: {reason} (rank {rank})")]
    SaveFailed {
        /// Its step.
        step: u64,
        /// The first rank that failed.
        rank: usize,
        /// Why it failed.
        reason: String,
    },
    /// A checkpoint was not finished in time.
    #[error("checkpoint of step {step} is not written after {waited:?}: still waiting for {}; wait longer (finish_timeout) or look at their disks", Ranks(late))]
    Late {
        /// Its step.
        step: u64,
        /// How long was waited.
        waited: Duration,
        /// The ranks that still write.
        late: Vec<usize>,
    },
    /// The process group failed.
    #[error("cannot agree with the other ranks on a checkpoint: {0}")]
    Group(Cause),
    /// Ranks do not save the same step, or one sent what is no record of this version.
    #[error("ranks do not save alike: {reason}")]
    OutOfStep {
        /// Who does what.
        reason: String,
    },
    /// The memory of a tensor could not be copied.
    #[error("cannot copy {extent} of tensor `{tensor}`: {cause}")]
    Content {
        /// The tensor.
        tensor: String,
        /// The box that was to be copied.
        extent: String,
        /// Why not. It stands in the message, so it is not also the error's `source`.
        cause: Cause,
    },
    /// Ranks describe a tensor differently, or describe what no tensor can be.
    #[error("tensor `{tensor}`: {reason}")]
    Mismatch {
        /// The tensor.
        tensor: String,
        /// Who says what.
        reason: String,
    },
    /// Two ranks hold the same elements, but not the same boxes.
    #[error("tensor `{tensor}`: {left} of rank {left_rank} and {right} of rank {right_rank} overlap; boxes must be equal or disjoint")]
    Overlap {
        /// The tensor.
        tensor: String,
        /// A box, and a rank that holds it.
        left: String,
        /// A rank that holds the first box.
        left_rank: usize,
        /// Another box.
        right: String,
        /// A rank that holds the second box.
        right_rank: usize,
    },
    /// No rank holds some elements of a tensor.
    #[error("tensor `{tensor}` of shape {shape:?}: no rank holds {missing} of its elements")]
    Hole {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// How many elements are missing.
        missing: u64,
    },
    /// A tensor's memory has gaps, or holds elements twice.
    #[error(
        "strides {strides:?} do not make a tensor of shape {shape:?} dense; make it contiguous"
    )]
    NotDense {
        /// The shape.
        shape: Vec<u64>,
        /// The strides, in elements.
        strides: Vec<u64>,
    },
    /// Something does not lie in what it is asked of.
    #[error("out of bounds: {what}")]
    OutOfBounds {
        /// What was asked, and of what.
        what: String,
    },
    /// There is no such tensor.
    #[error("{} has no tensor `{tensor}`", path.display())]
    NoTensor {
        /// The checkpoint or file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A path is neither a checkpoint nor weights.
    #[error("{} is neither a checkpoint (a folder with manifest.json) nor weights (a .safetensors file, its index, or a folder with them)", path.display())]
    NotFound {
        /// The path.
        path: PathBuf,
    },
    /// Something would be written over.
    #[error("{} is there already: choose another place, or remove it", path.display())]
    Exists {
        /// What is there.
        path: PathBuf,
    },
    /// A manifest cannot be used.
    #[error("{} is not a usable manifest: {reason}", path.display())]
    BadManifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of weights cannot be used.
    #[error("{} is not usable: {reason}", path.display())]
    BadWeights {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file is shorter or longer than the manifest says.
    #[error("{} has {actual} bytes, expected {expected}: it was cut off or written to", path.display())]
    WrongSize {
        /// The file.
        path: PathBuf,
        /// The size in the manifest.
        expected: u64,
        /// The size that was found.
        actual: u64,
    },
    /// A block of a file does not have the checksum that it was written with.
    #[error("{} is damaged in block {block} (bytes from {offset}): checksum {actual:08x}, expected {expected:08x}; {} there", path.display(), Lies(tensor.as_deref()))]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The block.
        block: u64,
        /// Where it starts in the file.
        offset: u64,
        /// The tensor that was read, or the first that lies in the block; none in a file's header.
        tensor: Option<String>,
        /// The checksum in the manifest.
        expected: u32,
        /// The checksum of what was read.
        actual: u32,
    },
    /// Rank 0 does not find what another rank has written.
    #[error("{} is not seen by rank 0: all ranks must write into one folder, shared by their machines", path.display())]
    NotShared {
        /// The file.
        path: PathBuf,
    },
    /// A program's values, or a snapshot's, cannot be used.
    #[error("{what}: {reason}")]
    BadValue {
        /// Which.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// Saving was given up because another rank failed.
    #[error("given up because another rank failed")]
    Cancelled,
}

impl Error {
    /// Wraps what the operating system said.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_path_buf();
        move |cause| Error::Io { action, path, cause }
    }

    /// Whether files are not what they were when they were written, as opposed to a disk that does not answer.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Error::BadManifest { .. }
                | Error::BadWeights { .. }
                | Error::WrongSize { .. }
                | Error::Damaged { .. }
        )
    }
}

/// Bytes in the largest unit that leaves at least one of it.
struct Bytes(u64);

impl Display for Bytes {
    #[expect(clippy::cast_precision_loss, reason = "it is shown with one digit")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
        match units.into_iter().find(|(_, shift)| self.0 >> shift > 0) {
            Some((unit, shift)) => {
                write!(f, "{:.1} {unit}", self.0 as f64 / (1_u64 << shift) as f64)
            }
            None => write!(f, "{} bytes", self.0),
        }
    }
}

struct Ranks<'a>(&'a [usize]);

impl Display for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers: Vec<_> = self.0.iter().map(ToString::to_string).collect();
        write!(f, "rank{} {}", if numbers.len() == 1 { "" } else { "s" }, numbers.join(","))
    }
}

struct Lies<'a>(Option<&'a str>);

impl Display for Lies<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(tensor) => write!(f, "tensor `{tensor}` lies"),
            None => f.write_str("no tensor lies"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_say_what_is_needed() {
        let (path, needed) = (PathBuf::from("/ckpt"), 48 << 20);
        let full = Error::NoSpace { path, needed, free: 11 << 20 };
        assert_eq!(full.to_string(), "no space left on /ckpt: needs 48.0 MiB, 11.0 MiB free");
        let late = Error::Late { step: 3, waited: Duration::from_secs(9), late: vec![1, 3] };
        assert!(late.to_string().contains("still waiting for ranks 1,3;"), "{late}");
    }
}
