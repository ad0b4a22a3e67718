"""Checks the metrics file of a short run: usage check_metrics.py FILE STEPS WORLD_SIZE."""

import json
import math
import sys

path, steps, world_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with open(path, encoding="utf-8") as lines:
    *rows, last = [json.loads(line) for line in lines]
assert [row["step"] for row in rows] == list(range(1, steps + 1)), [row["step"] for row in rows]
for row in rows:
    for key in (
        "loss lr grad_norm tokens step_ms data_wait_ms forward_ms backward_ms "
        "exposed_comm_ms optimizer_ms tokens_per_s"
    ).split():
        assert math.isfinite(row[key]) and row[key] >= 0, (row["step"], key, row[key])
    assert len(row["data_wait_ms_by_rank"]) == world_size and row["left_out"] == 0, row
    assert row["skipped"] == 0, row
assert rows[-1]["loss"] < rows[0]["loss"], "the loss did not fall"
assert last["summary"]["world_size"] == world_size, last
assert last["summary"]["skipped"] == 0 and isinstance(last["summary"]["stragglers"], list), last
print(f"{path}: {steps} steps, loss {rows[0]['loss']:.3f} -> {rows[-1]['loss']:.3f}")
