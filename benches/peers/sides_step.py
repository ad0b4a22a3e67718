#!/usr/bin/env python3
"""A training step in several settings of ours, and of PyTorch's FSDP2 over gloo, taking turns in one run.

    scripts/bench_ddp.sh --sides "--zero 1" "--zero 3" "--zero 3 --recompute" fsdp2 --config configs/bert_large.json --precision bf16

Each side is a set of flags of benches/step.rs, or `ddp`, `fsdp2` (parameters in --precision) or `fsdp2-autocast` (f32 parameters); ratios are to the first. Else as in ddp_step.py, which says what is
measured how: all sides stay resident, wait for their turn without using a processor, and are asked for blocks of steps in turned order.
"""

import argparse
import json
import pathlib
import shlex
import statistics
import sys

from ddp_step import ROOT, Side


PEERS = {"ddp": [], "fsdp2": ["--fsdp", "bf16"], "fsdp2-autocast": ["--fsdp", "autocast"]}


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sides", nargs="+", required=True)
    parser.add_argument("--config", default="configs/bert_small.json")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--micro-batch", type=int, default=8, help="samples of a rank")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a block")
    parser.add_argument("--without", action="store_true", help="of the first side also steps without exchange")
    parser.add_argument("--json", help="write everything to this file")
    parser.add_argument("--ours", help="the program of benches/step.rs")
    return parser.parse_args()


def side(words, arguments):
    shared = ["--config", arguments.config, "--precision", arguments.precision]
    shared += ["--micro-batch", str(arguments.micro_batch)]
    if words in PEERS:
        script = str(ROOT / "benches/peers/ddp_step.py")
        command = [sys.executable, "-W", "ignore", script, "--worker", "--threads", str(arguments.threads), *shared]
        return Side(words, command + PEERS[words], arguments)
    libraries = {"LD_LIBRARY_PATH": str(ROOT / "third_party/libtorch/lib")}
    return Side(words, [arguments.ours, "--take-turns", *shlex.split(words), *shared], arguments, libraries)


def main():
    arguments = parsed()
    if not arguments.ours:
        sys.exit("sides_step: scripts/bench_ddp.sh --sides starts this, with a program that it builds")
    sides = [side(words, arguments) for words in arguments.sides]
    try:
        for each in sides:
            each.start()
        for number in range(arguments.rounds):
            turn = number % len(sides)
            for each in sides[turn:] + sides[:turn]:
                if arguments.without and each is sides[0]:
                    each.block("without")
                each.block("with")
            now = ", ".join(f"{each.name} {each.median('with'):.0f}" for each in sides)
            print(f"# round {number + 1} of {arguments.rounds}: {now} ms", file=sys.stderr)
        for each in sides:
            each.stop()
    finally:
        for each in sides:
            each.kill()
    print(
        f"{arguments.config}: {arguments.precision}, {arguments.ranks} ranks x {arguments.threads} threads, {arguments.micro_batch} x 128 "
        f"tokens a rank; {len(sides[0].times['with'])} steps each in {arguments.rounds} rounds\n"
    )
    print("| | median | to the first | fastest | to the first | processor time of a rank |\n|---|---|---|---|---|---|")
    first = sides[0]
    rows = [(each.name, each.times["with"], each.busy["with"]) for each in sides]
    if arguments.without:
        rows.append((f"{first.name}, no exchange", first.times["without"], first.busy["without"]))
    of_first = rows[0][1]
    for name, times, busy in rows:
        middle, least = statistics.median(times), min(times)
        print(
            f"| {name} | {middle:.0f} ms | {middle / statistics.median(of_first):.3f} | {least:.0f} ms | {least / min(of_first):.3f} "
            f"| {statistics.median(busy):.0f} ms |"
        )
    if arguments.json:
        document = {
            **{key: value for key, value in vars(arguments).items() if key not in ("ours", "json")},
            "times_ms": {each.name: each.times for each in sides},
            "processor_ms": {each.name: each.busy for each in sides},
        }
        pathlib.Path(arguments.json).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
