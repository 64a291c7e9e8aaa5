"""What README.md says is true: its commands parse, the first run's run, line counts and files are right."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from tests.commands import run

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
SCRIPTS = [shlex.split(command) for command in COMMANDS if re.search(r"\b\w+\.py\b", command)]
SWITCHES = re.findall(r"^\| .*? \| `(--.*?)` \|$", README, re.MULTILINE)


@pytest.mark.parametrize("words", SCRIPTS, ids=" ".join)
def test_command_parses(words, tmp_path, monkeypatch):
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    if "/" in words[at]:
        done = subprocess.run([sys.executable, *words[at:], "--dry"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count("star.py") == 4, done.stderr
        return
    module = importlib.import_module(words[at].removesuffix(".py"))
    if words[at] == "runs.py" or words[at + 1] == "replay":
        monkeypatch.chdir(tmp_path)  # the clone may hold runs
        with pytest.raises(SystemExit, match="error: runs"):  # it was understood; there are no such runs
            (module.main if words[at] == "runs.py" else module.replay_command)(words[at + 1 + (words[at] == "eval.py"):])
        return
    tyro.cli(module.Args, args=words[at + 1:])


@pytest.mark.parametrize("switches", SWITCHES)
def test_every_method_in_the_table_runs(switches, tmp_path):
    words = [*shlex.split(switches), "--dry-run", "--prompts-per-step", 2, "--num-generations", 2,
             "--max-new-tokens", 16, "--train-questions", 8, "--eval-questions", 2]
    if "--overlong-buffer" in words:
        words[words.index("--overlong-buffer") + 1] = 8
    assert "dry run: peak memory" in run(*words, cwd=tmp_path, script="grpo.py")


def test_the_table_names_every_method():
    assert len(SWITCHES) == 8


def test_line_counts():
    for name, lines in re.findall(r"^\| `(\w+\.py)` \|[^|]*\| (\d+) \|", README, re.MULTILINE):
        assert len((ROOT / name).read_text().splitlines()) == int(lines), (
            f"README says {name} has {lines} lines")


def test_every_script_is_listed():
    listed = set(re.findall(r"^\| `(\w+\.py)` \|", README, re.MULTILINE))
    assert listed == {path.name for path in ROOT.glob("*.py")}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_first_run_is_within_40_lines():
    lines = README.splitlines()
    assert next(i for i, line in enumerate(lines) if "make demo" in line) < 40


def test_importing_a_script_does_nothing(tmp_path):
    names = ", ".join(path.stem for path in ROOT.glob("*.py"))
    done = subprocess.run([sys.executable, "-c", f"import {names}"], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and not done.stdout and not list(tmp_path.iterdir()), done.stderr


def test_algorithm_files_import_only_common_and_libraries():
    names = {path.stem for path in ROOT.glob("*.py")}
    for path in ROOT.glob("*.py"):
        imported = set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
        assert not imported & names, path.name


def test_optional_packages_are_imported_inside_functions():
    optional = r"^(?:from|import) (wandb|datasets|matplotlib|bitsandbytes|math_verify|tyro|peft)\b"
    for path in [*ROOT.glob("*.py"), *ROOT.glob("common/*.py")]:
        assert not re.search(optional, path.read_text(), re.MULTILINE), path.name
