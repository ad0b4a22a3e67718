#!/usr/bin/env bash
# Checkpoints of ours beside torch.distributed.checkpoint, one after the other on one disk: BERT-large with AdamW's moments, two ranks.
#
#   scripts/bench_checkpoint.sh [CONFIG [FOLDER [ROUNDS]]]      # configs/bert_large.json, target, 3
#
# A save counts until it is durable. PyTorch is that of PHALANX_PYTHON, or the one that scripts/setup.sh --test-extras unpacks.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
config=${1:-configs/bert_large.json} folder=${2:-target} rounds=${3:-3}

python=${PHALANX_PYTHON:-third_party/torch-python/bin/python}
if ! type -P "$python" >/dev/null; then
  scripts/setup.sh --test-extras
fi
# torch.distributed.checkpoint gathers its plans through numpy, which the unpacked PyTorch comes without.
numpy=$root/target/bench-numpy
if ! "$python" -c 'import numpy' 2>/dev/null && [[ ! -d $numpy/numpy ]]; then
  "$python" -m pip install --quiet --target "$numpy" numpy
fi
ours=$(cargo bench --bench checkpoint -- --nnodes 2 --threads 1 --no-prefix --config "$config" --folder "$folder" --rounds "$rounds" |
  grep '^{')
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export MASTER_ADDR=127.0.0.1 MASTER_PORT=$port WORLD_SIZE=2 OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo
peer() {
  RANK=$1 timeout 3600 "$python" -W ignore benches/peers/dcp.py --config "$config" --folder "$folder" --rounds "$rounds" \
    --modules "$numpy"
}
peer 1 &
theirs=$(peer 0 | grep '^{')
wait
"$python" - "$ours" "$theirs" <<'TABLE'
import json
import sys

ours, theirs = map(json.loads, sys.argv[1:])
print("| | ours | torch.distributed.checkpoint | DCP / ours |")
print("|---|---|---|---|")
print(f"| bytes | {ours['bytes'] / 2**30:.2f} GiB | {theirs['bytes'] / 2**30:.2f} GiB | |")
print(f"| training waits for a save | {ours['copy_ms']:.0f} ms | {theirs['save_ms']:.0f} ms | {theirs['save_ms'] / ours['copy_ms']:.1f} |")
for what in ("save", "load"):
    a, b = ours[what + "_ms"], theirs[what + "_ms"]
    print(f"| {what} | {a:.0f} ms | {b:.0f} ms | {b / a:.2f} |")
TABLE
