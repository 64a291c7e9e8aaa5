"""A curriculum against all levels at once: how many levels a run climbs with the same number of sampled tokens.

    python bench/curriculum.py --task matrix-inverse --script grpo --out docs/curriculum-matrix-inverse
    python bench/curriculum.py --task rref --script ppo --out docs/curriculum-rref

The embedded model is warm-started by sft.py on the spot, once, then trained with and without --curriculum, seed
by seed. A level is climbed once held-out pass@1 on it, and on those below it, has reached the bar. Writes OUT.md
(the commands, a table) and OUT.png (held-out pass@1 by level, mean and range over the seeds).
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.curves import COLOURS, _figure, read_metrics

WARM = {"matrix-inverse": "--level 1-4 --train-questions 5000 --max-steps 900 --lr 2e-3 --max-new-tokens 128",
        "rref": "--level 1-3 --train-questions 5000 --max-steps 600 --lr 2e-3 --max-new-tokens 128"}
RUN = {"grpo": "--lr 5e-4 --rewards partial=1 --eval-every 25",
       "ppo": "--lr 2e-4 --rewards partial=1 --eval-every 25"}
LEVELS = {"matrix-inverse": "1-5", "rref": "1-4"}


def climbed(lines, bar):
    """How many levels, from the lowest on, have reached the bar in one of the evaluations."""
    levels = sorted({key for line in lines for key in line if key.startswith("eval/pass@1 level ")})
    best = [max(line[level] for line in lines if level in line) for level in levels]
    return next((i for i, value in enumerate(best) if value < bar), len(best))


def run(words, folder):
    """Seconds that the command took; one that is finished is not repeated."""
    print("python", *words, flush=True)
    started = time.time()
    if not (folder / "final").exists():
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        (folder / "seconds").write_text(str(time.time() - started))
    return float((folder / "seconds").read_text())


def draw(runs, out):
    """runs: {name: lists of metrics}, one list a seed."""
    figure, axes = _figure(1, len(runs), 4)
    for ax, (name, seeds) in zip(axes, runs.items()):
        levels = sorted({key for lines in seeds for line in lines for key in line if "pass@1 level" in key})
        for colour, level in zip(COLOURS, levels):
            curves = [[(line["sampled_tokens"] / 1e6, line[level]) for line in lines if level in line]
                      for lines in seeds]
            n = min(map(len, curves))
            x = [statistics.mean(curve[i][0] for curve in curves) for i in range(n)]
            values = [[curve[i][1] for curve in curves] for i in range(n)]
            ax.plot(x, list(map(statistics.mean, values)), color=colour, label=level.removeprefix("eval/pass@1 "))
            ax.fill_between(x, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15)
        ax.set(title=name, xlabel="million sampled tokens", ylabel="held-out pass@1", ylim=(0, 1))
        ax.legend(fontsize=7, frameon=False)
    figure.savefig(out, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=WARM, default="matrix-inverse")
    parser.add_argument("--script", choices=RUN, default="grpo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=2_500_000, help="sampled in training by each run")
    parser.add_argument("--bar", type=float, default=0.6, help="accuracy that opens the next level; a climbed one's")
    parser.add_argument("--runs", default="runs/curriculum", help="folder; finished runs are not repeated")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    folder = Path(args.runs) / args.task
    warm = ["sft.py", "--data", args.task, *WARM[args.task].split(), "--full", "--eval-every", "1000",
            "--eval-questions", "200", "--out", str(folder / "warm")]
    run(warm, folder / "warm")
    commands, runs, rows = [warm], {}, []
    for name, bar in ((f"--curriculum {args.bar}", args.bar), ("all levels at once", 0)):
        for seed in args.seeds:
            out = folder / f"{args.script}-{bar}-s{seed}"
            words = [f"{args.script}.py", "--model", str(folder / "warm"), "--data", args.task,
                     "--level", LEVELS[args.task], "--curriculum", str(bar), *RUN[args.script].split(),
                     "--max-new-tokens", "160", "--max-steps", "100000", "--token-budget", str(args.tokens),
                     "--seed", str(seed), "--out", str(out)]
            minutes = run(words, out) / 60
            lines, tokens = read_metrics(out), 0
            for line in lines:  # an evaluation's line does not say
                tokens = line["sampled_tokens"] = line.get("sampled_tokens", 0 if line["step"] == 0 else tokens)
            runs.setdefault(name, []).append(lines)
            rows.append((name, seed, climbed(lines[:1], args.bar), climbed(lines, args.bar), minutes))
            commands.append(words)
    draw(runs, f"{args.out}.png")
    table = ["| run | seed | levels at the start | levels climbed | minutes |", "| --- | --- | --- | --- | --- |"]
    table += [f"| {name} | {seed} | {start} | {end} | {minutes:.1f} |" for name, seed, start, end, minutes in rows]
    text = "\n".join("python " + " ".join(words) for words in commands)
    Path(f"{args.out}.md").write_text(f"```bash\n{text}\n```\n\n" + "\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
