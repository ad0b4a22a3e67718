//! Where a run stands in its data: small enough for every checkpoint, enough to go on with any
//! number of ranks.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::order::{Order, Position};

/// A loader's place: what [`Loader::resume`](crate::Loader::resume) needs.
///
/// It is the same on every rank, and knows nothing of ranks, threads or batch sizes: all of them
/// may differ when a run is resumed. At most 100 bytes as JSON, whatever the seed, up to 2^62
/// samples an epoch and 9999 epochs, in blocks and buckets as well:
/// `{"at":"2/999999999","seed":42,"data":"0123456789abcdef b65536x16"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct LoaderState {
    /// The epoch, from 0.
    pub epoch: u64,
    /// How many samples of the epoch's order are done.
    pub next_global_sample: u64,
    /// The seed of order and masks.
    pub seed: u64,
    /// The order; [`Order::Shuffled`] is not written out.
    pub order: Order,
    /// Batches of similar length: how many global batches of how many samples are sorted together
    /// (`8x256`). Absent: they are not.
    pub buckets: Option<Buckets>,
    /// Version of the order ([`permutation::VERSION`](crate::order::permutation::VERSION)); 1 is
    /// not written out.
    pub version: u32,
    /// What the data was.
    pub fingerprint: Fingerprint,
}

impl LoaderState {
    /// The place in the order.
    pub fn position(&self) -> Position {
        Position { epoch: self.epoch, next_global_sample: self.next_global_sample }
    }

    /// Checks that a state belongs to the same data and order as this run's beginning.
    pub(crate) fn check(&self, current: &LoaderState) -> Result<()> {
        let pairs = [
            ("data", self.fingerprint.to_string(), current.fingerprint.to_string()),
            ("seed", self.seed.to_string(), current.seed.to_string()),
            ("order", self.order.to_string(), current.order.to_string()),
            ("batches of similar length", shown(self.buckets), shown(current.buckets)),
            ("order's version", self.version.to_string(), current.version.to_string()),
        ];
        for (what, saved, now) in pairs {
            if saved != now {
                return Err(Error::StateMismatch { what, saved, current: now });
            }
        }
        Ok(())
    }
}

/// How samples of similar length come together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Buckets {
    /// Global batches that are sorted together.
    pub batches: u64,
    /// Samples of a global batch.
    pub global_batch: u64,
}

impl fmt::Display for Buckets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.batches, self.global_batch)
    }
}

impl TryFrom<String> for Buckets {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        let sizes = text.split_once('x').and_then(|(batches, global_batch)| {
            Some(Buckets {
                batches: batches.parse().ok()?,
                global_batch: global_batch.parse().ok()?,
            })
        });
        sizes.ok_or_else(|| {
            format!("`{text}` is not so many batches of so many samples, such as 8x256")
        })
    }
}

impl From<Buckets> for String {
    fn from(buckets: Buckets) -> String {
        buckets.to_string()
    }
}

fn shown(buckets: Option<Buckets>) -> String {
    buckets.map_or_else(|| "none".to_owned(), |buckets| buckets.to_string())
}

/// The state as it is written: few names, as each of them counts. It is read as it was written
/// before, too, with a name for each field.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    /// `EPOCH/SAMPLE`, and in a state that would be too long otherwise `EPOCH/SAMPLE/SEED`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    at: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    /// The fingerprint, and what differs from a shuffled order without buckets, of the first
    /// version: `b65536x16`, `8x256`, `v2`.
    #[serde(alias = "fingerprint")]
    data: String,
    #[serde(default, skip_serializing)]
    epoch: Option<u64>,
    #[serde(default, alias = "next_global_sample", skip_serializing)]
    next_sample: Option<u64>,
    #[serde(default, skip_serializing)]
    order: Option<Order>,
    #[serde(default, skip_serializing)]
    buckets: Option<Buckets>,
    #[serde(default, skip_serializing)]
    version: Option<u32>,
}

const FIRST_VERSION: u32 = 1;

/// What a state takes as JSON.
const BYTES_MAX: usize = 100;

impl From<LoaderState> for Stored {
    fn from(state: LoaderState) -> Stored {
        let LoaderState { epoch, next_global_sample, seed, order, buckets, version, fingerprint } =
            state;
        let mut data = fingerprint.to_string();
        let mut add = |text: String| data.extend([" ", &text]);
        if order != Order::Shuffled {
            add(order.to_string());
        }
        if let Some(buckets) = buckets {
            add(buckets.to_string());
        }
        if version != FIRST_VERSION {
            add(format!("v{version}"));
        }
        let at = format!("{epoch}/{next_global_sample}");
        let digits = seed.to_string().len();
        let fits =
            r#"{"at":"","seed":,"data":""}"#.len() + at.len() + digits + data.len() <= BYTES_MAX;
        Stored {
            at: Some(if fits { at } else { format!("{at}/{seed}") }),
            seed: fits.then_some(seed),
            data,
            epoch: None,
            next_sample: None,
            order: None,
            buckets: None,
            version: None,
        }
    }
}

/// Epoch, sample and seed of a state.
fn place(stored: &Stored) -> std::result::Result<(u64, u64, u64), String> {
    let seed = stored.seed;
    match (&stored.at, stored.epoch, stored.next_sample) {
        (Some(at), None, None) => {
            let numbers = at.split('/').map(|number| number.parse().ok());
            match (numbers.collect::<Option<Vec<u64>>>().as_deref(), seed) {
                (Some(&[epoch, next]), Some(seed)) | (Some(&[epoch, next, seed]), None) => {
                    Ok((epoch, next, seed))
                }
                _ => {
                    let form = "epoch/sample, with `seed` beside it, or epoch/sample/seed";
                    Err(format!("`{at}` is no place such as 2/999: {form}"))
                }
            }
        }
        (None, Some(epoch), Some(next)) => Ok((epoch, next, seed.ok_or("a state has a `seed`")?)),
        _ => Err("a state has a place, once: `at`, or `epoch` and `next_sample`".into()),
    }
}

impl TryFrom<Stored> for LoaderState {
    type Error = String;

    fn try_from(stored: Stored) -> std::result::Result<Self, String> {
        let (epoch, next_global_sample, seed) = place(&stored)?;
        let Stored { data, mut order, mut buckets, mut version, .. } = stored;
        let mut words = data.split(' ');
        let fingerprint = words.next().unwrap_or_default().parse()?;
        for word in words {
            if let Some(number) = word.strip_prefix('v').and_then(|number| number.parse().ok()) {
                version = Some(number);
            } else if word.starts_with(|first: char| first.is_ascii_digit()) {
                buckets = Some(Buckets::try_from(word.to_owned())?);
            } else {
                order = Some(word.parse()?);
            }
        }
        let (order, version) = (order.unwrap_or_default(), version.unwrap_or(FIRST_VERSION));
        Ok(LoaderState { epoch, next_global_sample, seed, order, buckets, version, fingerprint })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> LoaderState {
        LoaderState {
            epoch: 9999,
            next_global_sample: 1 << 62,
            seed: u64::MAX,
            order: Order::Shuffled,
            buckets: None,
            version: FIRST_VERSION,
            fingerprint: Fingerprint(u64::MAX),
        }
    }

    #[test]
    fn a_state_is_small_whatever_its_numbers_are_and_is_read_back() {
        let blocks = Order::Blocks { block: 65_536, window: 16 };
        let buckets = Some(Buckets { batches: 16, global_batch: 4096 });
        for state in [
            state(),
            LoaderState { order: blocks, ..state() },
            LoaderState { order: Order::Sequential, ..state() },
            LoaderState { buckets, ..state() },
            LoaderState { version: 2, ..state() },
            LoaderState { order: blocks, buckets, next_global_sample: 1 << 40, ..state() },
            LoaderState { order: blocks, buckets, ..state() },
        ] {
            let json = serde_json::to_string(&state).unwrap();
            assert!(json.len() <= 100, "{} bytes: {json}", json.len());
            assert_eq!(serde_json::from_str::<LoaderState>(&json).unwrap(), state);
        }
    }

    #[test]
    fn states_of_earlier_programs_are_read() {
        let old = r#"{"epoch":3,"next_sample":96,"seed":7,"order":"b64x16","buckets":"8x32","version":2,"data":"00000000000000ff"}"#;
        let older =
            r#"{"epoch":3,"next_global_sample":96,"seed":7,"fingerprint":"00000000000000ff"}"#;
        let plain = LoaderState {
            epoch: 3,
            next_global_sample: 96,
            seed: 7,
            fingerprint: Fingerprint(255),
            ..state()
        };
        let order = Order::Blocks { block: 64, window: 16 };
        let buckets = Some(Buckets { batches: 8, global_batch: 32 });
        let full = LoaderState { order, buckets, version: 2, ..plain.clone() };
        assert_eq!(serde_json::from_str::<LoaderState>(old).unwrap(), full);
        assert_eq!(serde_json::from_str::<LoaderState>(older).unwrap(), plain);
    }

    #[test]
    fn what_is_no_state_is_refused_with_a_reason() {
        let error = |json: &str| serde_json::from_str::<LoaderState>(json).unwrap_err().to_string();
        let data = r#""data":"00000000000000ff""#;
        assert!(error(&format!(r#"{{"at":"3","seed":7,{data}}}"#)).contains("epoch/sample"));
        assert!(error(&format!(r#"{{"seed":7,{data}}}"#)).contains("a place, once"));
        let twice = format!(r#"{{"at":"3/4","epoch":3,"next_sample":4,"seed":7,{data}}}"#);
        assert!(error(&twice).contains("a place, once"));
        assert!(error(&format!(r#"{{"at":"3/4",{data}}}"#)).contains("epoch/sample/seed"));
        assert!(
            error(&format!(r#"{{"at":"3/4/5","seed":5,{data}}}"#)).contains("epoch/sample/seed")
        );
        assert!(error(&format!(r#"{{"epoch":3,"next_sample":4,{data}}}"#)).contains("`seed`"));
        assert!(error(r#"{"at":"3/4","seed":7,"data":"ff"}"#).contains("fingerprint"));
        assert!(error(r#"{"at":"3/4","seed":7,"data":"00000000000000ff 8"}"#).contains("8x256"));
        assert!(error(r#"{"at":"3/4","seed":7,"data":"00000000000000ff z"}"#).contains("no order"));
        assert!(error(&format!(r#"{{"at":"3/4","seed":7,{data},"more":1}}"#)).contains("more"));
    }
}
