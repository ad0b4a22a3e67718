#!/usr/bin/env python3
"""A training step of GPT under `torch.distributed.tensor.parallel` over gloo: the peer of `gpt --tp 2` (see `gpt_turns.py`, which starts it).

Products are cut by column and row, the vocabulary over both ranks, with `loss_parallel` for the loss, so that no rank has all logits. Prints the
milliseconds of each step as JSON, of the slowest rank.
"""

import argparse
import json
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module

from gpt_model import Gpt, batch, optimizer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    arguments = parser.parse_args()
    config = json.load(open(arguments.config))
    model, tokens = config["model"], config["data"]["sequence_length"]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(7)
    network = Gpt(model)
    plan = {
        "words": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    for number in range(model["n_layer"]):
        block = f"blocks.{number}"
        for name in ("attention.q", "attention.k", "attention.v", "up"):
            plan[f"{block}.{name}"] = ColwiseParallel()
        for name in ("attention.out", "down"):
            plan[f"{block}.{name}"] = RowwiseParallel()
    parallelize_module(network, mesh, plan)
    # The fused rule does not take tensors that are cut and whole ones together.
    rule = optimizer(network, fused=False)
    ids, labels = batch(model, arguments.samples, tokens)
    times = []
    for _ in range(arguments.steps):
        dist.barrier()
        start = time.perf_counter()
        with loss_parallel():
            loss = F.cross_entropy(network(ids).flatten(0, 1), labels.flatten())
            loss.backward()
        rule.step()
        rule.zero_grad(set_to_none=True)
        mine = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        dist.all_reduce(mine, op=dist.ReduceOp.MAX)
        times.append(mine.item() * 1e3)
    if dist.get_rank() == 0:
        print(json.dumps({"step_ms": times, "loss": loss.item()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
