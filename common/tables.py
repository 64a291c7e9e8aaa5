"""What runs have written, as rows read back and as text to print; torch is not needed."""

import csv
import itertools
import json
import re
from pathlib import Path


def read_config(run) -> dict:
    """The config.json of a run's folder; {} where there is none. Errors: ValueError if it is not a run's."""
    path = Path(run, "config.json")
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text())
    except ValueError:  # not UTF-8, either
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("args"), dict):
        raise ValueError(f"{path}: not a run's config.json, a JSON object with its arguments under args")
    return config


def read_csv(path, damaged=None) -> list[dict]:
    """The rows of a CSV that `common.run.Run.write_rows` wrote, as text.

    A row that is not whole (other columns, a wrong byte, no step) is left out; (place, text) goes into
    `damaged` if more follow: a kill cuts off the last one.
    """
    csv.field_size_limit(2**31 - 1)  # completions can be long
    rows, left_out = [], []
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        for row in reader:
            text = ",".join(map(str, row.values()))
            whole = None not in row and None not in row.values() and not re.search("[\ud800-\udfff]", text)
            if whole and re.fullmatch(r"\d+", row.get("step", "0")):
                rows.append(row)
                if damaged is not None:
                    damaged += left_out
                left_out = []
            else:
                left_out.append((f"{path}: line {reader.line_num}", ascii(text)))
    return rows


def rollout(path, step, number) -> dict:
    """Row `number` of a step, from 0, in a run's samples.csv. Errors: ValueError if it is not there."""
    file = Path(path) / "samples.csv"
    if not file.exists():
        raise ValueError(f"{path}: no samples.csv in it")
    rows = [row for row in read_csv(file) if int(row["step"]) == step]
    if not 0 <= number < len(rows):
        raise ValueError(f"--row {number}: step {step} of {path} has {len(rows)} rows")
    return rows[number]


def rollout_text(row) -> str:
    """A rollout for the terminal: question, answer, its rewards and advantage."""
    return (f"step {row['step']}, question {row['id']}, group {row.get('group', '-')}, "
            f"sample {row['sample']}\nQ: {row['prompt']}\nA: {row['completion']}\n"
            f"{reward_text(row)}, gold {row['answer']}, extracted {row['extracted']!r}, "
            f"advantage {row.get('advantage', '-')}, {row['tokens']} tokens")


def reward_text(row) -> str:
    """reward 1.2 (correctness 1, format 0.2)"""
    parts = ", ".join(f"{key[7:]} {float(row[key]):.3g}" for key in row if key.startswith("reward/"))
    return f"reward {float(row.get('reward') or 0):.4g} ({parts})"


def table(rows) -> str:
    """Dicts as a Markdown table: a column for each key, intervals beside their value, three decimals."""

    def cell(row, name):
        value, interval = row.get(name, ""), [row.get(f"{name}/{end}") for end in ("low", "high")]
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        text = text.replace("|", "\\|").replace("\n", " ")
        return f"{text} [{interval[0]:.3f}, {interval[1]:.3f}]" if None not in interval else text

    names = [name for name in dict.fromkeys(itertools.chain(*rows)) if not name.endswith(("/low", "/high"))]
    lines = [names, ["---"] * len(names), *([cell(row, name) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def clock(seconds) -> str:
    """1:02:03, or 2:03 under an hour; 0:00 where a clock went backwards."""
    hours, rest = divmod(max(0, int(seconds)), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
