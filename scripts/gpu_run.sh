#!/usr/bin/env bash
# Runs the GPU checks of a bundle (see gpu_bundle.sh) and prints a table. SECONDS bounds each check.
# Without a GPU only the programs are started; the other rows say NO GPU, and the exit status is 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" || exit
limit=${1:-120}
out=${OUT:-out}
mkdir -p "$out"

# The full wheel's libraries: libtorch with CUDA, and NCCL beside it.
site=$(python3 -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))') || {
  echo "python3 has no torch: pip install torch==2.11.0" >&2
  exit 1
}
libraries=$site/torch/lib
for folder in "$site"/nvidia/*/lib; do
  libraries=$libraries:$folder
done
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
nvidia-smi --query-gpu=index,name,memory.total,driver_version --format=csv || true
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || true

table=
failed=0
row() {
  table+=$(printf '%-22s %-10s %5d s' "$1" "$2" "$3")$'\n'
}
run() {
  local name=$1
  shift
  local start=$SECONDS code=0
  echo "=== $name: $*"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log" || code=$?
  local state=ok
  if [[ $code != 0 ]]; then
    state="FAIL ($code)"
    failed=1
  fi
  row "$name" "$state" $((SECONDS - start))
}
check() {
  if ((gpus > 0)); then
    run "$@"
  else
    row "$1" "NO GPU" 0
    failed=1
  fi
}

run starts-gpu_check ./gpu_check --help
run starts-bert_large ./bert_large --help
check nccl-1-rank ./gpu_check --nnodes 1
check nccl-2-ranks ./gpu_check --nnodes 2
check nccl-3-ranks ./gpu_check --nnodes 3
check bert-tiny-1-gpu ./bert_large --config configs/bert_tiny.json --data text --nnodes 1 --steps 50 \
  --metrics "$out/tiny.jsonl" --output "$out/tiny"
check bert-tiny-cpu ./bert_large --config configs/bert_tiny.json --data text --nnodes 1 --steps 50 --backend host \
  --metrics "$out/tiny-cpu.jsonl" --output "$out/tiny-cpu"
check bert-tiny-2-ranks ./bert_large --config configs/bert_tiny.json --data text --nnodes 2 --steps 20 \
  --output "$out/tiny2"
check bert-large-bf16 ./bert_large --config configs/bert_large.json --data text --nnodes 1 --precision bf16 --steps 60 \
  --micro-batch 32 --global-batch 32 --metrics "$out/large.jsonl" --output "$out/large"
check bert-large-bare ./bert_large --config configs/bert_large.json --data text --nnodes 1 --precision bf16 --steps 60 \
  --micro-batch 32 --global-batch 32 --no-exchange --metrics "$out/bare.jsonl" --output "$out/bare"
check torch-ddp python3 gpu_torch_ddp.py
check torch-bert python3 gpu_torch_bert.py --config configs/bert_large.json --batch 32

rm -rf "$out"/*/model.safetensors
echo
echo "$table"
((gpus > 0)) || echo "no GPU here: nvidia-smi lists none; install the NVIDIA driver, or run this where it is" >&2
grep -h "step with Ddp\|all_reduce 64" "$out"/nccl-1-rank.log "$out"/torch-ddp.log 2>/dev/null
for run in bert-large-bf16 bert-large-bare; do
  grep -h "median" "$out/$run.log" 2>/dev/null | sed "s/^/$run: /"
done
grep -h "BERT step" "$out"/torch-bert.log 2>/dev/null
exit $failed
