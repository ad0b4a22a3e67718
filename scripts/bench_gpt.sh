#!/usr/bin/env bash
# Steps of examples/gpt.rs on two ranks beside PyTorch's tensor and pipeline parallelism over gloo, taking turns in one run.
#
#   scripts/bench_gpt.sh [--rounds 4] [--steps 8] [--sides tp "tp torch" ...] [--json FILE]
#
# `--help` says what is compared with what (benches/peers/gpt_turns.py). PyTorch is that of PHALANX_PYTHON, or the one that
# scripts/setup.sh --test-extras unpacks; its torch.distributed.tensor needs the package sympy.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

python=${PHALANX_PYTHON:-third_party/torch-python/bin/python}
if ! type -P "$python" >/dev/null; then
  scripts/setup.sh --test-extras
fi
version=$("$python" -W ignore -c 'import torch; print(torch.__version__.split("+")[0])')
if [[ $version != 2.11.0 ]]; then
  printf 'bench_gpt: error: %s has torch %s; libtorch here is 2.11.0\n' "$python" "$version" >&2
  exit 1
fi
ours=$(cargo build --release --example gpt --message-format=json |
  sed -n 's/.*"kind":\["example"\].*"name":"gpt".*"executable":"\([^"]*\)".*/\1/p')
exec "$python" -W ignore benches/peers/gpt_turns.py --ours "$ours" "$@"
