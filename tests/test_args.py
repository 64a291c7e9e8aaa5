"""The arguments of all scripts: one name, type and text for what they share, in groups of the same order."""

import ast
import importlib
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common.run import check_ranges

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}
SCRIPTS = [name for name, source in SOURCES.items()
           if re.search(r"^class Args\((Run|Train|Question)Args\):", source, re.MULTILINE)]
GROUPS = ["run", "model", "LoRA", "data", "sampling", "method", "optimizer", "evaluation"]
OWN = {  # what a script means by these is its own
    # several models, no optimizer steps to go on with, no policy in training to ask
    "eval.py": {"model", "resume", "dry_run", "seed", "rewards"},
    "dpo.py": {"beta", "lr"}, "sft.py": {"lr"},  # lr says the script's default
    "grpo.py": {"max_steps", "lr"}, "ppo.py": {"max_steps", "recompute_old", "lr"},  # never 0
    "reward_model.py": {"pairs", "loss", "passes", "system", "lr"},  # its data are pairs
    "star.py": {"lr", "few_shot", "iterations", "epochs", "beta", "eval_every"}}  # of its own outer loop
EVERYWHERE = {"model", "data", "out", "seed", "max_steps", "resume", "wandb", "dry_run", "config", "device"}


def read_fields(source, name="Args", group=None):
    """(name, type, help text or None, group) of each field of a class of arguments, in its order.

    The text is the comment at the end of the field's line, or on the lines above it, as tyro reads it.
    """
    cls = next(node for node in ast.parse(source).body if getattr(node, "name", "") == name)
    nodes = {node.lineno: node for node in cls.body if isinstance(node, ast.AnnAssign)}
    fields, above = [], []
    for number, line in enumerate(source.splitlines()[cls.lineno:cls.end_lineno], cls.lineno + 1):
        if match := re.fullmatch(r"    # ---- (.+) ----", line):
            group, above = match[1], []
        elif node := nodes.get(number):
            after = line[node.end_col_offset:].strip()
            text = after[1:].strip() if after.startswith("#") else " ".join(above) or None
            fields.append((node.target.id, ast.unparse(node.annotation), text, group))
            above = []
        else:
            above = [*above, line.strip()[1:].strip()] if line.strip().startswith("#") else []
    return fields


def with_inherited(source):
    """A script's fields behind those of common/run.py, in whose place stands what it says anew."""
    own = {name: rest for name, *rest in read_fields(source)}
    shared, inherited = (ROOT / "common/run.py").read_text(), ()
    bases = ["RunArgs", "TrainArgs", "QuestionArgs"]
    for name in bases[:bases.index(re.search(r"class Args\((\w+)\)", source)[1]) + 1]:
        inherited = [*inherited, *read_fields(shared, name, "run")]
    return [(name, *own.pop(name, rest)) for name, *rest in inherited] + [
        (name, *rest) for name, rest in own.items()]


def by_group(fields):
    """As --help shows them."""
    return sorted(fields, key=lambda field: GROUPS.index(field[3]))


FIELDS = {script: with_inherited(SOURCES[script]) for script in SCRIPTS}


def complaints(fields):
    """What is wrong with the arguments of {script: fields}, one line each."""
    found, first = [], {}
    for script, of_script in fields.items():
        for name, kind, text, group in of_script:
            if not (isinstance(text, str) and text.strip()):
                found.append(f"{script}: {name} has no help text")
            if name in OWN.get(script, ()):
                continue
            home, *expected = first.setdefault(name, (script, kind, text, group))
            for what, value, other in zip(("type", "help text", "group"), (kind, text, group), expected):
                if value != other:
                    found.append(f"{script}: the {what} of {name} is {value!r}, in {home} it is {other!r}")
        order = list(dict.fromkeys(group for *_, group in of_script))
        if order != [group for group in GROUPS if group in order]:
            found.append(f"{script}: the groups stand as {', '.join(order)}, not as {', '.join(GROUPS)}")
        if len([1 for one, other in zip(of_script, of_script[1:]) if one[3] != other[3]]) + 1 != len(order):
            found.append(f"{script}: a group is split in two")
        names = [name for name, *_ in of_script]
        missing = EVERYWHERE - set(names) - {"eval.py": {"max_steps"}, "reward_model.py": {"data"}}.get(
            script, set())
        found += [f"{script}: {name} is missing" for name in sorted(missing)]
    orders = {script: [name for name, *_ in of_script if name not in OWN.get(script, ())]
              for script, of_script in fields.items()}
    for script, names in orders.items():
        for other, theirs in orders.items():
            if [n for n in names if n in theirs] != [n for n in theirs if n in names]:
                found.append(f"{script} and {other}: what they share stands in another order")
    return found


def test_scripts_agree():
    assert len(SCRIPTS) == 7
    assert complaints({script: by_group(fields) for script, fields in FIELDS.items()}) == []
    own = {script: read_fields(SOURCES[script]) for script in SCRIPTS if script != "eval.py"}
    assert [line for line in complaints(own) if "missing" not in line] == []


GOOD = [(name, "str", "text", "run") for name in sorted(EVERYWHERE)] + [("lr", "float", "rate", "optimizer")]


@pytest.mark.parametrize("changed, complaint", [
    (GOOD, None),
    ([*GOOD[:-1], ("lr", "int", "rate", "optimizer")], "the type of lr"),
    ([*GOOD[:-1], ("lr", "float", "another rate", "optimizer")], "the help text of lr"),
    ([*GOOD[:-1], ("lr", "float", "rate", "method")], "the group of lr"),
    ([*GOOD[:-1], ("lr", "float", None, "optimizer")], "lr has no help text"),
    ([GOOD[-1], *GOOD[:-1]], "the groups stand as"),
    ([GOOD[1], GOOD[0], *GOOD[2:]], "another order"),
    (GOOD[1:], "config is missing"),
    ([*GOOD, ("late", "int", "text", "run")], "a group is split"),
])
def test_each_complaint_is_made(changed, complaint):
    found = complaints({"a.py": GOOD, "b.py": changed})
    assert any(complaint in line for line in found) if complaint else found == []


def test_the_fields_are_read_as_python_reads_them():
    for script in SCRIPTS:
        module = importlib.import_module(script.removesuffix(".py"))
        assert [name for name, *_ in FIELDS[script]] == list(module.Args.__dataclass_fields__)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_field_is_used(script):
    """By the script or by the run directory; a flag that nothing reads would be a lie."""
    used = SOURCES[script] + "".join(path.read_text() for path in (ROOT / "common").glob("*.py"))
    unused = {name for name, *_ in FIELDS[script] if not re.search(rf"\bargs\.{name}\b", used)}
    assert unused - {"reshard"} == {"config"}  # read before there are any arguments


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_each_flag_is(script, tmp_path):
    """As a user starts it; the width keeps each text on one line. Nothing is written, stderr stays empty."""
    env = os.environ | {"COLUMNS": "400", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / script, "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and list(tmp_path.iterdir()) == []
    for name, _, text, group in FIELDS[script]:
        assert re.search(rf"--{name.replace('_', '-')}\b", done.stdout), name
        assert text in done.stdout and f"─ {group} options ─" in done.stdout, name
    method = ast.get_docstring(ast.parse(SOURCES[script])).splitlines()[0]
    assert method in done.stdout


OUT_OF_RANGE = [  # FAULTS C5; each is out of range in every script that has it
    ("clip_eps_low", -1.0), ("beta", -1.0), ("lora_alpha", -5.0), ("warmup_steps", -1), ("tokens_per_batch", -1),
    ("reward_timeout", -1.0), ("lr", -1.0), ("lr", math.nan), ("weight_decay", -1.0), ("train_questions", -5),
    ("limit", -1), ("few_shot", -1), ("temperature", math.nan), ("temperature", 0.0), ("slots", 0), ("keep", 0),
    ("lora_r", 0), ("gamma", 1.5), ("gae_lambda", -0.1), ("max_grad_norm", 0.0), ("save_every", -3),
    ("curriculum", 1.5), ("curriculum_window", 0)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_numbers_out_of_range_are_refused_and_defaults_are_not(script):
    Args = importlib.import_module(script.removesuffix(".py")).Args
    check_ranges(Args())
    check_ranges(replace(Args(), **{name: 0 for name in ("warmup_steps", "value_clip") if hasattr(Args, name)}))
    for name, value in OUT_OF_RANGE:
        if hasattr(Args, name):
            with pytest.raises(ValueError, match=rf"^--{name.replace('_', '-')} {value}: "):
                check_ranges(replace(Args(), **{name: value}))
