//! The network of the BERT example against PyTorch's numbers.

#[path = "../examples/bert/mod.rs"]
#[expect(dead_code, reason = "the tests use a part of the example")]
mod bert;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bert::config::Model;
use bert::model::{build, BertForMaskedLm, Inputs, LossSum, Pass};
use tch::{nn, Device, Kind, Tensor};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// What `scripts/make_fixture.py` wrote.
struct Fixture {
    document: serde_json::Value,
    batches: BTreeMap<String, Tensor>,
}

impl Fixture {
    fn read() -> Fixture {
        let text = std::fs::read_to_string(fixture("bert_tiny_losses.json")).expect("the losses");
        let batches = Tensor::read_safetensors(fixture("bert_tiny_batches.safetensors"));
        Fixture {
            document: serde_json::from_str(&text).expect("JSON"),
            batches: batches.expect("the batches").into_iter().collect(),
        }
    }

    /// The network with the fixture's weights.
    fn network(&self) -> (nn::VarStore, BertForMaskedLm) {
        let config: Model =
            serde_json::from_value(self.document["model"].clone()).expect("a model section");
        let mut vs = nn::VarStore::new(Device::Cpu);
        let network = build(&vs, &config, 1, 0).expect("a network");
        vs.load(fixture("bert_tiny_weights.safetensors")).expect("weights of these names");
        (vs, network)
    }

    fn numbers(&self, precision: &str, what: &str) -> Vec<f64> {
        serde_json::from_value(self.document[precision][what].clone()).expect("numbers")
    }

    fn loss(&self, network: &BertForMaskedLm, step: i64, masked: bool) -> LossSum {
        let rows = |name: &str| self.batches[name].narrow(0, step * 8, 8);
        let (ids, labels, mask) = (rows("input_ids"), rows("labels"), rows("attention_mask"));
        let attention_mask = masked.then_some(&mask);
        let inputs = Inputs { ids: &ids, labels: &labels, attention_mask };
        network.loss(&inputs, Pass { train: true, kind: Kind::Float }).expect("a forward pass")
    }
}

/// `actual` is `expected` up to rounding.
fn check_close(actual: f64, expected: f64) {
    let error = (actual - expected).abs() / expected.abs();
    assert!(error < 1e-5, "{actual} is not {expected}: off by {error:.1e}");
}

#[test]
fn loss_and_gradient_norm_are_pytorchs() {
    let fixture = Fixture::read();
    let (vs, network) = fixture.network();
    let LossSum { loss, masked_count } = fixture.loss(&network, 0, true);
    let mean = &loss / masked_count;
    check_close(mean.double_value(&[]), fixture.numbers("fp32", "losses")[0]);
    mean.backward();
    let squares = vs.trainable_variables().into_iter().map(|v| v.grad().square().sum(Kind::Double));
    let norm = squares.map(|s| s.double_value(&[])).sum::<f64>().sqrt();
    check_close(norm, fixture.numbers("fp32", "grad_norms")[0]);
}

#[test]
fn padding_is_seen_only_without_the_mask() {
    let fixture = Fixture::read();
    let (_vs, network) = fixture.network();
    let with = fixture.loss(&network, 0, true).loss.double_value(&[]);
    let without = fixture.loss(&network, 0, false).loss.double_value(&[]);
    assert!((with - without).abs() > 1e-4 * with, "the mask made no difference: {with} {without}");
}

#[test]
fn a_batch_without_masked_tokens_has_no_loss_and_zero_gradients() {
    let fixture = Fixture::read();
    let (vs, network) = fixture.network();
    let ids = fixture.batches["input_ids"].narrow(0, 0, 2);
    let labels = ids.full_like(-100);
    let inputs = Inputs { ids: &ids, labels: &labels, attention_mask: None };
    let sum = network.loss(&inputs, Pass { train: true, kind: Kind::Float }).unwrap();
    assert_eq!(sum.masked_count, 0);
    assert!(sum.loss.double_value(&[]).abs() < f64::MIN_POSITIVE);
    sum.loss.backward();
    for (name, variable) in vs.variables() {
        let gradient = variable.grad();
        assert!(gradient.defined(), "{name} has no gradient: its bucket would never be full");
        assert!(gradient.abs().max().double_value(&[]) < f64::MIN_POSITIVE, "{name}");
    }
}
