# The commands worth remembering; plain cargo works too once `make setup` has run.

.PHONY: demo test setup fmt lint doc ci

# A small BERT, data-parallel on four emulated nodes: two minutes on two cores. BERT-large is the same command without
# "--config" and "--steps", and wants 20 GiB of memory.
demo:
	scripts/setup.sh
	cargo run --release --example bert_large -- --nnodes 4 --config configs/bert_small.json --steps 100

# Every test that needs no special hardware.
test:
	scripts/setup.sh --test-extras
	@features=$$(scripts/setup.sh --print-test-features); set -ex; \
	if cargo nextest --version >/dev/null 2>&1; \
	then cargo nextest run --workspace --features "$$features" --no-fail-fast; \
	cargo test --workspace --features "$$features" --doc; \
	else cargo test --workspace --features "$$features" --no-fail-fast; fi

setup:
	scripts/setup.sh

fmt:
	cargo fmt --all

lint:
	cargo fmt --all -- --check
	cargo clippy --workspace --features "$$(scripts/setup.sh --print-test-features)" --all-targets -- -D warnings
	shellcheck scripts/*.sh examples/slurm/*.sbatch .ci/run .ci/consumer

doc:
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

ci:
	.ci/run
