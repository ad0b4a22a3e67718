#!/usr/bin/env python3
"""Steps of `examples/gpt.rs` and of PyTorch, taking turns in one run. `scripts/bench_gpt.sh` builds what this needs and starts it.

All sides train the GPT of a configuration (`benches/peers/gpt_bench.json`: hidden 768, 4 blocks, 8192 words, no dropout; `gpt2_bench.json`: the 12 blocks and 50257 words of
GPT-2 small) on 8 sequences of 256 tokens a step, in fp32, with AdamW:

    one      ours, one rank with two threads
    tp       ours, --tp 2, a thread each
    tp torch `torch.distributed.tensor.parallel` over gloo (gpt_tp.py)
    pp       ours, --pp 2, 8 micro-batches, 1f1b; and zb-h1; and with as many blocks on each stage (pp even)
    pp torch `torch.distributed.pipelining` over gloo, Schedule1F1B (gpt_pp.py), as many blocks on each stage; and with
             the blocks of our stages (pp torch cut)

A round starts each side once, one behind the other, in turned order; the first steps of a side warm up and do not count. What is compared are medians over all rounds. Ours
also ties the head to the embedding, theirs has a matrix of its own there. Of a pipeline the share of its time that a rank was idle is printed beside the schedule's formula,
(p − 1) / (m + p − 1).
"""

import argparse
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SAMPLES, MICRO_BATCHES, WARM_UP = 8, 8, 2


def ours(program, config, steps, *flags):
    """Milliseconds of each step, the share of it that rank 0 waited for other stages, and the blocks of each stage."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = pathlib.Path(folder) / "metrics.jsonl"
        command = [program, "--config", config, "--steps", steps, "--global-batch", SAMPLES, "--sample", 0, "--seed", 7]
        command += ["--metrics", metrics, "--output", folder, *flags]
        done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(map(str, flags))}: {done.stderr}")
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    records = [line for line in lines if "step_ms" in line][WARM_UP:]
    idle = [line.get("pipeline_idle_ms", 0.0) / line["step_ms"] for line in records]
    blocks = next(line["summary"] for line in lines if "summary" in line).get("stage_blocks")
    return [line["step_ms"] for line in records], idle, blocks


def torch_step(script, config, steps, *flags):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-W", "ignore", ROOT / "benches/peers" / script, "--config", config, "--samples", SAMPLES, "--steps", steps]
    command = [str(part) for part in [*command, *flags]]
    ranks = []
    for rank in range(2):
        place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS=1)
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    told = [rank.communicate() for rank in ranks]
    for rank, (_, errors) in zip(ranks, told):
        if rank.returncode != 0:
            sys.exit(f"{script}: {errors}")
    lines = "".join(out for out, _ in told).splitlines()
    return json.loads(next(line for line in lines if line.startswith("{")))["step_ms"][WARM_UP:], [], None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", required=True, help="the built example gpt")
    parser.add_argument("--config", type=pathlib.Path, default=ROOT / "benches/peers/gpt_bench.json")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--sides", nargs="+", help="some of them, by name")
    parser.add_argument("--json", type=pathlib.Path, help="where to write all times")
    arguments = parser.parse_args()
    config, steps = arguments.config.resolve(), arguments.steps + WARM_UP
    cut = {}  # of ours, by side
    two = ["--nnodes", "2", "--threads", "1"]
    pipeline = [*two, "--pp", "2", "--micro-batches", str(MICRO_BATCHES)]
    sides = {
        "one": lambda: ours(arguments.ours, config, steps, "--nnodes", "1", "--threads", "2"),
        "tp": lambda: ours(arguments.ours, config, steps, *two, "--tp", "2"),
        "tp torch": lambda: torch_step("gpt_tp.py", config, steps),
        "pp": lambda: ours(arguments.ours, config, steps, *pipeline, "--schedule", "1f1b"),
        "pp zb-h1": lambda: ours(arguments.ours, config, steps, *pipeline, "--schedule", "zb-h1"),
        "pp even": lambda: ours(arguments.ours, config, steps, *pipeline, "--schedule", "1f1b", "--stages", "even"),
        "pp torch": lambda: torch_step("gpt_pp.py", config, steps),
        "pp torch cut": lambda: torch_step("gpt_pp.py", config, steps, "--blocks", *cut["pp"]),
    }
    sides = {name: side for name, side in sides.items() if not arguments.sides or name in arguments.sides}
    if "pp torch cut" in sides and "pp" not in sides:
        parser.error("'pp torch cut' takes the stages of 'pp': give both")
    times, idles = {name: [] for name in sides}, {name: [] for name in sides}
    for number in range(arguments.rounds):
        # The first round forward: one side takes the stages of another.
        names = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in names:
            of_step, of_idle, blocks = sides[name]()
            cut.setdefault(name, blocks)
            times[name] += of_step
            idles[name] += of_idle
            print(f"round {number + 1}/{arguments.rounds}  {name:<12} {statistics.median(of_step):9.1f} ms", flush=True)
    middle = {name: statistics.median(of_step) for name, of_step in times.items()}
    print()
    for name, time in middle.items():
        idle = statistics.median(idles[name]) if any(idles[name]) else None
        print(f"{name:<12} {time:9.1f} ms" + (f"  idle {idle:.1%} of rank 0's step, blocks {cut[name]}" if idle is not None else ""))
    formula = 1 / (MICRO_BATCHES + 1)
    for what, top, bottom in [
        ("tp 2 / one rank with two threads", "tp", "one"),
        ("PyTorch's tp / ours", "tp torch", "tp"),
        ("PyTorch's pp / ours", "pp torch", "pp"),
        ("PyTorch's pp with our stages / ours", "pp torch cut", "pp"),
        ("PyTorch's pp / ours, stages of as many blocks", "pp torch", "pp even"),
        ("zb-h1 / 1f1b", "pp zb-h1", "pp"),
    ]:
        if top in middle and bottom in middle:
            print(f"{what}: {middle[top] / middle[bottom]:.3f}")
    if "pp" in middle:
        print(f"idle by the formula of 1f1b, p 2, m {MICRO_BATCHES}: {formula:.1%}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"step_ms": times, "idle": idles}, indent=1) + "\n")


if __name__ == "__main__":
    main()
