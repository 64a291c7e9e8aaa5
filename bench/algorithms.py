"""Held-out accuracy after each algorithm, over seeds, at the same number of sampled tokens: a Markdown table.

    python bench/algorithms.py --methods grpo ppo --seeds 5 --tokens 100000

Each run starts from the embedded model (or --model) with the script's own defaults and answers 500 held-out
questions greedily at its end. Intervals are 95%, Student's t over seeds. Runs lie in --out; those that are
finished are not made again.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import curves

METHODS = {"grpo": "grpo.py", "ppo": "ppo.py"}
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # by n - 1


def train(method, seed, a):
    """The run's directory; it is made if it is not there."""
    out = Path(a.out, f"{method}-s{seed}")
    if not (out / "final").exists():
        script, *words = METHODS[method].split()
        command = [sys.executable, str(ROOT / script), "--out", str(out), "--seed", str(seed), "--model",
                   a.model, "--token-budget", str(a.tokens), "--max-steps", "100000", *words, *a.more]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        (out / "seconds.json").write_text(json.dumps(time.perf_counter() - start))
    return out


def interval(values):
    """(mean, half width of its 95% interval) over seeds; the width is NaN outside two to ten of them."""
    n = len(values)
    if n - 1 not in T_95:
        return statistics.mean(values), math.nan
    return statistics.mean(values), T_95[n - 1] * statistics.stdev(values) / n**0.5


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=100_000, help="sampled for training, each run")
    parser.add_argument("--model", default="")
    parser.add_argument("--out", default="runs/algorithms")
    parser.add_argument("--more", nargs="*", default=[], help="more arguments of the scripts: name=value")
    a = parser.parse_args()
    a.more = [f"--{word}" for word in a.more]
    print("| method | before | after, each seed | after, mean and 95% interval | difference | sampled tokens "
          "| seconds |\n| --- | --- | --- | --- | --- | --- | --- |")
    for method in a.methods:
        before, after, tokens, seconds = [], [], [], []
        for seed in range(a.seeds):
            out = train(method, seed, a)
            lines = curves.read_metrics(out)
            scores = [line["eval/pass@1"] for line in lines if "eval/pass@1" in line]
            before.append(scores[0])
            after.append(scores[-1])
            tokens.append(max(line.get("sampled_tokens", 0) for line in lines))
            seconds.append(json.loads((out / "seconds.json").read_text()))
        (mean, width), (gain, gain_width) = interval(after), interval([y - x for x, y in zip(before, after)])
        each = " ".join(f"{score:.3f}" for score in after)
        print(f"| {method} | {statistics.mean(before):.3f} | {each} | {mean:.3f} ± {width:.3f} "
              f"| {gain:+.3f} ± {gain_width:.3f} | {statistics.mean(tokens):,.0f} "
              f"| {statistics.median(seconds):.0f} |", flush=True)


if __name__ == "__main__":
    main()
