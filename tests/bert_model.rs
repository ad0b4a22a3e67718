//! The network of the BERT example against PyTorch's numbers.

#![expect(clippy::print_stdout, reason = "how close the numbers are is worth seeing")]

#[path = "../examples/bert/mod.rs"]
#[expect(dead_code, reason = "the tests use a part of the example")]
mod bert;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bert::batching::{Batching, Cut};
use bert::config::{Config, Model, Precision, Schedule};
use bert::metrics::StepRecord;
use bert::model::{build, BertForMaskedLm, Inputs, LossSum, Pass};
use bert::train::Trainer;
use bert::{data, failure, output, source, weights};
use phalanx_comm::{Group, GroupOptions};
use phalanx_data::progress::Silent;
use phalanx_ddp_core::{checkpoint, Ddp, DdpOptions};
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

    /// The configuration that PyTorch's run amounts to.
    fn config(&self, precision: Precision) -> Config {
        let mut config = Config::default();
        let section = |name: &str| self.document[name].clone();
        config.model = serde_json::from_value(section("model")).expect("a model section");
        config.optimizer = serde_json::from_value(section("optimizer")).expect("an optimizer");
        config.optimizer.schedule = Schedule::Constant;
        config.data.batches = Some(fixture("bert_tiny_batches.safetensors"));
        config.data.shuffle = false;
        config.train.steps = 10;
        config.train.precision = precision;
        config
    }

    /// Ten steps of the trainer itself, in a world of one.
    fn train(&self, precision: Precision) -> Vec<StepRecord> {
        let config = self.config(precision);
        config.validate("the fixture").expect("a valid configuration");
        let (vs, network) = self.network();
        let mut group = Group::single(GroupOptions::default()).expect("a group");
        let batching = Batching { global_batch: 8, micro_batch: 4, accumulate: 2, cut: Cut::Parts };
        let samples = data::open(&config, &Silent).expect("the batches");
        let place = (tch::Device::Cpu, None);
        let mut feed = source::feed(&samples, &config, batching, (0, 1), place).expect("a feed");
        let settings = (&config, batching, true);
        let mut trainer = Trainer::new(network, &vs, &mut group, settings).expect("a trainer");
        (1..=10).map(|step| trainer.step(step, &mut feed, &mut group).expect("a step")).collect()
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

/// `actual` is `expected` up to rounding, in fp32. From the weights to a token's loss some n = 1700 operations follow one another
/// (2 layers of 4 × 64 + 128 + 32 terms of products and 2 × 128 of norms, 64 + 128 + 512 of the head), and three times as many to its
/// gradients. Roundings of u = 2^-24 are as good as random, so a number is off by less than 5 √n u (Higham & Mary 2019:
/// all but certainly) = 1.2e-5 or 2.1e-5, and the mean of 50 tokens by a seventh of that.
fn check_close(actual: f64, expected: f64) {
    check_within(actual, expected, 1e-5);
}

fn check_within(actual: f64, expected: f64, tolerance: f64) {
    let error = (actual - expected).abs() / expected.abs();
    assert!(error < tolerance, "{actual} is not {expected}: off by {error:.1e}");
}

/// Ten steps give PyTorch's losses within one relative tolerance, its gradient norms within
/// another.
fn check_training(precision: Precision, name: &str, of_loss: f64, of_norm: f64) {
    let fixture = Fixture::read();
    let records = fixture.train(precision);
    let (losses, norms) = (fixture.numbers(name, "losses"), fixture.numbers(name, "grad_norms"));
    assert_eq!(records.len(), losses.len());
    let error = |actual: f64, expected: f64| (actual - expected).abs() / expected;
    let worst = records.iter().zip(&losses).map(|(r, l)| error(r.loss, *l)).fold(0.0, f64::max);
    let worst_norm =
        records.iter().zip(&norms).map(|(r, n)| error(r.grad_norm, *n)).fold(0.0, f64::max);
    println!("{name}: losses within {worst:.1e}, gradient norms within {worst_norm:.1e}");
    for (record, (loss, norm)) in records.iter().zip(losses.into_iter().zip(norms)) {
        check_within(record.loss, loss, of_loss);
        check_within(record.grad_norm, norm, of_norm);
    }
}

#[test]
fn ten_steps_in_fp32_are_pytorchs() {
    // Each of ten steps adds as much as `check_close` allows. Where a gradient is nothing but rounding, Adam makes of it a step of any
    // size up to the learning rate: that moves the loss by less still (times that gradient), the next gradients by more.
    check_training(Precision::Fp32, "fp32", 1e-4, 1e-3);
}

#[test]
fn ten_steps_in_bf16_are_pytorchs_up_to_rounding() {
    // bf16 has 8 digits: each of some 16 products between the weights and a token's loss is rounded by 2^-9 / √3 = 1.1e-3 on the root
    // of the mean square, together 4.5e-3 of logits below 2, and the mean of 50 tokens by a seventh of that: 1.3e-3 of losses near 6,
    // so 2e-4. Gradients go the way twice: 6.4e-3, not averaged. Five and three times as much are not seen by chance.
    check_training(Precision::Bf16, "bf16", 1e-3, 2e-2);
}

/// A network of the fixture's shape with values of its own.
fn other_network(config: &Model) -> nn::VarStore {
    let vs = nn::VarStore::new(Device::Cpu);
    build(&vs, config, 77, 0).expect("a network");
    vs
}

/// Whether two stores hold the same values under the same names.
fn same(left: &nn::VarStore, right: &nn::VarStore) -> bool {
    let (left, right) = (left.variables(), right.variables());
    left.len() == right.len() && left.iter().all(|(name, tensor)| right[name].equal(tensor))
}

/// Loads into the wrapped model.
fn load(path: &Path, vs: &nn::VarStore) -> anyhow::Result<Vec<String>> {
    let mut group = Group::single(GroupOptions::default()).expect("a group");
    let ddp = Ddp::new(vs, &mut group, DdpOptions::default()).expect("a model");
    weights::load(path, &ddp)
}

#[test]
fn what_was_written_loads_again() {
    let fixture = Fixture::read();
    let (vs, _network) = fixture.network();
    let config = fixture.config(Precision::Fp32);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out");
    let output = output::Output::create(Some(&path), "unused").unwrap();
    let variables: Vec<_> = vs.variables().into_iter().collect();
    checkpoint::save_safetensors(&output.weights(), &variables).unwrap();
    let written = output.write(&config.model, &[]).unwrap();
    assert_eq!(written.len(), 3, "{written:?}");
    let other = other_network(&config.model);
    assert!(!same(&vs, &other));
    let left = load(&path.join("model.safetensors"), &other).unwrap();
    assert!(left.is_empty(), "{left:?}");
    assert!(same(&vs, &other));
    let model = std::fs::read_to_string(path.join("config.json")).unwrap();
    assert_eq!(serde_json::from_str::<Model>(&model).unwrap(), config.model);
}

#[test]
fn old_names_of_layer_norms_load_and_foreign_tensors_are_named() {
    let fixture = Fixture::read();
    let (vs, _network) = fixture.network();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("old.safetensors");
    let rename = |name: String| {
        name.replace("LayerNorm.weight", "LayerNorm.gamma")
            .replace("LayerNorm.bias", "LayerNorm.beta")
    };
    let mut tensors: Vec<_> =
        vs.variables().into_iter().map(|(name, tensor)| (rename(name), tensor)).collect();
    tensors.push(("bert.pooler.dense.bias".into(), Tensor::from_slice(&[1f32])));
    Tensor::write_safetensors(&tensors, &path).unwrap();
    let config = fixture.config(Precision::Fp32).model;
    weights::check(&path, &config).unwrap();
    let other = other_network(&config);
    assert_eq!(load(&path, &other).unwrap(), ["bert.pooler.dense.bias"]);
    assert!(same(&vs, &other));
}

#[test]
fn weights_of_other_shapes_are_all_named() {
    let mut config = Fixture::read().config(Precision::Fp32).model;
    config.vocab_size = 100;
    config.num_hidden_layers = 3;
    let path = fixture("bert_tiny_weights.safetensors");
    let error = failure::message(&weights::check(&path, &config).unwrap_err());
    for part in [
        "bert_tiny_weights.safetensors does not fit the model",
        "word_embeddings.weight is [512, 64], the model has [100, 64]",
        "layer.2.attention.output.LayerNorm.bias is missing",
        " more; take the configuration",
    ] {
        assert!(error.contains(part), "{error} lacks {part}");
    }
    assert!(!error.contains('\n'), "{error}");
    // Loading by itself refuses too, before any variable is changed.
    let vs = other_network(&config);
    let refusal = load(&path, &vs).unwrap_err().to_string();
    assert!(refusal.contains("[512, 64]") && refusal.contains("[100, 64]"), "{refusal}");
    assert!(same(&vs, &other_network(&config)));
}

#[test]
fn weights_that_are_none_are_told_apart() {
    let fixture_config = Fixture::read().config(Precision::Fp32).model;
    let check = |path: &Path| weights::check(path, &fixture_config);
    check(&fixture("bert_tiny_weights.safetensors")).unwrap();
    let absent = check(Path::new("/nowhere.safetensors")).unwrap_err();
    assert_eq!(failure::exit_code(&absent), failure::IO);
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let other = check(&text).unwrap_err();
    assert_eq!(failure::exit_code(&other), failure::DATA);
    assert!(failure::message(&other).contains("is not a safetensors file"));
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
