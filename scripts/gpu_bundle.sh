#!/usr/bin/env bash
# Packs the GPU checks for a machine that has no Rust: release programs, a driver, a little data.
#
#   scripts/gpu_bundle.sh [FOLDER]      builds, and fills FOLDER (default: gpu-bundle)
#
# There:  ./run.sh [SECONDS]     needs an NVIDIA driver and Python's torch 2.11 with its CUDA wheels; prints a table.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-gpu-bundle}

scripts/setup.sh
cargo build --release --example gpu_check --example bert_large

rm -rf "$folder"
mkdir -p "$folder/configs"
target=${CARGO_TARGET_DIR:-target}
for program in gpu_check bert_large; do
  strip -o "$folder/$program" "$target/release/examples/$program"
done
cp configs/bert_*.json "$folder/configs/"
cp scripts/gpu_run.sh "$folder/run.sh"
cp scripts/gpu_torch_ddp.py scripts/gpu_torch_bert.py "$folder/"
mkdir -p "$folder/text"
find -L third_party/text -name '*.txt' -print0 | sort -z | head -z -n 12 | xargs -0 -I{} cp {} "$folder/text/"
du -sh "$folder"
