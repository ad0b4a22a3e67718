#!/usr/bin/env python3
"""A training step of GPT under `torch.distributed.pipelining` over gloo: the peer of `gpt --pp 2` (see `gpt_turns.py`, which starts it).

As many blocks on each stage, or those of `--blocks`, the 1F1B schedule, eight micro-batches. Prints the milliseconds of each step as JSON, of the slowest rank.
"""

import argparse
import json
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from gpt_model import Gpt, batch, optimizer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--blocks", type=int, nargs="+", help="of each stage; as many on each when it is not given")
    arguments = parser.parse_args()
    config = json.load(open(arguments.config))
    model, tokens = config["model"], config["data"]["sequence_length"]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    blocks = arguments.blocks or [model["n_layer"] // ranks] * ranks
    torch.manual_seed(7)
    network = Gpt(model, sum(blocks[:rank]), sum(blocks[: rank + 1]))
    samples = arguments.samples // arguments.micro_batches
    ids, labels = batch(model, arguments.samples, tokens)
    hidden = torch.empty(samples, tokens, model["n_embd"])
    stage = PipelineStage(network, rank, ranks, torch.device("cpu"), input_args=(ids[:samples] if rank == 0 else hidden,))
    loss = lambda logits, targets: F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    schedule = Schedule1F1B(stage, arguments.micro_batches, loss_fn=loss)
    rule = optimizer(network)
    times, losses = [], []
    for _ in range(arguments.steps):
        dist.barrier()
        start = time.perf_counter()
        losses.clear()
        if rank == 0:
            schedule.step(ids)
        else:
            schedule.step(target=labels, losses=losses)
        rule.step()
        rule.zero_grad(set_to_none=True)
        mine = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        dist.all_reduce(mine, op=dist.ReduceOp.MAX)
        times.append(mine.item() * 1e3)
    if rank == ranks - 1:
        print(json.dumps({"step_ms": times, "loss": sum(one.item() for one in losses) / len(losses)}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
