#!/usr/bin/env python3
"""Saves and loads a BERT with AdamW's moments by torch.distributed.checkpoint: `benches/checkpoint.rs` does the same by ours.

Started once for each rank by `scripts/bench_checkpoint.sh`. The state is what DCP asks for: `get_state_dict` of a model under
DistributedDataParallel and its optimizer, replicas written once, the writing spread over the ranks, files synced (its default). The first
round warms up and is not counted.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import sys
import time
import warnings

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modules", default="", help="a folder with numpy, where Python has none")
    arguments = parser.parse_args()
    sys.path.append(arguments.modules)

    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.nn.parallel import DistributedDataParallel

    sys.path.insert(0, str(ROOT / "scripts"))
    from gpu_torch_bert import Bert

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = json.loads(pathlib.Path(arguments.config).read_text())["model"]
    torch.manual_seed(7)
    model = DistributedDataParallel(Bert(config, dropout=lambda x, p: x))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    def slowest(start):
        elapsed = torch.tensor([(time.perf_counter() - start) * 1e3])
        dist.all_reduce(elapsed, dist.ReduceOp.MAX)
        return elapsed.item()

    saves, loads = [], []
    folder = os.path.join(arguments.folder, "bench-dcp")
    for number in range(arguments.rounds + 1):
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()
        start = time.perf_counter()
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
        save = slowest(start)
        dist.barrier()
        start = time.perf_counter()
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        load = slowest(start)
        if number > 0:
            saves.append(save)
            loads.append(load)
    if dist.get_rank() == 0:
        written = sum(path.stat().st_size for path in pathlib.Path(folder).iterdir())
        shutil.rmtree(folder)
        print(json.dumps({
            "bytes": written,
            "save_ms": statistics.median(saves),
            "load_ms": statistics.median(loads),
        }))
    dist.destroy_process_group()


main()
