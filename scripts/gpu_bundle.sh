#!/usr/bin/env bash
# Packs the GPU checks for a machine that has no Rust: release programs, a driver, a little data.
#
#   scripts/gpu_bundle.sh [--programs BUILT] [FOLDER]      builds, and fills FOLDER (default: gpu-bundle)
#
# --programs: packs the programs that lie in the folder BUILT instead of building them.
# A program that does not start is told here, not on the GPU machine.
# There:  ./run.sh [SECONDS]     needs an NVIDIA driver and Python's torch 2.11 with its CUDA wheels; prints a table.
# It runs gpu_check on 1 to 3 ranks (collectives; training and optimizers in ZeRO stages; kinds; faults; checkpoints; layers computed again;
# SyncBatchNorm; weights written and read under ZeRO-3; batches) and bert_large beside PyTorch.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
built=
if [[ ${1-} == --programs ]]; then
  built=$(realpath -e -- "${2:?--programs needs a folder}")
  shift 2
fi
folder=$(realpath -m -- "${1:-$root/gpu-bundle}")
mark=$folder/.phalanx-gpu-bundle
if [[ -n $(ls -A "$folder" 2>/dev/null) && ! -e $mark ]]; then
  printf 'gpu_bundle: error: %s holds something else: name another folder\n' "$folder" >&2
  exit 1
fi
cd "$root"

programs=(gpu_check bert_large)
if [[ -z $built ]]; then
  scripts/setup.sh
  cargo build --release "${programs[@]/#/--example=}"
  built=${CARGO_TARGET_DIR:-target}/release/examples
fi

rm -rf "$folder"
mkdir -p "$folder/configs"
touch "$mark"
for program in "${programs[@]}"; do
  strip -o "$folder/$program" "$built/$program"
  # As run.sh starts it: libtorch by LD_LIBRARY_PATH.
  if ! said=$(LD_LIBRARY_PATH=$root/third_party/libtorch/lib timeout 60 "$folder/$program" --help 2>&1); then
    printf 'gpu_bundle: error: the packed %s does not start: %s\n' "$program" "$said" >&2
    exit 1
  fi
done
cp configs/bert_*.json "$folder/configs/"
cp scripts/gpu_run.sh "$folder/run.sh"
cp scripts/gpu_torch_ddp.py scripts/gpu_torch_bert.py "$folder/"
mkdir -p "$folder/text"
find -L third_party/text -name '*.txt' -print0 | sort -z | head -z -n 12 | xargs -0 -I{} cp {} "$folder/text/"
du -sh "$folder"
