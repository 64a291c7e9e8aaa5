"""Stored runs: compared by their answers, drawn, shown, listed. No model is loaded.

    python runs.py compare RUN RUN                  # accuracy, paired differences, what changed, as Markdown
    python runs.py compare RUN                      # a training run's first evaluation with its last
    python runs.py plot RUN RUN --out curves.png    # runs overlaid
    python runs.py show RUN --step 40 --row 3       # one rollout (sampled once more: eval.py replay)
    python runs.py status runs                      # step, reward, ETA of every run

A difference from the first run is the mean over the questions that all runs have answered: its 95% interval
by bootstrap over questions, its p by McNemar's exact test.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import curves, rewards
from common.tables import clock, read_config, read_csv, rollout, rollout_text, table


# Copied from eval.py::wilson
def wilson(share, n):
    """95% interval of a share of n questions (Wilson 1927, eq. 7 of Brown, Cai, DasGupta 2001): never empty.

    For means of pass@k, whose spread over questions is at most that of a coin, it is wider than needed.
    """
    if n == 0:
        return 0.0, 1.0
    z = 1.959964
    centre, scale = share + z * z / (2 * n), 1 + z * z / n
    spread = z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def mcnemar(wrong_to_right, right_to_wrong):
    """Exact two-sided p of McNemar's test: chance of so uneven a split of the changes if both were alike."""
    n = wrong_to_right + right_to_wrong
    tail = sum(math.comb(n, i) for i in range(min(wrong_to_right, right_to_wrong) + 1))
    return min(1.0, 2 * tail / 2**n)


def bootstrap(differences, seed=0, draws=10_000):
    """95% percentile interval of the mean of paired differences, resampled over questions."""
    values, generator = np.asarray(differences, dtype=float), np.random.default_rng(seed)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(draws)]
    return tuple(float(bound) for bound in np.percentile(means, (2.5, 97.5)))


# ---- stored answers ----


@dataclass
class Answers:
    """Stored answers of one model: rows by question id (the greedy row first), and what training it took."""

    label: str
    rows: dict[str, list[dict]]
    tokens: int  # sampled for training
    hours: float  # of all GPUs
    tagged: bool  # whether <answer> tags were asked for


def stored_answers(name):
    """The Answers in a run's directory, one for each model and preamble (eval.py) or each evaluated step.

    name: the directory, or DIRECTORY@STEP. Errors: ValueError if it holds no answers (of that step).
    """
    name, _, step = str(name).partition("@")
    path = Path(name)
    training = (path / "eval.csv").exists()  # its samples.csv are rollouts
    file = path / ("eval.csv" if training else "samples.csv")
    system, groups = read_config(path).get("args", {}).get("system", ""), {}
    for row in read_csv(file) if file.exists() else ():
        if not training and "preamble" not in row:
            continue
        if step in ("", row["step"]):
            key = row["step"] if training else (row["model"], row["preamble"])
            groups.setdefault(key, {}).setdefault(row["id"], []).append(row)
    if not groups:
        raise ValueError(f"{name}: no run with stored answers" + (f" of step {step}" if step else ""))
    found = []
    for key, by_id in groups.items():
        for of in by_id.values():
            of.sort(key=lambda row: int(row["sample"]))
        run = path if training else Path(key[0])
        label = f"{name}@{key}" if training else " ".join(filter(None, [name, *key]))
        budget = training_budget(run, int(next(iter(by_id.values()))[0]["step"]))
        found.append(Answers(label, by_id, *budget, system == "" or "<answer>" in system))
    return found


def training_budget(path, step):
    """(tokens sampled, GPU hours), up to that step, of the run that wrote a model; (0, 0) of no run's."""
    run = next((folder for folder in (path, *path.parents[:2]) if (folder / "metrics.jsonl").exists()), None)
    if not str(path) or run is None or not (run / "config.json").exists():
        return 0, 0.0
    lines = [line for line in curves.read_metrics(run) if line["step"] <= step]
    ranks = read_config(run).get("world_size", 1)
    return (max((line.get("sampled_tokens", 0) for line in lines), default=0),
            sum(line.get("seconds", 0.0) for line in lines) / 3600 * ranks)


OUTCOMES = ("right", "wrong", "wrong format", "no answer", "truncated")


def outcome(row, tagged):
    """One of OUTCOMES: right, or else what was wrong first; without tags no format is wrong."""
    if int(row["correct"]):
        return "right"
    if not int(row["finished"]):
        return "truncated"
    if not row["extracted"]:
        return "no answer"
    return "wrong format" if tagged and rewards.format([""], [row["completion"]], [""])[0] < 1 else "wrong"


def chosen_answers(names):
    """The Answers to compare: of a training run alone its first and last evaluation, of several the last.

    Of eval.py's directories all rows. Errors: ValueError if they did not answer the same questions.
    """
    chosen = []
    for name in names:
        found = stored_answers(name)
        if Path(name.partition("@")[0], "eval.csv").exists():
            found = [found[0], found[-1]] if len(names) == 1 and len(found) > 1 else found[-1:]
        chosen += found
    for other in chosen[1:]:
        common = [id for id in chosen[0].rows if all(id in answers.rows for answers in chosen)]
        if not common or any(chosen[0].rows[id][0]["answer"] != other.rows[id][0]["answer"] for id in common):
            raise ValueError(f"{chosen[0].label} and {other.label} answered different questions: "
                             "evaluate both with the same --data, --split, --limit and --seed")
    return chosen


# ---- the commands ----


def compare(runs, examples=1):
    """Accuracy of each, paired differences from the first with interval and p, what changed: as Markdown."""
    chosen = chosen_answers(runs)
    first = chosen[0]
    ids = [id for id in first.rows if all(id in other.rows for other in chosen)]
    left_out = max(len(answers.rows) for answers in chosen) - len(ids)
    print(f"{len(ids)} questions in common, {left_out} left out\n")
    hits = {id: [int(row["correct"]) for row in first.rows[id]] for id in ids}  # of all its samples
    groups = {"always": [id for id in ids if all(hits[id])],
              "sometimes": [id for id in ids if any(hits[id]) and not all(hits[id])],
              "never": [id for id in ids if not any(hits[id])]}
    lines, changed, right = [], [], [{id: int(of.rows[id][0]["correct"]) for id in ids} for of in chosen]
    for answers, scores in zip(chosen, right):
        changes = [scores[id] - right[0][id] for id in ids]
        better = [id for id, change in zip(ids, changes) if change > 0]
        worse = [id for id, change in zip(ids, changes) if change < 0]
        kinds = {id: outcome(answers.rows[id][0], answers.tagged) for id in ids}
        share = sum(scores.values()) / len(ids)
        line = {"run": answers.label, "pass@1": share}
        line["pass@1/low"], line["pass@1/high"] = wilson(share, len(ids))
        line["difference"] = sum(changes) / len(ids)
        line["difference/low"], line["difference/high"] = bootstrap(changes)
        line |= {"McNemar p": f"{mcnemar(len(better), len(worse)):.3g}", "wrong→right": len(better),
                 "right→wrong": len(worse)}
        line |= {kind: list(kinds.values()).count(kind) for kind in OUTCOMES}
        for name, group in groups.items():
            line[f"first {name} right ({len(group)})"] = (
                sum(scores[id] for id in group) / len(group) if group else "-")
        lines.append(line | {"tokens": answers.tokens, "hours": f"{answers.hours:.3g}"})
        changed.append({"wrong→right": better, "right→wrong": worse} | {
            kind: [id for id in ids if kinds[id] == kind] for kind in OUTCOMES[2:]})
    print(table(lines))
    for answers, kinds in list(zip(chosen, changed))[1:]:
        for title, of in kinds.items():
            for id in of[:examples]:
                a, b = first.rows[id][0], answers.rows[id][0]
                print(f"\n### {answers.label}: {title}, question {id} (gold {a['answer']})\n\n{a['prompt']}\n"
                      f"\n- {first.label}: {a['completion']}\n- {answers.label}: {b['completion']}")


def plot(runs, out="curves.png", chance=None):
    """Curves of training runs, overlaid, as a PNG."""
    if not Path(out).parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {Path(out).parent}")
    curves.draw(runs, out, chance=chance)
    print(out)


def show(run, step, row=0):
    """One rollout of a training run: question, answer, rewards, advantage."""
    print(rollout_text(rollout(run, step, row)))


def status(folder="runs"):
    """One line per run under a folder: step, reward (or loss), time of its last sign of life, ETA."""
    root, lines = Path(folder), []
    for config in sorted([*root.glob("*/config.json"), *root.glob("config.json")]):
        try:
            limit = read_config(config.parent)["args"].get("max_steps", 0)
        except ValueError:  # a model's
            continue
        steps = [line for line in curves.read_metrics(config.parent) if "seconds" in line]
        first = steps[0] if steps else {"step": 0, "time": config.stat().st_mtime}
        last = steps[-1] if steps else first
        pace = (last["time"] - first["time"]) / max(1, last["step"] - first["step"])
        shown = [name for name in ("reward", "loss", "pass@1") if last.get(name) is not None][:1]
        eta = clock(pace * (limit - last["step"])) if pace and limit else "?"
        eta = "done" if (config.parent / "final").exists() else eta
        lines.append({"run": config.parent.name, "step": f"{last['step']}/{limit or '-'}",
                      "value": "".join(f"{name} {last[name]:.3g}" for name in shown), "ETA": eta,
                      "last sign of life": f"{clock(time.time() - last['time'])} ago"})
    if not lines:
        raise ValueError(f"{root}: no runs there (a run is a folder with a config.json)")
    print(table(lines))


def main(argv):
    """A user's mistake ends as one line."""
    parser = argparse.ArgumentParser(prog="runs.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)

    def add(function):
        sub = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(function=function)
        return sub.add_argument

    argument = add(compare)
    argument("runs", nargs="+", help="run directories or RUN@STEP; the others are compared with the first")
    argument("--examples", type=int, default=1, help="rows to show of each kind of change")
    argument = add(plot)
    argument("runs", nargs="+", help="run directories or metrics.jsonl files")
    argument("--out", default="curves.png", help="the picture to write")
    argument("--chance", type=float, help="draw a line at this accuracy: what guessing gives")
    argument = add(show)
    argument("run", help="run directory")
    argument("--step", type=int, required=True)
    argument("--row", type=int, default=0, help="number of the row in the step, from 0")
    argument = add(status)
    argument("folder", nargs="?", default="runs", help="folder of run directories")
    options = vars(parser.parse_args(argv))
    try:
        options.pop("function")(**options)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
