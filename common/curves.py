"""Curves of training runs as one picture: drawn at the end of every run, and by `runs.py plot`."""

import json
import math
from collections import defaultdict
from pathlib import Path

from common.tables import read_csv

# (title, metrics that may carry it, unit of the y axis); the first of the metrics that a run has is drawn
PANELS = (
    ("reward", ("reward",), "mean reward"),
    ("held-out pass@1", ("eval/pass@1", "pass@1"), "share of questions"),
    ("held-out reward", ("eval/reward",), "mean"),
    ("held-out ranking accuracy", ("eval/ranking_accuracy",), "share of pairs"),
    ("loss", ("eval/loss", "loss"), "loss"),
    ("KL to the start", ("kl",), "nats per token"),
    ("entropy", ("entropy",), "nats per token"),
    ("length", ("tokens",), "tokens"),
    ("gradient norm", ("grad_norm",), "norm before clipping"),
)
COLOURS = ("#000000", "#d55e00", "#56b4e9", "#0072b2", "#e6c200", "#8b1a1a")  # they differ in grey, too
STYLES = ("-", "--", "-.", ":")


def read_metrics(path, damaged=None) -> list[dict]:
    """The lines of a run's metrics.jsonl (a directory or the file); [] where there is none yet.

    A line that is not whole is left out; (place, text) goes into `damaged` if more follow: a kill cuts off
    the last one.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() or not path.suffix else path
    found, left_out = [], []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            values = json.loads(line)
            int(values["step"])
        except (ValueError, TypeError, KeyError, RecursionError):
            left_out.append((f"{path}: line {number}", ascii(line)))
            continue
        found.append(values)
        if damaged is not None:
            damaged += left_out
        left_out = []
    return found


def _parts(lines):
    """Lines of eval.py by run and preamble, models of no run in each; those of a training run as they are."""
    def part(line):
        run, of_run, _ = line.get("model", "").partition("/checkpoints/")
        return run if of_run else "", line.get("preamble", "")

    found = dict.fromkeys(map(part, lines))
    runs = {run for run, _ in found if run}
    return {(run if len(runs) > 1 else "", preamble): [
        line for line in lines if part(line) in ((run, preamble), ("", preamble))]
        for run, preamble in found if run or not runs}


def _figure(rows, columns, height):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("curves need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(11, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def calibration(margins, bins=10) -> list[tuple[float, float, int]]:
    """How sure a reward model was against how often it was right: (confidence, accuracy, pairs) of each bin.

    margins: score of chosen less score of rejected. Confidence sigma(|margin|), 0.5 to 1, in equal bins; the
    empty ones are left out, and so is NaN. A tie is half right.
    """
    found = defaultdict(list)
    for margin in margins:
        if math.isnan(margin):
            continue
        confidence = 1 / (1 + math.exp(-abs(margin)))
        right = 0.5 if margin == 0 else float(margin > 0)
        found[min(bins - 1, int((confidence - 0.5) * 2 * bins))].append((confidence, right))
    return [(*(sum(column) / len(rows) for column in zip(*rows)), len(rows))
            for _, rows in sorted(found.items())]


def draw_calibration(run, step) -> None:
    """A run's calibration.png, from eval.csv: how right it was where it was so sure, and its scores' spread.

    Errors: ValueError without matplotlib.
    """
    rows = [row for row in read_csv(Path(run) / "eval.csv") if int(row["step"]) == step]
    chosen, rejected = ([float(row[f"score_{name}"]) for row in rows] for name in ("chosen", "rejected"))
    bins = calibration([c - r for c, r in zip(chosen, rejected)])
    figure, (left, right) = _figure(1, 2, 4)
    left.plot([0.5, 1], [0.5, 1], color="#7f7f7f", linestyle=":", label="as right as sure")
    confidence, accuracy, pairs = zip(*bins)
    left.plot(confidence, accuracy, color=COLOURS[0], marker="o", label="held-out pairs")
    for x, y, n in bins:
        left.annotate(str(n), (x, y), textcoords="offset points", xytext=(4, -12), fontsize=7)
    left.set(title=f"calibration, {sum(pairs)} pairs", xlabel="confidence: sigmoid(|score difference|)",
             ylabel="share ranked rightly", ylim=(0, 1.02))
    for scores, name, colour in ((chosen, "chosen", COLOURS[3]), (rejected, "rejected", COLOURS[1])):
        right.hist(scores, bins=30, alpha=0.6, label=name, color=colour)
    right.set(title="scores", xlabel="score", ylabel="replies")
    for ax in (left, right):
        ax.legend(fontsize=7, frameon=False)
    figure.savefig(Path(run) / "calibration.png", dpi=110)


def draw(paths, out, chance=None) -> None:
    """Write a PNG with a panel for each metric that any of the runs has; runs overlaid, one line style each.

    chance: accuracy of guessing, a line in the accuracy panel, by default the first run's own eval/chance;
    a thin line is a run's first evaluation.
    Errors: ValueError if a run has no metrics, or matplotlib is not installed.
    """
    runs = {}
    for path in paths:
        name = Path(path).parent.name if Path(path).name == "metrics.jsonl" else Path(path).name
        lines = read_metrics(path)
        if not lines:
            raise ValueError(f"{path}: no metrics.jsonl with anything in it")
        for part, of in _parts(lines).items():
            runs[" ".join(filter(None, [name if name not in runs else str(path), *part]))] = of

    if chance is None:
        chance = next((line["eval/chance"] for lines in runs.values() for line in lines
                       if "eval/chance" in line), None)

    def series(lines, metric):
        points = [(line["step"], line[metric]) for line in lines if isinstance(line.get(metric), int | float)]
        if metric in ("kl", "loss") and all(abs(value) < 1e-6 for _, value in points):
            return None  # not computed; or GRPO's loss, which is rounding
        return tuple(zip(*sorted(points))) if points else None

    panels = []
    for title, metrics, unit in PANELS:
        found = {name: next(filter(None, (series(lines, metric) for metric in metrics)), None)
                 for name, lines in runs.items()}
        if any(found.values()):
            panels.append((title, unit, found))
    keys = sorted({key for line in sum(runs.values(), []) for key in line})
    many = [(title, unit, {key: key.removeprefix(prefix).strip() for key in keys if key.startswith(prefix)})
            for title, unit, prefix in (("held-out pass@1 by level", "share of questions", "eval/pass@1 "),
                                        ("time of a step", "seconds", "seconds/"))]
    many = [panel for panel in many if panel[2]]
    n = len(panels) + len(many)
    figure, axes = _figure(-(-n // 2), 2, 2.7)
    for ax, (title, unit, found) in zip(axes, panels):
        for i, (name, points) in enumerate(found.items()):
            if points:
                look = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]}
                ax.plot(*points, label=name, linewidth=1.4, marker="o" if len(points[0]) < 12 else None,
                        markersize=3, **look)
                if title.startswith("held-out"):
                    ax.axhline(points[1][0], linewidth=0.8, alpha=0.6, **look)
        if title.startswith("held-out"):
            ax.set_ylim(0, 1)
            if chance is not None:
                ax.axhline(chance, color="#7f7f7f", linestyle=":", label="chance")
        ax.set(title=title, xlabel="step", ylabel=unit)
    for ax, (title, unit, labels) in zip(axes[len(panels):], many):
        for i, (name, lines) in enumerate(runs.items()):
            for j, (metric, label) in enumerate(labels.items()):
                look = {"color": COLOURS[j % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]}
                if points := series(lines, metric):
                    of_run = label if len(runs) == 1 else f"{name} {label}"
                    ax.plot(*points, label=of_run, linewidth=1.2, **look)
                opened = [line["step"] for line in lines if f"level {line.get('level')}" == label]
                if title.startswith("held-out") and opened and len(runs) == 1:
                    ax.axvline(opened[0], linewidth=0.8, alpha=0.6, **look)  # where --curriculum opened it
        ax.set(title=title, xlabel="step", ylabel=unit, ylim=(0, 1) if title.startswith("held-out") else None)
        ax.legend(fontsize=7, frameon=False)
    for ax in axes[n:]:
        ax.set_visible(False)
    if len(runs) > 1 or chance is not None:
        named = {}
        for ax in axes[:len(panels)]:
            named |= dict(zip(*reversed(ax.get_legend_handles_labels())))
        figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(out, dpi=110)
