"""The step of gpu_check under PyTorch DDP, beside the bare step: world size 1, alternating, medians."""

import os
import statistics
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def network():
    torch.manual_seed(7)
    layers = []
    for _ in range(4):
        layers += [nn.Linear(2048, 2048), nn.GELU()]
    return nn.Sequential(*layers).cuda()


def main():
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29533")
    dist.init_process_group("nccl", rank=0, world_size=1)
    bare, wrapped = network(), DistributedDataParallel(network(), device_ids=[0])
    models = [bare, wrapped]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4) for model in models]
    x = torch.randn(4096, 2048, device="cuda")
    times = [[], []]
    steps = 100
    for step in range(steps + 10):
        for kind in (step % 2, 1 - step % 2):
            start = time.perf_counter()
            optimizers[kind].zero_grad()
            (models[kind](x) - x).square().mean().backward()
            optimizers[kind].step()
            torch.cuda.synchronize()
            if step >= 10:
                times[kind].append((time.perf_counter() - start) * 1e3)
    without, with_ddp = (statistics.median(kind) for kind in times)
    print(
        f"step with Ddp / bare, PyTorch {torch.__version__}: {with_ddp / without:.4f} "
        f"({with_ddp:.3f} ms, {without:.3f} ms; median of {steps})"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
