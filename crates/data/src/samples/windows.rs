//! Samples of one length, cut out of a stream of tokens one behind the other.

use std::ops::Range;
use std::sync::Arc;

use crate::batches::Scratch;
use crate::cast::to_u64;
use crate::error::{Error, Result};
use crate::format::Tokens;
use crate::order::Sample;

/// Rows that the processor is asked for before they are read: memory is slow to answer.
const AHEAD: usize = 2;

/// What [`Samples`](super::Samples) of a type with `windows`, `columns` and a `fingerprint` are, but for how they fill rows.
macro_rules! of_windows {
    () => {
        fn sample_count(&self) -> u64 {
            self.windows.count()
        }

        fn columns(&self) -> &[$crate::batches::Column] {
            &self.columns
        }

        fn fingerprint(&self) -> $crate::fingerprint::Fingerprint {
            self.fingerprint
        }

        fn damaged(&self) -> $crate::error::Result<Vec<std::ops::Range<u64>>> {
            Ok(self.windows.damaged())
        }

        fn will_need(
            &self,
            samples: std::ops::Range<u64>,
            _scratch: &mut $crate::batches::Scratch,
        ) {
            self.windows.will_need(&samples);
        }
    };
}
pub(super) use of_windows;

/// Sample i is the tokens `i·len..(i + 1)·len + more`. What is left over at the end is no sample.
#[derive(Clone, Debug)]
pub(super) struct TokenWindows {
    stream: Arc<dyn Tokens>,
    len: usize,
    /// Tokens that a sample shares with the next one.
    more: usize,
}

impl TokenWindows {
    pub(super) fn new(stream: Arc<dyn Tokens>, len: usize, more: usize) -> Self {
        TokenWindows { stream, len, more }
    }

    pub(super) fn stream(&self) -> &dyn Tokens {
        &*self.stream
    }

    pub(super) fn count(&self) -> u64 {
        self.stream.token_count().saturating_sub(to_u64(self.more)) / to_u64(self.len)
    }

    /// The samples that hold damaged tokens.
    pub(super) fn damaged(&self) -> Vec<Range<u64>> {
        let (len, more) = (to_u64(self.len), to_u64(self.more));
        let of =
            |tokens: &Range<u64>| tokens.start.saturating_sub(more) / len..tokens.end.div_ceil(len);
        self.stream.damaged().iter().map(of).collect()
    }

    /// Has the tokens of samples fetched from the disk.
    pub(super) fn will_need(&self, samples: &Range<u64>) {
        let start_of = |sample: u64| sample.saturating_mul(to_u64(self.len));
        let end = start_of(samples.end).saturating_add(to_u64(self.more));
        self.stream.will_need(start_of(samples.start)..end);
    }

    /// Has the processor load what is read two rows after row `at`.
    #[inline]
    pub(super) fn expect_after(&self, samples: &[Sample], at: usize) {
        if let Some(later) = samples.get(at + AHEAD) {
            self.stream.expect(later.id.saturating_mul(to_u64(self.len)), self.len + self.more);
        }
    }

    /// Reads the tokens of sample `id`; `before` others stand in front of them in the sample.
    pub(super) fn read(
        &self,
        id: u64,
        before: usize,
        out: &mut [i64],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let samples = self.count();
        if id >= samples {
            return Err(Error::NoSuchSample { sample: id, samples });
        }
        let start = id * to_u64(self.len);
        let read = self.stream.read(start, out, scratch, &format_args!("sample {id}"));
        read.map_err(|error| of_sample(error, id, before))
    }
}

/// The stream counts tokens from where it was read; who reads an error counts samples.
pub(super) fn of_sample(error: Error, sample: u64, before: usize) -> Error {
    match error {
        Error::BadValue { path, position, value, reason, .. } => {
            Error::BadValue { path, sample, position: position + before, value, reason }
        }
        other => other,
    }
}
