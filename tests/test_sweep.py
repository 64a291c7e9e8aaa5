"""sbatch/sweep.py: what it expands, that it runs, and what it leaves alone."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from common import curves

ROOT = Path(__file__).resolve().parents[1]


def sweep(*words, cwd, **env):
    return subprocess.run([sys.executable, str(ROOT / "sbatch" / "sweep.py"), *map(str, words)], cwd=cwd,
                          capture_output=True, text=True, env=os.environ | env)


def test_it_prints_a_command_for_each_combination(tmp_path):
    done = sweep("grpo.py", "lr=1e-5,2e-5", "rewards=correctness=1 format=0.2,digit", "--dry", cwd=tmp_path)
    commands = [shlex.split(line)[2:] for line in done.stdout.splitlines()]
    assert done.returncode == 0 and list(tmp_path.iterdir()) == [] and len(commands) == 4
    assert [words[words.index("--lr"):] for words in commands] == [
        ["--lr", lr, "--rewards", *names] for lr in ("1e-5", "2e-5")
        for names in (["correctness=1", "format=0.2"], ["digit"])]
    assert len({words[1] for words in commands}) == 4  # directories
    done = sweep("star.py", "rationalize=true,false", "--dry", cwd=tmp_path)
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["--rationalize", "--no-rationalize"]


@pytest.mark.parametrize("words, complaint", [
    (["star.py", "lr"], "write name=value"), (["star.py", "lr=1,"], "write name=value"),
    (["sta.py"], "no script sta.py"), (["star.py", "lr=1", "lr=2"], "lr is there twice"),
    (["star.py", "--local", "0"], "--local 0")])
def test_mistakes(words, complaint, tmp_path):
    done = sweep(*words, cwd=tmp_path)
    assert done.returncode == 1 and complaint in done.stderr and "Traceback" not in done.stderr


def test_it_runs_here_and_goes_on(tmp_path):
    """A run that fails costs itself alone; what is finished is not made again, what was cut off goes on."""
    small = ["eval_questions=2", "train_questions=20", "questions=4", "iterations=1", "max_new_tokens=40"]
    words = ["star.py", "level=3,9", *small, "--local", 2, "--out", "s"]
    done = sweep(*words, cwd=tmp_path)
    assert done.returncode == 1 and "done" in done.stdout and "exit code 1, see s/level=9" in done.stdout
    [log] = [path for path in (tmp_path / "s").glob("level=9*.log")]
    assert "levels 1 to 8, not '9'" in log.read_text()
    [good] = [path for path in (tmp_path / "s").glob("level=3*") if path.is_dir()]
    assert (good / "final").is_dir()
    heads, three, nine = [re.split(r"  +", line) for line in done.stdout.splitlines()[-3:]]
    last = curves.read_metrics(good)[-1]
    assert heads == ["run", "state", "step", "seconds", "result"]
    assert three[:3] == [f"s/{good.name}", "done", str(last["step"])] and three[3].isdigit()
    assert three[4] == f"eval/pass@1 {last['eval/pass@1']:.3g}" and nine[2:] == ["-", "0", "-"]
    words[1] = "level=3"
    done = sweep(*words, cwd=tmp_path)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2  # it is finished: the table alone
    assert "--resume" in sweep(*words, "--dry", cwd=tmp_path).stdout


@pytest.fixture
def slurm(tmp_path):
    """The environment of a user of tests/slurm, whose python notes its arguments and ends."""
    (tmp_path / "python").write_text('#!/bin/bash\nprintf "%s\\n" "$*" >> python.txt\n')
    (tmp_path / "python").chmod(0o755)
    path = f"{ROOT / 'tests/slurm'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"PATH": path, "FAKE_SLURM": str(tmp_path / "state"), "ACCOUNT": "none",
            "PYTHON": str(tmp_path / "python")}


def test_it_sends_jobs(tmp_path, slurm):
    """One each, that are resumed one by one; sent again, those alone that are not finished."""
    words = ["--sbatch", "--gpus=1 --time=4:00:00", "--out", "s"]
    printed = sweep("grpo.py", "lr=1e-5,2e-5", "beta=0.1,0.5", *words, "--dry", cwd=tmp_path, **slurm)
    lines = [shlex.split(line) for line in printed.stdout.splitlines()]
    assert [line[-7:] for line in lines] == [
        ["grpo.py", "--out", f"s/lr={lr}-beta={beta}", "--lr", lr, "--beta", beta]
        for lr in ("1e-5", "2e-5") for beta in ("0.1", "0.5")] and not (tmp_path / "s").exists()
    words += ["grpo.py", "seed=0,1"]
    done = sweep(*words, cwd=tmp_path, **slurm)
    assert done.returncode == 0, done.stderr
    jobs = [json.loads(line) for line in (tmp_path / "state/jobs.jsonl").read_text().splitlines()]
    assert [job["options"]["output"] for job in jobs] == ["s/seed=0.log", "s/seed=1.log"]
    assert all(job["options"]["time"] == "4:00:00" for job in jobs) and (tmp_path / "s/seed=1.log").exists()
    commands = [f"{ROOT}/grpo.py --out s/seed={seed} --seed {seed}" for seed in (0, 1)]
    assert (tmp_path / "python.txt").read_text().splitlines() == commands
    (tmp_path / "s/seed=0/final").mkdir(parents=True)
    (tmp_path / "s/seed=1").mkdir()
    (tmp_path / "s/seed=1/config.json").touch()
    assert sweep(*words, cwd=tmp_path, **slurm).returncode == 0
    assert (tmp_path / "python.txt").read_text().splitlines() == [*commands, f"{commands[1]} --resume"]
    refused = sweep(*words, cwd=tmp_path, **slurm | {"ACCOUNT": ""})
    assert refused.returncode == 1 and refused.stderr.startswith("error: set ACCOUNT")
    assert len(refused.stderr.splitlines()) == 1
