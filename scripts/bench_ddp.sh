#!/usr/bin/env bash
# A training step of ours beside PyTorch's DistributedDataParallel over gloo, taking turns in one run.
#
#   scripts/bench_ddp.sh [--config configs/bert_small.json] [--precision fp32|bf16] [--rounds 6] [--steps 5] [--json FILE] ...
#
#   scripts/bench_ddp.sh --sides "--zero 1" "--zero 3" fsdp2 ...      settings of ours, and PyTorch's FSDP2 (benches/peers/sides_step.py)
#
# `--help` lists all, and says what is compared with what (benches/peers/ddp_step.py). PyTorch is that of PHALANX_PYTHON,
# or the one that scripts/setup.sh --test-extras unpacks.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

python=${PHALANX_PYTHON:-third_party/torch-python/bin/python}
if ! type -P "$python" >/dev/null; then
  scripts/setup.sh --test-extras
fi
version=$("$python" -W ignore -c 'import torch; print(torch.__version__.split("+")[0])')
if [[ $version != 2.11.0 ]]; then
  printf 'bench_ddp: error: %s has torch %s; libtorch here is 2.11.0\n' "$python" "$version" >&2
  exit 1
fi

# program PACKAGE BENCH: builds a bench and prints where it is.
program() {
  cargo bench -p "$1" --bench "$2" --no-run --message-format=json |
    sed -n 's/.*"kind":\["bench"\].*"name":"'"$2"'".*"executable":"\([^"]*\)".*/\1/p'
}
ours=$(program phalanx step)
if [[ " $* " == *" --sides "* ]]; then
  exec "$python" -W ignore benches/peers/sides_step.py --ours "$ours" "$@"
fi
exec "$python" -W ignore benches/peers/ddp_step.py --ours "$ours" --collectives "$(program phalanx-comm collectives)" "$@"
