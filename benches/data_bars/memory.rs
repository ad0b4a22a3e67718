//! Memory that an open folder takes.

use std::path::Path;

use phalanx::data::{Access, MaskedText, Masking, Samples as _};

use super::{counting, holes};

/// MiB that a folder of 10^9 samples takes when it is open.
pub(crate) fn of_a_billion_samples(folder: &Path) -> anyhow::Result<f64> {
    let target = folder.join("billion");
    holes::write(&target)?;
    let before = counting::live_bytes();
    let samples = MaskedText::open(&target, holes::SEQUENCE_LEN, Masking::default(), Access::Map)?;
    anyhow::ensure!(samples.sample_count() >= holes::SAMPLES, "too few samples");
    #[expect(clippy::cast_precision_loss, reason = "some hundred thousand bytes")]
    let bytes = (counting::live_bytes() - before) as f64;
    Ok(bytes / f64::from(1 << 20))
}
