"""Held-out accuracy after each algorithm, over seeds, at the same number of sampled tokens: a Markdown table.

    python bench/algorithms.py --seeds 5 --tokens 100000                     # all of them
    python bench/algorithms.py --methods grpo ppo --seeds 5 --tokens 100000

Each run starts from the embedded model (or --model) with the script's own defaults and answers 500 held-out
questions greedily at its end. It ends with the step or iteration in which it has sampled the tokens; sft.py
samples none, and trains as many of worked solutions. Intervals are 95%, Student's t over seeds. Runs lie in
--out; those that are finished are not made again.
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

SFT_STEP, DPO_QUESTION = 1680, 108  # tokens of 64 worked solutions; of the start model's 8 answers
METHODS = {  # name: command for so many tokens
    "sft": lambda tokens: f"sft.py --max-steps {round(tokens / SFT_STEP)}",
    "dpo": lambda tokens: f"dpo.py --questions {round(tokens / DPO_QUESTION)}",
    "iterative dpo": lambda tokens: f"dpo.py --questions 64 --iterations 1000 --token-budget {tokens}",
    "grpo": lambda tokens: f"grpo.py --max-steps 100000 --token-budget {tokens}",
    "ppo": lambda tokens: f"ppo.py --max-steps 100000 --token-budget {tokens}",
    "star": lambda tokens: f"star.py --iterations 1000 --token-budget {tokens}"}
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # by n - 1


def train(method, seed, a):
    """The run's directory; it is made if it is not there."""
    out = Path(a.out, f"{method.replace(' ', '-')}-s{seed}")
    if not (out / "final").exists():
        script, *words = METHODS[method](a.tokens).split()
        command = [sys.executable, str(ROOT / script), "--out", str(out), "--seed", str(seed), "--model",
                   a.model, *words, *a.more]
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
    parser.add_argument("--tokens", type=int, default=100_000, help="sampled (sft: trained), each run")
    parser.add_argument("--model", default="")
    parser.add_argument("--out", default="runs/algorithms")
    parser.add_argument("--more", nargs="*", default=[], help="more arguments of the scripts: name=value")
    a = parser.parse_args()
    a.more = [f"--{word}" for word in a.more]
    print("| method | before | after, each seed | after, mean and 95% interval | difference | tokens "
          "| seconds |\n| --- | --- | --- | --- | --- | --- | --- |")
    for method in a.methods:
        before, after, tokens, seconds = [], [], [], []
        for seed in range(a.seeds):
            out = train(method, seed, a)
            lines = curves.read_metrics(out)
            scores = [line["eval/pass@1"] for line in lines if "eval/pass@1" in line]
            before.append(scores[0])
            after.append(scores[-1])
            tokens.append(max(line.get("sampled_tokens", 0) for line in lines)
                          or sum(line.get("tokens", 0) for line in lines))  # of sft.py: trained
            seconds.append(json.loads((out / "seconds.json").read_text()))
        (mean, width), (gain, gain_width) = interval(after), interval([y - x for x, y in zip(before, after)])
        each = " ".join(f"{score:.3f}" for score in after)
        print(f"| {method} | {statistics.mean(before):.3f} | {each} | {mean:.3f} ± {width:.3f} "
              f"| {gain:+.3f} ± {gain_width:.3f} | {statistics.mean(tokens):,.0f} "
              f"| {statistics.median(seconds):.0f} |", flush=True)


if __name__ == "__main__":
    main()
