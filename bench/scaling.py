"""What a GRPO step of grpo.py costs as G, the completions' length and the vocabulary grow: a Markdown table.

    python bench/scaling.py                                  # minutes on two CPU cores

One thing grows at a time, from the tiny model of bench/models.py with 8 prompts x 8 samples of exactly 128
tokens, KL on. Each row is a process of its own (so is its peak memory), and the median of --rounds passes
through all rows. "cost / size": growth of the seconds since the first row over growth of the size; 1 is
linear, less is better.
"""

import json
import statistics
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.beside import run_side
from bench.models import build


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="*", default=[4, 8, 16, 32], help="samples per prompt, G")
    parser.add_argument("--lengths", type=int, nargs="*", default=[64, 128, 256, 512], help="of completions")
    parser.add_argument("--vocabularies", type=int, nargs="*", default=[512, 8192, 32_768, 151_936])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8, help="where it is not what grows; so --new")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="of each row and round, the first not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()

    base = {"prompts": a.prompts, "group": a.group, "new": a.new, "steps": a.steps, "warmup": 1,
            "threads": a.threads}
    points = ([("G", g, 512, base | {"group": g}) for g in a.groups]
              + [("length", n, 512, base | {"new": n}) for n in a.lengths]
              + [("vocabulary", v, v, base) for v in a.vocabularies])
    measured = [[] for _ in points]
    with tempfile.TemporaryDirectory() as folder:
        for vocab_size in {point[2] for point in points}:
            build(f"{folder}/{vocab_size}", eos_prob=0, vocab_size=vocab_size)  # lengths are exact
        for r in range(a.rounds):
            for (what, value, vocab_size, settings), rounds in zip(points, measured):
                words = [f"--model={folder}/{vocab_size}", *(f"--{name}={x}" for name, x in settings.items())]
                rounds.append(run_side(Path(__file__).with_name("grpo_step.py"), words, "unrolled"))
                seconds = rounds[-1]["seconds"]["step"]
                print(f"round {r + 1}: {what} {value}: {seconds:.3f} s", file=sys.stderr, flush=True)

    print("| | | tokens | sample s | reference s | update s | step s | cost / size | peak GB |")
    print("| --- " * 9 + "|")
    first, lines = {}, []
    for (what, value, _, _), rounds in zip(points, measured):
        phases = rounds[0]["seconds"]
        seconds = {name: statistics.median(row["seconds"][name] for row in rounds) for name in phases}
        from_value, from_seconds = first.setdefault(what, (value, seconds["step"]))
        cost, tokens = seconds["step"] / from_seconds / (value / from_value), rounds[0]["tokens_per_step"]
        peak = max(row["peak_gb"] for row in rounds)
        split = " | ".join(f"{seconds[name]:.3f}" for name in ("sample", "reference", "update", "step"))
        print(f"| {what} | {value:,} | {tokens:,} | {split} | {cost:.2f} | {peak:.2f} |")
        lines.append({"bench": "scaling", what: value, "tokens_per_step": tokens, "seconds": seconds,
                      "cost_per_size": round(cost, 3), "peak_gb": peak})
    print("\n".join(map(json.dumps, lines)))


if __name__ == "__main__":
    main()
