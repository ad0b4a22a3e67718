//! What a run leaves behind: weights and `config.json` that transformers loads, and the loss curve.

use std::path::{Path, PathBuf};

use anyhow::{bail, Context as _, Result};

use super::config::{Model, LOSS};
use super::metrics::StepRecord;
use super::plot;

/// The folder of one run.
#[derive(Debug)]
pub(crate) struct Output {
    folder: PathBuf,
}

impl Output {
    /// Makes the folder: what is given, or the next free number. A place that cannot be written is
    /// found before training, not after.
    pub(crate) fn create(wanted: Option<&Path>, name: &str) -> Result<Output> {
        let Some(folder) = wanted else { return Output::numbered(Path::new("runs"), name) };
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make the output folder {}", folder.display()))?;
        Ok(Output { folder: folder.into() })
    }

    fn numbered(parent: &Path, name: &str) -> Result<Output> {
        const NUMBER_MAX: u32 = 9999;
        let explain = || format!("cannot make a folder under {}; give --output", parent.display());
        std::fs::create_dir_all(parent).with_context(explain)?;
        for number in 1..=NUMBER_MAX {
            let folder = parent.join(format!("{name}-{number:03}"));
            match std::fs::create_dir(&folder) {
                Ok(()) => return Ok(Output { folder }),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).with_context(explain),
            }
        }
        bail!("{} holds {NUMBER_MAX} runs called {name}; give --output", parent.display())
    }

    /// Where the weights go.
    pub(crate) fn weights(&self) -> PathBuf {
        self.folder.join("model.safetensors")
    }

    /// Writes everything but the weights, which are there; gives what was written, one line each.
    pub(crate) fn write(&self, model: &Model, records: &[StepRecord]) -> Result<Vec<String>> {
        let weights = self.weights();
        let config = self.text("config.json", &hugging_face(model)?)?;
        let points: Vec<_> = records.iter().map(|r| (step(r), r.loss)).collect();
        let plot = self.text("loss.svg", &plot::loss_curve(LOSS, &points))?;
        Ok([weights, config, plot].iter().map(|path| path.display().to_string()).collect())
    }

    fn text(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}

/// `config.json` as transformers wants it beside the weights.
fn hugging_face(model: &Model) -> Result<String> {
    let mut value = model.for_hugging_face()?;
    if let Some(object) = value.as_object_mut() {
        object.insert("architectures".into(), serde_json::json!([model.architecture()]));
    }
    Ok(serde_json::to_string_pretty(&value)? + "\n")
}

#[expect(clippy::cast_precision_loss, reason = "a coordinate of a plot")]
fn step(record: &StepRecord) -> f64 {
    record.step as f64
}
