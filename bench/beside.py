"""What the step benchmarks share: a process for each side, alternating rounds, the median of their ratios."""

import importlib.util
import json
import re
import resource
import statistics
import subprocess
import sys
from pathlib import Path

PEER = ("trl", "peft", "datasets", "accelerate")


def peak_memory_gb():
    """Largest resident memory of this program. (Linux's ru_maxrss counts the one that started it, too.)"""
    status = Path("/proc/self/status")
    own = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if own:
        return int(own[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def add_arguments(parser):
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--micro", type=int, default=0, help="TRL's rows per forward pass; 0: all")
    parser.add_argument("--steps", type=int, default=8, help="steps of each side in each round")
    parser.add_argument("--warmup", type=int, default=2, help="of these, not counted")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", choices=("both", "unrolled", "trl"), default="both", help="one: here, once")


def run_side(script, words, side):
    """One side in a process of its own. Errors: RuntimeError with the end of what it wrote."""
    command = [sys.executable, str(Path(script).resolve()), *words, "--side", side]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def median_of(steps, warmup):
    """Median seconds of each phase over the steps after the warm-up."""
    return {name: round(statistics.median(step[name] for step in steps[warmup:]), 4) for name in steps[-1]}


def compare(a, parser, script, measure):
    """Run both sides round by round (or the one asked for, here) and print the figures as a JSON line.

    measure(a, side) returns a side's figures, with {"seconds": {"step": ...}, "peak_gb": ...} among them.
    """
    if a.warmup >= a.steps:
        parser.error(f"--warmup {a.warmup} leaves none of {a.steps} steps to count")
    if a.side != "both":
        print(json.dumps(measure(a, a.side)))
        return
    sides = ["trl", "unrolled"]
    if missing := [name for name in PEER if importlib.util.find_spec(name) is None]:
        missing = " ".join(missing)
        print(f"TRL is left out, {missing} not installed: pip install {missing}", file=sys.stderr)
        sides = ["unrolled"]
    rounds = []
    for r in range(a.rounds):
        rounds.append({side: run_side(script, sys.argv[1:], side) for side in sides[::-1 if r % 2 else 1]})
        for side in sides:
            figures = rounds[-1][side]
            split = "  ".join(f"{name} {value:.3f}" for name, value in figures["seconds"].items())
            line = f"round {r + 1}: {side:8s}  {split}  peak {figures['peak_gb']:.2f} GB"
            print(line, file=sys.stderr, flush=True)
    seconds = {side: [row[side]["seconds"]["step"] for row in rounds] for side in sides}
    ratios = [theirs / ours for theirs, ours in zip(seconds.get("trl", []), seconds["unrolled"])]
    print(json.dumps({
        "bench": Path(script).stem, **vars(a),
        "seconds": {side: statistics.median(seconds[side]) for side in sides},
        "peak_gb": {side: max(row[side]["peak_gb"] for row in rounds) for side in sides},
        "ratio": round(statistics.median(ratios), 3) if ratios else None,
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)] if ratios else None, "each": rounds}))
